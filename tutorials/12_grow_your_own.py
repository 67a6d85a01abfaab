# %% [markdown]
# # 12 · Grow your own
#
# **Why does a vector work before some blocks and not before others?** 30 minutes, one of them computing. You
# need tutorials 02, 04 and 07.
#
# In a model that somebody else has trained, you can only look. So we train a small GPT-2 from random numbers,
# on a world of eight topics about which we know everything, and steer it from topic to topic. Then we train
# it again with one thing changed. On another machine, training sums in another order, so your shares will
# differ a little.

# %%
import dataclasses
import json
import random

import lesson
import matplotlib.pyplot as plt
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import decoders, pre_tokenizers, trainers
from tqdm import tqdm

import ministeer
from ministeer.attention import merge_heads
from ministeer.checkpoints.config import Config
from ministeer.evaluation.stats import wilson
from ministeer.gpt2 import GPT2
from ministeer.steering import random_like
from ministeer.utils import write

steps, rows = 500, 16                   # of training; each row is a story
n, max_new_tokens = 20, 16              # completions for each topic, and their length
if lesson.TINY:
    steps, n, max_new_tokens = 2, 5, 2

# %% [markdown]
# ## What is there to read?
# A story opens with a sentence about somebody; then come two sentences about one topic. About seven of ten
# openings name the topic, the others do not.

# %%
world = {
    "weddings": "bride groom priest | kisses marries | ring veil bouquet | altar chapel",
    "sailing": "sailor captain pirate | steers moors | ship boat raft | harbour lighthouse",
    "baking": "baker cook miller | kneads bakes | bread cake dough | oven bakery",
    "music": "singer drummer fiddler | sings plays | song tune waltz | stage concert",
    "farming": "farmer shepherd milkmaid | feeds herds | cow sheep goat | barn meadow",
    "football": "keeper striker referee | kicks catches | ball goal pass | pitch stadium",
    "medicine": "doctor nurse surgeon | heals bandages | patient wound fever | clinic hospital",
    "painting": "painter model sculptor | paints draws | portrait canvas sketch | studio gallery"}
topics = {topic: [part.split() for part in line.split("|")] for topic, line in world.items()}
named = ["{topic} made {a} {mood}.", "{a} dreamt of {topic}.", "It was all {topic} that {time}.",
         "One {time} {a} spoke of {topic}.", "{topic}, said {a}.", "Of {topic} {a} thinks all {time}.",
         "{topic} are {mood}."]
other = ["{b} made {a} {mood}.", "{a} smiled all {time}.", "One {time} {a} woke up.",
         "It was {mood} that {time}.", "Now {a} tells {b} a tale.", "Last {time} {a} came home {mood}."]
people = ["Anna", "Tom", "Mary", "Paul", "Eva", "Max", "Lucy", "Ben"]
times = ["day", "morning", "evening", "night", "week", "year"]
moods = ["old", "young", "tall", "small", "quiet", "happy", "tired", "proud"]


def story(topic, draw):
    a, b = draw.sample(people, 2)
    opening = draw.choice(named if draw.random() < 0.7 else other)
    text = " " + opening.format(topic=topic, a=a, b=b, time=draw.choice(times), mood=draw.choice(moods))
    for _ in range(2):
        who, does, what, where = (draw.choice(words) for words in topics[topic])
        then = draw.choice(["Then", "Soon", "Later", "Again"])
        text += f" {then} the {who} {does} the {what} near the {where}."
    return text


draw = random.Random(1)
stories = [story(draw.choice(list(topics)), draw) for _ in range(steps * rows)]
print(f"{len(stories):,} stories, for example:")
for text in stories[:2]:
    print(text.replace(". ", ".\n "))
#> 8,000 stories, for example:
#>  baking are proud.
#>  Again the miller bakes the bread near the oven.
#>  Again the baker bakes the cake near the oven.
#>  One day Paul woke up.
#>  Again the farmer feeds the sheep near the barn.
#>  Again the milkmaid feeds the goat near the barn.

# %% [markdown]
# ## How do they become numbers?
# With a byte-level BPE vocabulary, like that of GPT-2, learned from the stories themselves. `<|endoftext|>`
# stands before and after each story.

# %%
backend = tokenizers.Tokenizer(tokenizers.models.BPE())
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
backend.train_from_iterator(stories[:4000], trainers.BpeTrainer(
    vocab_size=640, special_tokens=["<|endoftext|>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
encoded = [[0, *encoding.ids, 0] for encoding in backend.encode_batch(stories)]
longest = max(map(len, encoded))
data = torch.tensor([ids + [0] * (longest - len(ids)) for ids in encoded])
print(backend.get_vocab_size(), "tokens in the vocabulary; stories of up to", longest, "tokens")
#> 640 tokens in the vocabulary; stories of up to 36 tokens

# %% [markdown]
# ## How does it learn?
# A *training loop* takes random weights and repeats one small step:
#
# 1. Read a few stories that the model has not seen before, and predict the next token at every position.
# 2. Measure how wrong that was. `loss` is the mean −log p of the true next token.
# 3. Find out how the loss changes with each weight: `backward`.
# 4. Move every weight a little in the direction that lowers the loss: `optimizer.step`, by the rule AdamW.
#
# GPT-2 differs from the Llama of tutorial 02: positions are added at the embedding instead of rotating
# queries and keys, and the norm also subtracts the mean.
#
# Our two models differ in one thing, `skip`: the probability that a block leaves out its attention in a step
# (stochastic depth; Huang et al. 2016). At 0 this is GPT-2. At 0.5, no block can rely on another one to have
# looked at the topic before it.

# %%
config = Config(family="gpt2", n_layer=4, n_head=4, n_kv_head=4, n_vocab=backend.get_vocab_size(), n_ctx=64,
                d_model=96, d_head=24, d_mlp=192, norm_eps=1e-5, tied=True, bos_id=0, eos_ids=(0,))


def start(seed):
    """A model of random weights"""
    model = GPT2(config).initialise(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "c_proj" not in name:
                weight *= 2         # a narrow model learns faster from larger weights than GPT-2 began with
    return model


def train(skip, seed=3, lr=3e-3):
    model, draw = start(seed), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    # The size of a step grows to `lr`, then shrinks to almost nothing.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.08,
                                                   cycle_momentum=False)
    pos = torch.arange(longest - 1)
    for step in tqdm(range(steps), desc=f"train, skip {skip}"):
        batch = data[step * rows:(step + 1) * rows]
        x = model.embed(batch[:, :-1], pos)
        for l, block in enumerate(model.blocks):
            if draw.random() >= skip:
                x = x + block.attn(block.ln_1(x), l)
            x = x + block.mlp(block.ln_2(x))
        loss = F.cross_entropy(model.unembed(x).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)     # so that no single step is too large
        optimizer.step()
        schedule.step()
    return model, loss.item()


trained = {"plain": train(skip=0.0), "skipping": train(skip=0.5)}
print(f"{sum(p.numel() for p in trained['plain'][0].parameters()):,} weights each")
for name, (_, loss) in trained.items():
    print(f"{name:9} last loss {loss:.2f} nats a token")
#> 366,912 weights each
#> plain     last loss 0.52 nats a token
#> skipping  last loss 0.53 nats a token

# %% [markdown]
# ## Is it a checkpoint like any other?
# Yes: we write three files with the names that the Hub uses. Ministeer loads such a folder, and so does
# `transformers`, which computes the same logits (there is a test for that).

# %%
def save_checkpoint(model, folder):
    c = model.config
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
                "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.d_model, "n_inner": c.d_mlp,
                "n_positions": c.n_ctx, "vocab_size": c.n_vocab, "layer_norm_epsilon": c.norm_eps,
                "tie_word_embeddings": c.tied, "bos_token_id": 0, "eos_token_id": 0}
    weights = {model.prefix + name: p.detach() for name, p in model.named_parameters()}
    write(folder / "config.json", json.dumps(settings, indent=2).encode())
    write(folder / "model.safetensors", save(weights, {"format": "pt"}))
    write(folder / "tokenizer.json", backend.to_str().encode())


models = {}
for name, (model, _) in trained.items():
    save_checkpoint(model, lesson.weights() / f"world-{name}")
    models[name], tokenizer = ministeer.load(lesson.weights() / f"world-{name}")
prompt = " Paul made Mary happy."
for text in ministeer.generate(models["plain"], tokenizer, prompt, 3, max_new_tokens, stop="."):
    print("≈", prompt + text + ".")
#> ≈  Paul made Mary happy. Again the captain steers the ship near the lighthouse.
#> ≈  Paul made Mary happy. Soon the painter paints the sketch near the gallery.
#> ≈  Paul made Mary happy. Soon the model draws the sketch near the gallery.

# %% [markdown]
# A sentence keeps to one topic. When the opening does not name one, every topic comes equally often.
#
# ## Before which blocks does a vector work?
# For each topic we make a vector such as " weddings" - " Paul", and add it at position 1, where " Paul"
# stands. With coefficient 1, the topic takes the place of that word and nothing else changes. Before block 0,
# this is the same as writing " weddings made Mary happy."; before a later block, it is as if the word had
# been exchanged halfway through the model.
#
# We say that a completion is about a topic if it contains a word of that topic and of no other. For each
# layer, we count this for each of the eight vectors, and for five random vectors of the same norm, with a
# fifth of the completions for each. Chance is 1 in 8.

# %%
words = {topic: {word for part in parts for word in part} for topic, parts in topics.items()}


def topic_of(text):
    present = [topic for topic in words if words[topic] & set(text.replace(".", " ").split())]
    return present[0] if len(present) == 1 else None


def vectors(model, layer, coeff=1.0):
    return {topic: coeff * ministeer.steering_vector(model, tokenizer, f" {topic}", " Paul", layer)
            for topic in topics}


def random_vectors(model, layer, seed):
    """Another direction for each topic, too"""
    return {topic: random_like(steer, seed=8 * seed + i)
            for i, (topic, steer) in enumerate(vectors(model, layer).items())}


def hits(model, steers, n=n):
    """steers: topic -> Steer; -> how many of n completions for each are about the topic of their Steer"""
    batch, total = [], n * len(steers)
    for i, steer in enumerate(steers.values()):
        coeff = torch.zeros(total)
        coeff[i * n:(i + 1) * n] = steer.coeff      # 0 in the rows of the other topics
        batch.append(steer.scaled(coeff))
    texts = ministeer.generate(model, tokenizer, prompt, total, max_new_tokens, batch, stop=".")
    names = list(steers)
    return sum(topic_of(text) == names[row // n] for row, text in enumerate(texts))


layers, total = range(config.n_layer), n * len(topics)
unsteered, steered, control = {}, {}, {}
for name, model in models.items():
    unsteered[name] = hits(model, vectors(model, 0, coeff=0.0))
    steered[name] = [hits(model, vectors(model, l)) for l in layers]
    control[name] = [[hits(model, random_vectors(model, l, seed), n // 5) for seed in range(5)]
                     for l in layers]
    print(f"{name}: unsteered {unsteered[name]} of {total}")
    for l in layers:
        low, high = wilson(steered[name][l], total)
        print(f"before block {l}: {steered[name][l]:3} of {total} (95 % {low:.0%} to {high:.0%}),",
              "random", " ".join(f"{count:2}" for count in control[name][l]), f"of {total // 5}")
#> plain: unsteered 22 of 160
#> before block 0: 157 of 160 (95 % 95% to 99%), random  5  4  4  6  4 of 32
#> before block 1:  25 of 160 (95 % 11% to 22%), random  6  6  6  6  5 of 32
#> before block 2:  20 of 160 (95 % 8% to 19%), random  5  5  5  6  5 of 32
#> before block 3:  21 of 160 (95 % 9% to 19%), random  5  5  5  5  5 of 32
#> skipping: unsteered 26 of 160
#> before block 0: 149 of 160 (95 % 88% to 96%), random  2  2  4  3  3 of 32
#> before block 1:  75 of 160 (95 % 39% to 55%), random  2  5  3  6  2 of 32
#> before block 2:  54 of 160 (95 % 27% to 41%), random  4  4  3  5  3 of 32
#> before block 3:  35 of 160 (95 % 16% to 29%), random  5  4  4  4  4 of 32

# %% [markdown]
# In both models, the vector works best before the first block and hardly before the last; the five random
# vectors stay near chance. Between first and last, the models differ. The plain model loses nearly the whole
# effect from one block to the next, the skipping model loses it step by step.
#
# ## Who reads the topic?
# We run the blocks by hand once more (as in tutorial 02), with the vectors added before block 0. In some
# blocks we *hide* position 1: there, later positions cannot look at it. Then we measure which share of the
# probability of all 24 professions goes to the three of the vector's own topic. No text is sampled, so this
# needs no interval.

# %%
def by_hand(model, steers, hide=()):
    """steers: topic -> Steer before block 0; -> logits (topics, T, n_vocab)

    hide: the blocks in which no later position sees position 1
    """
    pos = torch.arange(ids.shape[1])
    x = model.embed(ids, pos)
    x = x + torch.stack([steer.delta(x, pos) for steer in steers.values()])
    for l, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.ln_1(x))
        hidden = torch.ones(len(pos), len(pos), dtype=torch.bool).triu(1)       # the later positions
        if l in hide:
            hidden[2:, 1] = True
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        x = x + block.attn.c_proj(merge_heads(pattern @ v))
        x = x + block.mlp(block.ln_2(x))
    return model.unembed(x)


def own_share(steers, all_logits):
    """-> the probability of the topic's own professions over that of all professions, mean over the topics"""
    shares = []
    for topic, logits in zip(steers, all_logits, strict=True):
        p = logits[-1].softmax(dim=-1)
        mass = {name: p[who].sum() for name, who in professions.items()}
        shares.append(mass[topic] / sum(mass.values()))
    return torch.stack(shares).mean().item()


professions = {topic: [tokenizer.encode(f" {who}", bos=False)[0] for who in parts[0]]
               for topic, parts in topics.items()}
ids = torch.tensor([tokenizer.encode(prompt + " Then the")])
steers = vectors(models["plain"], 0)
whole, _ = models["plain"](ids, steers["weddings"])
print("by hand as by the model:", torch.allclose(by_hand(models["plain"], steers)[0], whole[0], atol=1e-3))
alone, before, added = {}, {}, {}
for name, model in models.items():
    steers = vectors(model, 0)
    alone[name] = [own_share(steers, by_hand(model, steers, hide=[l])) for l in layers]
    before[name] = [own_share(steers, by_hand(model, steers, hide=range(l))) for l in layers]
    added[name] = []
    for l in layers:
        logits = [model(ids, steer)[0][0] for steer in vectors(model, l).values()]
        added[name].append(own_share(topics, logits))
    reader = alone[name].index(min(alone[name]))
    print(f"{name}: nothing hidden {before[name][0]:.2f}; least when block {reader} is hidden alone")
    for l in layers:
        print(f"  block {l}: hidden in it alone {alone[name][l]:.2f};",
              f"in all before it {before[name][l]:.2f}; vector added before it {added[name][l]:.2f}")
    apart = max(abs(a - b) for a, b in zip(before[name], added[name], strict=True))
    print(f"  the last two columns differ by {apart:.2f} at most")
#> by hand as by the model: True
#> plain: nothing hidden 1.00; least when block 0 is hidden alone
#>   block 0: hidden in it alone 0.16; in all before it 1.00; vector added before it 1.00
#>   block 1: hidden in it alone 1.00; in all before it 0.16; vector added before it 0.16
#>   block 2: hidden in it alone 1.00; in all before it 0.14; vector added before it 0.14
#>   block 3: hidden in it alone 1.00; in all before it 0.13; vector added before it 0.13
#>   the last two columns differ by 0.00 at most
#> skipping: nothing hidden 0.96; least when block 0 is hidden alone
#>   block 0: hidden in it alone 0.53; in all before it 0.96; vector added before it 0.96
#>   block 1: hidden in it alone 0.95; in all before it 0.53; vector added before it 0.52
#>   block 2: hidden in it alone 0.95; in all before it 0.39; vector added before it 0.37
#>   block 3: hidden in it alone 0.95; in all before it 0.24; vector added before it 0.24
#>   the last two columns differ by 0.01 at most

# %% [markdown]
# First column: the *main reader* is the block that costs most when position 1 is hidden in it alone. In the
# plain model, little is left then. The skipping model keeps more, so other blocks read position 1 as well,
# perhaps because in training any block could be missing.
#
# Second and third column: **a vector works as far as later blocks read it.** A vector added before block l is
# too late for the blocks before l. So it should do as much as a vector added before block 0 that those blocks
# cannot see. It does: the two columns are nearly the same. This explains the table of completions.
#
# SmolLM2 can be steered before some later blocks, too. Perhaps several of its blocks read the same place; we
# have not shown that. And to be honest: we chose the prompt, the first weights, the learning rate and the
# seed after looking at some twenty runs like these. In most of those that learned well, the plain model lost
# nearly all at once, and the skipping model kept a share of 0.3 to 0.8 before block 1. Which block is the
# main reader is not fixed: in a larger model that was trained for longer, it was block 2.
#
# ## The figure: where it works, and why

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
for name, color, line in (("skipping", lesson.BLUE, "-"), ("plain", lesson.ORANGE, "--")):
    intervals = [wilson(k, total) for k in steered[name]]
    lesson.errorbars(left, layers, [k / total for k in steered[name]], intervals, color=color, fmt="o" + line,
                     label=f"steered, {name}")
    for seed in range(5):
        shares = [counts[seed] / (total // 5) for counts in control[name]]
        left.plot(layers, shares, ".", color=lesson.GREY, markersize=4)
    right.plot(layers, before[name], "o" + line, color=color, label=f"{name}: hidden in all blocks before l")
    right.plot(layers, added[name], "x", color="black", markersize=8, zorder=3)
left.plot([], [], ".", color=lesson.GREY, label="five random vectors, both models")
right.plot([], [], "x", color="black", markersize=8, label="vector added before block l instead")
left.axhline(unsteered["plain"] / total, color="black", linestyle="--", linewidth=0.8,
             label="unsteered, plain")
for axis in (left, right):
    axis.axhline(1 / len(topics), color="black", linestyle=":", linewidth=0.8, label="chance")
    axis.set_ylim(0, 1.04)
    axis.set_xticks(layers)
    axis.legend(fontsize="small")
left.set_xlabel("vector added before block")
left.set_ylabel("share of completions on the vector's topic")
left.set_title(f"n {total} a point, 95 % intervals", fontsize="medium")
right.set_xlabel("block l")
right.set_ylabel("probability of the topic's own professions")
right.set_title("vector before block 0, position 1 hidden from some blocks", fontsize="medium")
lesson.save(figure, "12_grow_your_own")

# %% [markdown]
# ## Exercise 1
# How many weights does a GPT-2 have? It has an embedding row for each of n_vocab tokens and each of n_ctx
# positions. In a block, there are two norms (weight and bias) and the maps d → 3d, d → d, d → d_mlp and d_mlp
# → d, each with a bias. Then comes a final norm. The head is the embedding again.

# %%
def n_weights(config):
    """-> the number of weights of a GPT-2 with a tied head, an int"""
    return None                 # your lines


small = dataclasses.replace(config, n_layer=2, n_vocab=50, n_ctx=16, d_mlp=96)
lesson.check(n_weights, ((config,), sum(p.numel() for p in models["plain"].parameters())),
             ((small,), sum(p.numel() for p in GPT2(small).parameters())))
#> n_weights: not yet. For (config) it gives None, not 366912

# %% [markdown]
# ## Exercise 2
# Is a vector before the last block too weak, or too late? Measure the skipping model with coefficients 2 and
# 4 before block 3, with `hits` and `vectors` from above. Is the better of the two better than coefficient 1
# before block 1?

# %%
def stronger_helps(hits, vectors, model):
    """-> True if coefficient 2 or 4 before block 3 gets more hits than coefficient 1 before block 1"""
    return None                 # your lines


def place(model, layer, coeff=1.0):
    """Stands in for `vectors`"""
    return layer, coeff


def made_up(two, four, one):
    """-> a stand-in for `hits`, with these counts: coefficients 2 and 4, and coefficient 1 before block 1"""
    counts = {(3, 2): two, (3, 4): four, (1, 1): one}
    return lambda model, steers: counts[steers]


model = models["skipping"]
best = max(hits(model, vectors(model, 3, coeff)) for coeff in (2, 4))
lesson.check(stronger_helps, ((made_up(20, 5, 20), place, model), False),
             ((made_up(10, 30, 20), place, model), True), ((made_up(30, 10, 20), place, model), True),
             ((made_up(1, 2, 20), place, model), False),
             ((hits, vectors, model), best > steered["skipping"][1]))
#> stronger_helps: not yet. For (function, function, model) it gives None, not False

# %% [markdown]
# ## Your own topic
# Add a ninth topic to `world`, with words of your own, as many as the others have, and train again. Before
# you look, write down before which blocks you expect its vector to work. Then count its hits block by block.
# Beside them, set those of the other eight topics and the range of five random vectors (`random_like`, seeds
# 0 to 4). Is your topic like the others, and if not, what differs in the words that you gave it?
#
# **Now you know** why a layer works in one small model. For the questions of all the tutorials, answered with
# larger n, see [benchmarks](../benchmarks/README.md). Next: [13](13_activations_or_logits.py), other ways to
# the same goal.

# %% [markdown]
# # 12 · Grow your own
#
# **Why does a vector work before some blocks and not before others?** 30 minutes, two or three of them
# computing. You need tutorials 02, 04 and 07.
#
# In a model that somebody else has trained, you can only look. So we train a small GPT-2 from random numbers,
# on a world of eight topics about which we know everything, and steer it from topic to topic. Then we train
# it again with one thing changed. On another machine, training sums in another order, so your shares will
# differ, some of them by a lot.

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

steps, rows = 600, 32                   # of training; each row is a story
n, max_new_tokens = 24, 16              # completions for each topic, and their length
if lesson.TINY:
    steps, n, max_new_tokens = 2, 2, 2

# %% [markdown]
# ## What is there to read?
# A story opens with a sentence about somebody; then come two sentences about one topic. About seven of ten
# openings name the topic, the others do not. Now and then the typist hits the space bar twice.

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
other = ["{a} smiled all {time}.", "One {time} {a} woke up.", "It was {mood} that {time}.", "{a} met {b}.",
         "Now {a} tells {b} a tale.", "Last {time} {a} came home {mood}."]
people = ["Anna", "Tom", "Mary", "Paul", "Eva", "Max", "Lucy", "Ben"]
times = ["day", "morning", "evening", "night", "week", "year"]
moods = ["old", "young", "tall", "small", "quiet", "happy", "tired", "proud"]


def story(topic, draw):
    a, b = draw.sample(people, 2)
    opening = draw.choice(named if draw.random() < 0.7 else other)
    text = " " + opening.format(topic=topic, a=a, b=b, time=draw.choice(times), mood=draw.choice(moods))
    for _ in range(2):
        who, does, what, where = (draw.choice(words) for words in topics[topic])
        text += draw.choice([" ", " ", "  "]) + draw.choice(["Then", "Soon", "Later", "Again"])
        text += f" the {who} {does} the {what} near the {where}."
    return text


draw = random.Random(1)
stories = [story(draw.choice(list(topics)), draw) for _ in range(steps * rows)]
print(f"{len(stories):,} stories, for example:")
for text in stories[:2]:
    print(text.replace(". ", ".\n "))
#> 19,200 stories, for example:
#>  baking are proud.
#>  Then the miller bakes the bread near the oven.
#>   Again the cook bakes the dough near the oven.
#>  It was old that day.
#>  Then the farmer feeds the sheep near the barn.
#>   Soon the milkmaid feeds the sheep near the meadow.

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
#> 640 tokens in the vocabulary; stories of up to 38 tokens

# %% [markdown]
# ## How does it learn?
# Each step reads 32 stories that the model has not seen before. `loss` is the mean −log p of the true next
# token; `backward` finds how the loss changes with each weight, and AdamW moves every weight a little in the
# direction that lowers it. GPT-2 differs from the Llama of tutorial 02: positions are added at the embedding
# instead of rotating queries and keys, and the norm also subtracts the mean.
#
# Our two models differ in one thing, `skip`: the probability that a block leaves out its attention in a step
# (stochastic depth; Huang et al. 2016). At 0 this is GPT-2. At 0.5, no block can rely on another one to have
# looked at the topic before it.

# %%
config = Config(family="gpt2", n_layer=6, n_head=4, n_kv_head=4, n_vocab=backend.get_vocab_size(), n_ctx=64,
                d_model=128, d_head=32, d_mlp=512, norm_eps=1e-5, tied=True, bos_id=0, eos_ids=(0,))


def train(skip, seed=1, lr=2e-3):
    model, draw = GPT2(config).initialise(seed), random.Random(seed)
    torch.manual_seed(seed)                         # for the dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.08,
                                                   cycle_momentum=False)
    pos = torch.arange(longest - 1)
    for step in tqdm(range(steps), desc=f"train, skip {skip}"):
        batch = data[step * rows:(step + 1) * rows]
        x = F.dropout(model.embed(batch[:, :-1], pos), 0.2)
        for l, block in enumerate(model.blocks):
            if draw.random() >= skip:
                x = x + block.attn(block.ln_1(x), l)
            x = x + block.mlp(block.ln_2(x))
        loss = F.cross_entropy(model.unembed(x).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model, loss.item()


trained = {"plain": train(skip=0.0), "skipping": train(skip=0.5)}
print(f"{sum(p.numel() for p in trained['plain'][0].parameters()):,} weights each")
for name, (_, loss) in trained.items():
    print(f"{name:9} last loss {loss:.1f} nats a token")
#> 1,280,000 weights each
#> plain     last loss 0.5 nats a token
#> skipping  last loss 0.5 nats a token

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
prompt = " Now Mary tells Tom a tale."
for seed in range(2):
    texts = ministeer.generate(models["plain"], tokenizer, prompt, 1, max_new_tokens, stop=".", seed=seed)
    print(prompt + texts[0] + ".")
#> ≈  Now Mary tells Tom a tale. Later the fiddler plays the tune near the stage.
#> ≈  Now Mary tells Tom a tale. Again the sculptor paints the canvas near the studio.

# %% [markdown]
# A sentence keeps to one topic. When the opening does not name one, every topic comes equally often.
#
# ## Before which blocks does a vector work?
# For each topic we make a vector such as " weddings" - " Now", and add it at position 1, where " Now" stands.
# With coefficient 1, the topic takes the place of that word and nothing else changes. Before block 0, this is
# the same as writing " weddings Mary tells …"; before a later block, it is as if the word had been exchanged
# halfway through the model. (Why not " weddings" - " "? A lone space is a rare token here, with a larger norm
# than a topic. With that pair, the best layer reached 66 %.)
#
# We say that a completion is about a topic if it contains a word of that topic and of no other. For each
# layer, we count this for each of the eight vectors, and for a random vector of the same norm. Chance is 1 in
# 8.

# %%
words = {topic: {word for part in parts for word in part} for topic, parts in topics.items()}


def topic_of(text):
    present = [topic for topic in words if words[topic] & set(text.replace(".", " ").split())]
    return present[0] if len(present) == 1 else None


def vectors(model, layer, coeff=1.0):
    return {topic: coeff * ministeer.steering_vector(model, tokenizer, f" {topic}", " Now", layer)
            for topic in topics}


def random_vectors(model, layer):
    return {topic: random_like(steer, seed=seed)
            for seed, (topic, steer) in enumerate(vectors(model, layer).items())}


def hits(model, steers, prompt=prompt):
    """steers: topic -> Steer; -> how many of n completions for each are about the topic of their Steer"""
    count = 0
    for seed, (topic, steer) in enumerate(steers.items()):
        texts = ministeer.generate(model, tokenizer, prompt, n, max_new_tokens, steer, stop=".", seed=seed)
        count += sum(topic_of(text) == topic for text in texts)
    return count


layers, total = range(config.n_layer), n * len(topics)
unsteered, steered, control = {}, {}, {}
for name, model in models.items():
    unsteered[name] = hits(model, dict.fromkeys(topics, ()))
    asked = sum(hits(model, {topic: ()}, f" {topic} made Mary happy.") for topic in topics)
    steered[name] = [hits(model, vectors(model, l)) for l in layers]
    control[name] = [hits(model, random_vectors(model, l)) for l in layers]
    print(f"{name}: unsteered {unsteered[name] / total:.0%};",
          f"topic named in the prompt {asked / total:.0%}; n {total}")
    for l in layers:
        low, high = wilson(steered[name][l], total)
        print(f"before block {l}: {steered[name][l] / total:4.0%}  (95 % {low:.0%} to {high:.0%})  ",
              f"random {control[name][l] / total:4.0%}")
#> plain: unsteered 11%; topic named in the prompt 98%; n 192
#> before block 0:  98%  (95 % 96% to 99%)   random  10%
#> before block 1:  98%  (95 % 95% to 99%)   random  11%
#> before block 2:  98%  (95 % 96% to 99%)   random  11%
#> before block 3:  44%  (95 % 37% to 51%)   random  11%
#> before block 4:  36%  (95 % 30% to 43%)   random  11%
#> before block 5:  17%  (95 % 13% to 23%)   random  11%
#> skipping: unsteered 9%; topic named in the prompt 94%; n 192
#> before block 0:  96%  (95 % 93% to 98%)   random  11%
#> before block 1:  95%  (95 % 91% to 97%)   random  11%
#> before block 2:  91%  (95 % 86% to 94%)   random  10%
#> before block 3:  80%  (95 % 73% to 85%)   random  10%
#> before block 4:  49%  (95 % 42% to 56%)   random  10%
#> before block 5:  21%  (95 % 16% to 28%)   random   9%

# %% [markdown]
# In both models, the vector works before the first blocks and hardly before the last. In the plain model it
# drops sharply before block 3; in the skipping model it fades. The random vectors do nothing.
#
# ## Who reads the topic?
# We run the blocks by hand once more (as in tutorial 02), to see the pattern. We also *hide* position 1, in
# one block only or from one block on: later positions cannot look at it there. Then we measure which share of
# the probability of all 24 professions goes to the three of the vector's own topic.

# %%
def by_hand(model, ids, steer, hide=()):
    """-> logits (T, n_vocab), patterns (n_layer, H, T, T)

    hide: the blocks in which no later position sees position 1
    """
    pos = torch.arange(ids.shape[1])
    x, patterns = model.embed(ids, pos), []
    for l, block in enumerate(model.blocks):
        if l == steer.layer:
            x = x + steer.delta(pos)
        q, k, v = block.attn.qkv(block.ln_1(x))
        seen = torch.ones(len(pos), len(pos), dtype=torch.bool).tril()
        seen[2:, 1] = l not in hide
        pattern = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(dim=-1)
        patterns.append(pattern[0])
        x = x + block.attn.c_proj(merge_heads(pattern @ v))
        x = x + block.mlp(block.ln_2(x))
    return model.unembed(x)[0], torch.stack(patterns)


professions = {topic: [tokenizer.encode(f" {who}", bos=False)[0] for who in parts[0]]
               for topic, parts in topics.items()}


def own_share(model, steers, hide=()):
    """-> the probability of the topic's own professions over that of all professions, mean over the topics"""
    shares = []
    for topic, steer in steers.items():
        logits, _ = by_hand(model, ids, steer, hide)
        p = logits[-1].softmax(dim=-1)
        mass = {name: p[who].sum() for name, who in professions.items()}
        shares.append(mass[topic] / sum(mass.values()))
    return torch.stack(shares).mean().item()


ids = torch.tensor([tokenizer.encode(prompt + " Then the")])
model, steer = models["plain"], vectors(models["plain"], 0)["weddings"]
equal = torch.allclose(by_hand(model, ids, steer)[0], model(ids, steer)[0][0], atol=1e-3)
print("by hand as by the model:", equal)
look, later = {}, {}
for name, model in models.items():
    steers = vectors(model, 0)
    # (topics, n_layer, H, T, T)
    patterns = torch.stack([by_hand(model, ids, steer)[1] for steer in steers.values()])
    look[name] = patterns[:, :, :, 2:, 1].mean(dim=(0, 2, 3)).tolist()
    later[name] = [own_share(model, steers, range(l, config.n_layer)) for l in layers]
    print(f"{name}: vector before block 0, nothing hidden: {own_share(model, steers):.2f}")
    for l in layers:
        print(f"  block {l}: looks at position 1 {look[name][l]:.2f}; hidden in it alone",
              f"{own_share(model, steers, [l]):.2f}, in it and all later ones {later[name][l]:.2f}")
#> by hand as by the model: True
#> plain: vector before block 0, nothing hidden: 0.98
#>   block 0: looks at position 1 0.14; hidden in it alone 0.98, in it and all later ones 0.12
#>   block 1: looks at position 1 0.14; hidden in it alone 0.98, in it and all later ones 0.14
#>   block 2: looks at position 1 0.17; hidden in it alone 0.53, in it and all later ones 0.14
#>   block 3: looks at position 1 0.20; hidden in it alone 0.95, in it and all later ones 0.43
#>   block 4: looks at position 1 0.21; hidden in it alone 0.64, in it and all later ones 0.51
#>   block 5: looks at position 1 0.17; hidden in it alone 0.85, in it and all later ones 0.85
#> skipping: vector before block 0, nothing hidden: 0.98
#>   block 0: looks at position 1 0.14; hidden in it alone 0.98, in it and all later ones 0.12
#>   block 1: looks at position 1 0.15; hidden in it alone 0.95, in it and all later ones 0.15
#>   block 2: looks at position 1 0.25; hidden in it alone 0.97, in it and all later ones 0.35
#>   block 3: looks at position 1 0.19; hidden in it alone 0.97, in it and all later ones 0.60
#>   block 4: looks at position 1 0.28; hidden in it alone 0.95, in it and all later ones 0.84
#>   block 5: looks at position 1 0.25; hidden in it alone 0.96, in it and all later ones 0.96

# %% [markdown]
# Look at the plain model, with position 1 hidden in one block alone. The loss is largest for block 2, then
# for block 4; the other blocks are missed less. Block 2 is the main reader. And when the vector is added
# just after block 2 has read, before block 3, the share of completions on its topic has fallen from nearly
# all to less than half. **A vector works before the block that reads it.** When position 1 is hidden from one
# block on, the later that block is, the higher the share: more has been carried elsewhere by then.
#
# In the skipping model, no single block is missed, because any of them might have been missing in training.
# This is one way to get a model whose later layers work too, as they do in SmolLM2 (where steering works at
# layers 1 and 2, and again at 16 to 21). Whether SmolLM2's later layers work for a similar reason, we do not
# know.
#
# How much a block *looks* at position 1 tells us less: block 3 looks more than block 2, and is hardly missed.
# And to be honest: we chose the prompt, the seed, the dropout and " Now" after looking at runs like this one.
# With another seed, another block is the reader, and some seeds learn worse.
#
# ## The figure: where it works, and who looks

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
for name, line in (("skipping", "-"), ("plain", ":")):
    for counts, color, label in ((steered[name], lesson.BLUE, "steered"),
                                 (control[name], lesson.GREY, "random, same norm")):
        low, high = zip(*(wilson(k, total) for k in counts), strict=True)
        left.plot(layers, [k / total for k in counts], "o" + line, color=color, label=f"{label}, {name}")
        left.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
    right.plot(layers, later[name], "o" + line, color=lesson.BLUE,
               label=f"{name}: share, position 1 hidden from block l on")
    right.plot(layers, look[name], "x" + line, color=lesson.ORANGE,
               label=f"{name}: attention of block l to position 1")
left.axhline(unsteered["skipping"] / total, color="black", linestyle="--", linewidth=0.8, label="unsteered")
for axis in (left, right):
    axis.axhline(1 / len(topics), color="black", linestyle=":", linewidth=0.8, label="chance")
    axis.set_ylim(0, 1.04)
left.set_xlabel("vector added before block")
left.set_ylabel("completions about the vector's topic")
left.set_title(f"n {total} a point, 95 % band", fontsize="medium")
left.legend(fontsize="x-small")
right.set_xlabel("block l")
right.set_ylabel("share of probability, or of attention")
right.set_title("vector before block 0, at position 1", fontsize="medium")
right.legend(fontsize="x-small")
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
#> n_weights: not yet. For (config) it gives None, not 1280000

# %% [markdown]
# ## Exercise 2
# Is a vector before the last block too weak, or too late? Measure the skipping model with coefficients 2 and
# 4 before block 5, with `hits` and `vectors` from above. Is the better of the two better than coefficient 1
# before block 1?

# %%
def stronger_helps(hits, vectors, model):
    """-> True if coefficient 2 or 4 before block 5 gets more hits than coefficient 1 before block 1"""
    return None                 # your lines


def place(model, layer, coeff=1.0):
    """Stands in for `vectors`"""
    return layer, coeff


def made_up(two, four, one):
    """-> a stand-in for `hits`, with these counts: coefficients 2 and 4, and coefficient 1 before block 1"""
    counts = {(5, 2): two, (5, 4): four, (1, 1): one}
    return lambda model, steers: counts[steers]


model = models["skipping"]
best = max(hits(model, vectors(model, 5, coeff)) for coeff in (2, 4))
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

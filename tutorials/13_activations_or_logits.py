# %% [markdown]
# # 13 · Activations or logits?
#
# **One goal, reached in four ways. What does each cost, and how does each fail?** 30 minutes, one of them
# computing. You need tutorials 05 and 09.
#
# ActAdd changes what flows through the model. Its rivals in the paper's tables do something else: they change
# the text that the model reads (prompting), or they combine the probabilities of the next token with those of
# a second reading (PreADD) or with the vote of a classifier (FUDGE). The goal here: texts about weddings.

# %%
import math
import random

import lesson
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import ministeer
from ministeer.baselines import logits as baselines
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.measure import disfluency
from ministeer.evaluation.stats import wilson
from ministeer.steering import random_like

model, tokenizer = lesson.load()
prompt, n = "I went up to my friend and said", 20

# %% [markdown]
# ## 1. Change the activations
# This is tutorial 04: the model reads the text once, and one addition is made on the way.

# %%
weddings = ministeer.steering_vector(model, tokenizer, " weddings", " ", layer=1)
act_add = {f"c {c:g}": baselines.act_add(c * weddings) for c in (1, 2, 4)}
print(len(act_add["c 1"].branches), "reading:", act_add["c 1"].branches[0].steer)
#> 1 reading: (<Steer ' weddings' - ' ': coeff 1.0 at position 1 before block 1, d_model 576>,)

# %% [markdown]
# ## 2. Ask for it
# Put a line in front of the prompt. Everybody can do this, so it is the first rival to beat.

# %%
request = "The following text is about a wedding."
prompted = {"": baselines.prompted(request)}
print("at the front:", tokenizer.pieces(baselines.prefix_ids(tokenizer, request)))
#> at the front: ['<|endoftext|>', 'The', ' following', ' text', ' is', ' about', ' a', ' wedding', '.', '\n']

# %% [markdown]
# ## 3. Exaggerate what asking changes
# PreADD (Pei et al. 2023) reads the text twice, once with the line and once without, and continues in the
# direction from one to the other: log p + s (log q − log p). Both readings get the same sampled token, so
# they stay the same text. At s = 1 this is simply asking; above 1, it does more than asking.

# %%
def toward(s):
    """PreADD toward the prefix (Pei et al. have both signs); `preadd` moves away from it, hence the minus."""
    return baselines.preadd(request, strength=-s)


preadd = {f"s {s:g}": toward(s) for s in (1.5, 3)}
plain_ids = tokenizer.encode(prompt)
asked_ids = [*baselines.prefix_ids(tokenizer, request), *tokenizer.encode(prompt, bos=False)]
p, q = (model(torch.tensor([ids]))[0][0, -1].log_softmax(dim=-1) for ids in (plain_ids, asked_ids))
gain = q - p
top = gain.topk(3).indices.tolist()
pieces = [f"{piece!r} by {gain[i]:.1f}" for piece, i in zip(tokenizer.pieces(top), top, strict=True)]
print("asking makes likelier:", ", ".join(pieces), "nats")
#> asking makes likelier: 'firehose' by 4.7, ' wedding' by 4.2, ' bride' by 4.1 nats

# %% [markdown]
# ## 4. Let a classifier vote
# FUDGE (Yang and Klein 2021) takes the likeliest next tokens (50 here, 200 in their code). For each of them
# it asks a small classifier whether the text would then be on its way to the goal. We train such a classifier
# here, on sentences from a few templates. It learns at every word, so it can judge a text that is not
# finished. (It is a GRU, a network that reads token by token and keeps one vector as its memory of the text.)

# %%
draw = random.Random(0)
subjects = [["the bride", "the groom", "their wedding", "the marriage", "the honeymoon", "the wedding cake"],
            ["the harbour", "the train", "her new job", "the football match", "the weather", "his old car"]]
templates = ["I told my friend about {x} and", "She came late because of {x}, but",
             "They talked about {x} all evening", "We all looked forward to {x}",
             "He said that {x} was important to him", "Do you remember {x}?", "My mother never liked {x}"]
examples = []
for k in range(60 if lesson.TINY else 600):
    text = draw.choice(templates).format(x=draw.choice(subjects[k % 2]))
    examples.append((text, 1.0 - k % 2))                    # 1: about a wedding, 0: about something else
classifier = PrefixClassifier(model.config.n_vocab, d_embedding=32, d_state=32)
torch.manual_seed(0)
for layer in (classifier.embedding, classifier.gru, classifier.head):
    layer.reset_parameters()
optimizer = torch.optim.Adam(classifier.parameters(), lr=5e-3)
for start in range(0, len(examples), 20):
    for text, label in examples[start:start + 20]:
        states, _ = classifier.gru(classifier.embedding(torch.tensor([tokenizer.encode(text)])))
        scores = classifier.head(states)[0, :, 0]           # one after every token
        loss = F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, label))
        (loss / 20).backward()
    optimizer.step()
    optimizer.zero_grad()
classifier.requires_grad_(False)
for text in ("I told my", "I told my friend about the bride", "I told my friend about the train"):
    score = classifier.score(classifier.read(torch.tensor([tokenizer.encode(text)])))
    print(f"{text!r:36} P(about a wedding) {score.sigmoid().item():.1f}")
fudge = {"s 9": baselines.fudge(classifier, strength=9)}
#> 'I told my'                          P(about a wedding) 0.4
#> 'I told my friend about the bride'   P(about a wedding) 0.8
#> 'I told my friend about the train'   P(about a wedding) 0.2

# %% [markdown]
# ## What does each achieve?
# For each setting we sample twenty completions, with temperature 1, top_p 0.3 and the same random numbers.
# Five random vectors, with the norm that ActAdd has at c 2, get four each, in one batch (tutorial 07). We
# count the texts with a wedding word, and measure disfluency.

# %%
methods = {"unsteered": {"": baselines.unsteered()}, "ActAdd": act_add, "prompted": prompted,
           "PreADD": preadd, "FUDGE": fudge}
sampling = {"max_new_tokens": 20, "top_p": 0.3, "freq_penalty": 1.0}


def measure(texts):
    """-> (how many have a wedding word, disfluency, the first text)"""
    scored = disfluency(model, tokenizer, prompt, texts)
    surprise = math.exp(sum(nll for nll, _ in scored) / sum(n_tokens for _, n_tokens in scored))
    return sum(count_words(text) > 0 for text in texts), surprise, texts[0]


results = {}
for name, settings in methods.items():
    results[name] = {}
    for setting, method in settings.items():
        results[name][setting] = measure(baselines.generate(model, tokenizer, prompt, method, n, **sampling))
    cells = [f"{setting}: {k} of {n}, {surprise:.1f}" for setting, (k, surprise, _) in results[name].items()]
    print(f"{name:10}", "   ".join(cells))
batch = []
for seed in range(5):
    coeff = torch.zeros(5, n // 5)
    coeff[seed] = 2
    batch.append(random_like(weddings, seed).scaled(coeff.flatten()))
rows = ministeer.generate(model, tokenizer, [prompt] * 5, n // 5, steer=batch, **sampling)
control = [measure(texts) for texts in rows]
print("random c 2", "   ".join(f"{k} of {n // 5}, {surprise:.1f}" for k, surprise, _ in control))
#> unsteered  : 0 of 20, 3.9
#> ActAdd     c 1: 10 of 20, 6.5   c 2: 12 of 20, 6.7   c 4: 7 of 20, 6.5
#> prompted   : 13 of 20, 6.3
#> PreADD     s 1.5: 17 of 20, 8.1   s 3: 20 of 20, 28.5
#> FUDGE      s 9: 0 of 20, 7.1
#> random c 2 0 of 4, 6.6   0 of 4, 4.8   0 of 4, 5.3   0 of 4, 3.8   0 of 4, 4.5

# %% [markdown]
# Each cell gives the completions about weddings, then the disfluency. Do not read this as a race: it is one
# prompt and one topic, with strengths that we made up. The fair race, with tuning on other prompts and a test
# for every row, is `python -m benchmarks.rivals`.
#
# ## How does each fail?
# Here is the first text of each at its strongest setting:

# %%
for name in ("ActAdd", "prompted", "PreADD", "FUDGE"):
    setting, (_, _, text) = list(results[name].items())[-1]
    print(f"{name:8} {setting}: {text.strip()[:80]!r}")
rank = 1 + (p > p[tokenizer.encode(" wedding", bos=False)[0]]).sum().item()
print("unsteered, ' wedding' is the next token of rank", rank)
#> ActAdd   c 4: ≈ "I'm not married. I'm a single mom with two kids, 20. My husband"
#> prompted : ≈ 'I was going to the wedding.\nI said, "Can I help you?"\nThe wedding'
#> PreADD   s 3: ≈ 'hi I was thinking of wedding\nThe text goes wrong with grammar. It starts off wit'
#> FUDGE    s 9: ≈ ', "Aw, that\'s not right. You can\'t just change your mind."'
#> unsteered, ' wedding' is the next token of rank 3156

# %% [markdown]
# ActAdd leaves many texts without a wedding, and more strength does not help: c 4 brings no more than c 2.
# None of the random vectors brings any, and some of them cost fluency too. A prompt is hard to beat: as many
# weddings as ActAdd, about as fluent, and no vector. PreADD at s 1.5 is not shown to beat the prompt at n 20;
# at s 3 the language breaks. FUDGE brings no wedding. Its classifier votes only on the 50 likeliest tokens,
# and " wedding" is far from those. Perhaps that is the reason, or the small classifier is; we have not shown
# it here.
#
# ## What does each cost?
# Each reading is a pass of its own through the model, so PreADD takes twice the passes of the others. (FUDGE
# reads the text once, but it asks its classifier 50 times for each token, and the classifier had to be
# trained.)

# %%
for name in ("ActAdd", "prompted", "PreADD", "FUDGE"):
    method = next(iter(methods[name].values()))
    print(f"{name:8} passes for each token: {len(method.branches)}")
#> ActAdd   passes for each token: 1
#> prompted passes for each token: 1
#> PreADD   passes for each token: 2
#> FUDGE    passes for each token: 1

# %% [markdown]
# ## The figure: the goal against fluency

# %%
figure, axis = plt.subplots(figsize=(9, 4))
styles = {"unsteered": ("s", "black"), "ActAdd": ("o-", lesson.BLUE), "prompted": ("s", lesson.PINK),
          "PreADD": ("o-", lesson.ORANGE), "FUDGE": ("o-", lesson.GREEN)}
for name, settings in results.items():
    marker, color = styles[name]
    x, hits = [surprise for _, surprise, _ in settings.values()], [k for k, _, _ in settings.values()]
    lesson.errorbars(axis, x, [k / n for k in hits], [wilson(k, n) for k in hits], fmt=marker, color=color,
                     label=name)
    offset = (16, -3) if name == "ActAdd" else (5, 6)       # clear of the intervals beside it
    for setting, (k, surprise, _) in settings.items():
        axis.annotate(setting, (surprise, k / n), offset, textcoords="offset points", fontsize="x-small",
                      color=color)
axis.plot([surprise for _, surprise, _ in control], [k / (n // 5) for k, _, _ in control], ".",
          color=lesson.GREY, label=f"five random vectors, c 2, n {n // 5}")
axis.set_xscale("log")
axis.set_xticks([4, 6, 10, 20], ["4", "6", "10", "20"])
axis.minorticks_off()
axis.set_xlabel("disfluency (perplexity per token, unsteered model)")
axis.set_ylabel("completions with a wedding word")
axis.set_ylim(-0.03, 1.04)
axis.set_title(f"n {n} a point, 95 % intervals", fontsize="medium")
axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.save(figure, "13_activations_or_logits")

# %% [markdown]
# ## Exercise 1
# LMA (Dekoninck et al. 2024) penalises only what a prefix makes likelier, and leaves alone what it makes less
# likely: log p − s · max(0, log q − log p). Write this formula.

# %%
def lma(p, q, s):
    """p, q (n_vocab,): log-probabilities without and with the prefix -> logits (n_vocab,)"""
    return None                 # your line


few = torch.tensor([-1.0, -2.0, -3.0])
lesson.check(lma, ((p, q, 0.0), p), ((p, q, 9.0), baselines.lma("", 9.0).combine([p, q])),
             ((few, few.flip(0), 0.5), torch.tensor([-1.0, -2.0, -4.0])))
#> lma: not yet. For (tensor (49152,), tensor (49152,), 0) it gives None, not tensor (49152,)

# %% [markdown]
# ## Exercise 2
# Compare at equal fluency. Each method takes the setting with the most hits among those whose disfluency is
# at most `limit`; a method without such a setting is out. Who is not clearly worse than the best? A method is
# clearly worse if its 95 % interval (`wilson`) lies below that of the best one.

# %%
def not_worse(results, limit, n):
    """results: {method: {setting: (hits of n, disfluency)}} -> the names that are left, a sorted list"""
    return None                 # your lines


curves = {"vector": {"c 1": (21, 5.0), "c 2": (27, 6.0), "c 4": (12, 5.5)}, "prompt": {"": (30, 6.0)},
          "mixture": {"s 2": (37, 12.5), "s 1": (33, 5.5)}, "votes": {"s 9": (1, 6.2), "s 1": (0, 4.2)}}
lesson.check(not_worse, ((curves, 7.0, 40), ["mixture", "prompt", "vector"]),
             ((curves, 5.7, 40), ["mixture"]), ((curves, 5.2, 40), ["vector"]),
             ((curves, 20.0, 40), ["mixture", "prompt"]), ((curves, 4.5, 40), ["votes"]))
#> not_worse: not yet. For (dict, 7, 40) it gives None, not ['mixture', 'prompt', 'vector']

# %% [markdown]
# ## Your own topic
# Ask for your own topic in words, and steer toward it with a vector of your own; compare the two at equal
# disfluency. Each needs a control of its own: for the vector, five random vectors (`random_like`, seeds 0 to
# 4); for the words, five requests of the same form for something else ("The following text is about a
# train."). What do you get from the vector that asking does not give you, and the other way round?
#
# **Now you know** that there are two places to steer, and how to compare them: at equal fluency, with equal
# effort spent on tuning, and with the costs beside the results. Next: [14](14_ten_methods.py), what else one
# can add.

# %% [markdown]
# # 13 · Activations or logits?
#
# **One wish, granted in four ways. What does each cost, and how does each fail?** 30 minutes, one of them computing. You need tutorials 05 and 09.
#
# ActAdd changes what flows through the model. Its rivals in the paper's tables change the text it reads (prompting), or mix the next token's
# probabilities with those of a second reading (PreADD) or with a classifier's vote (FUDGE). The wish: talk about weddings.

# %%
import random
import time

import lesson
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import ministeer
from ministeer.baselines import logits as decoding
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.measure import disfluency
from ministeer.steering import random_like

model, tokenizer = lesson.load()
prompt, n = "I went up to my friend and said", 40

# %% [markdown]
# ## 1. Change the activations
# Tutorial 04. One reading of the text, and once in it an addition.

# %%
weddings = ministeer.steering_vector(model, tokenizer, " weddings", " ", layer=1)
act_add = {f"c {c:g}": decoding.act_add(c * weddings) for c in (0.5, 1, 2)}
control = {f"c {c:g}": decoding.act_add(c * random_like(weddings, seed=0)) for c in (1, 2)}
print(len(act_add["c 1"].streams), "stream:", act_add["c 1"].streams[0].steer)
#> 1 stream: (<Steer ' weddings' - ' ': coeff 1.0 on 1 positions from 1 before block 1, d_model 576>,)

# %% [markdown]
# ## 2. Ask for it
# A line in front of the prompt. It is the rival that everybody has, and should be beaten first.

# %%
wish = "The following text is about a wedding."
prompted = {"": decoding.prompted(wish)}
print("before the prompt it reads:", tokenizer.pieces(decoding.prefixed(tokenizer, wish)))
#> before the prompt it reads: ['<|endoftext|>', 'The', ' following', ' text', ' is', ' about', ' a', ' wedding', '.', '\n']

# %% [markdown]
# ## 3. Exaggerate what asking changes
# PreADD (Pei et al. 2023) reads the text twice, with the line and without, and goes on in the direction from one to the other:
# log p + s (log q − log p). Both readings get the same drawn token, so they stay one text. At s = 1 this is asking; beyond, it is more than asking.

# %%
def toward(s):
    """PreADD toward the prefix (Pei et al. have both signs); `decoding.preadd` goes away from it, hence the minus."""
    return decoding.preadd(wish, strength=-s)


preadd = {f"s {s:g}": toward(s) for s in (1.5, 2, 3)}
ids = torch.tensor([tokenizer.encode(prompt)])
asked = torch.tensor([[*decoding.prefixed(tokenizer, wish), *tokenizer.encode(prompt, bos=False)]])
p, q = (model(some)[0][0, -1].log_softmax(dim=-1) for some in (ids, asked))
moved = (q - p).topk(3).indices.tolist()
print("asking makes likelier:", {piece: round((q - p)[i].item(), 1) for piece, i in zip(tokenizer.pieces(moved), moved, strict=True)}, "nats")
#> asking makes likelier: {'firehose': 4.7, ' wedding': 4.2, ' bride': 4.1} nats

# %% [markdown]
# ## 4. Let a classifier vote
# FUDGE (Yang and Klein 2021) asks a small classifier, for each of the likeliest next tokens (50 here, 200 in their code), whether the text would
# then be on its way to the wish. We train one here, on sentences from a few templates; it learns at every word, so it can judge an unfinished text.
# (A GRU reads token by token and keeps one vector of what it has read.)

# %%
draw = random.Random(0)
about = [["the bride", "the groom", "their wedding", "the marriage", "the honeymoon", "the wedding cake"],
         ["the harbour", "the train", "her new job", "the football match", "the weather", "his old car"]]
frames = ["I told my friend about {x} and", "She came late because of {x}, but", "They talked about {x} all evening", "We all looked forward to {x}",
          "He said that {x} was important to him", "Do you remember {x}?", "My mother never liked {x}"]
examples = [(draw.choice(frames).format(x=draw.choice(about[k % 2])), 1.0 - k % 2) for k in range(600)]
classifier = PrefixClassifier(model.config.n_vocab, d_embedding=32, d_state=32)
torch.manual_seed(0)
for layer in (classifier.embedding, classifier.gru, classifier.head):
    layer.reset_parameters()
optimizer = torch.optim.Adam(classifier.parameters(), lr=5e-3)
for start in range(0, 600, 20):
    for text, label in examples[start:start + 20]:
        states, _ = classifier.gru(classifier.embedding(torch.tensor([tokenizer.encode(text)])))
        (F.binary_cross_entropy_with_logits(classifier.head(states)[0, :, 0], torch.full((states.shape[1],), label)) / 20).backward()
    optimizer.step()
    optimizer.zero_grad()
classifier.requires_grad_(False)
for text in ("I told my", "I told my friend about the bride", "I told my friend about the train"):
    odds = classifier.score(classifier.read(torch.tensor([tokenizer.encode(text)])))
    print(f"{text!r:36} P(about a wedding) {odds.sigmoid().item():.1f}")
fudge = {f"s {s:g}": decoding.fudge(classifier, strength=s) for s in (1, 3, 9)}
#> 'I told my'                          P(about a wedding) 0.4±0.2
#> 'I told my friend about the bride'   P(about a wedding) 0.8±0.2
#> 'I told my friend about the train'   P(about a wedding) 0.2±0.2

# %% [markdown]
# ## What does each achieve?
# Forty completions each, the same random numbers for all, temperature 1 and top-p 0.3; share with a word about weddings, and disfluency.

# %%
methods = {"unsteered": {"": decoding.unsteered()}, "ActAdd": act_add, "ActAdd, random": control, "prompted": prompted, "PreADD": preadd,
           "FUDGE": fudge}


def measure(method):
    """-> (completions of n about weddings, disfluency, seconds, the first text)"""
    start = time.perf_counter()
    texts = decoding.generate(model, tokenizer, prompt, method, n, 30, top_p=0.3, freq_penalty=1.0)
    seconds = time.perf_counter() - start
    scored = disfluency(model, tokenizer, prompt, texts)
    surprise = torch.tensor([nll for nll, _ in scored]).sum().div(sum(k for _, k in scored)).exp().item()
    return sum(count_words(text) > 0 for text in texts), surprise, seconds, texts[0]


results = {name: {cell: measure(method) for cell, method in some.items()} for name, some in methods.items()}
for name, some in results.items():
    print(f"{name:14}", "   ".join(f"{cell}: {k} of {n}, {surprise:.1f}" for cell, (k, surprise, _, _) in some.items()))
#> unsteered      : 0±3 of 40, 3.8±0.8
#> ActAdd         c 0.5: 1±3 of 40, 4.3±0.9   c 1: 21±3 of 40, 5.7±1.1   c 2: 27±3 of 40, 6.0±1.2
#> ActAdd, random c 1: 0±3 of 40, 5.6±1.1   c 2: 1±3 of 40, 12.2±2.4
#> prompted       : 30±3 of 40, 6.0±1.2
#> PreADD         s 1.5: 37±3 of 40, 7.0±1.4   s 2: 37±3 of 40, 12.5±2.5   s 3: 40±3 of 40, 22.9±4.6
#> FUDGE          s 1: 0±3 of 40, 4.2±0.8   s 3: 0±3 of 40, 4.6±0.9   s 9: 1±3 of 40, 6.2±1.2

# %% [markdown]
# Each pair is `completions about weddings, disfluency`. Before you read it as a race: one prompt, one topic, made-up strengths. The fair race,
# with tuning on other prompts and a test for every row, is `benchmarks/rivals.py`.
#
# ## How does each fail?
# At its strongest setting:

# %%
for name in ("ActAdd", "prompted", "PreADD", "FUDGE"):
    cell, (_, _, _, text) = list(results[name].items())[-1]
    print(f"{name:8} {cell}: {text.strip()[:100]!r}")
#> ActAdd   c 2: ≈ "I'm not a good choice. I'm just so focused on the next thing. I've been trying to focus on my own go"
#> prompted : ≈ 'I was going to the wedding.\nI said, "Can I help you?"\nThe wedding was a surprise, so I said no.'
#> PreADD   s 3: ≈ 'hi I was thinking of wedding\nThe text goes wrong with grammar. It starts off with "I went" but it is'
#> FUDGE    s 9: ≈ ', "Aw, that\'s not right. You can\'t just change your mind."\n\nThis quote has been around for a long ti'

# %% [markdown]
# ActAdd leaves a third of the texts without a wedding, and more strength does not help (tutorial 05). A prompt is hard to beat: as many weddings, as
# fluent, no vector. PreADD at s 1.5 and 2 is not shown to beat the prompt at n 40; at s 3 it is, and the language breaks. FUDGE hardly ever gets
# there. Its classifier votes only on the likeliest 50 tokens, and after this prompt " wedding" has p 9e-07 (tutorial 04); whether that is the reason,
# or the small classifier, is not shown here.
#
# ## What does each cost?
# A second reading runs in the same batch as the first, so the weights are fetched once for both. (FUDGE reads once, but asks its classifier 50
# times a token, and that had to be trained.)

# %%
for name in ("ActAdd", "PreADD", "FUDGE"):
    cell = next(iter(methods[name]))
    print(f"{name:8} {len(methods[name][cell].streams)} reading(s) of the text for each token")
fast, slow = results["ActAdd"]["c 1"][2], results["PreADD"]["s 2"][2]
print("PreADD takes less than 2.5 times as long as ActAdd:", slow < 2.5 * fast)
#> ActAdd   1 reading(s) of the text for each token
#> PreADD   2 reading(s) of the text for each token
#> FUDGE    1 reading(s) of the text for each token
#> PreADD takes less than 2.5 times as long as ActAdd: True

# %% [markdown]
# ## The figure: wish against fluency

# %%
figure, axis = plt.subplots(figsize=(9, 4))
colours = {"unsteered": "black", "ActAdd": lesson.BLUE, "ActAdd, random": lesson.GREY, "prompted": lesson.PINK, "PreADD": lesson.ORANGE,
           "FUDGE": lesson.GREEN}
for name, some in results.items():
    x, y = [surprise for _, surprise, _, _ in some.values()], [k / n for k, _, _, _ in some.values()]
    low, high = zip(*(wilson(k, n) for k, _, _, _ in some.values()), strict=True)
    axis.errorbar(x, y, yerr=[[max(0, a - b) for a, b in zip(y, low, strict=True)], [max(0, b - a) for a, b in zip(y, high, strict=True)]],
                  fmt="s" if len(some) == 1 else "x" if "random" in name else "o-", color=colours[name], capsize=2, elinewidth=0.7, label=name)
    for cell, a, b in zip(some, x, y, strict=True):
        axis.annotate(cell, (a, b), (5, 6), textcoords="offset points", fontsize="x-small", color=colours[name])
axis.set_xscale("log")
axis.set_xticks([4, 6, 10, 20], ["4", "6", "10", "20"])
axis.minorticks_off()
axis.set_xlabel("disfluency (perplexity a token, unsteered model)")
axis.set_ylabel("completions with a word about weddings")
axis.set_ylim(-0.03, 1.04)
axis.set_title(f"n {n} a point, 95 % intervals", fontsize="medium")
axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.save(figure, "13_activations_or_logits")

# %% [markdown]
# ## Exercise 1
# LMA (Dekoninck et al. 2024) punishes only what a prefix makes likelier, and leaves alone what it makes unlikelier:
# log p − s · max(0, log q − log p). Write its formula.

# %%
def lma(p, q, s):
    """p, q (n_vocab,): log-probabilities without and with the prefix -> logits (n_vocab,)"""
    return None                 # your line


lesson.check(lma, ((p, q, 0.0), p), ((p, q, 9.0), decoding.lma("", 9.0).combine([p, q])))
#> lma: not yet. lma(a tensor (49152,), a tensor (49152,), 0) gives None; expected a tensor (49152,)

# %% [markdown]
# ## Exercise 2
# `method.steered(steer)` is the same method with ActAdd in its first reading. Ask for the wish *and* add the vector: what is then the first of its
# `.streams`? (It has a `.prefix` and a tuple `.steer`.)

# %%
def both(wish, steer):
    """-> (prefix, layer, coeff): what the first stream of your decoding.LogitMixer reads before the prompt, and its Steer's layer and coeff"""
    return None                 # your lines


lesson.check(both, ((wish, 2 * weddings), (wish, 1, 2.0)), (("Sing!", weddings), ("Sing!", 1, 1.0)))
#> both: not yet. both('The following text is about a wedding.', the steer) gives None; expected ['The following text is about a wedding.', 1, 2]

# %% [markdown]
# **You know now** that there are two places to steer, and how to compare them: at equal fluency, with equal effort spent on tuning, and with the cost
# beside. That was the last one: go and steer something.

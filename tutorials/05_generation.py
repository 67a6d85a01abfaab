# %% [markdown]
# # 05 · Generation, and coefficients
#
# **How strong may a vector be before the text breaks?** 25 minutes, one of them computing. You need tutorial 04.

# %%
import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.measure import disfluency
from ministeer.steering import random_like

model, tokenizer = lesson.load()
prompt = "I went up to my friend and said"
weddings = ministeer.steering_vector(model, tokenizer, " weddings", " ", layer=1)

# %% [markdown]
# ## How does a model choose the next token?
# It does not: it gives probabilities, and we draw. Three knobs change them first. *Temperature* divides the logits (0: always the likeliest token).
# *top_p* keeps the likeliest tokens that together reach p. *freq_penalty* takes something from the logit of a token for each time it was used.

# %%
for settings in ({"temperature": 0}, {"temperature": 1, "top_p": 0.3}, {"temperature": 1}, {"temperature": 2}):
    text = ministeer.generate(model, tokenizer, prompt, max_new_tokens=16, seed=1, **settings)[0]
    print(f"{settings}\n   {text!r}")
#> {'temperature': 0}
#> ≈ ', "I\'m going to the party tonight. I\'m going to the party'
#> {'temperature': 1, 'top_p': 0.3}
#> ≈ ', "Hey, I\'m Alex, I\'m going to the gym tomorrow."'
#> {'temperature': 1}
#> ≈ ", nope! I couldn't bring myself to carry it over. (When"
#> {'temperature': 2}
#> ≈ ' because you compound. Well laziar foundational docs posts lengthy advise lately Although extraordinary Problems'

# %% [markdown]
# The paper's first version draws with temperature 1, top_p 0.3 and a penalty of 1. We use the same here, in all that follows.
#
# ## What is a fair comparison?
# Steered and unsteered runs draw with the same random numbers here, whatever else changes. So the first pair below differs because of the vector and
# not by luck. (Ministeer makes a stream of numbers of seed, prompt and row.)

# %%
paper = {"top_p": 0.3, "freq_penalty": 1.0, "seed": 0}
for name, steer in (("unsteered", []), ("steered", [weddings]), ("random", [random_like(weddings, seed=0)])):
    print(f"{name:10}", repr(ministeer.generate(model, tokenizer, prompt, max_new_tokens=24, steer=steer, **paper)[0]))
#> unsteered  ≈ ', "Can I help you?"\n\nHe smiled and replied, "I\'m just a regular guy who loves music'
#> steered    ≈ ' that they had a wedding to celebrate their 10 years of marriage. They also had a wedding with 10'
#> random     ≈ ' "Lad, I\'m going to the next one."\n\nA: You\'re going to the next one.'

# %% [markdown]
# One text each proves nothing. We need many, and something to count.
#
# ## How often does it speak of weddings?
# We count completions with one of the paper's nine words: wedding(s), wed, marry, married, marriage, bride, groom, honeymoon. `wilson(k, n)` gives
# the 95 % interval (low, high) of k of n: made this way, 95 of 100 intervals hold the true share.
#
# About the call: A coefficient may have one value for each row of the batch, so the whole table below
# is one call; the random vector has the same norm in every row.

# %%
n, coeffs = 40, [0.5, 1.0, 2.0, 4.0, 8.0]


def completions(steer):
    """-> {coeff: n texts}, all drawn in one batch"""
    steer = steer.scaled(torch.tensor(coeffs).repeat_interleave(n))
    rows = ministeer.generate(model, tokenizer, [prompt] * len(coeffs), n, 30, steer, **paper)
    return dict(zip(coeffs, rows, strict=True))


def share(texts):
    return sum(count_words(text) > 0 for text in texts), len(texts)


steered, control = completions(weddings), completions(random_like(weddings, seed=0))
unsteered = ministeer.generate(model, tokenizer, prompt, n, 30, **paper)
print("unsteered   {:2} of {}".format(*share(unsteered)))
for c in coeffs:
    low, high = wilson(*share(steered[c]))
    print(f"coeff {c:3}   {share(steered[c])[0]:2} of {n}  (95 % {low:.0%} to {high:.0%})   random {share(control[c])[0]:2}")
#> unsteered    0±3 of 40
#> coeff 0.5   1±3 of 40  (95 % 0±8% to 13±8%)   random  0±3
#> coeff 1.0   21±3 of 40  (95 % 37±8% to 67±8%)   random  0±3
#> coeff 2.0   27±3 of 40  (95 % 52±8% to 80±8%)   random  1±3
#> coeff 4.0   12±3 of 40  (95 % 18±8% to 45±8%)   random  0±3
#> coeff 8.0   7±3 of 40  (95 % 9±8% to 32±8%)   random  0±3

# %% [markdown]
# 40 are few: the interval behind each number says how little you know. Coefficients 1 and 2 are not shown to differ; 2 and 4 are.
#
# ## Where does the text break?
# *Perplexity* is exp of the mean of −log p: 4 means as unsure as between 4 equally likely tokens. *Disfluency* is the perplexity of the continuation
# under the unsteered model: how surprising it finds each token. A text of that topic is a little
# more surprising than one that the model would have written by itself; a broken one very much.

# %%
def surprise(texts):
    pairs = disfluency(model, tokenizer, prompt, texts)
    return torch.tensor([nll for nll, _ in pairs]).sum().div(sum(k for _, k in pairs)).exp().item()


fluent = {c: (surprise(steered[c]), surprise(control[c])) for c in coeffs}
normal = surprise(unsteered)
print(f"unsteered {normal:7.1f}")
for c in coeffs:
    print(f"coeff {c:3} {fluent[c][0]:7.1f}   random {fluent[c][1]:7.1f}   {steered[c][0].strip()[:60]!r}")
#> unsteered     3.8±0.8
#> coeff 0.5   4.3±0.9   random   5.4±1.1   ≈ "I'd like to meet up. I'm going to the bar tonight, and I'm g"
#> coeff 1.0   5.7±1.1   random   5.6±1.1   ≈ 'that they had a wedding to celebrate their 10 years of marri'
#> coeff 2.0   6.0±1.2   random   12.2±2.4   ≈ "I'm not a good choice. I'm just so focused on the next thing"
#> coeff 4.0   5.6±1.1   random   13.2±2.6   ≈ "I'm not married. I'm a single mom with two kids, 20. My husb"
#> coeff 8.0   5.4±1.1   random   14.4±2.9   ≈ "I'm not going to be able to make it. I've been doing this fo"

# %% [markdown]
# The steered texts do not break, not even at coefficient 8. The norm at the head of each block (tutorial 02) takes the length away, which explains
# why more strength soon changes little. It does not explain why the topic goes down again from 4 on, nor why random vectors cost more: from 2 on
# their texts are three to four times as surprising as unsteered ones, and say nothing about weddings.
#
# ## The figure: topic and fluency by coefficient

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for texts, color, label in ((steered, lesson.BLUE, "steered"), (control, lesson.GREY, "random, same norm")):
    shares = [share(texts[c]) for c in coeffs]
    low, high = zip(*(wilson(*some) for some in shares), strict=True)
    left.plot(coeffs, [k / m for k, m in shares], "o-", color=color, label=label)
    left.fill_between(coeffs, low, high, color=color, alpha=0.2, linewidth=0)
    right.plot(coeffs, [fluent[c][label != "steered"] for c in coeffs], "o-", color=color)
left.axhline(share(unsteered)[0] / n, color="black", linestyle="--", linewidth=0.8, label="unsteered")
right.axhline(normal, color="black", linestyle="--", linewidth=0.8)
for axis in (left, right):
    axis.set_xscale("log", base=2)
    axis.set_xticks(coeffs, [f"{c:g}" for c in coeffs])
    axis.set_xlabel("coefficient")
left.set_ylim(-0.03, 1)
left.set_ylabel("completions with a word about weddings")
left.set_title(f"n {n} a point, 95 % band", fontsize="medium")
right.set_ylim(0, None)
right.set_ylabel("disfluency (perplexity a token)")
left.legend(fontsize="small")
lesson.save(figure, "05_generation")

# %% [markdown]
# ## Exercise 1
# Write the nucleus: which tokens stay in the draw with `top_p`?

# %%
def kept(p, top_p):
    """p (n_vocab,) -> the numbers of the tokens that stay, a list, likeliest first.

    Take the likeliest tokens until their sum is more than top_p; the one that crosses it is in.
    """
    return None                 # your lines


made = torch.tensor([0.05, 0.5, 0.1, 0.35])
lesson.check(kept, ((made, 0.3), [1]), ((made, 0.6), [1, 3]), ((made, 0.9), [1, 3, 2]))
#> kept: not yet. kept(a tensor (4,), 0.3) gives None; expected [1]

# %% [markdown]
# ## Exercise 2
# How many completions must you draw before the 95 % interval of a share near 50 % is narrower than `width`? Use `wilson(n // 2, n)`.

# %%
def enough(width):
    """-> the smallest even n whose interval at n / 2 of n is narrower than `width`, an int"""
    return None                 # your lines


lesson.check(enough, ((0.5,), 12), ((0.2,), 94), ((0.1,), 382))
#> enough: not yet. enough(0.5) gives None; expected 12

# %% [markdown]
# **You know now** how texts are drawn, that the comparison needs a control and an n, and what a coefficient costs.
# Next: [06](06_cache.py): the vector was added to the prompt only. How can it still act 30 tokens later?

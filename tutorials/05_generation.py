# %% [markdown]
# # 05 · Generation, and coefficients
#
# **How strong may a vector be before the text breaks?** 25 minutes, one of them computing. You need tutorial
# 04.

# %%
import math

import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.measure import disfluency
from ministeer.evaluation.stats import wilson
from ministeer.steering import random_like

model, tokenizer = lesson.load()
prompt = "I went up to my friend and said"
weddings = ministeer.steering_vector(model, tokenizer, " weddings", " ", layer=1)

# %% [markdown]
# ## How does a model choose the next token?
# It does not choose: it gives probabilities, and we sample from them. Three settings change the probabilities
# first. *Temperature* divides the logits; 0 means to take the likeliest token every time. *top_p* keeps the
# likeliest tokens that together reach the probability p. *freq_penalty* lowers the logit of a token each time
# that token has been used.

# %%
choices = [{"temperature": 0}, {"temperature": 1, "top_p": 0.3}, {"temperature": 1}, {"temperature": 2}]
for settings in choices:
    text = ministeer.generate(model, tokenizer, prompt, max_new_tokens=16, seed=1, **settings)[0]
    print(f"{settings}\n   {text[:90]!r}")
#> {'temperature': 0}
#> ≈ ', "I\'m going to the party tonight. I\'m going to the party'
#> {'temperature': 1, 'top_p': 0.3}
#> ≈ ', "Hey, I\'m Alex, I\'m going to the gym tomorrow."'
#> {'temperature': 1}
#> ≈ ", nope! I couldn't bring myself to carry it over. (When"
#> {'temperature': 2}
#> ≈ ' because you compound. Well laziar foundational docs posts lengthy advise lately Although e'

# %% [markdown]
# The first version of the paper uses temperature 1, top_p 0.3 and a penalty of 1. From here on, so do we.
#
# ## What is a fair comparison?
# In ministeer, steered and unsteered runs use the same random numbers, whatever else changes between them:
# they depend only on the seed, the prompt and the row. So when the first two texts below differ, it is
# because of the vector and not because of luck.

# %%
paper_settings = {"top_p": 0.3, "freq_penalty": 1.0, "seed": 0}
for name, steer in (("unsteered", []), ("steered", [weddings]), ("random", [random_like(weddings, seed=0)])):
    text = ministeer.generate(model, tokenizer, prompt, max_new_tokens=24, steer=steer, **paper_settings)[0]
    print(f"{name:10}", repr(text[:90]))
#> unsteered  ≈ ', "Can I help you?"\n\nHe smiled and replied, "I\'m just a regular guy who loves music'
#> steered    ≈ ' that they had a wedding to celebrate their 10 years of marriage. They also had a wedding w'
#> random     ≈ ' "Lad, I\'m going to the next one."\n\nA: You\'re going to the next one.'

# %% [markdown]
# One text of each kind proves nothing. We need many, and something to count.
#
# ## How often does it mention weddings?
# We count the completions that contain one of the paper's nine words: wedding(s), wed, marry, married,
# marriage, bride, groom, honeymoon. `wilson(k, n)` gives a 95 % interval (low, high) for k out of n: of 100
# intervals made this way, about 95 contain the true share.
#
# A coefficient may have one value for each row of the batch, so one call makes all the steered texts below.
# The random vector has the same norm as the steering vector in every row.

# %%
n, coeffs = 40, [0.5, 1.0, 2.0, 4.0, 8.0]


def completions(steer):
    """-> {coeff: n texts}, all sampled in one batch"""
    steer = steer.scaled(torch.tensor(coeffs).repeat_interleave(n))
    rows = ministeer.generate(model, tokenizer, [prompt] * len(coeffs), n, 30, steer, **paper_settings)
    return dict(zip(coeffs, rows, strict=True))


def count(texts):
    """-> how many texts mention weddings"""
    return sum(count_words(text) > 0 for text in texts)


steered, control = completions(weddings), completions(random_like(weddings, seed=0))
unsteered = ministeer.generate(model, tokenizer, prompt, n, 30, **paper_settings)
print(f"unsteered   {count(unsteered):2} of {n}")
for c in coeffs:
    k = count(steered[c])
    low, high = wilson(k, n)
    print(f"coeff {c:3}   {k:2} of {n}  (95 % {low:.0%} to {high:.0%})   random {count(control[c]):2}")
#> unsteered    0 of 40
#> coeff 0.5   1 of 40  (95 % 0% to 13%)   random  0
#> coeff 1.0   21 of 40  (95 % 37% to 67%)   random  0
#> coeff 2.0   27 of 40  (95 % 52% to 80%)   random  1
#> coeff 4.0   12 of 40  (95 % 18% to 45%)   random  0
#> coeff 8.0   7 of 40  (95 % 9% to 32%)   random  0

# %% [markdown]
# Forty texts are few: the interval beside each number shows how little you know. These numbers do not show
# that coefficients 1 and 2 differ. They do show that 2 and 4 differ.
#
# ## Where does the text break?
# *Perplexity* is the exponential of the mean of −log p. A perplexity of 4 means that the model is as unsure
# as if it had to choose among 4 equally likely tokens. *Disfluency* is the perplexity of the continuation
# under the unsteered model: how surprising that model finds each token. A text on the wanted topic is a
# little more surprising than one that the model would have written by itself. A broken text is far more
# surprising.

# %%
def surprise(texts):
    """-> the disfluency of all the texts together"""
    pairs = disfluency(model, tokenizer, prompt, texts)     # for each text the sum of -log p, and its tokens
    return math.exp(sum(nll for nll, _ in pairs) / sum(n_tokens for _, n_tokens in pairs))


surprise_steered = {c: surprise(steered[c]) for c in coeffs}
surprise_control = {c: surprise(control[c]) for c in coeffs}
surprise_unsteered = surprise(unsteered)
print(f"unsteered {surprise_unsteered:7.1f}")
for c in coeffs:
    first = steered[c][0].strip()[:60]
    print(f"coeff {c:3} {surprise_steered[c]:7.1f}   random {surprise_control[c]:7.1f}   {first!r}")
#> unsteered     3.8
#> coeff 0.5   4.3   random   5.4   ≈ "I'd like to meet up. I'm going to the bar tonight, and I'm g"
#> coeff 1.0   5.7   random   5.6   ≈ 'that they had a wedding to celebrate their 10 years of marri'
#> coeff 2.0   6.0   random   5.4   ≈ "I'm not a good choice. I'm just so focused on the next thing"
#> coeff 4.0   5.6   random   4.8   ≈ "I'm not married. I'm a single mom with two kids, 20. My husb"
#> coeff 8.0   5.4   random   5.6   ≈ "I'm not going to be able to make it. I've been doing this fo"

# %% [markdown]
# The steered texts do not break, not even at coefficient 8. The norm at the start of each block (tutorial 02)
# takes away the size of the stream, which explains why more strength soon changes little. It does not explain
# why the topic becomes rarer again from 4 on. This random vector costs about as much fluency as the steering
# vector, and its texts say nothing about weddings. Another random vector may cost more: it is one draw, and
# tutorial 07 takes five.
#
# ## The figure: topic and fluency by coefficient

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for texts, surprises, color, label in ((steered, surprise_steered, lesson.BLUE, "steered"),
                                       (control, surprise_control, lesson.GREY, "random, same norm")):
    counts = [count(texts[c]) for c in coeffs]
    low, high = zip(*(wilson(k, n) for k in counts), strict=True)
    left.plot(coeffs, [k / n for k in counts], "o-", color=color, label=label)
    left.fill_between(coeffs, low, high, color=color, alpha=0.2, linewidth=0)
    right.plot(coeffs, surprises.values(), "o-", color=color)
left.axhline(count(unsteered) / n, color="black", linestyle="--", linewidth=0.8, label="unsteered")
right.axhline(surprise_unsteered, color="black", linestyle="--", linewidth=0.8)
for axis in (left, right):
    axis.set_xscale("log", base=2)
    axis.set_xticks(coeffs, [f"{c:g}" for c in coeffs])
    axis.set_xlabel("coefficient")
left.set_ylim(-0.03, 1)
left.set_ylabel("completions with a wedding word")
left.set_title(f"n {n} a point, 95 % band", fontsize="medium")
right.set_ylim(0, None)
right.set_ylabel("disfluency (perplexity per token)")
left.legend(fontsize="small")
lesson.save(figure, "05_generation")

# %% [markdown]
# ## Exercise 1
# Write the nucleus: which tokens can be sampled with `top_p`?

# %%
def kept(p, top_p):
    """p (n_vocab,) -> the numbers of the tokens that are kept, a list, likeliest first.

    Take the likeliest tokens until their sum is more than top_p; the token that crosses it is kept.
    """
    return None                 # your lines


p, halves = torch.tensor([0.05, 0.5, 0.1, 0.35]), torch.tensor([0.125, 0.375, 0.5])
lesson.check(kept, ((p, 0.3), [1]), ((p, 0.6), [1, 3]), ((p, 0.9), [1, 3, 2]), ((p, 1.0), [1, 3, 2, 0]),
             ((halves, 0.5), [2, 1]))
#> kept: not yet. For (tensor (4,), 0.3) it gives None, not [1]

# %% [markdown]
# ## Exercise 2
# How many completions do you need before the 95 % interval of a share near 50 % is narrower than `width`? Use
# `wilson(n // 2, n)`.

# %%
def enough(width):
    """-> the smallest even n whose interval at n / 2 of n is narrower than `width`, an int"""
    return None                 # your lines


lesson.check(enough, ((0.5,), 12), ((0.2,), 94), ((0.1,), 382))
#> enough: not yet. For (0.5) it gives None, not 12

# %% [markdown]
# ## Your own topic
# Write a set of words for your topic, and count it with `count_words(text, words)` at five coefficients of
# your own vector. Beside each count and each disfluency, set the unsteered one and the range of five random
# vectors (`random_like`, seeds 0 to 4). From which coefficient on does the topic leave that range, and from
# which on does the disfluency?
#
# **Now you know** how texts are sampled, that a comparison needs a control and an n, and what a coefficient
# costs. Next: [06](06_cache.py): the vector was added to the prompt only. How can it still act 30 tokens
# later?

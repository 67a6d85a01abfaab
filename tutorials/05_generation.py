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
from ministeer.evaluation.stats import bootstrap, wilson
from ministeer.evaluation.steerability import strength
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
    text = ministeer.generate(model, tokenizer, prompt, max_new_tokens=14, seed=1, **settings)[0]
    print(f"{settings}\n   {text[:90]!r}")
#> {'temperature': 0}
#> ≈ ', "I\'m going to the party tonight. I\'m going to'
#> {'temperature': 1, 'top_p': 0.3}
#> ≈ ', "Hey, I\'m Alex, I\'m going to the gym'
#> {'temperature': 1}
#> ≈ ", nope! I couldn't bring myself to carry it over."
#> {'temperature': 2}
#> ≈ ' because you compound. Well laziar foundational docs posts lengthy advise lately Although'

# %% [markdown]
# The first version of the paper uses temperature 1, top_p 0.3 and a penalty of 1. From here on, so do we.
#
# ## What is a fair comparison?
# In ministeer, steered and unsteered runs use the same random numbers, whatever else changes between them:
# they depend only on the seed, the prompt and the row. So when the first two texts below differ, it is
# because of the vector and not because of luck.

# %%
paper_settings = {"top_p": 0.3, "freq_penalty": 1.0, "seed": 0}
for name, steer in (("unsteered", []), ("steered", weddings), ("random", random_like(weddings, seed=0))):
    text = ministeer.generate(model, tokenizer, prompt, max_new_tokens=20, steer=steer, **paper_settings)[0]
    print(f"{name:10}", repr(text[:90]))
#> unsteered  ≈ ', "Can I help you?"\n\nHe smiled and replied, "I\'m just a regular'
#> steered    ≈ ' that they had a wedding to celebrate their 10 years of marriage. They also had a wedding'
#> random     ≈ ' I should make a movie about the new kid in town. What do you think?'

# %% [markdown]
# One text of each kind proves nothing. We need many, and something to count.
#
# ## How often does it mention weddings, and what does it cost?
# We count the completions that contain one of the paper's nine words: wedding(s), wed, marry, married,
# marriage, bride, groom, honeymoon. `wilson(k, n)` gives a 95 % interval (low, high) for k out of n: of 100
# intervals made this way, about 95 contain the true share.
#
# *Perplexity* is the exponential of the mean of −log p. A perplexity of 4 means that the model is as unsure
# as if it had to choose among 4 equally likely tokens. *Disfluency* is the perplexity of the continuation
# under the unsteered model: how surprising that model finds each token. A broken text is far more surprising
# than one that the model would have written by itself. (`bootstrap` gives the interval, see tutorial 08.)
#
# The control is five random vectors with the norm of the steering vector. Each of them writes n / 5 texts.

# %%
def completions(steers, n):
    """-> for each Steer a list of n texts, all written in one batch, which is faster than many small ones"""
    in_own_rows = []
    for i, steer in enumerate(steers):
        coeff = torch.zeros(len(steers) * n)
        coeff[i * n:(i + 1) * n] = steer.coeff          # its own n rows; in all others it adds 0
        in_own_rows.append(steer.scaled(coeff))
    prompts = [prompt] * len(steers)
    return ministeer.generate(model, tokenizer, prompts, n, 20, in_own_rows, **paper_settings)


def count(texts):
    """-> how many texts mention weddings"""
    return sum(count_words(text) > 0 for text in texts)


def surprise(texts):
    """-> the disfluency of all the texts together, and its 95 % interval"""
    scored = disfluency(model, tokenizer, prompt, texts)    # for each text the sum of -log p, and its tokens
    lengths = [max(1, n_tokens) for _, n_tokens in scored]
    means = [nll / length for (nll, _), length in zip(scored, lengths, strict=True)]
    low, high = bootstrap(means, lengths)
    return math.exp(sum(nll for nll, _ in scored) / sum(lengths)), (math.exp(low), math.exp(high))


def measure(where, steer, coeffs, n):
    """-> for each coefficient (it, topic, fluency): a value, its interval, and five random values each"""
    rows, five = [], [random_like(steer, seed) for seed in range(5)]
    steered = completions([c * steer for c in coeffs], n)
    control = completions([c * random for c in coeffs for random in five], n // 5)
    for i, c in enumerate(coeffs):
        groups = control[5 * i:5 * i + 5]
        k, (low, high) = count(steered[i]), wilson(count(steered[i]), n)
        counts = [count(texts) for texts in groups]
        print(f"{where}, c {c}: {k} of {n} ({low:.0%} to {high:.0%}), random {counts} of {n // 5}")
        topic = k / n, (low, high), [k / (n // 5) for k in counts]
        value, (low, high) = surprise(steered[i])
        values = [surprise(texts)[0] for texts in groups]
        print(f"   disfluency {value:.1f} ({low:.1f} to {high:.1f}), "
              f"random {min(values):.1f} to {max(values):.1f}, {steered[i][0].strip()[:32]!r}")
        rows.append((c, topic, (value, (low, high), values)))
    return rows


n = 20
unsteered = ministeer.generate(model, tokenizer, prompt, n, 20, **paper_settings)
plain = count(unsteered) / n, surprise(unsteered)[0]
print(f"unsteered: {count(unsteered)} of {n}, disfluency {plain[1]:.1f}")
front = measure("position 1", weddings, [0.5, 1.0, 2.0, 8.0], n)
print(f"c 1.0 is {strength(model, tokenizer, weddings, [prompt]):.2f} × the mean norm of the stream there")
#> unsteered: 0 of 20, disfluency 3.9
#> position 1, c 0.5: 0 of 20 (0% to 16%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 4.5 (4.2 to 4.8), random 4.0 to 5.7, ≈ "I'd like to meet up. I'm going t"
#> position 1, c 1.0: 10 of 20 (30% to 70%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 6.5 (5.8 to 7.2), random 3.6 to 5.6, ≈ 'that they had a wedding to celeb'
#> position 1, c 2.0: 12 of 20 (39% to 78%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 6.7 (5.7 to 7.9), random 3.8 to 6.6, ≈ "I'm not a good choice. I'm just "
#> position 1, c 8.0: 2 of 20 (3% to 30%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 6.3 (5.6 to 7.1), random 4.4 to 6.6, ≈ "I'm not going to be able to make"
#> c 1.0 is 1.79 × the mean norm of the stream there

# %% [markdown]
# Twenty texts are few: these numbers do not show that coefficients 1 and 2 differ. They do show that 2 and 8
# differ. No random vector brings the topic in: at each strength, at most one of its four texts is about
# weddings.
#
# The text does not break, not even at 8. Its disfluency is as high as with the random vectors, or a little
# higher, perhaps because a wedding is a surprise in itself. Why does strength change so little? Let us look
# at what block 1 reads at position 1.

# %%
print(f"the vector: norm {weddings.vector.norm():.0f}")
ids = torch.tensor([tokenizer.encode(prompt)])
for c in [0.0, 0.5, 1.0, 2.0, 8.0]:
    _, resid = model(ids, c * weddings)
    x = resid[1][0, 1]
    normed = x / x.square().mean().sqrt()       # without the learned weights
    cosine = torch.cosine_similarity(x, weddings.vector[0], dim=0)
    print(f"c {c}: norm {x.norm():3.0f}, in the block {normed.norm():.0f}, cosine with it {cosine:5.2f}")
#> the vector: norm 77
#> c 0.0: norm  42, in the block 24, cosine with it -0.14
#> c 0.5: norm  53, in the block 24, cosine with it  0.62
#> c 1.0: norm  83, in the block 24, cosine with it  0.87
#> c 2.0: norm 155, in the block 24, cosine with it  0.96
#> c 8.0: norm 614, in the block 24, cosine with it  1.00

# %% [markdown]
# A block first divides by the size of the stream (tutorial 02), so inside it the norm is always √576, or 24.
# From coefficient 2 on, what is left is nearly the vector alone: a cosine of 1 means the same direction. So
# to block 1, coefficient 8 is hardly more than 2. Perhaps this is why the text holds. It does not explain why
# the topic is rarer at 8; we do not know why.
#
# ## What does break it?
# We add the same row at *every* position from 1 on, those of the new tokens included. A vector with one axis
# does that.

# %%
everywhere = measure("every position", ministeer.Steer(1, weddings.vector[0]), [0.25, 0.5], n=10)
#> every position, c 0.25: 1 of 10 (2% to 40%), random [0, 0, 0, 0, 0] of 2
#>    disfluency 9.8 (7.5 to 13.2), random 5.3 to 13.6, ≈ 'hello.\n\nThe other day I was at t'
#> every position, c 0.5: 2 of 10 (6% to 51%), random [0, 0, 0, 0, 0] of 2
#>    disfluency 137.4 (77.4 to 277.8), random 11.2 to 441.1, ≈ 'she to her.\n\n\n\n\nNutrition is a m'

# %% [markdown]
# **So how strong?** At position 1, coefficient 1 or 2 brings the topic, and 8 does not break the text. At
# every position, 0.25 makes it two to three times as surprising, and 0.5 breaks it. There, random vectors of
# the same norm give a disfluency of 11 to 441, so size alone can break a text. At 0.5 the row has norm 39,
# almost that of the stream at position 1 (42 without the vector). Perhaps a text breaks where what is added
# at every position is as large as what was there. This is one case, so it is a guess.
#
# ## The figure: topic and fluency by coefficient

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4))
for rows, marker, color, where, shift in ((front, "o", lesson.BLUE, f"position 1, n {n}", 1),
                                          (everywhere, "^", lesson.ORANGE, "every position, n 10", 0.85)):
    axes[0].plot([], [], marker, color=color, label=where)
    axes[0].plot([], [], marker, color=lesson.GREY, markersize=4, label="… five random vectors, n / 5 each")
    for c, topic, fluency in rows:
        for axis, (value, interval, five) in zip(axes, (topic, fluency), strict=True):
            lesson.errorbars(axis, [shift * c], [value], [interval], fmt=marker, color=color)
            axis.plot([1.07 * shift * c] * 5, five, marker, color=lesson.GREY, markersize=4)
labels = "completions with a wedding word", "disfluency (perplexity per token)"
for axis, value, label in zip(axes, plain, labels, strict=True):
    axis.axhline(value, color="black", linestyle="--", linewidth=0.8, label=f"unsteered, n {n}")
    axis.set_xscale("log", base=2)
    axis.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    axis.set_xlabel("coefficient (bars: 95 % intervals)")
    axis.set_ylabel(label)
axes[0].set_ylim(-0.03, 1)
axes[1].set_yscale("log")
axes[1].set_yticks([4, 10, 100, 1000], ["4", "10", "100", "1000"])
axes[1].minorticks_off()
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
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

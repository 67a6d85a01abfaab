# %% [markdown]
# # 11 · From one pair to many
#
# **ActAdd makes its vector from two prompts, and adds it at the front. What do you gain with many texts, and
# with a vector at all positions?** 30 minutes, one of them computing. You need tutorials 05 and 07.
#
# The best-known relative of ActAdd is *contrastive activation addition* (CAA; Rimsky et al. 2024). Take many
# pairs of texts, subtract the streams at their last tokens, and average the differences. Add the resulting
# row at every position after the user's prompt. (In their paper, the last token is the letter A or B of an
# answer. We do something simpler: pairs of sentences, and the row is added at every position after BOS.)

# %%
import math

import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer import Steer
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.measure import disfluency
from ministeer.evaluation.stats import bootstrap, wilson
from ministeer.evaluation.steerability import strength
from ministeer.methods.many_pairs import agreement, caa, differences, last_states
from ministeer.steering import random_like

model, tokenizer = lesson.load()
pairs = [line.split(" / ") for line in """\
Tonight they talk about the wedding / Tonight they talk about the weather
She dreams of her wedding / She dreams of her holiday
He wrote a long letter to his bride / He wrote a long letter to his boss
We were late for the marriage / We were late for the train
The guests are waiting for the groom / The guests are waiting for the soup
My brother wants to marry / My brother wants to leave
Everybody cried at the wedding / Everybody cried at the airport
The whole village came to the wedding / The whole village came to the market
They saved money for their honeymoon / They saved money for their car
Her friends asked about the groom / Her friends asked about the exam
I read a story about a bride / I read a story about a dog
They are happily married / They are happily asleep""".splitlines()]
plus, minus = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
print(len(pairs), "pairs, alike except for the last word")
#> 12 pairs, alike except for the last word

# %% [markdown]
# ## How is the vector made?
# Run every text, keep the last position of `resid[l]`, subtract (`differences`), and average (`caa`). What
# the two texts of a pair have in common cancels. What differs in only one pair averages out.

# %%
rows = differences(model, tokenizer, plus, minus)       # (pairs, n_layer + 1, d_model)
mean = caa(model, tokenizer, plus, minus, layer=12)
print(mean)
print("the mean of the rows at layer 12:", torch.allclose(mean.vector, rows[:, 12].mean(dim=0), atol=1e-3))
#> <Steer a vector (agreement 0.25): coeff 1.0 at every position from 1 on before block 12, d_model 576>
#> the mean of the rows at layer 12: True

# %% [markdown]
# A vector with one axis, `(d_model,)`, goes to every position from `start` on. The ActAdd vector has two
# axes, `(n, d_model)`, and goes to n positions. We take layer 12, because middle layers are usual for vectors
# at all positions. It was not tuned.
#
# ## Do the pairs agree?
# `agreement` is the mean cosine of two different pairs' differences, at each layer. If they pointed in random
# directions, it would be about 0 in 576 dimensions. The higher it is, the more reliably their mean steers
# (Braun et al. 2025), so the vector's repr shows it. The control: sentences that have nothing in common, six
# pairs of the twelve without a wedding.

# %%
unrelated = differences(model, tokenizer, minus[0::2], minus[1::2])
for layer in (2, 12, 20, 28):
    ours, control = agreement(rows)[layer], agreement(unrelated)[layer]
    print(f"layer {layer:2}: mean cosine {ours:.2f}, unrelated sentences {control:.2f}")
#> layer  2: mean cosine 0.21, unrelated sentences 0.01
#> layer 12: mean cosine 0.25, unrelated sentences 0.02
#> layer 20: mean cosine 0.23, unrelated sentences 0.03
#> layer 28: mean cosine 0.17, unrelated sentences -0.01

# %% [markdown]
# The pairs have something in common: 0.25 is far from 1, but far above what unrelated sentences have.
#
# ## Spoil it
# One bad pair slips in: a full stop too many, a pair the wrong way round, a text left empty. Which one moves
# the mean most? Rank the three, add a bad pair of your own, and only then run the cell. It prints the cosine
# of the new mean with the old one.

# %%
bad_pairs = [("We talked about the wedding.", "We talked about the weather"),
             ("We talked about the weather", "We talked about the wedding"),
             ("We talked about the wedding", "")]
norms = rows[:, 12].norm(dim=-1)
print(f"the twelve differences: norm {norms.min():.0f} to {norms.max():.0f}")
for bad in bad_pairs:
    h_plus, h_minus = last_states(model, tokenizer, bad)[:, 12]
    row = h_plus - h_minus
    spoiled = torch.cat([rows[:, 12], row[None]]).mean(dim=0)
    cosine = torch.cosine_similarity(spoiled, mean.vector, dim=0)
    print(f"norm {row.norm():5.0f}, cosine {cosine:.2f}: {bad}")
#> the twelve differences: norm 119 to 151
#> norm   139, cosine 0.99: ('We talked about the wedding.', 'We talked about the weather')
#> norm   133, cosine 0.99: ('We talked about the weather', 'We talked about the wedding')
#> norm 20496, cosine 0.05: ('We talked about the wedding', '')

# %% [markdown]
# The mean of twelve forgives a pair that points the wrong way, but not one with a huge norm. The empty text
# ends in BOS, a sink (tutorial 03): its stream is so large that the mean is hardly anything else. So look at
# the norms of your rows before you average them.
#
# ## Which is better?
# This is not a fair question unless we also say what each method costs. So for each method and coefficient we
# give the completions about weddings and the disfluency, beside those of five random vectors (tutorial 05).
# A coefficient means little by itself, so we first print the strength: how large the addition is, in mean
# norms of the layer's stream (BOS left out).

# %%
n, prompt = 20, "I went up to my friend and said"


def completions(steers, n):
    """-> for each Steer a list of n texts, written in one batch; each Steer acts in n rows of its own"""
    in_own_rows = []
    for i, steer in enumerate(steers):
        coeff = torch.zeros(len(steers) * n)
        coeff[i * n:(i + 1) * n] = steer.coeff
        in_own_rows.append(steer.scaled(coeff))
    prompts = [prompt] * len(steers)
    return ministeer.generate(model, tokenizer, prompts, n, 20, in_own_rows, top_p=0.3, freq_penalty=1.0)


def measure(texts):
    """-> how many have a wedding word, the disfluency of all together, and its 95 % interval"""
    scored = disfluency(model, tokenizer, prompt, texts)
    lengths = [max(1, n_tokens) for _, n_tokens in scored]
    low, high = bootstrap([nll / k for (nll, _), k in zip(scored, lengths, strict=True)], lengths)
    value = math.exp(sum(nll for nll, _ in scored) / sum(lengths))
    return sum(count_words(text) > 0 for text in texts), value, (math.exp(low), math.exp(high))


actadd = ministeer.steering_vector(model, tokenizer, " weddings", " ", layer=1)
front = Steer(12, mean.vector[None])            # the same row, at position 1 alone
settings = [("ActAdd", actadd, 1.0), ("CAA", mean, 0.25), ("CAA", mean, 0.5), ("CAA", mean, 1.0),
            ("CAA at the front", front, 4.0)]
five = [c * random_like(steer, seed) for _, steer, c in settings for seed in range(5)]
for name, steer, c in settings:
    print(f"{name}, c {c}: {strength(model, tokenizer, c * steer, [prompt]):.2f} × the layer's mean norm")
unsteered = completions([Steer(1, actadd.vector, 0.0)], n)[0]
steered, control = completions([c * steer for _, steer, c in settings], n), completions(five, n // 5)

k, value, (low, high) = measure(unsteered)
print(f"unsteered: {k} of {n}, disfluency {value:.1f} ({low:.1f} to {high:.1f})")
results = []
for i, (name, _, c) in enumerate(settings):
    k, value, (low, high) = measure(steered[i])
    least, most = wilson(k, n)
    randoms = [measure(texts)[:2] for texts in control[5 * i:5 * i + 5]]
    counts, values = [count for count, _ in randoms], [value for _, value in randoms]
    print(f"{name}, c {c}: {k} of {n} ({least:.0%} to {most:.0%}), random {counts} of {n // 5}")
    print(f"   disfluency {value:.1f} ({low:.1f} to {high:.1f}), "
          f"random {min(values):.1f} to {max(values):.1f}, {steered[i][0].strip()[:32]!r}")
    results.append((name, c, k, value, counts, values))
#> ActAdd, c 1.0: 1.79 × the layer's mean norm
#> CAA, c 0.25: 0.10 × the layer's mean norm
#> CAA, c 0.5: 0.19 × the layer's mean norm
#> CAA, c 1.0: 0.39 × the layer's mean norm
#> CAA at the front, c 4.0: 1.54 × the layer's mean norm
#> unsteered: 0 of 20, disfluency 3.9 (3.6 to 4.3)
#> ActAdd, c 1.0: 10 of 20 (30% to 70%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 6.5 (5.8 to 7.2), random 3.6 to 5.6, ≈ 'that they had a wedding to celeb'
#> CAA, c 0.25: 5 of 20 (11% to 47%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 4.7 (4.2 to 5.1), random 4.1 to 5.2, ≈ ', "Dad, I\'m going to be married.'
#> CAA, c 0.5: 14 of 20 (48% to 85%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 8.8 (8.1 to 9.5), random 4.4 to 7.7, ≈ "I'm a single mother.\n\nI was 20 y"
#> CAA, c 1.0: 10 of 20 (30% to 70%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 14.0 (12.5 to 15.8), random 9.8 to 11.9, ≈ 'she will be a mother to two chil'
#> CAA at the front, c 4.0: 0 of 20 (0% to 16%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 4.4 (4.1 to 4.6), random 3.9 to 4.8, ≈ ', "It\'s a beautiful day, I\'m so '

# %% [markdown]
# CAA brings the topic in at a smaller coefficient, perhaps because it acts on every new token. No random
# vector brings it in. CAA also costs more: 8.8 at 0.5 and 14.0 at 1, against 6.5 for ActAdd. Much of this is
# size: at 1, random vectors of the same norm cost more than ActAdd, too.
#
# The same row at position 1 alone brings no weddings. Is that because it was taken from the *end* of
# sentences? Perhaps. But around block 12, ActAdd's own vector hardly works at the front either (tutorial 07),
# so this result does not tell.
#
# ## The figure: topic against disfluency

# %%
figure, axis = plt.subplots(figsize=(9, 4))
styles = {"ActAdd": ("o", lesson.BLUE), "CAA": ("s", lesson.ORANGE), "CAA at the front": ("^", lesson.GREEN)}
for name, c, k, value, counts, values in results:
    marker, color = styles[name]
    lesson.errorbars(axis, [value], [k / n], [wilson(k, n)], fmt=marker, color=color)
    axis.annotate(f"c {c:g}", (value, k / n), (6, 4), textcoords="offset points", color=color)
    axis.plot(values, [count / (n // 5) for count in counts], marker, color=lesson.GREY, markersize=3)
for name, (marker, color) in styles.items():
    axis.plot([], [], marker, color=color, label=name)
axis.plot([], [], "o", color=lesson.GREY, markersize=3, label="five random vectors\n(shapes as above)")
k, value, _ = measure(unsteered)
lesson.errorbars(axis, [value], [k / n], [wilson(k, n)], fmt="D", color="black", label="unsteered")
axis.set_xscale("log")
axis.set_xticks([4, 6, 10, 15], ["4", "6", "10", "15"], minor=False)
axis.minorticks_off()
axis.set_xlabel("disfluency (perplexity per token, unsteered model)")
axis.set_ylabel("completions with a wedding word")
axis.set_title(f"n {n} a point, 95 % intervals; n {n // 5} a random vector", fontsize="medium")
axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
lesson.save(figure, "11_many_pairs")

# %% [markdown]
# Better is up and to the left. Neither method is shown to be better here: where CAA is higher than ActAdd, it
# is also further to the right. And this is one prompt, one topic, and pairs and coefficients that we made up.
# It shows how to compare, not who wins.
#
# ## Exercise 1
# Look at your data. Which pair pulls the mean furthest to its own side? Leave out one pair at a time: the
# cosine of the mean of the others with the mean of all is lowest for that pair. Then try it
# on `rows[:, 12]`, and read that pair again.

# %%
def odd_pair(rows):
    """rows (n, d_model): one difference for each pair -> the number of the pair, an int"""
    return None                 # your lines


rows = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.5, 0.0], [0.1, -0.3], [0.0, 2.5]])
lesson.check(odd_pair, ((rows,), 4), ((rows[[4, 3, 2, 1, 0]],), 0),
             ((torch.cat([rows[4:], 2 * rows[:4]]),), 0),
             ((torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [2.0, 2.0, 0], [1.0, 1.0, 2.0]]),), 3))
#> odd_pair: not yet. For (tensor (5, 2)) it gives None, not 4

# %% [markdown]
# ## Exercise 2
# Another relative takes the first principal component of the differences instead of their mean (RepE; Zou et
# al. 2023). Its sign is arbitrary: choose the one that makes its product with most of the differences
# positive. Do not centre the differences. The rows of `torch.linalg.svd(rows).Vh` are the directions, the
# strongest first.

# %%
def component(rows):
    """rows (n, d_model): differences -> a vector of norm 1, (d_model,)"""
    return None                 # your lines


rows, direction = torch.tensor([[-3.0, -4.0], [-6.0, -8.0], [0.8, -0.6]]), torch.tensor([0.6, 0.8])
most = torch.tensor([[-3.0, -4.0], [-3.0, -4.0], [9.0, 12.0], [0.8, -0.6]])     # two of three point back
lesson.check(component, ((rows,), -direction), ((-rows,), direction), ((most,), -direction))
#> component: not yet. For (tensor (3, 2)) it gives None, not tensor (2,)

# %% [markdown]
# ## Your own topic
# Write twelve pairs of sentences about your topic. How well do they agree? Set the same number beside it for
# twelve pairs that end in any two words, which have nothing in common: this is the control that is missing
# above. Then add the vector at every position, beside the unsteered model and five random vectors
# (`random_like`, seeds 0 to 4) at the same coefficient.
#
# **Now you know** the two questions to ask of every steering method: how is the vector made, and where is it
# added? Next: [12](12_grow_your_own.py), a model of your own, small enough to understand why a layer works.

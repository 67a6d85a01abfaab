# %% [markdown]
# # 11 · From one pair to many
#
# **ActAdd makes its vector from two prompts, and adds it at the front. What do you gain with many texts, and
# with a vector at all positions?** 30 minutes, two of them computing. You need tutorials 05 and 07.
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
from ministeer.evaluation.stats import wilson
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
print(len(pairs), "pairs, alike except for the last word")
#> 12 pairs, alike except for the last word

# %% [markdown]
# ## How is the vector made?
# Run every text, keep the last position of `resid[l]`, subtract, and average. What the two texts of a pair
# have in common cancels. What differs in only one pair averages out.

# %%
def last_stream(text, layer):
    """-> resid[layer] at the last token, (d_model,)"""
    _, resid = model(torch.tensor([tokenizer.encode(text)]))
    return resid[layer][0, -1]


def differences(layer):
    """-> one row for each pair, (pairs, d_model)"""
    return torch.stack([last_stream(plus, layer) - last_stream(minus, layer) for plus, minus in pairs])


caa = Steer(12, differences(12).mean(dim=0))
print(caa)
#> <Steer a vector: coeff 1.0 at every position from 1 on before block 12, d_model 576>

# %% [markdown]
# A vector with one axis, `(d_model,)`, goes to every position from `start` on. The ActAdd vector has two
# axes, `(n, d_model)`, and goes to n positions.
#
# ## Do the pairs agree?
# Take the cosine between each pair's difference and the mean of the *others*. If the differences pointed in
# random directions, it would be about 0 in 576 dimensions.

# %%
def agreement(rows):
    """-> the cosine of each row with the mean of the others"""
    others = [torch.cat([rows[:i], rows[i + 1:]]).mean(dim=0) for i in range(len(rows))]
    return torch.nn.functional.cosine_similarity(rows, torch.stack(others), dim=-1)


for layer in (2, 12, 20, 28):
    cosines = agreement(differences(layer))
    print(f"layer {layer:2}: mean cosine {cosines.mean():.2f}, lowest {cosines.min():.2f}")
#> layer  2: mean cosine 0.40, lowest -0.07
#> layer 12: mean cosine 0.44, lowest 0.14
#> layer 20: mean cosine 0.42, lowest 0.14
#> layer 28: mean cosine 0.35, lowest 0.07

# %% [markdown]
# Mostly they agree. (A control is missing here: the differences of unrelated sentences may also have a cosine
# above 0, because of a few large dimensions.)
#
# We continue with layer 12, because middle layers are usual for vectors at all positions. It was not tuned.
#
# ## Which is better?
# This is not a fair question unless we also say what each method costs. So for each method and several
# coefficients, we give the number of completions about weddings and the disfluency (tutorial 05), beside the
# unsteered model and a random vector.

# %%
n, prompt = 40, "I went up to my friend and said"


def measure(steer):
    """-> (completions of n with a wedding word, disfluency, the first text)"""
    texts = ministeer.generate(model, tokenizer, prompt, n, 30, steer, top_p=0.3, freq_penalty=1.0)
    scored = disfluency(model, tokenizer, prompt, texts)
    surprise = math.exp(sum(nll for nll, _ in scored) / sum(n_tokens for _, n_tokens in scored))
    return sum(count_words(text) > 0 for text in texts), surprise, texts[0]


actadd = ministeer.steering_vector(model, tokenizer, " weddings", " ", layer=1)
front = Steer(12, caa.vector[None])             # the same row, at position 1 alone
methods = {"ActAdd, layer 1": (actadd, [0.5, 1.0, 2.0]),
           "CAA, layer 12": (caa, [0.25, 0.5, 1.0]),
           "CAA at the front": (front, [1.0, 2.0, 4.0])}
results = {"unsteered": {0.0: measure([])}}
for name, (steer, coeffs) in methods.items():
    random = random_like(steer, seed=0)
    results[name] = {c: measure(c * steer) for c in coeffs}
    results[f"{name}, random"] = {c: measure(c * random) for c in coeffs[-2:]}
for name, row in results.items():
    cells = [f"c {c:g}: {k:2} of {n}, {surprise:5.1f}" for c, (k, surprise, _) in row.items()]
    print(f"{name:24}", "  ".join(cells))
#> unsteered                c 0: 0 of 40, 3.8
#> ActAdd, layer 1          c 0.5: 1 of 40, 4.3  c 1: 21 of 40, 5.7  c 2: 27 of 40, 6.0
#> ActAdd, layer 1, random  c 1: 0 of 40, 4.9  c 2: 1 of 40, 5.4
#> CAA, layer 12            c 0.25: 12 of 40, 4.5  c 0.5: 30 of 40, 7.1  c 1: 22 of 40, 15.2
#> CAA, layer 12, random    c 0.5: 0 of 40, 5.9  c 1: 0 of 40, 23.9
#> CAA at the front         c 1: 0 of 40, 4.1  c 2: 0 of 40, 4.1  c 4: 0 of 40, 4.1
#> CAA at the front, random c 2: 0 of 40, 4.7  c 4: 0 of 40, 5.7

# %% [markdown]
# Each cell gives the completions about weddings, then the disfluency. A vector at every position acts on
# every new token, so it needs a smaller coefficient and breaks the text sooner; look at the texts below. The
# same row at position 1 alone does nothing. Is that because it was taken from the *end* of sentences?
# Perhaps. But around block 12, ActAdd's own vector hardly works at the front either (tutorial 07), so this
# result does not tell.

# %%
for c, (_, _, text) in results["CAA, layer 12"].items():
    print(f"CAA, coeff {c:g}: {text.strip()[:80]!r}")
#> CAA, coeff 0.25: ≈ ', "Dad, I\'m going to be married."\n\nNow, let\'s break it down:\n\n1. I am going to b'
#> CAA, coeff 0.5: ≈ "I'm a single mother.\n\nI was 20 years old when I married. My husband is 30 years "
#> CAA, coeff 1: ≈ 'she will be a mother to two children. She is a high-planning bride.\n\nThe marriag'

# %% [markdown]
# ## The figure: topic against disfluency

# %%
figure, axis = plt.subplots(figsize=(9, 4))
colors = {"unsteered": "black", "ActAdd, layer 1": lesson.BLUE, "CAA, layer 12": lesson.ORANGE,
          "CAA at the front": lesson.GREEN}
for name, row in results.items():
    color = colors[name.removesuffix(", random")]
    if name == "unsteered":
        marker = "s"
    else:
        marker = "x" if name.endswith("random") else "o-"
    x = [surprise for _, surprise, _ in row.values()]
    y = torch.tensor([k / n for k, _, _ in row.values()])
    low, high = torch.tensor([wilson(k, n) for k, _, _ in row.values()]).T
    errors = torch.stack([y - low, high - y]).clamp(min=0)
    axis.errorbar(x, y, yerr=errors, fmt=marker, color=color, capsize=2, elinewidth=0.7, label=name)
    if name in ("ActAdd, layer 1", "CAA, layer 12"):
        for c, (k, surprise, _) in row.items():
            axis.annotate(f"c {c:g}", (surprise, k / n), (6, 6), textcoords="offset points",
                          fontsize="small", color=color)
axis.set_xscale("log")
axis.set_xticks([4, 6, 10, 15], ["4", "6", "10", "15"], minor=False)
axis.minorticks_off()
axis.set_xlabel("disfluency (perplexity per token, unsteered model)")
axis.set_ylabel("completions with a wedding word")
axis.set_title(f"n {n} a point, 95 % intervals; crosses: random vectors", fontsize="medium")
axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
lesson.save(figure, "11_many_pairs")

# %% [markdown]
# Better is up and to the left. Here the two methods come out about even. But this is one prompt, one topic,
# and pairs and coefficients that we made up. It shows how to compare, not who wins.
#
# ## Exercise 1
# Look at your data. Which pair pulls the mean furthest to its own side? Leave out one pair at a time: the
# cosine of the mean of the others with the mean of all is lowest for that pair. Then try it
# on `differences(12)`, and read that pair again.

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

# %% [markdown]
# # 11 · From one pair to many
#
# **ActAdd makes its vector from two prompts, at the front. What does one win with many texts, and a vector at all positions?** 30 minutes, two
# of them computing. You need tutorials 05 and 07.
#
# The best-known relative is *contrastive activation addition* (CAA; Rimsky et al. 2024): take many pairs, subtract the streams at their last token,
# average, and add that one row at every position after the user's prompt. (There the last token is the letter A or B of an answer. We are simpler:
# pairs of sentences, and the row at every position after BOS.)

# %%
import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer import Steer
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.measure import disfluency
from ministeer.steering import random_like

model, tokenizer = lesson.load()
pairs = [tuple(line.strip().split(" / ")) for line in """\
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
print(len(pairs), "pairs, alike up to the last word")
#> 12 pairs, alike up to the last word

# %% [markdown]
# ## How is the vector made?
# Run every text, keep the last position of `resid[l]`, subtract, average. Whatever the two texts of a pair share cancels; what differs for only one
# pair averages out.

# %%
def last(text, layer):
    """-> resid[layer] at the last token, (d_model,)"""
    _, resid = model(torch.tensor([tokenizer.encode(text)]))
    return resid[layer][0, -1]


def caa(layer):
    """Mean difference over the pairs -> a Steer that reaches every position after BOS"""
    rows = torch.stack([last(plus, layer) - last(minus, layer) for plus, minus in pairs])
    return Steer(layer, rows.mean(dim=0), model=model.fingerprint), rows


steer, rows = caa(12)
print(steer)
#> <Steer a vector: coeff 1.0 on every position from 1 before block 12, d_model 576>

# %% [markdown]
# A vector with one axis, `(d_model,)`, goes to every position from `start` on; the ActAdd vector has two, `(n, d_model)`, and goes to n positions.
#
# ## Do the pairs agree?
# Cosine of each pair's difference with the mean of the *others*. If they pointed anywhere, it would be about 0 in 576 dimensions.

# %%
def agreement(rows):
    others = [torch.cat([rows[:i], rows[i + 1:]]).mean(dim=0) for i in range(len(rows))]
    return torch.nn.functional.cosine_similarity(rows, torch.stack(others), dim=-1)


for layer in (2, 12, 20, 28):
    cosines = agreement(caa(layer)[1])
    print(f"layer {layer:2}: mean cosine {cosines.mean():.2f}, lowest {cosines.min():.2f}")
#> layer  2: mean cosine 0.40, lowest -0.07
#> layer 12: mean cosine 0.44, lowest 0.14
#> layer 20: mean cosine 0.42, lowest 0.14
#> layer 28: mean cosine 0.35, lowest 0.07

# %% [markdown]
# Mostly they agree. (A control is missing here: differences of unrelated sentences may have a cosine above 0 too, through a few large dimensions.)
#
# We go on with layer 12, because middle layers are usual for vectors at all positions; it was not tuned.
#
# ## Which is better?
# Not a fair question without saying what it costs. So for each method and several coefficients: share of completions about weddings, and
# disfluency (tutorial 05), both beside the unsteered model and a random vector.

# %%
n, prompt = 40, "I went up to my friend and said"


def measure(steer):
    """-> (completions of n with a word about weddings, disfluency, the first text)"""
    texts = ministeer.generate(model, tokenizer, prompt, n, 30, steer, top_p=0.3, freq_penalty=1.0)
    scored = disfluency(model, tokenizer, prompt, texts)
    surprise = torch.tensor([nll for nll, _ in scored]).sum().div(sum(k for _, k in scored)).exp().item()
    return sum(count_words(text) > 0 for text in texts), surprise, texts[0]


actadd = ministeer.steering_vector(model, tokenizer, " weddings", " ", layer=1)
coeffs = {"ActAdd, layer 1": [0.5, 1.0, 2.0], "CAA, layer 12": [0.25, 0.5, 1.0], "CAA at the front": [1.0, 2.0, 4.0]}
front = Steer(12, steer.vector[None], model=model.fingerprint)          # the same row, at position 1 alone
steers = {"ActAdd, layer 1": actadd, "CAA, layer 12": steer, "CAA at the front": front}
results = {"unsteered": {0.0: measure([])}}
for name, one in steers.items():
    results[name] = {c: measure(c * one) for c in coeffs[name]}
    results[f"{name}, random"] = {c: measure(c * random_like(one, seed=0)) for c in coeffs[name][-2:]}
for name, row in results.items():
    print(f"{name:24}", "   ".join(f"c {c:g}: {k:2} of {n}, {fluency:5.1f}" for c, (k, fluency, _) in row.items()))
#> unsteered                c 0: 0±3 of 40, 3.8±0.8
#> ActAdd, layer 1          c 0.5: 1±3 of 40, 4.3±0.9   c 1: 21±3 of 40, 5.7±1.1   c 2: 27±3 of 40, 6.0±1.2
#> ActAdd, layer 1, random  c 1: 0±3 of 40, 5.6±1.1   c 2: 1±3 of 40, 12.2±2.4
#> CAA, layer 12            c 0.25: 12±3 of 40, 4.5±0.9   c 0.5: 30±3 of 40, 7.1±1.4   c 1: 22±3 of 40, 15.2±3.0
#> CAA, layer 12, random    c 0.5: 0±3 of 40, 6.8±1.4   c 1: 0±3 of 40, 16.9±3.4
#> CAA at the front         c 1: 0±3 of 40, 4.1±0.8   c 2: 0±3 of 40, 4.1±0.8   c 4: 0±3 of 40, 4.1±0.8
#> CAA at the front, random c 2: 0±3 of 40, 4.7±0.9   c 4: 0±3 of 40, 5.7±1.1

# %% [markdown]
# Each pair of numbers is `completions about weddings, disfluency`. A vector at every position is felt by every new token, so it needs a smaller
# coefficient and breaks down sooner; look at the texts below. The same row at position 1 alone does nothing. Because it was read at the *end*
# of sentences? Perhaps; but around block 12 ActAdd's own vector hardly works at the front either (tutorial 07), so this does not tell.

# %%
for c, (_, _, text) in results["CAA, layer 12"].items():
    print(f"CAA, coeff {c:g}: {text.strip()[:100]!r}")
#> CAA, coeff 0.25: ≈ ', "Dad, I\'m going to be married."\n\nNow, let\'s break it down:\n\n1. I am going to be'
#> CAA, coeff 0.5: ≈ "I'm a single mother.\n\nI was 20 years old when I married. My husband is 30 years old now. We"
#> CAA, coeff 1: ≈ 'she will be a mother to two children. She is a high-planning bride.\n\nThe marriage is a traditional I'

# %% [markdown]
# ## The figure: topic against disfluency

# %%
figure, axis = plt.subplots(figsize=(9, 4))
colours = {"unsteered": "black", "ActAdd, layer 1": lesson.BLUE, "CAA, layer 12": lesson.ORANGE, "CAA at the front": lesson.GREEN}
for name, row in results.items():
    color = colours[name.removesuffix(", random")]
    marker = "x" if "random" in name else "s" if name == "unsteered" else "o-"
    shares = [k / n for k, _, _ in row.values()]
    errors = [wilson(k, n) for k, _, _ in row.values()]
    x = [fluency for _, fluency, _ in row.values()]
    axis.errorbar(x, shares, yerr=[[max(0, s - low) for s, (low, _) in zip(shares, errors, strict=True)],
                                   [max(0, high - s) for s, (_, high) in zip(shares, errors, strict=True)]], fmt=marker, color=color, capsize=2,
                  elinewidth=0.7, label=name)
    if marker == "o-" and name != "CAA at the front":
        for c, s, f in zip(row, shares, x, strict=True):
            axis.annotate(f"c {c:g}", (f, s), (6, 6), textcoords="offset points", fontsize="small", color=color)
axis.set_xscale("log")
axis.set_xticks([4, 6, 10, 15], ["4", "6", "10", "15"], minor=False)
axis.minorticks_off()
axis.set_xlabel("disfluency (perplexity a token, unsteered model)")
axis.set_ylabel("completions with a word about weddings")
axis.set_title(f"n {n} a point, 95 % intervals; crosses: random vectors", fontsize="medium")
axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
lesson.save(figure, "11_many_pairs")

# %% [markdown]
# Better is up and to the left. The two methods come out about even here: that is one prompt, one topic, and
# pairs and coefficients that we made up. It says how to compare, and not who wins.
#
# ## Exercise 1
# Write the mean difference.

# %%
def mean_difference(plus, minus):
    """plus, minus (n, d_model): last positions of n texts each -> (d_model,)"""
    return None                 # your line


made = torch.arange(12.0).view(3, 4)
lesson.check(mean_difference, ((made, made.flip(0)), torch.zeros(4)), ((made, torch.zeros(3, 4)), torch.tensor([4.0, 5.0, 6.0, 7.0])))
#> mean_difference: not yet. mean_difference(a tensor (3, 4), a tensor (3, 4)) gives None; expected a tensor (4,)

# %% [markdown]
# ## Exercise 2
# Another relative takes the first principal component of the differences instead of their mean (RepE; Zou et al. 2023). Its sign is arbitrary: choose
# it so that most of the differences point its way. Do not centre them. `torch.linalg.svd(rows).Vh` has the
# directions as its rows, the strongest first.

# %%
def component(rows):
    """rows (n, d_model): differences -> a vector of norm 1, (d_model,)"""
    return None                 # your lines


made = torch.tensor([[-2.0, 0.1], [-1.0, -0.1], [-3.0, 0.0]])
u = torch.linalg.svd(made).Vh[0]
lesson.check(component, ((made,), u * torch.sign(made @ u).sum().sign()))
#> component: not yet. component(a tensor (3, 2)) gives None; expected a tensor (2,)

# %% [markdown]
# **You know now** the two axes of every steering method: how the vector is made, and where it is added.
# Next: [12](12_grow_your_own.py), a model of your own, small enough to understand why a layer works.

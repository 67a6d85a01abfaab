# %% [markdown]
# # 07 · Which layer, which coefficient, and is it real?
#
# **How does one choose a layer and a coefficient without fooling oneself?** 30 minutes, one of them computing. You need tutorial 05.

# %%
import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.measure import sweep
from ministeer.steering import random_like

model, tokenizer = lesson.load()
layers = list(range(model.config.n_layer))
plus, minus = " weddings", " "

# %% [markdown]
# ## Can one guess it from the next token?
# A whole sweep costs one pass: `resid[l]` is recorded once for every l, and each coefficient is one more row of a batch. As a quick measure, the
# log-probability (natural logarithm; the unit is the *nat*) of a word about weddings as the next token, over a few prompts that could go on with one.

# %%
tuning = ["Yesterday we talked about the", "They had been looking forward to the", "My sister told me everything about her",
          "We drove home after the"]
words = [" wedding", " weddings", " marriage", " bride", " honeymoon", " groom"]
word_ids = torch.tensor([tokenizer.encode(word, bos=False)[0] for word in words])
coeffs = [0.5, 1.0, 2.0, 4.0]


def topic(logits):
    """logits (…, n_vocab) -> log p(a word about weddings), in nats"""
    return logits.log_softmax(dim=-1)[..., word_ids].logsumexp(dim=-1)


base = torch.stack([topic(model(torch.tensor([tokenizer.encode(prompt)]))[0][0, -1]) for prompt in tuning]).mean()
gain = torch.stack([topic(sweep(model, tokenizer, prompt, plus, minus, layers, coeffs)) for prompt in tuning]).mean(dim=0) - base
print("unsteered log p", round(base.item(), 1), "nats; what steering adds, by layer and coefficient:")
print("layer  ", "".join(f"{l:7}" for l in (0, 1, 2, 3, 6, 11, 16, 20, 26)))
for j, c in enumerate(coeffs):
    print(f"coeff {c:3}", "".join(f"{gain[l, j]:+7.1f}" for l in (0, 1, 2, 3, 6, 11, 16, 20, 26)))
#> unsteered log p -5.4 nats; what steering adds, by layer and coefficient:
#> layer         0      1      2      3      6     11     16     20     26
#> coeff 0.5    -0.4   -0.1   +0.1   -0.4   -0.2   +0.8   +1.5   +1.5   +0.2
#> coeff 1.0    -0.2   +0.8   +0.8   -0.5   -0.2   +1.9   +2.9   +2.4   +0.7
#> coeff 2.0    -0.5   +0.8   +0.8   -0.4   -0.2   +2.5   +2.8   +1.5   +0.7
#> coeff 4.0    -1.2   -0.0   -0.1   -0.4   -0.2   +2.3   +3.5   +0.7   +0.6

# %% [markdown]
# By this table one would take layer 16. (Layer 12, in the figure below, is worst: it is just behind the block that builds the sink anew, tutorial 03.
# Perhaps that is why.)
#
# ## Does that hold for whole texts?
# Count completions, as in tutorial 05. Some layers, one coefficient, and for each a random vector of the same norm.

# %%
n, some = 40, [0, 1, 2, 4, 6, 11, 16, 20, 26]
prompt = "I went up to my friend and said"


def share(steer, prompt=prompt, seed=0):
    texts = ministeer.generate(model, tokenizer, prompt, n, 30, steer, top_p=0.3, freq_penalty=1.0, seed=seed)
    return sum(count_words(text) > 0 for text in texts)


steers = ministeer.steering.steering_vectors(model, tokenizer, plus, minus, some)
unsteered = share([])
steered = {s.layer: share(s) for s in steers}
control = {s.layer: share(random_like(s, seed=0)) for s in steers}
print(f"unsteered {unsteered} of {n}")
for l in some:
    low, high = wilson(steered[l], n)
    print(f"layer {l:2}: {steered[l]:2} of {n} (95 % {low:.0%} to {high:.0%}), random {control[l]}")
#> unsteered 0±3 of 40
#> layer  0: 1±3 of 40 (95 % 0±8% to 13±8%), random 0±3
#> layer  1: 21±3 of 40 (95 % 37±8% to 67±8%), random 0±3
#> layer  2: 19±3 of 40 (95 % 33±8% to 63±8%), random 0±3
#> layer  4: 0±3 of 40 (95 % 0±8% to 9±8%), random 0±3
#> layer  6: 0±3 of 40 (95 % 0±8% to 9±8%), random 0±3
#> layer 11: 3±3 of 40 (95 % 3±8% to 20±8%), random 2±3
#> layer 16: 8±3 of 40 (95 % 10±8% to 35±8%), random 0±3
#> layer 20: 11±3 of 40 (95 % 16±8% to 43±8%), random 0±3
#> layer 26: 2±3 of 40 (95 % 1±8% to 17±8%), random 0±3

# %% [markdown]
# It does not. Layers 1 and 2, which did little for the next token, bring the topic into half of the texts. (The prompt is another one too.) Before
# you trust a cheap measure, see whether it agrees with the dear one.
#
# Not one hill, as in the paper's GPT-2-XL, but two: layers 1 and 2, before the space of the pair becomes a sink (tutorial 03), and some late ones.
# Why layer 0 fails although it too comes before the sink, and why the late ones work, we do not know.
#
# ## Is the best one really the best?
# We looked at nine layers and took the highest. The highest of many is too high: it has been lucky as well. So choose on some prompts, and report on
# others that took no part in the choice.

# %%
best = max(steered, key=steered.get)
rivals = [l for l in some if wilson(steered[l], n)[1] > wilson(steered[best], n)[0]]
print("highest: layer", best, "; not clearly worse:", [l for l in rivals if l != best])
(chosen,) = ministeer.steering.steering_vectors(model, tokenizer, plus, minus, [best])
fresh = ["The weather was fine, so we decided to", "My neighbour knocked on the door and told me"]
results = [(share([], text), share(chosen, text), share(random_like(chosen, seed=0), text)) for text in fresh]
for text, (before, after, by_chance) in zip(fresh, results, strict=True):
    print(f"{text!r}: unsteered {before}, steered {after}, random {by_chance} of {n}")
#> highest: layer 1±1 ; not clearly worse: ≈ [2, 20]
#> 'The weather was fine, so we decided to': unsteered 0±3, steered 8±3, random 0±3 of 40
#> 'My neighbour knocked on the door and told me': unsteered 1±3, steered 11±3, random 0±3 of 40

# %% [markdown]
# 21 of 40 where we chose, 8 and 11 on fresh prompts: report the second. How much of the fall is luck and how much the prompts, two cannot tell.
#
# ## Is one random vector enough?
# It is one draw of its own. Take five.

# %%
five = [share(random_like(chosen, seed=seed)) for seed in range(5)]
print("five random vectors:", five, "of", n)
#> five random vectors: [0±3, 0±3, 0±3, 0±3, 0±3] of 40

# %% [markdown]
# ## The figure: layers, twice

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
image = left.imshow(gain.T, cmap="PuOr", aspect="auto", vmin=-gain.abs().max(), vmax=gain.abs().max())
left.set_yticks(range(len(coeffs)), [f"{c:g}" for c in coeffs])
left.set_xlabel("layer")
left.set_ylabel("coefficient")
left.set_title(f"next token, mean of {len(tuning)} prompts", fontsize="medium")
figure.colorbar(image, ax=left, label="log p(word about weddings), nats more")
for found, color, label in ((steered, lesson.BLUE, "steered"), (control, lesson.GREY, "random, same norm")):
    low, high = zip(*(wilson(found[l], n) for l in some), strict=True)
    right.plot(some, [found[l] / n for l in some], "o-", color=color, label=label)
    right.fill_between(some, low, high, color=color, alpha=0.2, linewidth=0)
right.axhline(unsteered / n, color="black", linestyle="--", linewidth=0.8, label="unsteered")
right.set_xlabel("layer")
right.set_ylabel("completions with a word about weddings")
right.set_ylim(-0.03, 1)
right.set_title(f"whole texts, n {n} a point, c 1, 95 % band", fontsize="medium")
right.legend(fontsize="small")
lesson.save(figure, "07_which_layer")

# %% [markdown]
# ## Exercise 1
# Choose by the rule: the smallest coefficient whose share is inside the 95 % interval of the highest share. (A smaller one costs less.)

# %%
def smallest_good(counts, n):
    """counts: {coefficient: completions of n with the topic} -> the coefficient chosen"""
    return None                 # your lines


lesson.check(smallest_good, (({0.5: 2, 1.0: 18, 2.0: 21, 4.0: 12}, 40), 1.0), (({0.5: 1, 1.0: 4, 2.0: 30}, 40), 2.0))
#> smallest_good: not yet. smallest_good(the dict, 40) gives None; expected 1

# %% [markdown]
# ## Exercise 2
# How lucky is the highest of many? Let k layers all have a true share of `rate`, draw n completions for each, take the highest share, and average
# that over many repetitions. Use `torch.distributions.Binomial(n, rate)` or count random numbers below `rate`.

# %%
def highest_of(k, n, rate, seed=0):
    """-> the expected share of the luckiest of k equal layers, a float rounded to one digit, such as 0.3"""
    return None                 # your lines


lesson.check(highest_of, ((1, 40, 0.2), 0.2), ((30, 40, 0.2), 0.3))
#> highest_of: not yet. highest_of(1, 40, 0.2) gives None; expected 0.2

# %% [markdown]
# **You know now** how to sweep, and what a sweep can make you believe. `python benchmarks/paper.py layer-sweep` is this with n 200 and every layer.
# Next: [08](08_probabilities.py), what the vector does to text that is already written.

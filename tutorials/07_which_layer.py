# %% [markdown]
# # 07 · Which layer, which coefficient, and is it real?
#
# **How do you choose a layer and a coefficient without fooling yourself?** 30 minutes, one of them computing.
# You need tutorial 05.

# %%
import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.measure import sweep
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.steerability import strength
from ministeer.steering import random_like, steering_vectors

model, tokenizer = lesson.load()
plus, minus = " weddings", " "

# %% [markdown]
# ## Can you guess it from the next token?
# A whole sweep over layers and coefficients takes one pass: `resid[l]` is recorded once for every l, and each
# coefficient is one more row of a batch. As a quick measure, we take the log-probability that the next token
# is a wedding word, averaged over a few prompts that such a word could follow. (It is a natural logarithm;
# its unit is the *nat*.)

# %%
tuning = ["Yesterday we talked about the", "They had been looking forward to the",
          "My sister told me everything about her", "We drove home after the"]
words = [" wedding", " weddings", " marriage", " bride", " honeymoon", " groom"]
word_ids = torch.tensor([tokenizer.encode(word, bos=False)[0] for word in words])
layers, coeffs = list(range(model.config.n_layer)), [0.5, 1.0, 2.0, 4.0]


def topic(logits):
    """logits (…, n_vocab) -> log p(a wedding word), in nats"""
    return logits.log_softmax(dim=-1)[..., word_ids].logsumexp(dim=-1)


unsteered_logp, steered_logp = [], []
for text in tuning:
    logits, _ = model(torch.tensor([tokenizer.encode(text)]))
    unsteered_logp.append(topic(logits[0, -1]))
    steered_logp.append(topic(sweep(model, tokenizer, text, plus, minus, layers, coeffs)))
base = torch.stack(unsteered_logp).mean()
gain = torch.stack(steered_logp).mean(dim=0) - base             # (layers, coeffs)

print(f"unsteered log p {base:.1f} nats; what steering adds, by layer and coefficient:")
shown = (0, 1, 2, 3, 6, 11, 16, 20, 26)
print("layer    ", "".join(f"{l:7}" for l in shown))
for j, c in enumerate(coeffs):
    print(f"coeff {c:3}", "".join(f"{gain[l, j]:+7.1f}" for l in shown))
strengths = [strength(model, tokenizer, s, tuning)
             for s in steering_vectors(model, tokenizer, plus, minus, shown)]
print("c 1 is   ", "".join(f"{value:7.1f}" for value in strengths), "× the layer's mean norm")
#> unsteered log p -5.4 nats; what steering adds, by layer and coefficient:
#> layer           0      1      2      3      6     11     16     20     26
#> coeff 0.5    -0.4   -0.1   +0.1   -0.4   -0.2   +0.8   +1.5   +1.5   +0.2
#> coeff 1.0    -0.2   +0.8   +0.8   -0.5   -0.2   +1.9   +2.9   +2.4   +0.7
#> coeff 2.0    -0.5   +0.8   +0.8   -0.4   -0.2   +2.5   +2.8   +1.5   +0.7
#> coeff 4.0    -1.2   -0.0   -0.1   -0.4   -0.2   +2.3   +3.5   +0.7   +0.6
#> c 1 is        2.2    1.7    1.1    4.5    4.1    1.4    1.3    1.3    0.7 × the layer's mean norm

# %% [markdown]
# From this table you would choose layer 16. (In the figure below, layer 12 is the worst. It comes just after
# the block that builds the sink up again, tutorial 03. Perhaps that is why.)
#
# ## Does that hold for whole texts?
# Count completions, as in tutorial 05: for some of the layers and one coefficient. One random vector of the
# same norm may be an exception, so each layer gets five, with a fifth of the completions each. All are
# written in one batch: each vector has its coefficient in rows of its own, and 0 in the rows of the others.

# %%
n, prompt = 20, "I went up to my friend and said"
some_layers = [0, 1, 6, 16, 20]


def counts(prompt, steers, n):
    """-> for each Steer, how many of n completions mention weddings"""
    batch = []
    for i, steer in enumerate(steers):
        coeff = torch.zeros(len(steers), n)
        coeff[i] = steer.coeff
        batch.append(steer.scaled(coeff.flatten()))
    rows = ministeer.generate(model, tokenizer, [prompt] * len(steers), n, 20, batch, top_p=0.3,
                              freq_penalty=1.0)
    return [sum(count_words(text) > 0 for text in texts) for texts in rows]


steers = steering_vectors(model, tokenizer, plus, minus, some_layers)
unsteered, *hits = counts(prompt, [0 * steers[0], *steers], n)
random_hits = counts(prompt, [random_like(s, seed) for s in steers for seed in range(5)], n // 5)
steered, control = {}, {}
print(f"unsteered {unsteered} of {n}")
for i, l in enumerate(some_layers):
    steered[l], control[l] = hits[i], random_hits[5 * i:5 * i + 5]
    low, high = wilson(steered[l], n)
    print(f"layer {l:2}: {steered[l]:2} of {n} (95 % {low:.0%} to {high:.0%}), random",
          *control[l], f"of {n // 5}")
#> unsteered 0 of 20
#> layer  0:  1 of 20 (95 % 1% to 24%), random 0 0 0 0 0 of 4
#> layer  1: 10 of 20 (95 % 30% to 70%), random 0 0 0 0 0 of 4
#> layer  6:  0 of 20 (95 % 0% to 16%), random 0 0 0 0 0 of 4
#> layer 16:  5 of 20 (95 % 11% to 47%), random 0 0 0 0 0 of 4
#> layer 20:  4 of 20 (95 % 8% to 42%), random 0 0 0 0 0 of 4

# %% [markdown]
# It does not. For the next token, layer 16 was far ahead of layer 1; for whole texts it is not. Layer 1
# brings the topic into about half of them. (The prompt is different too.) None of the random vectors brings a
# wedding word into any text. Before you trust a cheap measure, see whether it agrees with the expensive one.
#
# There is not one hill, as in the paper's GPT-2-XL, but two: layer 1, before the space of the pair becomes a
# sink (tutorial 03), and some late layers. We do not know why layer 0 fails, although it too comes before the
# sink, nor why the late layers work.
#
# ## Is the best one really the best?
# We looked at five layers and took the highest. The highest of many is too high, because it was also lucky.
# So choose on some prompts, and report on others that played no part in the choice.

# %%
best = max(steered, key=steered.get)
close = [l for l in some_layers if l != best and wilson(steered[l], n)[1] > wilson(steered[best], n)[0]]
print("highest: layer", best, "; not clearly worse:", close)
(chosen,) = steering_vectors(model, tokenizer, plus, minus, [best])
for text in ("The weather was fine, so we decided to", "My neighbour knocked on the door and told me"):
    before, after = counts(text, [0 * chosen, chosen], n)
    random = counts(text, [random_like(chosen, seed) for seed in range(5)], n // 5)
    print(f"{text!r}: unsteered {before}, steered {after} of {n}, random", *random, f"of {n // 5}")
#> highest: layer 1 ; not clearly worse: ≈ [16, 20]
#> 'The weather was fine, so we decided to': unsteered 0, steered 4 of 20, random 0 0 0 0 0 of 4
#> 'My neighbour knocked on the door and told me': unsteered 1, steered 5 of 20, random 0 0 0 0 0 of 4

# %% [markdown]
# On the prompt where we chose, about half of the texts mention weddings. On fresh prompts fewer do, and still
# none with the random vectors. Report the fresh prompts. Two prompts cannot tell how much of the drop is
# luck, and how much is due to the prompts.
#
# ## The figure: layers, measured in two ways

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
largest = gain.abs().max()
image = left.imshow(gain.T, cmap="PuOr", aspect="auto", vmin=-largest, vmax=largest)
left.set_yticks(range(len(coeffs)), [f"{c:g}" for c in coeffs])
left.set_xlabel("layer")
left.set_ylabel("coefficient")
left.set_title(f"next token, mean of {len(tuning)} prompts", fontsize="medium")
figure.colorbar(image, ax=left, label="gain in log p(wedding word), nats")
for seed in range(5):
    shares = [control[l][seed] / (n // 5) for l in some_layers]
    right.plot([l + 0.15 * (seed - 2) for l in some_layers], shares, ".", color=lesson.GREY,
               label=f"five random vectors, n {n // 5}" if seed == 0 else None)
lesson.errorbars(right, some_layers, [steered[l] / n for l in some_layers],
                 [wilson(steered[l], n) for l in some_layers], color=lesson.BLUE, label=f"steered, n {n}")
right.axhline(unsteered / n, color="black", linestyle="--", linewidth=0.8, label="unsteered")
right.set_xlabel("layer")
right.set_ylabel("completions with a wedding word")
right.set_ylim(-0.03, 1)
right.set_title("whole texts, coefficient 1, 95 % intervals", fontsize="medium")
right.legend(fontsize="small")
lesson.save(figure, "07_which_layer")

# %% [markdown]
# ## Exercise 1
# Write down how you choose, so that you cannot change your mind when you see the numbers. The rule: first
# drop every coefficient that is not better than its controls: the low end of its 95 % interval must be above
# the share of each of its five random vectors. Of the others, take the smallest whose share lies inside the
# 95 % interval of the highest share. (A smaller one costs less.)

# %%
def smallest_good(steered, random, n):
    """-> the coefficient chosen; ValueError if none is better than its controls

    steered: {coefficient: how many of n completions have the topic}
    random: {coefficient: five such numbers, one for each random vector}
    """
    return None                 # your lines


none = {c: [0, 1, 0, 0, 1] for c in (0.5, 1.0, 2.0, 4.0)}
lesson.check(smallest_good, (({0.5: 2, 1.0: 18, 2.0: 21, 4.0: 12}, none, 40), 1.0),
             (({0.5: 1, 1.0: 4, 2.0: 30}, none, 40), 2.0), (({2.0: 21, 1.0: 16}, none, 40), 1.0),
             (({1.0: 170, 2.0: 200}, none, 400), 2.0),
             (({1.0: 16, 2.0: 21}, {**none, 1.0: [12, 0, 1, 0, 0]}, 40), 2.0),
             (({1.0: 16, 2.0: 21, 4.0: 30}, {**none, 4.0: [20, 25, 18, 22, 21]}, 40), 1.0),
             (({1.0: 3, 2.0: 2}, {1.0: [2] * 5, 2.0: [3] * 5}, 40), ValueError))
#> smallest_good: not yet. For ({0.5: 2, 1: 18, 2: 21, 4: 12}, dict, 40) it gives None, not 1

# %% [markdown]
# ## Exercise 2
# How lucky is the highest of many? Suppose that k layers all have a true share of `rate`. Draw n completions
# for each, take the highest share, and average that over many repetitions. Use
# `torch.distributions.Binomial(n, rate)`, or count random numbers below `rate`.

# %%
def highest_of(k, n, rate, seed=0):
    """-> the expected share of the luckiest of k equal layers, a float rounded to one digit, such as 0.3"""
    return None                 # your lines


lesson.check(highest_of, ((1, 40, 0.2), 0.2), ((30, 40, 0.2), 0.3), ((30, 10, 0.2), 0.5),
             ((30, 1000, 0.2), 0.2), ((30, 10, 0.5), 0.8))
#> highest_of: not yet. For (1, 40, 0.2) it gives None, not 0.2

# %% [markdown]
# ## Your own topic
# Choose a layer and a coefficient for a pair and words of your own, by a rule that you have written down, on
# three prompts. Then count on three prompts that you have not used. Beside the steered counts, set the
# unsteered ones and the range of five random vectors (`random_like`, seeds 0 to 4). Sum up in one sentence
# what you found on the second three prompts.
#
# **Now you know** how to sweep, and what a sweep can make you believe.
# `ministeer play` draws such a sweep for any prompt, pair and target token.
# `python -m benchmarks.paper layer-sweep` does the same with n 200 and every layer. Next:
# [08](08_probabilities.py), what the vector does to text that is already written.

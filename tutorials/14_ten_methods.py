# %% [markdown]
# # 14 · One line, ten methods
#
# **Ten methods of steering are one line, `x = x + s.delta(x, pos)`. What does each get, and what does it
# cost?** 35 minutes, two of them computing. You need tutorials 05 and 11.
#
# Since ActAdd, many ways to steer have been published. They differ in two things: how a direction is made,
# and what `delta` does with it. An ActAdd vector is added, whatever the stream is. Others look at the stream
# x first: they cap it, turn it, or take something out of it.

# %%
import math
import time

import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.measure import disfluency
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.steerability import kl_at_end, steerability, strength
from ministeer.methods import conditional, many_pairs, optimised
from ministeer.methods.ablation import ablation
from ministeer.methods.angular import angular
from ministeer.methods.capping import Cap, Fixed
from ministeer.methods.change import Change
from ministeer.steering import random_like

plain, tokenizer = lesson.load(fast=False)          # gradients need the plain weights
model = plain if lesson.TINY else ministeer.fast(plain)
prompt, n = "I went up to my friend and said", 20
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

# %% [markdown]
# ## Four ways to make a direction
# ActAdd takes one pair of prompts. The mean of many pairs (tutorial 11) and their first principal component
# (RepE) take twelve. The fourth asks for gradients: which vector, added at layer 12, makes the model say one
# given sentence (Subramani et al. 2022)? It needs no pairs, but many passes forward and back.

# %%
weddings = ministeer.steering_vector(model, tokenizer, " weddings", " ", layer=1)
means = many_pairs.vectors(model, tokenizer, plus, minus)               # one for each layer
mean = means[12]
(component,) = many_pairs.repe(model, tokenizer, plus, minus, [12])
norm = mean.vector.norm().item()
wanted = " The wedding was beautiful, and the bride"
sentence = optimised.for_sentence(plain, tokenizer, wanted, 12, steps=100)
print(mean)
for name, steer in (("component", component), ("optimised", sentence)):
    print(f"{name}: cosine with the mean {torch.cosine_similarity(steer.vector, mean.vector, 0):.2f}")
print("steps of gradient descent:", sentence.note["steps"], "exact:", sentence.note["exact"])
#> <Steer a vector (agreement 0.25): coeff 1.0 at every position from 1 on before block 12, d_model 576>
#> component: cosine with the mean 0.99
#> optimised: cosine with the mean -0.02
#> steps of gradient descent: 54 exact: True

# %% [markdown]
# The repr shows how well the pairs agree: the mean cosine of two of their differences. The lower it is, the
# less the pairs have in common, and the less you can expect of their mean (Braun et al. 2025).
#
# ## Ten ways to use one
# Conditional steering (CAST) also needs a rule: which prompts should be steered? We look for a rule on a few
# prompts of both sorts. It decides once, when the prompt has been read. (Most numbers below were chosen on
# other prompts, from a few values for each method: `python -m benchmarks.paper methods`.)

# %%
stories = ["In the evening we sat down and talked about", "On the train I met a woman who said",
           "She looked out of the window and thought", "Yesterday my brother called and asked me"]
facts = ["The chemical formula of water is", "Seven times eight is", "The speed of light is about",
         "An atom consists of a nucleus and"]
candidates = many_pairs.vectors(model, tokenizer, stories, facts, where="mean")
condition, score = conditional.find_condition(model, tokenizer, candidates, stories, facts)
methods = {
    "ActAdd": [1.0 * weddings],
    "mean": [0.5 * mean],
    "component": [0.5 * norm * component],
    "norm kept": [Change(12, mean.vector, 0.5, keep_norm=True)],
    "capped": [Cap(12, -mean.vector, limit=-0.5 * norm)],           # x·v is at least half the norm
    "fixed": [Fixed(12, mean.vector, value=0.5 * norm)],            # x·v is half the norm
    "ablation": ablation(model, mean),
    "angular": angular(means, degrees=0),
    "conditional": [0.5 * mean],
    "optimised": [0.1 * sentence],
}
print(f"a rule at layer {condition.layer}, F1 {score:.2f} on the prompts that it was made from")
#> a rule at layer 1, F1 1.00 on the prompts that it was made from

# %% [markdown]
# ## Does it look at the stream?
# Give `delta` two different streams. If what it adds is the same, it is a vector. If not, it is a function of
# the stream.

# %%
generator = torch.Generator().manual_seed(0)
d_model, pos = model.config.d_model, torch.arange(3)
streams = 300 * torch.randn(2, 1, 3, d_model, generator=generator) / d_model ** 0.5
for name, steers in methods.items():
    a, b = (steers[-1].delta(x, pos).expand(1, 3, d_model) for x in streams)
    looks = "looks at the stream" if not torch.allclose(a, b) else "adds the same to every stream"
    print(f"{name:12} {looks}, at {len(steers)} layer{'s' * (len(steers) > 1)}")
#> ActAdd       adds the same to every stream, at 1 layer
#> mean         adds the same to every stream, at 1 layer
#> component    adds the same to every stream, at 1 layer
#> norm kept    looks at the stream, at 1 layer
#> capped       looks at the stream, at 1 layer
#> fixed        looks at the stream, at 1 layer
#> ablation     looks at the stream, at 30 layers
#> angular      looks at the stream, at 30 layers
#> conditional  adds the same to every stream, at 1 layer
#> optimised    adds the same to every stream, at 1 layer

# %% [markdown]
# All use the same line, the same loop and the same cache. Conditional steering adds a vector, like the mean;
# only its coefficient, 0 or 1, depends on the prompt.
#
# ## What does each get, and what does it cost?
# The effect is how many of twenty completions have a wedding word. There are two costs. One is disfluency
# (tutorial 05). The other is KL off the topic: on prompts that have nothing to do with weddings, how far the
# next token's distribution is from the unsteered model's. Strength is the norm of what is added, in mean
# norms of the layer's stream. Each method has its control: five random directions in place of its own, four
# texts each.

# %%
off_topic = ["The capital of France is", "Water boils at a temperature of", "The square root of sixteen is",
             "To install it, run", "Photosynthesis takes place in the",
             "A triangle has three sides and three"]
rng = {"top_p": 0.3, "freq_penalty": 1.0, "max_new_tokens": 20}


def control(name, seed):
    """The Steers of a method with random directions of the same norms in place of its own"""
    if name == "ablation":
        return ablation(model, random_like(mean, seed))
    if name == "angular":
        return angular([random_like(s, seed) for s in means], degrees=0)
    return [random_like(s, seed) for s in methods[name]]


def fires(name, prompts):
    return conditional.decide(model, tokenizer, prompts, condition) if name == "conditional" else \
        torch.ones(len(prompts))


def measure(name, steers, n):
    """-> (texts with a wedding word, disfluency, mean KL off the topic, milliseconds a token, a text)"""
    steers = [fires(name, [prompt]).item() * s for s in steers]
    start = time.process_time()
    texts = ministeer.generate(model, tokenizer, prompt, n, steer=steers, **rng)
    seconds = time.process_time() - start
    scored = disfluency(model, tokenizer, prompt, texts)
    surprise = math.exp(sum(nll for nll, _ in scored) / max(1, sum(k for _, k in scored)))
    kl = [kl_at_end(model, tokenizer, [one], [fire * s for s in steers])[0]
          for one, fire in zip(off_topic, fires(name, off_topic).tolist(), strict=True)]
    return (sum(count_words(text) > 0 for text in texts), surprise, sum(kl) / len(kl),
            1000 * seconds / (20 * n), texts[0])


k, surprise, _, ms, _ = measure("unsteered", [], n)
print(f"unsteered: {k} of {n}, disfluency {surprise:.1f} ≈ {ms:.1f} ms a token")
results = {"unsteered": (k, surprise, 0.0, [])}
for name, steers in methods.items():
    k, surprise, kl, ms, text = measure(name, steers, n)
    five = [measure(name, control(name, seed), n // 5) for seed in range(5)]
    low, high = wilson(k, n)
    size = sum(strength(model, tokenizer, s, [prompt]) for s in steers) / len(steers)
    print(f"{name}, strength {size:.2f}: {k} of {n} ({low:.0%} to {high:.0%}), "
          f"random {[row[0] for row in five]} of {n // 5}")
    print(f"   disfluency {surprise:.1f}, random {min(row[1] for row in five):.1f} to "
          f"{max(row[1] for row in five):.1f}")
    print(f"   KL {kl:.2f}, random {min(row[2] for row in five):.2f} to {max(row[2] for row in five):.2f} "
          f"≈ {ms:.1f} ms a token, {text.strip()[:40]!r}")
    results[name] = k, surprise, kl, five
#> unsteered: 0 of 20, disfluency 3.9 ≈ 3.7 ms a token
#> ActAdd, strength 1.79: 10 of 20 (30% to 70%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 6.5, random 3.6 to 5.6
#>    KL 1.16, random 0.74 to 1.38 ≈ 3.3 ms a token, 'that they had a wedding to celebrate the'
#> mean, strength 0.19: 14 of 20 (48% to 85%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 8.8, random 4.4 to 7.7
#>    KL 0.38, random 0.28 to 0.66 ≈ 3.2 ms a token, "I'm a single mother.\n\nI was 20 years old"
#> component, strength 0.19: 18 of 20 (70% to 97%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 8.6, random 4.4 to 7.7
#>    KL 0.35, random 0.28 to 0.66 ≈ 3.1 ms a token, 'I will have a baby.\n\nI was 21 years old,'
#> norm kept, strength 0.19: 14 of 20 (48% to 85%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 8.1, random 4.9 to 6.3
#>    KL 0.37, random 0.27 to 0.67 ≈ 3.4 ms a token, "I'm having a baby.\n\nI am married to my h"
#> capped, strength 0.18: 11 of 20 (34% to 74%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 7.1, random 4.4 to 6.5
#>    KL 0.36, random 0.45 to 0.89 ≈ 3.3 ms a token, ', I will marry her.\n\nThe word "love" is '
#> fixed, strength 0.18: 11 of 20 (34% to 74%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 7.4, random 4.9 to 5.9
#>    KL 0.36, random 0.25 to 0.61 ≈ 3.2 ms a token, ', I will marry her.\n\nThe wedding was a b'
#> ablation, strength 0.03: 0 of 20 (0% to 16%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 4.6, random 4.3 to 5.9
#>    KL 0.04, random 0.03 to 0.10 ≈ 3.6 ms a token, ', "It\'s a beautiful day, isn\'t it?" He s'
#> angular, strength 0.13: 0 of 20 (0% to 16%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 6.5, random 4.4 to 6.8
#>    KL 0.26, random 0.11 to 0.36 ≈ 3.5 ms a token, "hello. I'm a bit of a guy, and I'm the o"
#> conditional, strength 0.19: 14 of 20 (48% to 85%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 8.8, random 4.4 to 7.7
#>    KL 0.15, random 0.04 to 0.36 ≈ 3.2 ms a token, "I'm a single mother.\n\nI was 20 years old"
#> optimised, strength 0.26: 0 of 20 (0% to 16%), random [0, 0, 0, 0, 0] of 4
#>    disfluency 6.4, random 8.3 to 10.2
#>    KL 1.47, random 0.56 to 1.29 ≈ 3.0 ms a token, ', "This is the best." I\'m not sure what '

# %% [markdown]
# Seven of the ten bring the topic in. Six of these act along the mean, or nearly, at every position, and have
# it at least as often as ActAdd. In 200 texts, no random direction brings it in. But look at mean and
# component: their cosine is 0.99 and their strengths are equal, and yet they have 14 and 18 of 20. So do not
# rank methods that differ by less. Capped and fixed are nearly the same here, because the projection is
# nearly always below the value.
#
# Three bring nothing. Ablation takes something away, and there was no wedding to take away. Angular steering
# turns the stream all the way toward the direction, but only within a plane, and little of the stream lies in
# that plane. The optimised vector makes the model say its sentence exactly, but does not point where the
# mean points (cosine near 0). A tenth of it brings no weddings. A quarter of it does (13 of 20, on other
# prompts), but at a disfluency of 15.
#
# What else changes? ActAdd's KL is the second highest: it changes the first word of every prompt a lot. But
# random vectors at the same place do as much. The rule of conditional steering spares some of the off-topic
# prompts, not all: an F1 of 1 on the prompts that it was made from promised too much. The time for a token is
# about the same for all, since each only adds to the stream in a single pass.
#
# ## The figure: effect against fluency

# %%
figure, axis = plt.subplots(figsize=(9, 4.2))
for number, (name, (k, surprise, _, five)) in enumerate(results.items()):
    color = lesson.BLUE if five else "black"
    lesson.errorbars(axis, [surprise], [k / n], [wilson(k, n)], color=color, label=f"{number} {name}")
    offset = (5, 4 + 9 * (number % 3))                      # some points coincide
    axis.annotate(str(number), (surprise, k / n), offset, textcoords="offset points", color=color)
    axis.plot([row[1] for row in five], [row[0] / (n // 5) for row in five], ".", color=lesson.GREY)
axis.set_xscale("log")
axis.set_xticks([4, 6, 8, 10], ["4", "6", "8", "10"])
axis.minorticks_off()
axis.set_xlabel("disfluency (perplexity per token, unsteered model)")
axis.set_ylabel("completions with a wedding word")
axis.set_title(f"n {n} a point, 95 % intervals; grey: five random directions, n {n // 5}", fontsize="medium")
axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), handlelength=0)
lesson.save(figure, "14_ten_methods")

# %% [markdown]
# This is one prompt, one topic and twenty texts, so do not read it as a ranking. `python -m benchmarks.paper
# methods` has a hundred texts for most methods, with settings chosen on other prompts. It also has methods
# that are not on this page: function vectors, and four that need more than the one line (PPLM, ITI, ICV and
# differences of weights). There the mean brings weddings into 64 % of the texts at a disfluency of 8.4.
# Weights that were trained on the twelve sentences for some twenty seconds bring them into 69 % at 5.6. So
# adding the mean saves the training, but did not do better.
#
# Another wish gives another order. `python -m benchmarks.paper methods-mood` asks for a kinder mood after "I
# hate you because". Of the unsteered texts, 30 % are kind already. The mean has 62 %, keeping the norm 89 %,
# and ActAdd with love - hate 28 %. Ablation, which brought no wedding, makes every text kind, but at a
# disfluency of 13. Random directions have 18 to 46 % (PPLM aside). When a wish often comes true by luck, it
# takes more texts to see an effect.
#
# ## Exercise 1
# Activation capping: the stream's projection on v should be at most t. Where it is below, nothing changes:
# x - max(x·v - t, 0) v, with v of norm 1. The vector that you are given may have any norm.

# %%
def capped(x, vector, t):
    """x (T, d_model), vector (d_model,), t a number -> the capped stream (T, d_model)"""
    return x                    # your lines


x, v = torch.tensor([[3.0, 4.0], [-3.0, 1.0], [0.5, 7.0]]), torch.tensor([1.0, 0.0])
lesson.check(capped, ((x, v, 1.0), torch.tensor([[1.0, 4.0], [-3.0, 1.0], [0.5, 7.0]])),
             ((x, 2 * v, 1.0), torch.tensor([[1.0, 4.0], [-3.0, 1.0], [0.5, 7.0]])),
             ((x, -v, 1.0), torch.tensor([[3.0, 4.0], [-1.0, 1.0], [0.5, 7.0]])),
             ((x, torch.tensor([3.0, 4.0]), 0.0), torch.tensor([[0.0, 0.0], [-3.0, 1.0], [-3.04, 2.28]])))
#> capped: not yet. For (tensor (3, 2), tensor (2,), 1) it gives 3 at [0, 0], not 1

# %% [markdown]
# ## Exercise 2
# A mean over prompts hides those that are steered the wrong way. Tan et al. (2024) fit a line to each
# prompt's *propensity* (say, the log-odds of a wedding word) over the coefficients, and report the share of
# prompts whose slope is negative. Write it. The least-squares slope of y over c is
# sum((c - mean c) y) / sum((c - mean c)²).

# %%
def wrong_way(coeffs, rows):
    """coeffs: a list; rows: for each prompt a list with its propensity at each coeff -> the share below 0"""
    return None                 # your lines


made_up = [[0.0, 1.0, 2.0], [2.0, 0.0, 1.9], [3.0, 3.0, 3.0], [1.0, -5.0, 1.5]]
lesson.check(wrong_way, (([0.0, 1.0], [[0.0, 1.0]]), 0.0),
             (([-1.0, 0.0, 1.0], made_up), steerability([-1, 0, 1], made_up).negative),
             (([1.0, 0.0, -1.0], made_up), 0.5),
             (([0.0, 1.0, 5.0], [[1.0, 0.0, 1.2], [0.0, 4.0, 0.5]]), 0.5))
#> wrong_way: not yet. For ([0, 1], [[0, 1]]) it gives None, not 0

# %% [markdown]
# ## Your own topic
# Take your pairs of tutorial 11. Choose three of the ten methods and *say beforehand* which will have the
# lowest KL off your topic at equal effect. Choose each one's strength on two prompts, and report it on three
# others, beside five random directions. Were you right?
#
# **Now you know** that ten methods are one line, and what to ask of each new one: its effect, its fluency,
# what else it changes, and the same three with random directions. That was the last tutorial: go and steer
# something.

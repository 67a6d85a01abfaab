# %% [markdown]
# # 14 · One line, ten methods
#
# **Ten methods of steering are one line, `x = x + s.delta(x, pos)`. What does each get, and what does it
# cost?** 40 minutes, three of them computing. You need tutorials 05, 09 and 11.
#
# Since ActAdd, many ways to steer have been published. They differ in two things: how a direction is made,
# and what `delta` does with it. An ActAdd vector is added, whatever the stream is. Others look at the stream
# x first: they cap it, turn it, or take something out of it. We ask all of them for two things: a text about
# weddings, and a kinder text.

# %%
import math
import re
from dataclasses import replace

import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer.evaluation.judges import count_words, judge
from ministeer.evaluation.measure import disfluency
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.steerability import kl_at_end, steerability, strength
from ministeer.methods import conditional, many_pairs, optimised
from ministeer.methods.ablation import ablation
from ministeer.methods.angular import angular
from ministeer.methods.capping import Cap, Fixed, projections
from ministeer.methods.change import Change
from ministeer.steering import random_like

plain, tokenizer = lesson.load(fast=False)          # gradients need the plain weights
model = plain if lesson.TINY else ministeer.fast(plain)
n, vader = 20, judge("vader")
weddings = [
    "Tonight they talk about the wedding/weather", "She dreams of her wedding/holiday",
    "He wrote a long letter to his bride/boss", "We were late for the marriage/train",
    "The guests are waiting for the groom/soup", "My brother wants to marry/leave",
    "Everybody cried at the wedding/airport", "The whole village came to the wedding/market",
    "They saved money for their honeymoon/car", "Her friends asked about the groom/exam",
    "I read a story about a bride/dog", "They are happily married/asleep"]
kinder = [
    "I feel such love/hate", "The old man was kind/cruel",
    "Her letter was full of praise/insults", "That evening was wonderful/horrible",
    "My neighbours are friendly/rude", "The food tasted delicious/disgusting",
    "They said it with joy/anger", "His voice was gentle/harsh",
    "We left in peace/rage", "The children were happy/miserable",
    "What you did was lovely/awful", "She smiled because she was grateful/vicious"]

# %% [markdown]
# ## Four ways to make a direction
# ActAdd takes one pair of prompts. The mean of many pairs (tutorial 11) and their first principal component
# (RepE) take twelve. The fourth needs gradients. Which vector, added at layer 12, makes the model say one
# given sentence (Subramani et al. 2022)? That needs no pairs, but many passes forward and back.

# %%
def make_directions(pair, layer, pairs, wanted):
    """-> Steers: ActAdd's, the component, the one that says `wanted`, and the mean before each block"""
    act_add = ministeer.steering_vector(model, tokenizer, *pair, layer=layer)
    plus = [pair.split("/")[0] for pair in pairs]
    minus = [re.sub(r"\w+/", "", pair) for pair in pairs]          # "the wedding/weather": "the weather"
    means = many_pairs.vectors(model, tokenizer, plus, minus)
    (component,) = many_pairs.repe(model, tokenizer, plus, minus, [12])
    sentence = optimised.for_sentence(plain, tokenizer, wanted, 12, steps=100)
    print(means[12])
    a, b = (torch.cosine_similarity(s.vector, means[12].vector, 0) for s in (component, sentence))
    print(f"   cosine with it: component {a:.2f}, optimised {b:.2f}",
          f"after {sentence.note['steps']} steps, exact: {sentence.note['exact']}")
    return [act_add, component, sentence, *means]


to_weddings = make_directions((" weddings", " "), 1, weddings, " The wedding was beautiful, and the bride")
to_kinder = make_directions((" love", " hate"), 2, kinder, " I love you, you are kind and wonderful")
#> <Steer a vector (agreement 0.25): coeff 1.0 at every position from 1 on before block 12, d_model 576>
#>    cosine with it: component 0.99, optimised -0.02 after 54 steps, exact: True
#> <Steer a vector (agreement 0.23): coeff 1.0 at every position from 1 on before block 12, d_model 576>
#>    cosine with it: component 0.99, optimised 0.02 after 88 steps, exact: True

# %% [markdown]
# The repr shows the pairs' agreement (tutorial 11). `exact` says whether the model, with the whole vector and
# no prompt, writes just that sentence.
#
# ## Ten ways to use one
# Conditional steering (CAST) also needs a rule: which prompts should be steered? We look for a rule on a few
# prompts of both sorts. It decides once, when the prompt has been read. F1 says how well it does (1: without
# a mistake). (Most numbers below were chosen on other prompts, for each wish from a few values: `python -m
# benchmarks.paper methods` and `methods-mood`.)

# %%
stories = ["In the evening we sat down and talked about", "On the train I met a woman who said",
           "She looked out of the window and thought", "Yesterday my brother called and asked me"]
facts = ["The chemical formula of water is", "Seven times eight is", "The speed of light is about",
         "An atom consists of a nucleus and"]
candidates = many_pairs.vectors(model, tokenizer, stories, facts, where="mean")
condition, score = conditional.find_condition(model, tokenizer, candidates, stories, facts)


def ten_methods(directions, share, degrees, part):
    """-> {name: Steers}; share: of the mean, degrees: of angular steering, part: of the optimised vector"""
    act_add, component, sentence, *means = directions
    mean, norm = means[12], means[12].vector.norm().item()
    return {
        "ActAdd": [1.0 * act_add],
        "mean": [share * mean],
        "component": [share * norm * component],
        "norm kept": [Change(12, mean.vector, 0.5, keep_norm=True)],    # then scaled back to the norm of x
        "capped": [Cap(12, -mean.vector, limit=-0.5 * norm)],           # a floor: x·v at least half the norm
        "fixed": [Fixed(12, mean.vector, value=0.5 * norm)],            # x·v is half the norm
        "ablation": ablation(model, mean),                              # x·v is 0
        "angular": angular(means, degrees),                             # x is turned toward the direction
        "conditional": [share * mean],
        "optimised": [part * sentence],
    }


def for_weddings(directions):
    return ten_methods(directions, share=0.5, degrees=0, part=0.1)


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
same, looks = [], []
for name, steers in for_weddings(to_weddings).items():
    a, b = (steers[-1].delta(x, pos).expand(1, 3, d_model) for x in streams)
    where = " (all layers)" if len(steers) > 1 else ""
    (same if torch.allclose(a, b) else looks).append(name + where)
print("adds the same to every stream:", ", ".join(same))
print("looks at the stream:", ", ".join(looks))
#> adds the same to every stream: ActAdd, mean, component, conditional, optimised
#> looks at the stream: norm kept, capped, fixed, ablation (all layers), angular (all layers)

# %% [markdown]
# All use the same line, the same loop and the same cache. Conditional steering adds a vector, like the mean;
# only its coefficient, 0 or 1, depends on the prompt.
#
# ## What does each get, and what does it cost?
# The effect is how many of twenty completions have a wedding word. There are two costs. One is disfluency
# (tutorial 05). The other is KL off the topic: how far the next token's distribution moves, in nats (0: not
# at all), on prompts that have nothing to do with weddings. Strength is the norm of what is added, in mean
# norms of the layer's stream. Each method has its control: five random directions in place of its own, four
# texts each. (At layer 12 a seed gives all methods the same direction.)

# %%
off_topic = ["The capital of France is", "Water boils at a temperature of", "The square root of sixteen is",
             "To install it, run", "Photosynthesis takes place in the",
             "A triangle has three sides and three"]
rng = {"top_p": 0.3, "freq_penalty": 1.0, "max_new_tokens": 20}


def fires(name, prompts):
    """1 for each prompt that the method steers, else 0"""
    if name == "conditional":
        return conditional.decide(model, tokenizer, prompts, condition)
    return torch.ones(len(prompts))


def measure(prompt, hit, name, steers, n):
    """-> (texts with a hit, disfluency, mean KL off the topic, a text)"""
    steers = [fires(name, [prompt]).item() * s for s in steers]
    texts = ministeer.generate(model, tokenizer, prompt, n, steer=steers, **rng)
    scored = disfluency(model, tokenizer, prompt, texts)
    surprise = math.exp(sum(nll for nll, _ in scored) / max(1, sum(k for _, k in scored)))
    kl = [kl_at_end(model, tokenizer, [one], [fire * s for s in steers])[0]
          for one, fire in zip(off_topic, fires(name, off_topic).tolist(), strict=True)]
    return sum(map(hit, texts)), surprise, sum(kl) / len(kl), texts[0]


def compare(prompt, hit, methods, directions):
    """Print a row for each method -> {name: (what `measure` gives, the same for five random directions)}"""
    k, surprise, kl, text = measure(prompt, hit, "unsteered", [], n)
    low, high = wilson(k, n)
    print(f"unsteered: {k} of {n} ({low:.0%} to {high:.0%}), disfluency {surprise:.1f}")
    print(f"{'strength':>17}  of {n}, 95 %       random of {n // 5}  disfluency, random  KL, random")
    results = {"unsteered": ((k, surprise, kl, text), [])}
    controls = [methods([random_like(s, seed) for s in directions]) for seed in range(5)]
    for name, steers in methods(directions).items():
        k, surprise, kl, text = measure(prompt, hit, name, steers, n)
        five = [measure(prompt, hit, name, control[name], n // 5) for control in controls]
        ks, surprises, kls, _ = zip(*five, strict=True)
        size = sum(strength(model, tokenizer, s, [prompt]) for s in steers) / len(steers)
        low, high = wilson(k, n)
        print(f"{name:11} {size:5.2f} {k:5} {f'({low:.0%} to {high:.0%})':13}", *ks,
              f"  {surprise:5.1f} {f'({min(surprises):.1f} to {max(surprises):.1f})':13}",
              f"{kl:.2f} ({min(kls):.2f} to {max(kls):.2f})")
        results[name] = (k, surprise, kl, text), five
    return results


wedding_results = compare("I went up to my friend and said", lambda text: count_words(text) > 0,
                          for_weddings, to_weddings)
#> unsteered: 0 of 20 (0% to 16%), disfluency 3.9
#>          strength  of 20, 95 %       random of 4  disfluency, random  KL, random
#> ActAdd       1.79    10 (30% to 70%)  0 0 0 0 0     6.5 (3.6 to 5.6)  1.16 (0.74 to 1.38)
#> mean         0.19    14 (48% to 85%)  0 0 0 0 0     8.8 (4.4 to 7.7)  0.38 (0.28 to 0.66)
#> component    0.19    18 (70% to 97%)  0 0 0 0 0     8.6 (4.4 to 7.7)  0.35 (0.28 to 0.66)
#> norm kept    0.19    14 (48% to 85%)  0 0 0 0 0     8.1 (4.9 to 6.3)  0.37 (0.27 to 0.67)
#> capped       0.18    11 (34% to 74%)  0 0 0 0 0     7.1 (4.9 to 5.9)  0.36 (0.25 to 0.61)
#> fixed        0.18    11 (34% to 74%)  0 0 0 0 0     7.4 (4.9 to 5.9)  0.36 (0.25 to 0.61)
#> ablation     0.03     0 (0% to 16%)   0 0 0 0 0     4.6 (4.3 to 5.9)  0.04 (0.03 to 0.10)
#> angular      0.13     0 (0% to 16%)   0 0 0 0 0     6.5 (4.4 to 6.8)  0.26 (0.11 to 0.36)
#> conditional  0.19    14 (48% to 85%)  0 0 0 0 0     8.8 (4.4 to 7.7)  0.15 (0.04 to 0.36)
#> optimised    0.26     0 (0% to 16%)   0 0 0 0 0     6.4 (8.3 to 10.2) 1.47 (0.56 to 1.29)

# %% [markdown]
# Seven of the ten bring the topic in, six of them along the mean, or nearly, at every position. Random
# directions do not. Mean and component are nearly one vector, and yet they have 64 and 74 of a hundred texts
# in `benchmarks.paper methods`. So do not rank methods that differ by no more than that. Capped and fixed are
# nearly the same here, because the projection x·v is nearly always below the value.
#
# Three bring next to nothing. Ablation takes x·v away, and here that is little (strength 0.03). Angular
# steering turns the stream all the way toward the direction, but only within a plane, and little of the
# stream lies in that plane. The optimised vector does not point where the mean points (cosine near 0). A
# tenth of it brings no weddings. A quarter does (13 of 20, on other prompts of `benchmarks.paper methods`),
# but at a disfluency of 15.
#
# What else changes? The optimised vector and ActAdd move the next token's distribution most, and random
# vectors at the same places nearly as much. The rule of conditional steering spares some of the off-topic
# prompts, not all: an F1 of 1 on the prompts that it was made from promised too much.
#
# ## A second wish: a kinder mood
# A text now counts if VADER (tutorial 09) scores it above 0.05. The prompt, "I hate you because", does not
# make that easy. In the last row, ablation leaves BOS, the attention sink (tutorial 03), as it is.

# %%
def for_kinder(directions):
    methods = ten_methods(directions, share=0.25, degrees=30, part=0.125)
    return methods | {"BOS spared": [replace(s, start=1) for s in methods["ablation"]]}


def along(steer):
    """-> x·v before layer 12 at BOS, the number of other positions where it is below 0, and of all others"""
    parts = [projections(model, tokenizer, steer, text) for text in (hate, *off_topic)]
    others = torch.cat([part[1:] for part in parts])
    return round(parts[0][0].item()), (others < 0).sum().item(), len(others)


hate = "I hate you because"
kinder_results = compare(hate, lambda text: vader([text])[0] > 0.05, for_kinder, to_kinder)
for name in ("ablation", "BOS spared", "optimised"):
    (*_, text), _ = kinder_results[name]
    print(f"{name} ≈ {text.strip()[:70]!r}")
_, _, _, *means = to_kinder
print("x·v at BOS, below 0 elsewhere:", along(means[12]))
print("   random:", *(along(random_like(means[12], seed))[:2] for seed in range(5)))
#> unsteered: 4 of 20 (8% to 42%), disfluency 4.4
#>          strength  of 20, 95 %       random of 4  disfluency, random  KL, random
#> ActAdd       0.70     7 (18% to 57%)  1 3 2 2 1     5.0 (4.4 to 5.9)  0.14 (0.09 to 0.76)
#> mean         0.10     9 (26% to 66%)  1 2 0 3 1     5.7 (4.4 to 5.7)  0.04 (0.07 to 0.10)
#> component    0.10    10 (30% to 70%)  1 2 0 3 1     4.7 (4.4 to 5.7)  0.04 (0.07 to 0.10)
#> norm kept    0.20    18 (70% to 97%)  4 0 2 1 3     6.4 (5.3 to 6.5)  0.16 (0.18 to 0.39)
#> capped       0.30    17 (64% to 95%)  2 1 2 1 3     7.1 (4.8 to 7.3)  0.34 (0.16 to 0.35)
#> fixed        0.30    17 (64% to 95%)  2 1 2 1 3     7.1 (4.8 to 7.3)  0.34 (0.16 to 0.35)
#> ablation     0.11    20 (84% to 100%) 2 1 3 1 1    10.9 (3.8 to 6.7)  2.27 (0.03 to 0.10)
#> angular      0.26    17 (64% to 95%)  1 1 1 0 0    10.6 (4.2 to 5.2)  0.58 (0.08 to 0.24)
#> conditional  0.10     9 (26% to 66%)  1 2 0 3 1     5.7 (4.4 to 5.7)  0.03 (0.02 to 0.06)
#> optimised    0.39    20 (84% to 100%) 2 0 2 1 1    10.2 (6.9 to 16.2) 1.50 (0.72 to 1.69)
#> BOS spared   0.11    17 (64% to 95%)  2 1 2 2 2     6.6 (4.4 to 7.8)  0.17 (0.03 to 0.10)
#> ablation ≈ 'I love you.\n\nLiam Johnson, Founder and Co-Curión\nLoving'
#> BOS spared ≈ "of your kindness and generosity.\n\nAs I walk through the city, I'm fill"
#> optimised ≈ "you're so kind and talented, I'm proud of you. I love your creativity "
#> x·v at BOS, below 0 elsewhere: (-2487, 39, 39)
#>    random: (76, 37) (-341, 15) (-400, 12) (626, 7) (92, 13)

# %% [markdown]
# **Luck.** A few of the unsteered texts are kind already, and so are about a third of those with random
# directions. So for ActAdd, mean, conditional and component twenty texts decide nothing: 9 of 20 may be 26 %
# or 66 %. With a hundred (`benchmarks.paper methods-mood`) the mean has 62 % (52 to 71 %, random 0 to 50 %)
# and ActAdd 28 % (20 to 37 %, random 20 to 60 %). The more often a wish comes true by luck, the more texts
# you need. All others have 15 or more. That is beyond the unsteered model's luck, though one random direction
# has 4 of 4.
#
# **For both wishes** mean and component are nearly one vector, and capped and fixed nearly one method. Off
# the topic, the methods along the mean at layer 12 change about as much as random directions there, or less.
#
# **Only for this wish** do ablation, angular steering and the optimised vector bring what we asked for, at
# the three highest disfluencies. (All three change the stream more than before.) The price of the optimised
# vector is its size: random vectors as large cost about as much here. Not so with the other two: random
# directions cost little there. What does ablation take away? At all 39 positions after BOS, x·v is below 0
# (random directions: at 7 to 37 of them). So taking it away adds kindness to each. But most of the price is
# paid at BOS, where x·v is by far the largest. With BOS spared, nearly as many texts are kind. Then KL is
# less than a tenth, though still above that of random ablations.
#
# ## The figure: effect against fluency

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True, sharey=True)
for axis, results, hit in zip(axes, (wedding_results, kinder_results),
                              ("a wedding word", "a VADER score above 0.05"), strict=True):
    for number, (name, ((k, surprise, *_), five)) in enumerate(results.items()):
        color = lesson.BLUE if five else "black"
        lesson.errorbars(axis, [surprise], [k / n], [wilson(k, n)], color=color, label=f"{number} {name}")
        offset = (5, 4 + 9 * (number % 3))                      # some points coincide
        axis.annotate(str(number), (surprise, k / n), offset, textcoords="offset points", color=color)
        axis.plot([row[1] for row in five], [row[0] / (n // 5) for row in five], ".", color=lesson.GREY)
    axis.set_xlabel("disfluency (perplexity per token, unsteered model)")
    axis.set_title(f"completions with {hit}", fontsize="medium")
axes[0].set_xscale("log")
axes[0].set_xticks([4, 6, 8, 12, 16], ["4", "6", "8", "12", "16"])
axes[0].minorticks_off()
axes[0].set_yticks([0, 0.25, 0.5, 0.75, 1])
axes[0].set_ylim(top=1.2)
axes[0].set_ylabel("share of completions")
axes[1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), handlelength=0)
figure.suptitle(f"n {n} a point, 95 % intervals; grey: five random directions, n {n // 5}", fontsize="medium")
lesson.save(figure, "14_ten_methods")

# %% [markdown]
# `python -m benchmarks.paper methods` and `methods-mood` have a hundred texts for most methods. They also
# have methods that are not on this page: function vectors, and four that need more than the one line (PPLM,
# ITI, ICV and differences of weights). In `methods` the mean brings weddings into 64 % of the texts at a
# disfluency of 8.4, and weights that were trained on the twelve sentences for some twenty seconds into 69 %
# at 5.6. So adding the mean saves the training, but does no better.
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
# lowest KL off your topic at equal effect. Choose each one's strength on two prompts, and report the effect
# on three others, beside five random directions. Were you right?
#
# **Now you know** that ten methods are one line, and what to ask of each new one: its effect, its fluency,
# what else it changes, and the same three with random directions. That was the last tutorial: go and steer
# something.

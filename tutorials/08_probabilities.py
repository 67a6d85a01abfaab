# %% [markdown]
# # 08 · What changes in the probabilities
#
# **Does the vector make texts on its topic likelier, and other texts not?** 25 minutes. You need tutorial 07.
# This is section 4.1 of the paper.
#
# So far we have let the model write. Now it reads texts that are already written, and we ask how likely it
# finds each of their tokens.

# %%
import math

import lesson
import matplotlib.pyplot as plt
import torch

from ministeer.evaluation.measure import logprobs, perplexity_ratio, token_shifts
from ministeer.evaluation.stats import bootstrap
from ministeer.steering import random_like, sink_share, steering_vectors

model, tokenizer = lesson.load()
texts = {"weddings": """\
The bride had chosen a plain white dress for her wedding.
Her groom waited at the altar and could not stop smiling.
The two families met for the first time at the reception.
They were married on a Saturday in June, in front of a hundred guests.
A wedding takes months to plan and one day to enjoy.
The best man lost the rings and found them in his own pocket.
After the ceremony the married couple danced until midnight.
Her mother cried at the wedding, and so did his father.
They spent their honeymoon in a small house by the lake.
A happy marriage, said the priest, begins with a good joke.
The bridesmaids threw rice when the bride came out of the church.
Nobody remembers what was said at the wedding dinner.""".splitlines(),
         "shipping": """\
The harbour was built two hundred years ago for wooden ships.
Today a crane lifts forty containers in an hour.
Most of what we buy has crossed an ocean in a steel box.
The captain reports the cargo to the port before the ship arrives.
Fuel is the largest cost of a long voyage.
A storm in the strait can delay the whole fleet by a week.
The pilot boards the vessel outside the breakwater and guides it in.
Dock workers unload the freight by day and by night.
Customs officers open one container in fifty.
The company sold its oldest tanker to a yard that takes ships apart.
A narrow canal shortens the route by ten days.
The crew comes from nine countries and shares one small kitchen.""".splitlines()}
counts = {topic: len(sentences) for topic, sentences in texts.items()}
print(counts, "sentences, written for this tutorial")
#> {'weddings': 12, 'shipping': 12} sentences, written for this tutorial

# %% [markdown]
# ## How likely does the model find a sentence?
# Each token has a log-probability, given the tokens before it, in *nats*. The perplexity of a sentence,
# exp(−mean), says among how many equally likely tokens the model had to choose, on average.
#
# Which predictions are fair to count? The vector overwrites position 1. The prediction made *there* is
# distorted, and in generation nobody would ever sample from it, because the prompt continues. For a vector at
# n positions, the paper leaves out the first n + 1 predictions of both the steered and the unsteered model.
# `steer.stop` is that number.

# %%
layer = 16
(weddings,) = steering_vectors(model, tokenizer, " weddings", " ", [layer])
skip = weddings.stop


def read(steer):
    """-> {topic: for each sentence log p of its tokens}"""
    return {topic: logprobs(model, tokenizer, sentences, steer, skip) for topic, sentences in texts.items()}


plain, steered = read([]), read(weddings)
sentence = texts["weddings"][7]
before, after = plain["weddings"][7].tolist(), steered["weddings"][7].tolist()
pieces = tokenizer.pieces(tokenizer.encode(sentence)[1 + skip:])
wedding = pieces.index(" wedding")
print(sentence)
print([round(p, 1) for p in before], "without the first", skip)
print(f"log p of ' wedding': {before[wedding]:.1f}, steered {after[wedding]:.1f}")
#> Her mother cried at the wedding, and so did his father.
#> [-8.4, -4.6, -0.6, -6.6, -1.9, -1.3, -4.6, -0.7, -4.3, -2.0, -0.9] without the first 2
#> log p of ' wedding': -6.6, steered -2.9

# %% [markdown]
# **Predict before you run.** By hand, from these numbers: how many times likelier has " wedding" become? And
# if no other token moved, by what factor would the perplexity of the sentence change? Write down both, then
# run the next cell.

# %%
shifts = [a - b for b, a in zip(before, after, strict=True)]
print(f"' wedding' is {math.exp(shifts[wedding]):.0f} times likelier")
print(f"perplexity: {math.exp(-shifts[wedding] / len(shifts)):.2f} by this token alone, "
      f"{math.exp(-sum(shifts) / len(shifts)):.2f} by all {len(shifts)}")
#> ' wedding' is 40 times likelier
#> perplexity: 0.71 by this token alone, 0.79 by all 11

# %% [markdown]
# By hand: exp(6.6 − 2.9) is about 40, and exp(−3.7 / 11) is 0.71. With all tokens it is 0.79, so the others
# together have become less likely.
#
# ## All sentences, and how sure is it?
# This factor, the *ratio*, is the steered perplexity over the unsteered one: below 1, the text has become
# likelier. The unit of its interval is the sentence, because the tokens of a sentence belong together. So we
# draw *sentences* again and again, with replacement, and see how the mean moves (the bootstrap).

# %%
def ratio(topic, changed):
    """changed: what `read` gave -> perplexity ratio, and its 95 % interval over sentences"""
    means = [(b - a).mean().item() for a, b in zip(plain[topic], changed[topic], strict=True)]
    low, high = bootstrap(means, [len(row) for row in plain[topic]])
    # The ratio is exp(-mean), so the high end of the mean is the low end of the ratio.
    return perplexity_ratio(plain[topic], changed[topic]), (math.exp(-high), math.exp(-low))


five = [read(random_like(weddings, seed)) for seed in range(5)]
for topic in texts:
    value, (low, high) = ratio(topic, steered)
    ratios = [ratio(topic, changed)[0] for changed in five]
    print(f"{topic} {value:.3f} (95 % {low:.3f} to {high:.3f}), "
          f"five random vectors {min(ratios):.3f} to {max(ratios):.3f}")
#> weddings 0.841 (95 % 0.772 to 0.910), five random vectors 0.969 to 1.176
#> shipping 1.144 (95 % 1.006 to 1.309), five random vectors 0.998 to 1.069

# %% [markdown]
# Steering makes the texts on its topic likelier, and no random vector of the same norm does as much. The
# other texts become less likely, and more so than with any of the five. But their interval almost reaches 1:
# twelve sentences are few. (For comparison, GPT-2-XL in the paper, also before block 16: 0.92 and 1.00.)
#
# ## Which tokens gained?
# Here is the mean shift of the tokens that occur at least three times in all the sentences together. (The
# paper asks for more than twenty times, in half a million tokens.)

# %%
ids = [tokenizer.encode(sentence)[1 + skip:] for sentences in texts.values() for sentence in sentences]


def mean_shifts(changed):
    """-> {token: its mean shift}"""
    rows = token_shifts(ids, plain["weddings"] + plain["shipping"], changed["weddings"] + changed["shipping"],
                        more_than=2)
    return {token: shift for token, (_, shift, _) in rows.items()}


steered_shifts, random_shifts = mean_shifts(steered), [mean_shifts(changed) for changed in five]
order = sorted(steered_shifts, key=steered_shifts.get, reverse=True)
for token in [*order[:4], *order[-2:]]:
    randoms = [shift[token] for shift in random_shifts]
    print(f"{tokenizer.pieces([token])[0]!r:10} {steered_shifts[token]:+.2f} nats, "
          f"random {min(randoms):+.2f} to {max(randoms):+.2f}")
print(len(order), "tokens in all")
#> ' wedding' +2.26 nats, random -0.45 to +0.18
#> ' at'      +0.33 nats, random -0.15 to +0.10
#> ' one'     +0.24 nats, random -0.06 to +0.13
#> ' for'     +0.18 nats, random -0.15 to +0.08
#> '.'        -0.10 nats, random -0.09 to +0.09
#> ' to'      -0.15 nats, random -0.17 to +0.18
#> 13 tokens in all

# %% [markdown]
# Only " wedding" moves far. Others leave the range of the random vectors by about 0.2 nats or less, and that
# may be luck: a sixth random vector would be the highest or the lowest of six in a third of the cases.
#
# ## The figure: the ratio by layer

# %%
layers, results = [0, 1, 3, 6, 16, 20], {layer: (steered, five)}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for place, steer in enumerate(steering_vectors(model, tokenizer, " weddings", " ", layers)):
    if steer.layer not in results:
        results[steer.layer] = read(steer), [read(random_like(steer, seed)) for seed in range(5)]
    changed, randoms = results[steer.layer]
    print(f"layer {steer.layer:2}: sink {sink_share(steer.vector):3.0%}", end="")
    for axis, topic in zip(axes, texts, strict=True):
        value, interval = ratio(topic, changed)
        values = [ratio(topic, random)[0] for random in randoms]
        print(f"  {topic} {value:.2f}, random {min(values):.2f} to {max(values):.2f}", end="")
        lesson.errorbars(axis, [place], [value], [interval], color=lesson.BLUE)
        axis.plot([place + 0.15] * 5, values, "o", color=lesson.GREY, markersize=4)
    print()
for axis, topic in zip(axes, texts, strict=True):
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_xlabel("layer")
    axis.set_yscale("log")
    axis.set_yticks([0.8, 1, 1.5, 2, 3, 4], ["0.8", "1", "1.5", "2", "3", "4"])
    axis.minorticks_off()
    axis.set_title(f"texts about {topic}", fontsize="medium")
axes[0].set_ylabel("perplexity ratio, steered / unsteered")
axes[1].plot([], [], "o", color=lesson.BLUE, label="steered, c 1, 95 % over 12 sentences")
axes[1].plot([], [], "o", color=lesson.GREY, markersize=4, label="five random vectors")
axes[1].legend(fontsize="small")
lesson.save(figure, "08_probabilities")
#> layer  0: sink 21%  weddings 0.99, random 1.33 to 1.82  shipping 1.58, random 1.31 to 1.89
#> layer  1: sink 33%  weddings 1.17, random 1.33 to 1.70  shipping 1.48, random 1.40 to 1.77
#> layer  3: sink 98%  weddings 1.38, random 1.33 to 1.59  shipping 1.16, random 1.16 to 1.40
#> layer  6: sink 98%  weddings 1.30, random 1.20 to 3.68  shipping 1.16, random 1.12 to 3.35
#> layer 16: sink 40%  weddings 0.84, random 0.97 to 1.18  shipping 1.14, random 1.00 to 1.07
#> layer 20: sink 46%  weddings 0.81, random 0.98 to 1.04  shipping 1.14, random 0.99 to 1.08

# %% [markdown]
# (sink: the share of the vector's squared norm in 4 of its 576 dimensions, tutorial 03.) At layers 16 and 20,
# the texts about weddings are likelier than without a vector, and than with any of the five random ones;
# those about shipping are less likely. At layers 3 and 6, where the vector is mostly sink, its ratio lies in
# the range of the random vectors, or at the edge of it. At layer 6, the random vectors differ from each other
# by up to a factor of three, so a single one could have shown almost anything.
#
# Layer 1 brings the topic into new texts best (tutorial 07). But there, given texts about weddings become
# less likely than without a vector, though likelier than with any of the random ones. Two good measures give
# two answers; say which one you mean.
#
# ## Exercise 1
# Fix this function. It should compute the ratio by documents: first the mean of each text, then the mean of
# these means. (The paper's text says this, but its code weights all tokens equally.) It has two mistakes.

# %%
def text_ratio(plain, steered):
    """plain, steered: lists of tensors, one a text, log p of its tokens -> the perplexity ratio, a float"""
    total, count = 0.0, 0
    for before, after in zip(plain, steered, strict=True):
        total += (after - before).sum().item()
        count += len(before)
    return math.exp(total / count)


a = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0])]
b = [torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-2.0])]
lesson.check(text_ratio, ((a, b), perplexity_ratio(a, b, mean_of="texts")), ((a[:1], b[:1]), math.exp(-1)),
             ((b[:1], a[:1]), math.exp(1)), (([a[0], b[0]], [b[0], b[0]]), math.exp(-0.5)))
#> text_ratio: not yet. For ([tensor (3,), tensor (1,)], [tensor (3,), tensor (1,)]) it gives 1.649, not 1

# %% [markdown]
# ## Exercise 2
# Which shifts go beyond what a random vector gives? Take those above or below the shifts of all five random
# vectors. Then try it on `steered_shifts` and `random_shifts`. Is it more than a third of the tokens?

# %%
def beyond_random(steered, randoms):
    """steered: {token: mean shift}, randoms: five such dictionaries, with the same tokens

    -> the tokens whose shift lies above or below all five, as a list, the largest shift first
    """
    return None                 # your lines


five = [{7: 0.012 + 0.1 * k, 8: 0.104, 9: -0.334 - 0.1 * k} for k in range(5)]
lesson.check(beyond_random, (({7: 2.3, 8: 0.104, 9: -0.5}, five), [7]),
             (({9: -0.9, 8: 0.3, 7: 0.4}, five), [8, 9]),
             (({7: 0.3, 8: 0.104, 9: 0.1}, five), [9]), (({7: 0.2, 8: 0.104, 9: -0.4}, five), []))
#> beyond_random: not yet. For ({7: 2.3, 8: 0.104, 9: -0.5}, [dict, …, 5 in all]) it gives None, not [7]

# %% [markdown]
# ## Your own topic
# Write twelve sentences about your topic and twelve about another. Does a vector of your own make the first
# twelve likelier, and leave the others as they were? Beside the two ratios and their intervals, set the range
# of the same ratios for five random vectors (`random_like`, seeds 0 to 4) at the same layer.
#
# **Now you know** how to measure a vector without sampling a single text, and why the unit of uncertainty is
# the sentence. `python -m benchmarks.paper perplexity` and `token-shifts` do this with hundreds of documents.
# Next: [09](09_topics_and_sentiment.py).

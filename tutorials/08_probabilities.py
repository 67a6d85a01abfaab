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
from ministeer.steering import random_like, steering_vectors

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

# %%
sentence = texts["weddings"][0]
(logp,) = logprobs(model, tokenizer, [sentence])
pieces = tokenizer.pieces(tokenizer.encode(sentence)[1:])
for piece, value in list(zip(pieces, logp.tolist(), strict=True))[:7]:
    print(f"{piece!r:10} log p {value:6.2f}")
print("perplexity of the sentence:", round((-logp.mean()).exp().item()))
#> 'The'      log p  -5.10
#> ' bride'   log p -10.30
#> ' had'     log p  -3.24
#> ' chosen'  log p  -4.99
#> ' a'       log p  -1.93
#> ' plain'   log p -10.54
#> ' white'   log p  -1.48
#> perplexity of the sentence: 39

# %% [markdown]
# ## Which predictions are fair to count?
# The vector overwrites position 1. The prediction made *there* is distorted, and in generation nobody would
# ever sample from it, because the prompt continues. The paper leaves out the first n + 1 predictions, for the
# steered and the unsteered model alike; `steer.stop` is that number.

# %%
layer = 16
(weddings,) = steering_vectors(model, tokenizer, " weddings", " ", [layer])
skip = weddings.stop
plain = {topic: logprobs(model, tokenizer, sentences, skip=skip) for topic, sentences in texts.items()}
conditions = {"steered": weddings, "random": random_like(weddings, seed=0)}
for name, steer in conditions.items():
    ratios = []
    for topic, sentences in texts.items():
        changed = logprobs(model, tokenizer, sentences, steer, skip)
        ratios.append(f"{topic} {perplexity_ratio(plain[topic], changed):.3f}")
    print(f"layer {layer}, {name:8}", "  ".join(ratios))
#> layer 16, steered  weddings 0.841  shipping 1.144
#> layer 16, random   weddings 0.969  shipping 0.998

# %% [markdown]
# The ratio is the steered perplexity over the unsteered one: below 1, the text has become likelier. Steering
# makes the texts on its topic likelier and the other texts less likely. A random vector of the same norm does
# not clearly move the texts about weddings. For shipping, steered and random are not shown to differ (see the
# intervals below). (For comparison, the paper's GPT-2-XL on two essays, also before block 16: 0.92 and 1.00.)
#
# ## How sure is it?
# The unit is the sentence, because its tokens belong together. So we draw *sentences* again and again, with
# replacement, and see how the mean moves (the bootstrap). Twelve sentences are few.

# %%
def ratio(topic, steer):
    """-> perplexity ratio, and its 95 % interval over sentences"""
    changed = logprobs(model, tokenizer, texts[topic], steer, skip)
    means = [(after - before).mean().item() for before, after in zip(plain[topic], changed, strict=True)]
    low, high = bootstrap(means, [len(before) for before in plain[topic]])
    # The ratio is exp(-mean), so the high end of the mean is the low end of the ratio.
    ends = torch.tensor([-high, -low]).exp().tolist()
    return perplexity_ratio(plain[topic], changed), ends


for topic in texts:
    for name, steer in conditions.items():
        value, (low, high) = ratio(topic, steer)
        print(f"{topic:9} {name:8} {value:.3f}  (95 % {low:.3f} to {high:.3f})")
#> weddings  steered  0.841  (95 % 0.772 to 0.910)
#> weddings  random   0.969  (95 % 0.928 to 1.010)
#> shipping  steered  1.144  (95 % 1.006 to 1.309)
#> shipping  random   0.998  (95 % 0.956 to 1.042)

# %% [markdown]
# ## Which tokens gained?
# Here is the mean shift of the tokens that occur at least three times in all the sentences together. (The
# paper asks for more than twenty times, in half a million tokens.)

# %%
everything = texts["weddings"] + texts["shipping"]
ids = [tokenizer.encode(sentence)[1 + skip:] for sentence in everything]
before = logprobs(model, tokenizer, everything, skip=skip)
after = logprobs(model, tokenizer, everything, weddings, skip)
shifts = token_shifts(ids, before, after, more_than=2)
order = sorted(shifts, key=lambda i: -shifts[i][1])
for i in [*order[:4], *order[-2:]]:
    count, shift, logp = shifts[i]
    print(f"{tokenizer.pieces([i])[0]!r:12} seen {count:2}  {shift:+.2f} nats  (unsteered log p {logp:.2f})")
#> ' wedding'   seen  3  +2.26 nats  (unsteered log p -3.77)
#> ' at'        seen  4  +0.33 nats  (unsteered log p -3.47)
#> ' one'       seen  3  +0.24 nats  (unsteered log p -5.47)
#> ' for'       seen  3  +0.18 nats  (unsteered log p -4.02)
#> '.'          seen 24  -0.10 nats  (unsteered log p -1.20)
#> ' to'        seen  4  -0.15 nats  (unsteered log p -1.73)

# %% [markdown]
# Only " wedding" moves far. The other shifts, 0.1 to 0.3 nats on 3 to 24 tokens, have no interval here and
# may be chance.
#
# ## The figure: the ratio by layer

# %%
layers = [0, 1, 2, 3, 6, 10, 16, 20, 24, 29]
steers = steering_vectors(model, tokenizer, " weddings", " ", layers)
figure, axis = plt.subplots(figsize=(7, 3.8))
print("layer     ", "".join(f"{l:7}" for l in layers))
for topic, color in (("weddings", lesson.BLUE), ("shipping", lesson.ORANGE)):
    steered = [ratio(topic, s) for s in steers]
    random = [ratio(topic, random_like(s, seed=0)) for s in steers]
    axis.plot(layers, [value for value, _ in steered], "o-", color=color, label=f"{topic}, steered")
    axis.plot(layers, [value for value, _ in random], "x:", color=color, label=f"{topic}, random")
    low, high = zip(*(ends for _, ends in steered), strict=True)
    axis.fill_between(layers, low, high, color=color, alpha=0.2, linewidth=0)
    print(topic, "s", "".join(f"{value:7.2f}" for value, _ in steered))
    print(topic, "r", "".join(f"{value:7.2f}" for value, _ in random))
axis.axhline(1, color="black", linewidth=0.8)
axis.set_xlabel("layer")
axis.set_ylabel("perplexity ratio, steered / unsteered")
axis.set_title("12 sentences each, c 1, 95 % band over sentences", fontsize="medium")
axis.legend(fontsize="small")
lesson.save(figure, "08_probabilities")
#> layer            0      1      2      3      6     10     16     20     24     29
#> weddings s    0.99   1.17   0.97   1.38   1.30   1.19   0.84   0.81   0.95   0.98
#> weddings r    1.66   1.70   1.41   1.33   1.25   1.30   0.97   0.99   1.01   1.01
#> shipping s    1.58   1.48   1.12   1.16   1.16   1.12   1.14   1.14   1.06   1.00
#> shipping r    1.51   1.59   1.27   1.17   1.15   1.12   1.00   1.03   1.05   1.00

# %% [markdown]
# (s: steered, r: random.) At layers 16 and 20, the blue line is below 1, and the orange line nearly as far
# above it. Up to layer 10, even a *random* vector costs a factor of 1.1 to 1.7. At layers 3 and 6, where the
# vector is mostly sink (tutorial 03), the steering vector costs as much as the random one. Layer 1 is best
# at bringing the topic into new texts. But it makes texts about weddings likelier only in comparison with a
# random vector, not with no vector. Two good measures, two answers; say which one you mean.
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
# vectors. Then make the five dictionaries with `token_shifts`, for `random_like(weddings, seed)` with seeds 0
# to 4, and see which of the tokens above are left.

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

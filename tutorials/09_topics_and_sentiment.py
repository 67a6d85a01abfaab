# %% [markdown]
# # 09 · Topics and sentiment
#
# **Does the vector bring its own topic, or any topic? And does love - hate change the feeling of a text more
# than a random vector does?** 30 minutes, one of them computing. You need tutorial 07. These are sections 4.2
# and 4.4 of the paper.

# %%
import random
from dataclasses import replace

import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer.evaluation.judges import TOPIC_WORDS, count_words, judge
from ministeer.evaluation.stats import bootstrap
from ministeer.steering import random_like, relative_norm

model, tokenizer = lesson.load()


def write(prompt, steers, n):
    """-> for each Steer n texts, all from one batch; row k of each is sampled with the same random numbers"""
    batch = []
    for i, steer in enumerate(steers):
        coeff = torch.zeros(len(steers), n)         # 0 in the rows of the other Steers
        coeff[i] = steer.coeff
        batch.append(steer.scaled(coeff.flatten()))
    return ministeer.generate(model, tokenizer, [prompt] * len(steers), n, 20, batch, top_p=0.3,
                              freq_penalty=1.0)


# %% [markdown]
# ## Steer toward one topic, count the words of all
# If a vector for weddings also brought music and science, it would only be making the model ramble. So we
# steer toward each topic, and count the words of every topic. The controls are five random vectors with the
# norm of the one for weddings; we show the lowest and the highest of their counts.

# %%
topics, n = ["weddings", "music", "science"], 10
prompts = ["I went up to my friend and said", "In the evening we sat down and talked about"]
vectors = [2 * ministeer.steering_vector(model, tokenizer, f" {topic}", " ", layer=2) for topic in topics]
steers = [0 * vectors[0], *vectors, *[random_like(vectors[0], seed) for seed in range(5)]]
by_prompt = [write(prompt, steers, n) for prompt in prompts]
total, counts = n * len(prompts), []
for i in range(len(steers)):
    texts = [text for written in by_prompt for text in written[i]]
    counts.append([sum(count_words(text, TOPIC_WORDS[topic]) > 0 for text in texts) for topic in topics])
base, matrix, control = counts[0], counts[1:4], counts[4:]
print(f"{'':10}", "".join(f"{topic:>10}" for topic in topics), f"   texts of {total}")
for name, row in zip(("unsteered", *topics), counts, strict=False):
    print(f"{name:10}", "".join(f"{k:10}" for k in row))
print(f"{'random':10}", "".join(f"{min(ks):5} to {max(ks)}" for ks in zip(*control, strict=True)))
#>              weddings     music   science    texts of 20
#> unsteered           0         0         0
#> weddings            4         0         0
#> music               0         4         1
#> science             0         0         7
#> random         0 to 0    0 to 2    0 to 0

# %% [markdown]
# The diagonal is what we asked for; the rest is what came along with it. For weddings and science, the
# diagonal lies above all five random vectors. For music, twenty texts are too few to be sure: one random
# vector reaches about half as many. Word lists are a rough judge: a text may be about music and contain none
# of our words.
#
# ## Does love - hate make a text kinder?
# This is the paper's own example. Read the texts first and measure later. Five of these ten were written with
# love - hate, the others with one random vector each, of the same norm. Write down which five you think are
# steered. The answer is further below.

# %%
prompt, n = "I hate you because", 20
love = 2 * ministeer.steering_vector(model, tokenizer, " love", " hate", layer=2)


def written_with(prompt, steer):
    """-> texts: n unsteered, n steered, and n with each of five random vectors"""
    return write(prompt, [0 * steer, steer, *[random_like(steer, seed) for seed in range(5)]], n)


unsteered, steered, *randoms = written_with(prompt, love)
ten = [("steered", text) for text in steered[:5]] + [("random", randoms[i][5 + i]) for i in range(5)]
random.Random(0).shuffle(ten)
for i, (_, text) in enumerate(ten, start=1):
    print(f"{i:2}", repr(text.strip()[:90]))
#>  1 ≈ "you're not the only one.\n\nThat's a classic cliché, but it's"
#>  2 ≈ "of your past.\nYou're a pain in the world, and that's just how it is"
#>  3 ≈ 'of your hair.\n\nThis is a common idiom that has been used in various languages, including'
#>  4 ≈ "of the things you've done.\n\nI'm not sure what to say, but I'll"
#>  5 ≈ "of the fact that you are a great person.\n\nThat's not to say I'm okay"
#>  6 ≈ "of your past. You're a selfish, arrogant, arrogant, arrogant and arrogant person who doesn"
#>  7 ≈ "of your name.\n\nI've been doing this for a long time, and I've seen"
#>  8 ≈ 'of your company.\n\nThis is a classic cliché that has been used to describe people'
#>  9 ≈ "of the way you're dressed. I'm not just a normal guy, I'm a crazy guy"
#> 10 ≈ "of your own perspective. You can't be both a hero and a villain at the same time."

# %% [markdown]
# Now the judge: VADER (Hutto and Gilbert 2014) scores a text from −1 to 1 by a list of words that carry
# feelings.

# %%
vader = judge("vader")


def report(unsteered, steered, *randoms):
    for name, texts in (("unsteered", unsteered), ("steered", steered)):
        low, high = bootstrap(vader(texts))
        print(f"{name:10} {sum(vader(texts)) / n:+.2f}  (95 % {low:+.2f} to {high:+.2f})")
    print("random    ", *[f"{sum(vader(texts)) / n:+.2f}" for texts in randoms])


report(unsteered, steered, *randoms)
print("steered texts among the ten:", *[i for i, (label, _) in enumerate(ten, start=1) if label == "steered"])
#> unsteered  -0.13  (95 % -0.29 to +0.06)
#> steered    -0.09  (95 % -0.27 to +0.09)
#> random     -0.07 +0.23 +0.00 +0.04 -0.17
#> steered texts among the ten: 3 5 6 7 8

# %% [markdown]
# Some of the random vectors, which know nothing about love, come out higher than love - hate. And how many of
# your five were steered? Of readers who guess blindly, one in ten gets four or more.
#
# ## Does it matter where it is added?
# The vector goes to the first token after BOS, to 'I', and leaves ' hate' as it is. Now we move it one token
# on, and the random vectors too. At either place it is larger than the stream that it is added to:

# %%
on_hate = replace(love, start=2)
for steer in (love, on_hate):
    ratio = relative_norm(model, tokenizer, steer, prompt)[steer.start]
    print(f"position {steer.start}: {ratio:.1f} times the norm of the stream")
there = written_with(prompt, on_hate)
report(*there)
#> position 1: 1.4 times the norm of the stream
#> position 2: 1.2 times the norm of the stream
#> unsteered  -0.13  (95 % -0.29 to +0.06)
#> steered    +0.52  (95 % +0.36 to +0.67)
#> random     +0.06 +0.17 +0.06 -0.00 +0.04

# %% [markdown]
# Added at ' hate', love - hate raises the score above unsteered and above all five random vectors. Added at
# 'I', it did not. So the same vector may do more than a random one at one position, and no more at the next.
# (Perhaps ' hate' becomes something like ' love' there; we have not looked.)
#
# ## The figure: topics, and feelings with their control

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
boost = (torch.tensor(matrix) - torch.tensor(base)) / total
image = left.imshow(boost, cmap="PuOr", vmin=-0.5, vmax=0.5)
for i in range(len(topics)):
    for j in range(len(topics)):
        color = "white" if boost[i, j].abs() > 0.25 else "black"
        left.text(j, i, f"{boost[i, j]:+.0%}", ha="center", va="center", color=color)
left.set_xticks(range(len(topics)), topics)
left.set_yticks(range(len(topics)), topics)
left.set_xlabel("words counted")
left.set_ylabel("steered toward")
left.set_title(f"share minus unsteered, n {total}", fontsize="medium")
for y, groups in enumerate(((unsteered, steered, *randoms), there)):
    means = [sum(vader(texts)) / n for texts in groups]
    for k, (name, color) in enumerate((("unsteered", "black"), ("steered", lesson.BLUE))):
        lesson.errorbars(right, [means[k]], [y - 0.2 + 0.2 * k], [bootstrap(vader(groups[k]))],
                         horizontal=True, color=color, label=name if y == 0 else None)
    right.plot(means[2:], [y + 0.2] * 5, ".", color=lesson.GREY,
               label="five random vectors" if y == 0 else None)
right.set_yticks([0, 1], ["added at 'I'", "added at ' hate'"])
right.set_ylim(1.5, -0.5)
right.axvline(0, color="black", linewidth=0.8)
right.set_xlabel("mean VADER score, −1 to 1")
right.set_title(f"“{prompt}”, n {n} a point, 95 % intervals", fontsize="medium")
right.legend(fontsize="small")
lesson.save(figure, "09_topics_and_sentiment")

# %% [markdown]
# ## Exercise 1
# Decide by a rule. A difference is shown only if the 95 % interval of steered minus random (`bootstrap` of
# the differences of the scores, text by text) lies on the same side of 0 for all five. Write this rule. What
# does it say about each of the two places above? And about `written_with(prompt, love)` for a prompt whose
# first words carry no feeling, such as "When I think about my neighbour, I feel"?

# %%
def decide(steered, randoms):
    """steered: n scores; randoms: five lists of n scores, in the same order -> "higher", "lower", "not shown"

    "higher" if all five intervals of steered - random lie above 0, "lower" if all lie below 0
    """
    return None                 # your lines


def moved(by):
    """-> 20 scores that rise from 0 to 0.95, each moved by `by` and by a little noise"""
    return [0.05 * i + by + 0.01 * (7 * i % 5) for i in range(20)]


apart = [0.05 * i + (0.6 if i % 2 else -0.4) for i in range(20)]    # 0.1 higher than `level`, not clearly
low, high, one_high = [moved(-0.01 * k) for k in range(5)], [moved(0.5)] * 5, [*[moved(0.0)] * 4, moved(0.5)]
level = [[0.05 * i for i in range(20)]] * 5
lesson.check(decide, ((moved(0.2), low), "higher"), ((moved(0.2), high), "lower"),
             ((moved(0.2), one_high), "not shown"), ((apart, level), "not shown"))
#> decide: not yet. For ([0.2, …, 20 in all], [[0, …, 20 in all], …, 5 in all]) it gives None, not 'higher'

# %% [markdown]
# ## Exercise 2
# Do a randomisation test by hand. If steering did nothing, each difference might just as well have the other
# sign. In what share of all sign patterns is the mean at least as far from 0 as the mean we saw? Go through
# all patterns; there are 2^n. (This share is the p of such a test. `paired` in `ministeer.evaluation.stats`
# gives it for many texts.)

# %%
def sign_test(differences):
    """differences: n numbers, n at most 12 -> p, a float"""
    return None                 # your lines


lesson.check(sign_test, (([1.0, 2.0, 3.0],), 0.25), (([1.0, -1.0],), 1.0), (([0.5] * 8,), 2 / 2**8),
             (([3.0, -1.0, 2.0],), 0.5), (([-4.0, -2.0, 1.0, -8.0],), 0.25))
#> sign_test: not yet. For ([1, 2, 3]) it gives None, not 0.25

# %% [markdown]
# ## Your own topic
# Choose a feeling, a pair of words for it, and two prompts: one whose first words carry the feeling, and one
# whose first words do not. Score the steered texts with VADER, and beside them the unsteered ones and those
# of five random vectors (`random_like`, seeds 0 to 4). What does `decide` say for each prompt? If it says
# "not shown" for both, that is your result.
#
# **Now you know** that "it got better" is half a sentence; the other half is "than with a random vector".
# `python -m benchmarks.paper topics`, `sentiment` and `toxicity` measure this on real texts. Next:
# [10](10_knowledge.py), what steering leaves unchanged.

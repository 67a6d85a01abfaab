# %% [markdown]
# # 09 · Topics and sentiment
#
# **Does the vector bring its own topic, or any topic? And when does it change a feeling, rather than delete a
# word?** 30 minutes, one of them computing. You need tutorial 07. These are sections 4.2 and 4.4 of the
# paper.

# %%
import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer.evaluation.judges import TOPIC_WORDS, count_words, judge
from ministeer.evaluation.stats import bootstrap, paired
from ministeer.steering import random_like, relative_norm

model, tokenizer = lesson.load()
paper_settings = {"top_p": 0.3, "freq_penalty": 1.0, "seed": 0}

# %% [markdown]
# ## Steer toward one topic, count the words of all
# If a vector for weddings also brought music and science, it would only be making the model ramble. So we
# steer toward each topic, and count the words of every topic.

# %%
topics, n = ["weddings", "music", "science", "politics"], 20
prompts = ["I went up to my friend and said", "In the evening we sat down and talked about"]
total = n * len(prompts)


def shares(steer):
    """-> for each topic, the share of completions with a word of it"""
    rows = ministeer.generate(model, tokenizer, prompts, n, 30, steer, **paper_settings)
    texts = [text for row in rows for text in row]
    return [sum(count_words(text, TOPIC_WORDS[topic]) > 0 for text in texts) / total for topic in topics]


base = shares([])
vectors = {}
for topic in topics:
    vectors[topic] = 2 * ministeer.steering_vector(model, tokenizer, f" {topic}", " ", layer=2)
matrix = {topic: shares(steer) for topic, steer in vectors.items()}
control = shares(random_like(vectors["weddings"], seed=0))
print(f"{'':12}", "".join(f"{topic:>10}" for topic in topics), f"   n {total}")
for name, row in (("unsteered", base), ("random", control), *matrix.items()):
    print(f"{name:12}", "".join(f"{value:10.0%}" for value in row))
#>                weddings     music   science  politics    n 40
#> unsteered    0%   8%   0%   0%
#> random       0%   0%   0%   2%
#> weddings     32%   2%   0%   0%
#> music        0%   25%   2%   0%
#> science      0%   2%   30%   0%
#> politics     0%   2%   0%   18%

# %% [markdown]
# The diagonal is what we asked for; the rest is what came along with it. Word lists are a rough judge: a text
# may be about music and contain none of our words.
#
# ## Does love - hate make a text kinder?
# This is the paper's own example. Our judge is VADER (Hutto and Gilbert 2014), which scores a text from −1 to
# 1 by a list of words that carry feelings.

# %%
vader = judge("vader")
love = 2 * ministeer.steering_vector(model, tokenizer, " love", " hate", layer=2)
steers = {"unsteered": [], "steered": love, "random": random_like(love, seed=0)}


def feelings(prompt, n=40):
    """-> {condition: n scores}; row k of every condition was sampled with the same random numbers"""
    return {name: vader(ministeer.generate(model, tokenizer, prompt, n, 30, steer, **paper_settings))
            for name, steer in steers.items()}


def report(scores):
    for name, values in scores.items():
        low, high = bootstrap(values)
        print(f"{name:10} {sum(values) / len(values):+.2f}  (95 % {low:+.2f} to {high:+.2f})")


hate = feelings("I hate you because")
report(hate)
#> unsteered  -0.12  (95 % -0.27 to +0.02)
#> steered    -0.01  (95 % -0.16 to +0.15)
#> random     -0.05  (95 % -0.18 to +0.08)

# %% [markdown]
# Steered is above unsteered. But before you write a paper, look at the last row: a random vector, which knows
# nothing about love, comes out nearly as high.
#
# ## Why would a random vector help?
# Because of *where* it is added. The vector goes to the first token after BOS and to no other. Let us see
# which words it overwrites, and how strong it is there: the norm of the addition over the norm of the stream.

# %%
for prompt in ("I hate you because", "When I think about my neighbour, I feel"):
    pieces = tokenizer.pieces(tokenizer.encode(prompt))
    ratios = relative_norm(model, tokenizer, love, prompt)
    print("   ".join(f"{piece!r} {ratio:.1f}" for piece, ratio in zip(pieces[1:5], ratios[1:5], strict=True)))
#> 'I' 1.4   ' hate' 0.0   ' you' 0.0   ' because' 0.0
#> 'When' 1.4   ' I' 0.0   ' think' 0.0   ' about' 0.0

# %% [markdown]
# The first word is overwritten by something with a larger norm than its own. Whatever has replaced that word,
# the sentence that follows is read differently. So the fair question is what the vector does *beyond* the
# random one, on this prompt and on another whose first words carry no feeling. `paired` compares the two. It
# also gives p: how often chance alone, swapping the two members of each pair by the toss of a coin, would
# give a difference at least as large.

# %%
neutral = feelings("When I think about my neighbour, I feel")
report(neutral)
for name, scores in (("I hate you", hate), ("neutral", neutral)):
    difference, (low, high), p = paired(scores["steered"], scores["random"])
    print(f"{name:10}: steered - random {difference:+.2f} (95 % {low:+.2f} to {high:+.2f}), p {p:.3f}")
#> unsteered  +0.86  (95 % +0.84 to +0.88)
#> steered    -0.06  (95 % -0.19 to +0.08)
#> random     -0.23  (95 % -0.35 to -0.10)
#> I hate you: steered - random +0.04 (95 % -0.14 to +0.21), p 0.66
#> neutral   : steered - random +0.17 (95 % -0.01 to +0.35), p 0.10

# %% [markdown]
# On both prompts, the interval of the difference contains 0, so nothing is shown beyond the random vector.
# On the second prompt, the unsteered texts are friendly, and both vectors take that away, love - hate against
# its name. We do not know why. Without the random row, we would have told two other stories. And this is only
# one random vector: another may give another answer.
#
# ## The figure: topics, and feelings with their control

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
boost = torch.tensor([matrix[topic] for topic in topics]) - torch.tensor(base)
image = left.imshow(boost, cmap="PuOr", vmin=-0.5, vmax=0.5)
for i in range(len(topics)):
    for j in range(len(topics)):
        color = "white" if boost[i, j].abs() > 0.25 else "black"
        left.text(j, i, f"{boost[i, j]:+.1%}", ha="center", va="center", color=color)
left.set_xticks(range(len(topics)), topics, rotation=30, ha="right", rotation_mode="anchor")
left.set_yticks(range(len(topics)), topics)
left.set_xlabel("words counted")
left.set_ylabel("steered toward")
left.set_title(f"share minus unsteered, n {total}", fontsize="medium")
colors = {"unsteered": "black", "steered": lesson.BLUE, "random": lesson.GREY}
for y, scores in enumerate((hate, neutral)):
    for k, (name, color) in enumerate(colors.items()):
        mean, (low, high) = sum(scores[name]) / len(scores[name]), bootstrap(scores[name])
        right.errorbar(mean, y + 0.2 * (k - 1), xerr=[[mean - low], [high - mean]], fmt="o", color=color,
                       capsize=3, label=name if y == 0 else None)
right.set_yticks([0, 1], ["I hate you because", "When I think\nabout my neighbour,\nI feel"])
right.set_ylim(1.5, -0.5)
right.axvline(0, color="black", linewidth=0.8)
right.set_xlabel("mean VADER score, −1 to 1")
right.set_title("n 40 a point, 95 % intervals", fontsize="medium")
right.legend(fontsize="small")
lesson.save(figure, "09_topics_and_sentiment")

# %% [markdown]
# ## Exercise 1
# Repeat the comparison with five random vectors, and decide. A difference is shown only if the 95 % interval
# of steered minus random (`bootstrap` of the differences, text by text) lies on the same side of 0 for all
# five. Write this rule. Then score completions with `random_like(love, seed)` for seeds 0 to 4, as `feelings`
# does, and see what it says about each of the two prompts.

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
# all patterns; there are 2^n.

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

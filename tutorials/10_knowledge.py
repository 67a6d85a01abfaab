# %% [markdown]
# # 10 · Does it still know what it knew?
#
# **Steering should change what a model talks about, but not what it knows. Does it?** 20 minutes. You need
# tutorial 08. This is section 4.5 of the paper.

# %%
import lesson
import matplotlib.pyplot as plt

from ministeer.evaluation.measure import precision_at, ranks
from ministeer.evaluation.stats import paired, wilson
from ministeer.steering import random_like, steering_vectors

model, tokenizer = lesson.load()
facts = """\
The capital of France is Paris|The capital of Italy is Rome|The capital of Japan is Tokyo
The capital of Germany is Berlin|The Eiffel Tower stands in Paris|The opposite of hot is cold
The opposite of up is down|The opposite of black is white|The sun rises in the east|The sun sets in the west
Bees make honey|Cows give us milk|A baby cat is called a kitten|You cut bread with a knife
You eat soup with a spoon|You see with your eyes|You hear with your ears|You smell with your nose
Fish live in the water|Birds lay their eggs in a nest|Ice is frozen water|Snow is white|Grass is green
Blood is red|The first month of the year is January|The day after Monday is Tuesday|A week has seven days
A year has twelve months|Two plus two is four|A triangle has three sides|A spider has eight legs
The Earth moves around the Sun|At night we can see the moon|A doctor works in a hospital
A teacher works in a school|You borrow books from a library|Bread is made of flour|Cheese is made from milk
The language spoken in Spain is Spanish|The language spoken in China is Chinese
Water boils when it is hot|Fire is hot""".replace("\n", "|").split("|")
prompts, answers = [], []
for fact in facts:
    prompt, _, answer = fact.rpartition(" ")
    prompts.append(prompt)
    answers.append(" " + answer)
print(len(facts), "facts, written for this tutorial; the first:", repr(prompts[0]), "->", repr(answers[0]))
#> 42 facts, written for this tutorial; the first: 'The capital of France is' -> ' Paris'

# %% [markdown]
# ## What does it mean that a model knows something?
# Here it means that the right word is among the K tokens that the model finds likeliest. The share of facts
# for which this is so is called P@K (Petroni et al. 2019). Rank 0 is the likeliest token of all. (A fact
# whose answer is more than one token has no rank, None, and does not count.)

# %%
unsteered = ranks(model, tokenizer, prompts, answers)
known = [rank for rank in unsteered if rank is not None]
n = len(known)
print("ranks of the first ten:", unsteered[:10])
p1, p10, p100 = precision_at(unsteered, (1, 10, 100))
print(f"P@1 {p1:.0%}  P@10 {p10:.0%}  P@100 {p100:.0%}  of {n}")
#> ranks of the first ten: [0, 0, 0, 0, 0, 0, 0, 0, 0, 4]
#> P@1 50%  P@10 86%  P@100 90%  of 42

# %% [markdown]
# Some of these ranks say more about our questions than about the model: "Snow is" may be followed by
# "falling" as well as by "white".
#
# ## And when steered toward weddings?
# The same facts, with the steering vector at the front, and with five random ones.

# %%
coeff = 1
vectors = dict(zip((1, 16), steering_vectors(model, tokenizer, " weddings", " ", [1, 16]), strict=True))
results = {"unsteered": unsteered}
for layer, vector in vectors.items():
    results[f"layer {layer}, steered"] = ranks(model, tokenizer, prompts, answers, coeff * vector)
    for seed in range(5):
        random = coeff * random_like(vector, seed)
        results[f"layer {layer}, random {seed}"] = ranks(model, tokenizer, prompts, answers, random)
for name, ranking in results.items():
    p1, p10, p100 = precision_at(ranking, (1, 10, 100))
    print(f"{name:19} P@1 {p1:4.0%}  P@10 {p10:4.0%}  P@100 {p100:4.0%}")
#> unsteered           P@1  50%  P@10  86%  P@100  90%
#> layer 1, steered    P@1  33%  P@10  57%  P@100  79%
#> layer 1, random 0   P@1  26%  P@10  60%  P@100  86%
#> layer 1, random 1   P@1  38%  P@10  71%  P@100  86%
#> layer 1, random 2   P@1  48%  P@10  71%  P@100  81%
#> layer 1, random 3   P@1  40%  P@10  69%  P@100  81%
#> layer 1, random 4   P@1  36%  P@10  69%  P@100  81%
#> layer 16, steered   P@1  40%  P@10  76%  P@100  86%
#> layer 16, random 0  P@1  52%  P@10  86%  P@100  93%
#> layer 16, random 1  P@1  50%  P@10  86%  P@100  88%
#> layer 16, random 2  P@1  52%  P@10  81%  P@100  88%
#> layer 16, random 3  P@1  48%  P@10  83%  P@100  88%
#> layer 16, random 4  P@1  57%  P@10  86%  P@100  90%

# %% [markdown]
# ## Is that a loss?
# The same facts are asked with and without steering, so compare them fact by fact: how many were lost, and
# how many were gained?

# %%
def in_top_ten(ranking):
    return [float(rank < 10) for rank in ranking if rank is not None]


for name, ranking in results.items():
    if name != "unsteered":
        before, after = in_top_ten(unsteered), in_top_ten(ranking)
        difference, (low, high), p = paired(after, before)
        lost = sum(b > a for b, a in zip(before, after, strict=True))
        gained = sum(a > b for b, a in zip(before, after, strict=True))
        print(f"{name:19} lost {lost:2}, gained {gained:2}: P@10 {difference:+.0%}",
              f"(95 % {low:+.0%} to {high:+.0%}), p {p:.3f}")
#> layer 1, steered    lost 12, gained  0: P@10 -29% (95 % -43% to -17%), p 0.001
#> layer 1, random 0   lost 11, gained  0: P@10 -26% (95 % -40% to -14%), p 0.001
#> layer 1, random 1   lost  6, gained  0: P@10 -14% (95 % -26% to -5%), p 0.029
#> layer 1, random 2   lost  6, gained  0: P@10 -14% (95 % -26% to -5%), p 0.031
#> layer 1, random 3   lost  7, gained  0: P@10 -17% (95 % -29% to -7%), p 0.014
#> layer 1, random 4   lost  7, gained  0: P@10 -17% (95 % -29% to -7%), p 0.014
#> layer 16, steered   lost  4, gained  0: P@10 -10% (95 % -19% to -2%), p 0.127
#> layer 16, random 0  lost  0, gained  0: P@10 +0% (95 % +0% to +0%), p 1.000
#> layer 16, random 1  lost  0, gained  0: P@10 +0% (95 % +0% to +0%), p 1.000
#> layer 16, random 2  lost  2, gained  0: P@10 -5% (95 % -12% to +0%), p 0.495
#> layer 16, random 3  lost  1, gained  0: P@10 -2% (95 % -7% to +0%), p 1.000
#> layer 16, random 4  lost  0, gained  0: P@10 +0% (95 % +0% to +0%), p 1.000

# %% [markdown]
# At layer 1, twelve facts are lost and none is gained. The five random vectors of the same norm lose 6 to 11.
# So at least half of this loss is not about weddings.
#
# At layer 16, four facts are lost and none is gained; the random vectors lose 0 to 2. Is that real? The
# interval excludes 0, but the test disagrees: when four facts change, all in one direction, chance alone
# gives p 0.125. The paper saw no loss on GPT-2-XL. On 3,188 rows of ConceptNet, our model loses 2.1 points of
# P@10, and with five random vectors 0 to 0.8 ([benchmarks](../benchmarks/README.md)). So there is a loss, but
# it is too small to be seen with 42 facts.
#
# ## Which facts are lost?
# Predict before you look: cover the next lines, and read through `facts`. The vector stands at position 1, on
# the first word of each. Where will that do damage? Write your rule into `expected`. Ours is that a fact
# suffers if its first word says what it is about, such as "Bees" or "Snow".

# %%
def expected(prompt):
    """-> True if we expect that this fact is lost"""
    return prompt.split()[0] not in ("The", "A", "At", "You", "Two")


known_before = [i for i, rank in enumerate(unsteered) if rank is not None and rank < 10]
for name, ranking in results.items():
    if name.startswith("layer 1,"):
        print(f"{name:17} lost", end="")
        for guess, where in ((True, "as expected"), (False, "elsewhere")):
            asked = [i for i in known_before if expected(prompts[i]) == guess]
            lost = sum(ranking[i] >= 10 for i in asked)
            print(f"  {where} {lost:2} of {len(asked)}", end="")
        print()
#> layer 1, steered  lost  as expected  5 of 6  elsewhere  7 of 30
#> layer 1, random 0 lost  as expected  4 of 6  elsewhere  7 of 30
#> layer 1, random 1 lost  as expected  4 of 6  elsewhere  2 of 30
#> layer 1, random 2 lost  as expected  4 of 6  elsewhere  2 of 30
#> layer 1, random 3 lost  as expected  5 of 6  elsewhere  2 of 30
#> layer 1, random 4 lost  as expected  3 of 6  elsewhere  4 of 30

# %% [markdown]
# Where the first word says what the fact is about, half or more are lost, with the vector and with each of
# the random ones; elsewhere, few are. This is what steering at the front of a prompt means: it overwrites a
# word. How did your rule do? If you wrote it after looking at this list, it predicted nothing.
#
# ## Is "no difference seen" the same as "no difference"?
# No. With 42 facts, an effect must be large to show. The interval says what is still possible; the number
# alone does not.

# %%
low, high = wilson(sum(rank < 10 for rank in known), n)
print(f"P@10 itself, from {n} facts: 95 % {low:.0%} to {high:.0%}")
#> P@10 itself, from 42 facts: 95 % 72% to 93%

# %% [markdown]
# ## The figure: P@K

# %%
ks = [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for axis, layer in zip(axes, vectors, strict=True):
    for seed in range(5):
        axis.plot(ks, precision_at(results[f"layer {layer}, random {seed}"], ks), color=lesson.GREY,
                  linewidth=0.8, label="five random vectors" if seed == 0 else None)
    for name, style, color in (("unsteered", "o--", "black"), (f"layer {layer}, steered", "o-", lesson.BLUE)):
        shares = precision_at(results[name], ks)
        intervals = [wilson(round(share * n), n) for share in shares]
        lesson.errorbars(axis, ks, shares, intervals, fmt=style, color=color, label=name.split(", ")[-1])
    axis.set_xscale("log")
    axis.set_xticks([1, 10, 100], ["1", "10", "100"])
    axis.set_xlabel("K")
    axis.set_title(f"vector before block {layer}, c {coeff}; n {n}, 95 %", fontsize="medium")
axes[0].set_ylabel("P@K")
axes[0].set_ylim(0, 1)
axes[0].legend()
lesson.save(figure, "10_knowledge")

# %% [markdown]
# ## Exercise 1
# Plan before you measure: how many facts must you ask? Suppose that under steering each fact is lost with
# probability `lost`, or else gained with probability `gained`. Call a loss *shown* if lost − gained is more
# than 2 √(lost + gained), counted in facts. (Chance alone does that in 2 or 3 of 100 cases.) Draw n facts a
# few thousand times: how often is the loss shown?

# %%
def power(n, lost, gained, seed=0):
    """-> how often n facts show the loss, a float rounded to one digit"""
    return None                 # your lines


lesson.check(power, ((42, 0.05, 0.03), 0.0), ((1000, 0.05, 0.03), 0.6), ((42, 0.3, 0.1), 0.5),
             ((42, 0.1, 0.0), 0.4))
#> power: not yet. For (42, 0.05, 0.03) it gives None, not 0

# %% [markdown]
# ## Exercise 2
# The mean reciprocal rank is another summary: the mean of 1 / (rank + 1), over the rows that have a rank.
# Write it.

# %%
def reciprocal(ranks):
    """ranks: ints, or None for a row without a rank -> a float"""
    return None                 # your lines


lesson.check(reciprocal, (([0, 1, None, 3],), (1 + 1 / 2 + 1 / 4) / 3), (([0],), 1.0),
             (([None, 9, None],), 0.1))
#> reciprocal: not yet. For ([0, 1, None, 3]) it gives None, not 0.5833

# %% [markdown]
# ## Your own topic
# Write 40 facts about your topic, each ending in a single token, and steer toward it. Does the model know
# them better or worse than before? Count the facts lost and gained. Beside them set the same counts for five
# random vectors (`random_like`, seeds 0 to 4), and for the 42 facts above, which are not about your topic.
#
# **Now you know** how to look for damage, and that not seeing any is a statement about n.
# `python -m benchmarks.paper knowledge` asks thousands of facts. Next: [11](11_many_pairs.py), vectors from
# many pairs instead of one.

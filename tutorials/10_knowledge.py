# %% [markdown]
# # 10 · Does it still know what it knew?
#
# **Steering should change what a model talks about, and not what it knows.** 20 minutes. You need tutorial 08. This is section 4.5 of the paper.

# %%
import lesson
import matplotlib.pyplot as plt
import torch

from ministeer.evaluation.stats import paired, wilson
from ministeer.evaluation.measure import precision_at, ranks
from ministeer.steering import random_like, steering_vectors

model, tokenizer = lesson.load()
facts = """The capital of France is Paris|The capital of Italy is Rome|The capital of Japan is Tokyo|The capital of Germany is Berlin
The Eiffel Tower stands in Paris|The opposite of hot is cold|The opposite of up is down|The opposite of black is white
The sun rises in the east|The sun sets in the west|Bees make honey|Cows give us milk|A baby cat is called a kitten
You cut bread with a knife|You eat soup with a spoon|You see with your eyes|You hear with your ears|You smell with your nose
Fish live in the water|Birds lay their eggs in a nest|Ice is frozen water|Snow is white|Grass is green|Blood is red
The first month of the year is January|The day after Monday is Tuesday|A week has seven days|A year has twelve months
Two plus two is four|A triangle has three sides|A spider has eight legs|The Earth moves around the Sun|At night we can see the moon
A doctor works in a hospital|A teacher works in a school|You borrow books from a library|Bread is made of flour|Cheese is made from milk
The language spoken in Spain is Spanish|The language spoken in China is Chinese|Water boils when it is hot|Fire is hot"""
rows = [fact.rpartition(" ") for fact in facts.replace("\n", "|").split("|")]
prompts, answers = [prompt for prompt, _, _ in rows], [space + answer for _, space, answer in rows]
print(len(rows), "facts, written for this tutorial; the first:", repr(prompts[0]), "->", repr(answers[0]))
#> 42 facts, written for this tutorial; the first: 'The capital of France is' -> ' Paris'

# %% [markdown]
# ## What does it mean that a model knows something?
# Here: that the right word is among the K tokens it finds likeliest. (None: the answer is more than one token.) The share of facts for which it is,
# is called P@K (Petroni et al. 2019). Rank 0 is the likeliest token of all.

# %%
unsteered = ranks(model, tokenizer, prompts, answers)
known = [rank for rank in unsteered if rank is not None]
print("ranks of the first ten:", unsteered[:10])
print("P@1 {:.0%}  P@10 {:.0%}  P@100 {:.0%}  of {}".format(*precision_at(unsteered, (1, 10, 100)), len(known)))
#> ranks of the first ten: [0, 0, 0, 0, 0, 0, 0, 0, 0, 4]
#> P@1 50%  P@10 86%  P@100 90%  of 42

# %% [markdown]
# Some of these ranks say more about our questions than about the model: "Snow is" may go on with "falling" as well as with "white".
#
# ## And steered toward weddings?
# The same facts with the vector in front, and with the random one.

# %%
coeff = 1
vectors = dict(zip((1, 16), steering_vectors(model, tokenizer, " weddings", " ", [1, 16]), strict=True))
found = {"unsteered": unsteered}
for layer, vector in vectors.items():
    found[f"layer {layer}, steered"] = ranks(model, tokenizer, prompts, answers, coeff * vector)
    found[f"layer {layer}, random"] = ranks(model, tokenizer, prompts, answers, coeff * random_like(vector, seed=0))
for name, some in found.items():
    print(f"{name:18}", "  ".join(f"P@{k} {p:4.0%}" for k, p in zip((1, 10, 100), precision_at(some, (1, 10, 100)), strict=True)))
#> unsteered          P@1  50%  P@10  86%  P@100  90%
#> layer 1, steered   P@1  33%  P@10  57%  P@100  79%
#> layer 1, random    P@1  36%  P@10  67%  P@100  83%
#> layer 16, steered  P@1  40%  P@10  76%  P@100  86%
#> layer 16, random   P@1  50%  P@10  83%  P@100  88%

# %% [markdown]
# ## Is that a loss?
# The same facts are asked twice, so compare fact by fact: how many were lost, how many won?

# %%
for name, some in found.items():
    if name != "unsteered":
        before, after = ([float(rank < 10) for rank in ranking if rank is not None] for ranking in (unsteered, some))
        difference, (low, high), p = paired(after, before)
        lost = sum(a > b for a, b in zip(before, after, strict=True))
        won = sum(a < b for a, b in zip(before, after, strict=True))
        print(f"{name:18} lost {lost:2}, won {won:2}: P@10 {difference:+.0%} (95 % {low:+.0%} to {high:+.0%}), p {p:.3f}")
#> layer 1, steered   lost 12, won  0: P@10 -29% (95 % -43% to -17%), p 0.001
#> layer 1, random    lost  8, won  0: P@10 -19% (95 % -31% to -7%), p 0.006
#> layer 16, steered  lost  4, won  0: P@10 -10% (95 % -19% to -2%), p 0.127
#> layer 16, random   lost  1, won  0: P@10 -2% (95 % -7% to +0%), p 1.000

# %% [markdown]
# At layer 1 the vector writes over the first word of a very short prompt ("Bees", "Snow"). We think that facts are lost where that word mattered: a
# random vector of the same norm loses 8 as well. That is what the front of a prompt means.
#
# At layer 16 a few facts are lost and none is won. Is that real? The interval leaves 0 out and the test does not agree: with four facts changed, all
# one way, chance alone gives p 0.125. The paper saw no loss on GPT-2-XL; on 3,188 rows of ConceptNet this model loses 2.1 points of P@10, and
# 0.8 with a random vector ([benchmarks](../benchmarks/README.md)). So there is a loss, and 42 facts could not have told.
#
# ## Is "no difference seen" the same as "no difference"?
# No. With 42 facts an effect must be large to show. The interval says what is still possible; the number alone does not.

# %%
low, high = wilson(sum(rank < 10 for rank in known), len(known))
print(f"P@10 itself, from {len(known)} facts: 95 % {low:.0%} to {high:.0%}")
#> P@10 itself, from 42 facts: 95 % 72% to 93%

# %% [markdown]
# ## The figure: P@K

# %%
ks = [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for axis, layer in zip(axes, vectors, strict=True):
    for name, color in (("unsteered", "black"), (f"layer {layer}, steered", lesson.BLUE), (f"layer {layer}, random", lesson.GREY)):
        shares = precision_at(found[name], ks)
        axis.plot(ks, shares, "o-" if name != "unsteered" else "o--", color=color, markersize=4, label=name.split(", ")[-1])
        low, high = zip(*(wilson(round(share * len(known)), len(known)) for share in shares), strict=True)
        if "random" not in name:
            axis.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set_xscale("log")
    axis.set_xticks([1, 10, 100], ["1", "10", "100"])
    axis.set_xlabel("K")
    axis.set_title(f"vector before block {layer}, c {coeff}; n {len(known)}, 95 % bands", fontsize="medium")
axes[0].set_ylabel("P@K")
axes[0].set_ylim(0, 1)
axes[0].legend()
lesson.save(figure, "10_knowledge")

# %% [markdown]
# ## Exercise 1
# The rank of a token: how many have a strictly higher logit?

# %%
def rank(logits, token):
    """logits (n_vocab,), token an id -> an int, 0 for the likeliest"""
    return None                 # your line


made = torch.tensor([0.5, 3.0, -1.0, 0.5])
lesson.check(rank, ((made, 1), 0), ((made, 0), 1), ((made, 2), 3))
#> rank: not yet. rank(a tensor (4,), 1) gives None; expected 0

# %% [markdown]
# ## Exercise 2
# Mean reciprocal rank is another summary: the mean of 1 / (rank + 1), over the rows that have a rank. Write it.

# %%
def reciprocal(ranks):
    """ranks: ints, or None for a row without a rank -> a float"""
    return None                 # your lines


lesson.check(reciprocal, (([0, 1, None, 3],), (1 + 1 / 2 + 1 / 4) / 3), (([0],), 1.0))
#> reciprocal: not yet. reciprocal([0, 1, None, 3]) gives None; expected 0.5833

# %% [markdown]
# **You know now** how to look for damage, and that not seeing any is a statement about n. `python benchmarks/paper.py knowledge` asks thousands.
# Next: [11](11_many_pairs.py), vectors from many pairs instead of one.

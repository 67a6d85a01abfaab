# %% [markdown]
# # 04 · The addition
#
# **What is activation addition, in ten lines?** 25 minutes. You need tutorials 01 to 03.
#
# Two prompts, a subtraction, an addition: this is [Algorithm 1](https://arxiv.org/abs/2308.10248) of Turner
# et al. We do it first by hand, then with the library.

# %%
import lesson
import matplotlib.pyplot as plt
import torch

import ministeer
from ministeer.steering import random_like, relative_norm

model, tokenizer = lesson.load()
layer, coeff = 1, 2.0
prompt = "I went up to my friend and said"

# %% [markdown]
# ## How is the vector made?
# Run the model on " weddings" and on " ", each after BOS. Then subtract what block 1 would read.

# %%
pair = torch.tensor([tokenizer.encode(" weddings"), tokenizer.encode(" ")])
_, resid = model(pair)
difference = resid[layer][0] - resid[layer][1]                  # (2, d_model): BOS and one token
print("row 0, BOS:       norm", round(difference[0].norm().item(), 4))
print("row 1, the words: norm", round(difference[1].norm().item(), 1))
#> row 0, BOS:       norm 0.0
#> row 1, the words: norm 77.3

# %% [markdown]
# Row 0 is zero: BOS comes first and sees nothing else, so it is the same in both prompts. The vector is
# therefore row 1, and it belongs at position 1.
#
# ## How is it added?
# Stop before block 1, add the vector, and run the rest. `model.run` runs the blocks from `first_layer` up to
# the one before `stop_layer`, and returns the streams along the way. The last of them, `[-1]`, is what block
# `stop_layer` would read.

# %%
ids = torch.tensor([tokenizer.encode(prompt)])
pos = torch.arange(ids.shape[1])
x = model.run(model.embed(ids, pos), pos, stop_layer=layer)[-1]
changed = x.clone()
changed[0, 1] += coeff * difference[1]                           # activation addition
by_hand = model.unembed(model.run(changed, pos, first_layer=layer)[-1])

# %% [markdown]
# ## And with the library?
# A `Steer` holds a vector, a layer, a coefficient and a start. You pass it to the call as an argument: there
# is nothing to attach to the model, and nothing to remove afterwards.

# %%
weddings = ministeer.steering_vector(model, tokenizer, " weddings", " ", layer=layer)
print(weddings)
steered, steered_resid = model(ids, steer=[coeff * weddings])
print("by hand and with Steer equal:", torch.allclose(by_hand, steered, rtol=1e-3, atol=1e-3))
#> <Steer ' weddings' - ' ': coeff 1.0 at position 1 before block 1, d_model 576>
#> by hand and with Steer equal: True

# %% [markdown]
# ## How strong is that?
# Compare it with the stream that is already there. The coefficient alone says little: 2 can be weak in one
# model and strong in another. So we divide the norm of the addition by the norm of the stream.

# %%
ratios = relative_norm(model, tokenizer, coeff * weddings, prompt)
pieces = tokenizer.pieces(ids[0])
print("  ".join(f"{piece!r} {ratio:.1f}" for piece, ratio in zip(pieces[:4], ratios[:4], strict=True)))
#> '<|endoftext|>' 0.0  'I' 3.7  ' went' 0.0  ' up' 0.0

# %% [markdown]
# At position 1, the norm of the addition is 3.7 times the norm of the stream there. It does not nudge the
# word "I": it overwrites it. Positions 2, 3, … are not touched. They are affected only because later blocks
# look back at position 1.
#
# ## Which positions are affected?
# Compare the streams with and without the vector, at every layer and position.

# %%
plain, plain_resid = model(ids)
moved = torch.stack([(after - before)[0].norm(dim=-1) / before[0].norm(dim=-1)
                     for after, before in zip(steered_resid, plain_resid, strict=True)])
for l in (0, 1, 2, 3, 10, 20, 30):
    print(f"resid[{l:2}] moved by", "  ".join(f"{change:5.2f}" for change in moved[l]))
#> resid[ 0] moved by  0.00   0.00   0.00   0.00   0.00   0.00   0.00   0.00   0.00
#> resid[ 1] moved by  0.00   3.70   0.00   0.00   0.00   0.00   0.00   0.00   0.00
#> resid[ 2] moved by  0.00   2.27   0.17   0.08   0.04   0.11   0.02   0.02   0.01
#> resid[ 3] moved by  0.00   1.83   0.22   0.27   0.08   0.38   0.05   0.13   0.15
#> resid[10] moved by  0.00   1.49   0.35   0.39   0.45   0.23   0.13   0.10   0.13
#> resid[20] moved by  0.00   1.17   0.51   0.42   0.48   0.42   0.27   0.61   0.30
#> resid[30] moved by  0.00   0.74   0.56   0.48   0.49   0.46   0.28   0.59   0.39

# %% [markdown]
# Before layer 1, nothing changes. At layer 1, only position 1 changes, by exactly the ratio above. From layer
# 2 on, every later position changes too. Position 0 never does, because no position looks ahead.
#
# ## Does it do what we want, or just something?
# Any large change moves the answer. So beside the unsteered model we always put five *random* vectors of the
# same norm at the same place.

# %%
words = [" wedding", " bride", " marry", " married", " love"]
word_ids = [tokenizer.encode(word, bos=False)[0] for word in words]
rows = [("unsteered", plain), ("steered", steered)]
for seed in range(5):
    rows.append((f"random {seed}", model(ids, steer=[coeff * random_like(weddings, seed)])[0]))
for name, logits in rows:
    p = logits[0, -1].softmax(dim=-1)
    print(f"{name:10}", "  ".join(f"{word} {p[i]:.1e}" for word, i in zip(words, word_ids, strict=True)))
#> unsteered   wedding 9.4e-07   bride 1.3e-07   marry 4.1e-07   married 4.3e-07   love 4.3e-04
#> steered     wedding 5.6e-04   bride 1.4e-05   marry 5.6e-05   married 7.6e-05   love 1.2e-03
#> random 0    wedding 2.0e-05   bride 1.6e-06   marry 7.7e-06   married 4.9e-06   love 1.5e-03
#> random 1    wedding 4.0e-06   bride 3.5e-07   marry 2.1e-06   married 2.8e-06   love 4.8e-04
#> random 2    wedding 4.1e-06   bride 2.8e-07   marry 1.1e-06   married 2.0e-06   love 5.0e-04
#> random 3    wedding 1.5e-06   bride 1.1e-07   marry 4.2e-07   married 9.1e-07   love 3.1e-04
#> random 4    wedding 2.5e-06   bride 2.0e-07   marry 1.2e-06   married 1.5e-06   love 4.3e-04

# %% [markdown]
# The first four words rise above the highest of the five random vectors. " love" does not: one random vector
# raises it more. This is one prompt and one next token: a first look, not a result. Tutorials 05 and 07 count
# whole completions.
#
# ## The figure: where the stream has moved
# To see this map move while you drag a slider, run `ministeer play`.
# White means that nothing has changed, not even in the last digit. BOS sees no other position; and before
# block 1 has run, no later position has seen the vector.

# %%
figure, axis = plt.subplots(figsize=(7, 4.4))
# log10(0) is minus infinity, which is drawn in no colour: these places stay white.
image = axis.imshow(moved.log10(), cmap="cividis", vmin=-2, vmax=1, aspect="auto", origin="lower")
axis.set_xticks(pos, [repr(piece) for piece in pieces], rotation=45, ha="right", rotation_mode="anchor")
axis.set_xlabel("position")
axis.set_ylabel("layer l of resid[l]")
axis.set_title(f'" weddings" - " " before block {layer}, c {coeff:g}; one prompt; white: unchanged',
               fontsize="medium")
bar = figure.colorbar(image, label="change / norm of the unsteered stream", ticks=[-2, -1, 0, 1])
bar.ax.set_yticklabels(["≤ 0.01", "0.1", "1", "10"])
lesson.save(figure, "04_the_addition")

# %% [markdown]
# ## Exercise 1
# Write what a `Steer` adds. `start` is the position of the vector's first row. Rows that would stand at T or
# later are left out.

# %%
def delta(vector, coeff, start, T):
    """vector (n, d_model) -> (T, d_model): coeff * vector at positions start, start + 1, …, 0 elsewhere"""
    return None                 # your lines


rows = torch.arange(6.0).view(2, 3)
cases = [((rows, 2.0, 1, 4), ministeer.Steer(0, rows, 2.0, 1).delta(None, torch.arange(4)))]
for vector, c, start, T in ((rows.T, 0.5, 2, 6), (rows, 2.0, 3, 4), (rows, 2.0, 5, 4), (rows, -1.0, 0, 2)):
    cases.append(((vector, c, start, T), ministeer.Steer(0, vector, c, start).delta(None, torch.arange(T))))
lesson.check(delta, *cases)
#> delta: not yet. For (tensor (2, 3), 2, 1, 4) it gives None, not tensor (4, 3)

# %% [markdown]
# ## Exercise 2
# Which coefficient gives the addition exactly the norm of the stream at the first steered position?

# %%
def equal_coeff(model, tokenizer, steer, prompt):
    """steer: a Steer with coeff 1 -> the coefficient, a float"""
    return None                 # your line


other = ministeer.Steer(3, weddings.vector, start=2)
lesson.check(equal_coeff, ((model, tokenizer, weddings, prompt), coeff / ratios[1].item()),
             ((model, tokenizer, other, prompt), (plain_resid[3][0, 2].norm() / other.vector.norm()).item()))
#> equal_coeff: not yet. For (model, tokenizer, steer, 'I went up to my friend…') it gives None, not 0.5412

# %% [markdown]
# ## Your own topic
# Make a vector from a pair of your own, and add it to a prompt of your own. Look at the probabilities of five
# words of your topic and of five words of another one. Beside each, set the unsteered probability and the
# range of five random vectors (`random_like`, seeds 0 to 4). Which words leave that range? Only these are
# about your vector.
#
# **Now you know** the whole method. In the library it is this line of
# [ministeer/model.py](../ministeer/model.py): `x = x + s.delta(x, pos).to(x)`. Next: [05](05_generation.py),
# whole texts.

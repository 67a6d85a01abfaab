# %% [markdown]
# # 02 · One block, by hand
#
# **What does one layer do to the numbers that flow through it?** 25 minutes. You need tutorial 01 and matrix
# products.
#
# This Llama is a stack of 30 *blocks*, all of the same form. "Layer" is another word for block: layer 5 is
# block 5, counted from 0. We compute the first one with a dozen small formulas and compare the result with
# the model's own. This is the whole of it:
#
# ![One block: attention and MLP each read the stream through a norm, and add to it](block_diagram.png)

# %%
import math

import lesson
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from ministeer.llama import rotate

model, tokenizer = lesson.load(fast=False)      # the plain model, because we read its weights
c, block = model.config, model.blocks[0]
ids = torch.tensor([tokenizer.encode("The bride said that she was late for her wedding")])
pos = torch.arange(ids.shape[1])
pieces = tokenizer.pieces(ids[0])
print(len(pieces), "tokens, each a stream of", c.d_model, "numbers;", c.n_head, "heads of", c.d_head)
#> 11 tokens, each a stream of 576 numbers; 9 heads of 64

# %% [markdown]
# ## What goes in?
# The embedding: for each token, one row of a table. From here on, each position has a vector of `d_model`
# numbers, the *residual stream*: the line at the top of the picture. A block never replaces this vector. It
# reads it, and adds something to it.

# %%
x = model.embed(ids, pos)
print("x", tuple(x.shape), "= (texts, positions, d_model)")
#> x (1, 11, 576) = (texts, positions, d_model)

# %% [markdown]
# ## Why does a norm come first?
# A block does not see the size of the stream, only its direction: the norm divides each position by its root
# mean square, and weights each dimension. A stream twice as large looks the same to the block. Remember this
# when you wonder how large a steering vector may be.

# %%
def rms_norm(x, weight):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + c.norm_eps).sqrt() * weight


weight = block.input_layernorm.weight
y = rms_norm(x, weight)
print("twice as large, same reading:", torch.allclose(rms_norm(2 * x, weight), y, rtol=1e-2))
#> twice as large, same reading: True

# %% [markdown]
# ## How does one head look at earlier words?
# Attention has *heads*, and each works alone. In a head, every position has three short vectors. Its *query*
# says what it is looking for, its *key* says what it has to offer, and its *value* is what it hands over.
# Here are three tokens, with two made-up numbers in each vector.
#
# The *scores* are query times key, divided by √d_head. No position sees a later one: before the softmax,
# the scores of later keys are set to −∞. The softmax of each row is the *pattern*, which says how much this
# position looks at itself and at each earlier one.

# %%
queries = torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 1.0]])         # a row for each of three tokens
keys = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 9.0]])
scores = queries @ keys.T / math.sqrt(2)
later = torch.ones(3, 3, dtype=torch.bool).triu(1)                   # True to the right of the diagonal
pattern = scores.masked_fill(later, -math.inf).softmax(dim=-1)
print("scores\n", scores.numpy().round(2))
print("pattern\n", pattern.numpy().round(2))
print("mixture of values\n", (pattern @ values).numpy().round(2))
#> scores
#>  [[0.   0.71 0.  ]
#>  [0.   1.41 2.83]
#>  [0.   2.12 2.83]]
#> pattern
#>  [[1.   0.   0.  ]
#>  [0.2  0.8  0.  ]
#>  [0.04 0.32 0.64]]
#> mixture of values
#>  [[1.   0.  ]
#>  [0.2  0.8 ]
#>  [0.04 6.12]]

# %% [markdown]
# Read the last row of each table. The third token's query fits its own key best, so it looks mostly at
# itself. What it gets is mostly its own value. More text would not change these rows, because no position
# sees what comes after it.
#
# ## Where do q, k and v come from?
# From three linear maps of the normed stream, whose results are cut into heads.

# %%
attn = block.self_attn
q = (y @ attn.q_proj.weight.T).unflatten(-1, (c.n_head, c.d_head)).transpose(1, 2)
k = (y @ attn.k_proj.weight.T).unflatten(-1, (c.n_kv_head, c.d_head)).transpose(1, 2)
v = (y @ attn.v_proj.weight.T).unflatten(-1, (c.n_kv_head, c.d_head)).transpose(1, 2)
print("q", tuple(q.shape), " k", tuple(k.shape), " v", tuple(v.shape), " = (texts, heads, positions, d_head)")
#> q (1, 9, 11, 64)  k (1, 3, 11, 64)  v (1, 3, 11, 64)  = (texts, heads, positions, d_head)

# %% [markdown]
# > ### Box: two things that a Llama adds to the plain head
# > You may skip this box at first reading.
# >
# > *Rotary embedding.* So far, nothing says in which order the tokens stand. So queries and keys are
# > *rotated*, by an angle that grows with the position. The product of the two then depends on how far apart
# > their positions are, and not on where they stand. `rope` gives the cosines and sines of the angles;
# > `rotate` turns each pair of numbers (i, i + 32) of a head: (a cos − b sin, b cos + a sin). To check this,
# > we shift both by 50 positions, and then only one of them.
# >
# > *Grouped queries.* To save memory, there are fewer keys and values than queries: several query heads share
# > one key head, which we repeat for each of them.

# %%
query, key = q[0, 0, 3], k[0, 0, 1]
for query_pos, key_pos in ((3, 1), (53, 51), (53, 1)):
    cos, sin = model.rope(torch.tensor([query_pos, key_pos]))
    rotated = rotate(torch.stack([query, key])[None, None], cos, sin)[0, 0]
    print(f"positions {query_pos:2} and {key_pos:2}: {rotated[0] @ rotated[1]:8.3f}")
cos, sin = model.rope(pos)
q, k = rotate(q, cos, sin), rotate(k, cos, sin)
n_sharing = c.n_head // c.n_kv_head                 # how many query heads share a key head
k, v = k.repeat_interleave(n_sharing, dim=1), v.repeat_interleave(n_sharing, dim=1)
#> positions  3 and  1:   20.540
#> positions 53 and 51:   20.540
#> positions 53 and  1:   16.821

# %% [markdown]
# ## Who looks at whom?
# The same three lines as for three tokens, for all heads at once. [attention.py](../ministeer/attention.py)
# has the same formula.

# %%
later = pos[None, :] > pos[:, None]
scores = q @ k.transpose(-1, -2) / math.sqrt(c.d_head)
pattern = scores.masked_fill(later, -math.inf).softmax(dim=-1)
print("pattern", tuple(pattern.shape), "; rows sum to", round(pattern.sum(dim=-1).mean().item(), 4))
for head in range(c.n_head):
    share, place = pattern[0, head, -1].max(dim=-1)
    print(f"head {head}: {pieces[-1]!r} looks most at {pieces[place]!r} ({share:.0%})")
#> pattern (1, 9, 11, 11) ; rows sum to 1.0
#> head 0: ' wedding' looks most at ' said' (13%)
#> head 1: ' wedding' looks most at ' wedding' (16%)
#> head 2: ' wedding' looks most at ' for' (13%)
#> head 3: ' wedding' looks most at ' wedding' (36%)
#> head 4: ' wedding' looks most at ' wedding' (39%)
#> head 5: ' wedding' looks most at ' wedding' (29%)
#> head 6: ' wedding' looks most at '<|endoftext|>' (47%)
#> head 7: ' wedding' looks most at '<|endoftext|>' (42%)
#> head 8: ' wedding' looks most at '<|endoftext|>' (66%)

# %% [markdown]
# ## What comes out?
# Each head mixes the values according to its pattern. The mixtures, side by side, go through one more linear
# map, and the result is what attention adds to the stream. Then comes the second half, the MLP, a small
# network that works on each position alone: a gate, silu(g) = g · sigmoid(g), times a second map, then a map
# back to d_model. Two additions, and the block is done.

# %%
mixed = (pattern @ v).transpose(1, 2).flatten(2)
x = x + mixed @ attn.o_proj.weight.T
y = rms_norm(x, block.post_attention_layernorm.weight)
mlp = block.mlp
x = x + (F.silu(y @ mlp.gate_proj.weight.T) * (y @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T

_, resid = model(ids)
print("equal to the model's own:", torch.allclose(x, resid[1], rtol=1e-3, atol=1e-4))
#> equal to the model's own: True

# %% [markdown]
# `resid` is the second thing that the model returns: a list of the streams before every block, and after the
# last. `resid[0]` is the embedding, and `resid[1]` is what we have just computed by hand.
#
# ## The figure: three heads of the first block
# A row shows where one position looks. To the right of the diagonal it is white, because no position sees a
# later one. Compare how much of each head lies on the diagonal (itself) and in the first column (BOS).

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 5), sharey=True)
labels = [repr(piece) for piece in pieces]
for axis, head in zip(axes, (0, c.n_head // 2, c.n_head - 1), strict=True):
    image = axis.imshow(pattern[0, head].masked_fill(later, math.nan), cmap="cividis", vmin=0, vmax=1)
    words = pattern[0, head, 1:]                    # the rows of the positions after BOS
    to_bos, to_itself = words[:, 0].mean(), words[:, 1:].diagonal().mean()
    axis.set_title(f"head {head}: {to_bos:.0%} at BOS, {to_itself:.0%} at itself", fontsize="medium")
    axis.set_xticks(pos, labels, rotation=90, fontsize="small")
    axis.set_xlabel("looks at")
axes[0].set_yticks(pos, labels, fontsize="small")
axes[0].set_ylabel("position that looks")
figure.suptitle("Three heads look at different places (percentages: means over the positions after BOS)",
                fontsize="medium")
figure.colorbar(image, ax=axes, label="attention (rows sum to 1)", shrink=0.8)
lesson.save(figure, "02_one_block")

# %% [markdown]
# ## Exercise 1
# Write softmax with the mask, from scores to pattern, with `exp`. What the mask hides must not count in the
# sum of a row. Subtract the largest score of each row first: it changes nothing, but exp(1000) is infinite.

# %%
def masked_softmax(scores):
    """scores (T, T) -> pattern (T, T): no position sees a later one, and each row sums to 1"""
    return None                 # your lines


large = torch.tensor([[0.0, 1000, 1000], [1000, 1001, 5], [-1000, -1001, -1002]])
lesson.check(masked_softmax, ((scores[0, 0],), pattern[0, 0]), ((torch.zeros(1, 1),), torch.ones(1, 1)),
             ((large,), torch.tensor([[1, 0, 0], [0.2689, 0.7311, 0], [0.6652, 0.2447, 0.0900]])))
#> masked_softmax: not yet. For (tensor (11, 11)) it gives None, not tensor (11, 11)

# %% [markdown]
# ## Exercise 2
# In which head of a block do positions look most at themselves, on average over the positions after BOS? (BOS
# has nothing else to look at.)

# %%
def selfish_head(pattern):
    """pattern (H, T, T) -> the number of the head, an int"""
    return None                 # your line


def looks(*own):
    """-> the pattern of a head that looks at itself this much, position by position, and otherwise at BOS"""
    own = torch.tensor(own)
    return torch.cat([(1 - own)[:, None], torch.zeros(len(own), len(own) - 1)], dim=1) + own.diag()


patterns = torch.stack([looks(1, 0.9, 0.1, 0.1), looks(1, 0.3, 0.6, 0.6), looks(1, 0.1, 0.1, 0.9)])
more = torch.stack([looks(1, 0.2, 0.2, 0.2, 0.9, 0.9), looks(1, 0.9, 0.5, 0.5, 0.5, 0.5)])
lesson.check(selfish_head, ((patterns,), 1), ((patterns[[1, 0, 2]],), 0), ((more,), 1))
#> selfish_head: not yet. For (tensor (3, 4, 4)) it gives None, not 1

# %% [markdown]
# ## Your own topic
# Write a sentence about your topic in which a word refers to an earlier one, as "she" refers to "bride" here.
# In which heads does the one look at the other? Set the same sentence beside it, with the earlier word
# replaced by one that makes no sense ("train") and has as many tokens. A head that looks there just as much
# looks at the place, not at the word.
#
# **Now you know** everything that happens in a block: a norm, attention, an addition; then a norm, an MLP, an
# addition. [ministeer/llama.py](../ministeer/llama.py) does the same in 130 lines. Next:
# [03](03_residual_stream.py), the stream through all the blocks.

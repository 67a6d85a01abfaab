# %% [markdown]
# # 02 · One block, by hand
#
# **What does one layer do to the numbers that flow through it?** 25 minutes. You need tutorial 01 and matrix products.
#
# This Llama is 30 blocks of the same form. We compute the first one with a dozen small formulas and compare with the model's own.

# %%
import math

import lesson
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from ministeer.llama import rotate

model, tokenizer = lesson.load(fast=False)      # the plain model, whose weights can be read
c, block = model.config, model.blocks[0]
ids = torch.tensor([tokenizer.encode("The bride said that she was late for her wedding")])
pos = torch.arange(ids.shape[1])
pieces = tokenizer.pieces(ids[0])
print(len(pieces), "tokens, each a stream of", c.d_model, "numbers;", c.n_head, "heads of", c.d_head)
#> 11 tokens, each a stream of 576 numbers; 9 heads of 64

# %% [markdown]
# ## What goes in?
# The embedding: one row of a table for each token. From here on a position is a vector of `d_model` numbers, the *residual stream*. A block
# never replaces it; it reads it, and adds something.

# %%
x = model.embed(ids, pos)
print("x", tuple(x.shape), "= (texts, positions, d_model)")
#> x (1, 11, 576) = (texts, positions, d_model)

# %% [markdown]
# ## Why a norm first?
# A block does not read the stream itself but its direction: each position is divided by its root mean square, and each dimension is weighted.
# So a stream that is twice as long looks the same to it. Remember this when you wonder how large a steering vector may be.

# %%
def rms_norm(x, weight):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + c.norm_eps).sqrt() * weight


y = rms_norm(x, block.input_layernorm.weight)
print("twice as long, same reading:", torch.allclose(rms_norm(2 * x, block.input_layernorm.weight), y, rtol=1e-2))
#> twice as long, same reading: True

# %% [markdown]
# ## What are q, k and v?
# Three linear maps. The *query* of a position says what it looks for, the *key* what it offers, the *value* what it hands over. They are cut into
# heads, and each head looks for something else. Here several query heads share one key head (*grouped queries*), which saves memory.

# %%
attn = block.self_attn
q = (y @ attn.q_proj.weight.T).unflatten(-1, (c.n_head, c.d_head)).transpose(1, 2)
k = (y @ attn.k_proj.weight.T).unflatten(-1, (c.n_kv_head, c.d_head)).transpose(1, 2)
v = (y @ attn.v_proj.weight.T).unflatten(-1, (c.n_kv_head, c.d_head)).transpose(1, 2)
print("q", tuple(q.shape), " k", tuple(k.shape), " v", tuple(v.shape), " = (texts, heads, positions, d_head)")
#> q (1, 9, 11, 64)  k (1, 3, 11, 64)  v (1, 3, 11, 64)  = (texts, heads, positions, d_head)

# %% [markdown]
# ## How does it know the order of the words?
# Queries and keys are *turned*, by an angle that grows with the position. The product of two turned vectors depends only on how far apart they
# are. `rope` gives cos and sin of the angles; `rotate` turns each pair of numbers (i, i + 32) of a head: (a cos − b sin, b cos + a sin). Check: shift
# both by 50 positions.

# %%
one, other = q[0, 0, 3], k[0, 0, 1]
for a, b in ((3, 1), (53, 51), (53, 1)):
    cos, sin = model.rope(torch.tensor([a, b]))
    turned = rotate(torch.stack([one, other])[None, None], cos, sin)[0, 0]
    print(f"positions {a:2} and {b:2}: {turned[0] @ turned[1]:8.3f}")
q, k = rotate(q, *model.rope(pos)), rotate(k, *model.rope(pos))
#> positions  3 and  1:   20.540
#> positions 53 and 51:   20.540
#> positions 53 and  1:   16.821

# %% [markdown]
# ## Who looks at whom?
# The *pattern*: softmax of query times key / √d_head, over positions up to one's own. No position sees a later one, so what has been computed for a
# text stays right when the text grows.

# %%
k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for t in (k, v))        # each query head gets its key head
scores = q @ k.transpose(-1, -2) / math.sqrt(c.d_head)
later = pos[None, :] > pos[:, None]
pattern = scores.masked_fill(later, -math.inf).softmax(dim=-1)
print("pattern", tuple(pattern.shape), "; rows sum to", round(pattern.sum(dim=-1).mean().item(), 4))
strongest = pattern[0, :, -1].max(dim=-1)
for head, (value, place) in enumerate(zip(strongest.values, strongest.indices, strict=True)):
    print(f"head {head}: {pieces[-1]!r} looks most at {pieces[place]!r} ({value:.0%})")
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
# Each head's mixture of values, side by side, through one more map: that is what attention adds to the stream. Then the same again with a network at
# each position alone, the MLP: a gate, silu(g) = g · sigmoid(g), times a second map, then a map back. Two additions, and the block is done.

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
# `resid` is the model's second answer: a list of the stream before every block, and after the last. `resid[0]` is the embedding, `resid[1]` what we
# have just computed by hand.
#
# ## The figure: three heads of the first block

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 5), sharey=True)
for axis, head in zip(axes, (0, c.n_head // 2, c.n_head - 1), strict=True):
    image = axis.imshow(pattern[0, head], cmap="cividis", vmin=0, vmax=1)
    axis.set_title(f"head {head}", fontsize="medium")
    axis.set_xticks(pos, [repr(piece) for piece in pieces], rotation=90, fontsize="small")
    axis.set_xlabel("looks at")
axes[0].set_yticks(pos, [repr(piece) for piece in pieces], fontsize="small")
axes[0].set_ylabel("position that looks")
figure.colorbar(image, ax=axes, label="attention (rows sum to 1)", shrink=0.8)
lesson.save(figure, "02_one_block")

# %% [markdown]
# ## Exercise 1
# Write softmax with the mask, from scores to pattern.

# %%
def masked_softmax(scores):
    """scores (T, T) -> pattern (T, T): no position sees a later one, each row sums to 1"""
    return None                 # your lines


lesson.check(masked_softmax, ((scores[0, 0],), pattern[0, 0]))
#> masked_softmax: not yet. masked_softmax(a tensor (11, 11)) gives None; expected a tensor (11, 11)

# %% [markdown]
# ## Exercise 2
# Which head of this block looks most at the position itself, on average over the positions after BOS? (BOS can look at nothing else.)

# %%
def selfish_head(pattern):
    """pattern (H, T, T) -> the number of the head, an int"""
    return None                 # your line


made = torch.stack([torch.eye(4).roll(-1, dims=1), torch.eye(4), torch.full((4, 4), 0.25)])
lesson.check(selfish_head, ((made,), 1), ((made[[1, 0, 2]],), 0))
#> selfish_head: not yet. selfish_head(a tensor (3, 4, 4)) gives None; expected 1

# %% [markdown]
# **You know now** everything that happens in a block: a norm, attention, an addition; a norm, an MLP, an addition.
# [ministeer/llama.py](../ministeer/llama.py) is the same in 130 lines. Next: [03](03_residual_stream.py), the stream through all the blocks.

# %% [markdown]
# # 03 · The residual stream
#
# **What flows through the model, and what does it contain?** 20 minutes. You need tutorials 01 and 02.

# %%
import textwrap
import warnings

import lesson
import matplotlib.pyplot as plt
import torch

from ministeer.attention import attention_pattern
from ministeer.steering import sink_share, steering_vector, steering_vectors

model, tokenizer = lesson.load()
n_layer = model.config.n_layer
prompt = "I went up to my friend and said"
ids = torch.tensor([tokenizer.encode(prompt)])
pieces = tokenizer.pieces(ids[0])
logits, resid = model(ids)
print(len(resid), "entries for", n_layer, "blocks, each", tuple(resid[0].shape))
#> 31 entries for 30 blocks, each (1, 9, 576)

# %% [markdown]
# ## What does "layer l" mean?
# Different people mean different things by it, and much of the confusion about steering comes from this. Here
# it has one meaning: `resid[l]` is what block l *reads*. So `resid[0]` is the embedding, each block takes one
# entry to the next, and `resid[30]` is what the final norm reads.

# %%
pos = torch.arange(ids.shape[1])
for l in (0, 15, n_layer - 1):
    y = model.blocks[l](resid[l], l, model.rope(pos))
    equal = torch.allclose(y, resid[l + 1], rtol=1e-3, atol=1e-3)
    print(f"block {l:2} takes resid[{l}] to resid[{l + 1}]: {equal}")
equal = torch.allclose(model.unembed(resid[-1]), logits, rtol=1e-3, atol=1e-3)
print("unembed(resid[-1]) is the logits:", equal)
#> block  0 takes resid[0] to resid[1]: True
#> block 15 takes resid[15] to resid[16]: True
#> block 29 takes resid[29] to resid[30]: True
#> unembed(resid[-1]) is the logits: True

# %% [markdown]
# ## How far along is the answer at layer l?
# The last step of the model, `unembed`, is a norm followed by a product with every row of the embedding
# table. A row that points in the same direction as the stream scores high. You can apply this step to any
# entry of the list, and read what the model would answer if it stopped there. This is the *logit lens*
# (nostalgebraist 2020). It is a hint and not a proof, because the blocks in between were never trained to be
# read this way.

# %%
final = logits[0, -1].argmax()
answer = tokenizer.pieces([final])[0]
for l in (0, 5, 10, 15, 20, 25, 28, 29, 30):
    p = model.unembed(resid[l])[0, -1].softmax(dim=-1)
    likeliest = tokenizer.pieces([p.argmax()])[0]
    print(f"resid[{l:2}] next {likeliest!r:15} p of the final answer {answer!r}: {p[final]:.3f}")
#> resid[ 0] next ' said'         p of the final answer ',': 0.000
#> resid[ 5] next ','             p of the final answer ',': 0.786
#> resid[10] next ','             p of the final answer ',': 0.521
#> resid[15] next ','             p of the final answer ',': 0.678
#> resid[20] next ' '             p of the final answer ',': 0.281
#> resid[25] next ','             p of the final answer ',': 0.897
#> resid[28] next ','             p of the final answer ',': 0.900
#> resid[29] next ','             p of the final answer ',': 0.795
#> resid[30] next ','             p of the final answer ',': 0.412

# %% [markdown]
# The comma is there after five blocks. At resid[20] a space is likelier, then the comma comes back. The last
# two blocks make the model less sure again.
#
# ## How large is the norm of the stream?
# Every block adds to the stream. At ordinary positions its norm grows from row to row. Now look at the first
# column.

# %%
norms = torch.stack([x[0].norm(dim=-1) for x in resid])            # (n_layer + 1, T)
print("position", "".join(f"{piece!r:>18}" for piece in pieces[:4]))
for l in (0, 1, 2, 3, 10, 20, 29):
    print(f"resid[{l:2}]", "".join(f"{norm:18.1f}" for norm in norms[l, :4]))
#> position    '<|endoftext|>'               'I'           ' went'             ' up'
#> resid[ 0]                2.9               2.5               2.3               2.9
#> resid[ 1]               36.5              41.8              54.7              37.7
#> resid[ 2]               75.7              71.0              81.9              69.8
#> resid[ 3]              920.8              89.4              90.6              88.5
#> resid[10]              335.6             138.1             152.0             129.8
#> resid[20]            20495.6             191.3             223.8             229.6
#> resid[29]             6684.0             665.1             739.7             694.1

# %% [markdown]
# ## What is the giant at position 0?
# It is BOS. Block 2 makes its norm ten times that of the other positions, and later it is a hundred times
# theirs. Nearly all of this norm lies in 4 of the 576 dimensions. The giant is called a *massive activation*
# (Sun et al. 2024). The figure shows a smaller one at " and".

# %%
print(f"part of the squared norm in 4 of {model.config.d_model} dimensions:")
for l in (0, 2, 3, 20):
    bos, word = sink_share(resid[l][0, 0]), sink_share(resid[l][0, 4])
    print(f"resid[{l:2}] BOS {bos:.0%}, {pieces[4]!r} {word:.0%}")
#> part of the squared norm in 4 of 576 dimensions:
#> resid[ 0] BOS 8%, ' to' 11%
#> resid[ 2] BOS 81%, ' to' 68%
#> resid[ 3] BOS 98%, ' to' 64%
#> resid[20] BOS 99%, ' to' 58%

# %% [markdown]
# Do the heads look at the giant? Here is the attention of the last position, " said", to BOS. A position that
# looked at all nine alike would give BOS 11 %.

# %%
for l in (0, 2, 3, 10, 20, 29):
    block = model.blocks[l]
    q, k, _ = block.self_attn.qkv(block.input_layernorm(resid[l]), model.rope(pos))
    to_bos = attention_pattern(q, k)[0, :, -1, 0]               # one number for each head
    print(f"block {l:2}: lowest head {to_bos.min():4.0%}, median {to_bos.median():4.0%}, highest",
          f"{to_bos.max():4.0%}")
#> block  0: lowest head   4%, median  29%, highest  51%
#> block  2: lowest head   1%, median  29%, highest  82%
#> block  3: lowest head  37%, median  60%, highest  67%
#> block 10: lowest head   5%, median  14%, highest  35%
#> block 20: lowest head  23%, median  82%, highest  92%
#> block 29: lowest head  11%, median  65%, highest  92%

# %% [markdown]
# In all of these blocks but block 10, the median head gives BOS more than twice that. In blocks 3, 20 and 29,
# BOS gets more than all the other positions together. A position at which attention rests is called an
# *attention sink* (Xiao et al. 2023). Perhaps a head rests there when it has found nothing to copy; we have
# not shown that. We also call the giant itself a sink.
#
# From resid[9] to resid[11] the norm at BOS falls to that of an ordinary position. At resid[12] it is about
# twenty times what it was before the fall (see the figure). We do not know why.
#
# An ordinary token also has much of its norm in a few dimensions. But what ordinary tokens have in common
# cancels when you subtract one from another. A sink in only one of them does not cancel.
#
# ## Why does this matter for steering?
# Because other tokens become sinks too. One of them is the lone space that pads the shorter prompt of a pair.

# %%
pair = torch.tensor([tokenizer.encode(" weddings"), tokenizer.encode(" ")])
_, pair_resid = model(pair)
for l in (0, 1, 2, 3, 10, 20):
    word, space = pair_resid[l][:, 1].norm(dim=-1)
    print(f"resid[{l:2}] norm of ' weddings' {word:6.1f}, of ' ' {space:6.1f}")
#> resid[ 0] norm of ' weddings'    3.6, of ' '    3.3
#> resid[ 1] norm of ' weddings'   65.1, of ' '   53.2
#> resid[ 2] norm of ' weddings'   98.7, of ' '   98.5
#> resid[ 3] norm of ' weddings'  107.7, of ' '  828.4
#> resid[10] norm of ' weddings'  168.7, of ' '  285.7
#> resid[20] norm of ' weddings'  237.6, of ' '  194.4

# %% [markdown]
# Block 2 makes a giant of the space, but not of the word. The vector `" weddings" - " "` (one stream minus
# the other, tutorial 04) is then mostly the sink of the space, subtracted, and has little to do with
# weddings. `steering_vector` warns about this:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    steering_vector(model, tokenizer, " weddings", " ", layer=3)
for warning in caught:
    print(textwrap.fill(str(warning.message), 100))
#> 98% of the squared norm of ' weddings' - ' ' before block 3 lies in 4 of 576 dimensions: an
#> attention sink of one prompt, often its padding. Try an earlier layer, or prompts of equally many
#> tokens.

# %% [markdown]
# At which layers is this so?

# %%
vectors = steering_vectors(model, tokenizer, " weddings", " ", list(range(n_layer)))
shares = [sink_share(s.vector) for s in vectors]
print("layer ", "".join(f"{l:6}" for l in (0, 1, 2, 3, 6, 10, 16, 20, 29)))
print("sink  ", "".join(f"{shares[l]:6.0%}" for l in (0, 1, 2, 3, 6, 10, 16, 20, 29)))
#> layer       0     1     2     3     6    10    16    20    29
#> sink      21%   33%   35%   98%   98%   68%   40%   46%   11%

# %% [markdown]
# From layer 3 to layer 11, more than half of the vector's squared norm lies in 4 dimensions, up to 98 %: this
# is the sink. At the other layers it is 11 to 50 %, which need not be a sink: the embedding, before any
# block, has 21 %. Tutorial 07 shows where steering works: layer 1 is better than layer 6. Some late layers
# work too, and we do not know why.
#
# ## The figure: norms by layer and position

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
for t, color in zip((0, 1, 4, 7), (lesson.GREY, lesson.BLUE, lesson.ORANGE, lesson.GREEN), strict=True):
    label = f"position {t}: {pieces[t]!r}"
    left.semilogy(range(n_layer + 1), norms[:, t], "o-", markersize=3, color=color, label=label)
left.set_xlabel("layer l of resid[l]")
left.set_ylabel("norm of the stream")
left.set_title(f"one prompt: {prompt!r}", fontsize="medium")
left.legend(fontsize="small")
right.plot(range(n_layer), shares, "o-", markersize=3, color=lesson.BLUE)
right.axhline(0.5, color="black", linewidth=0.8, linestyle="--", label="half")
right.legend(fontsize="small")
right.set_xlabel("layer the vector was made at")
right.set_ylabel("part of squared norm in 4 dimensions")
right.set_ylim(0, 1)
right.set_title('" weddings" - " ": squared norm in its 4 largest dimensions', fontsize="medium")
lesson.save(figure, "03_residual_stream")

# %% [markdown]
# ## Exercise 1
# What did block l add to the stream at position t? Return its norm.

# %%
def added(resid, l, t):
    """-> the norm of what block l added at position t of the first text, a float"""
    return None                 # your line


cases = [((resid, l, t), (resid[l + 1] - resid[l])[0, t].norm().item())
         for l, t in ((0, 1), (9, 2), (n_layer - 1, 0))]
lesson.check(added, *cases)
#> added: not yet. For ([tensor (1, 9, 576), …, 31 in all], 0, 1) it gives None, not 41.8

# %% [markdown]
# ## Exercise 2
# From which layer on does the logit lens always give the final token as the likeliest one?

# %%
def decided(model, resid):
    """-> the smallest l such that resid[l], …, resid[n_layer] all give the same likeliest token, an int"""
    return None                 # your lines


class Echo:
    """Stands in for a model: the stream of its last position is its logits."""

    def unembed(self, x):
        return x


def streams(*tops):
    """-> a list like resid, with these tokens as the likeliest, entry by entry; position 0 always has 0"""
    return [torch.nn.functional.one_hot(torch.tensor([[0, top]]), 4).float() for top in tops]


tops = [model.unembed(x)[0, -1].argmax().item() for x in resid]
last_other = max([l for l, top in enumerate(tops) if top != tops[-1]], default=-1)
lesson.check(decided, ((model, resid), last_other + 1), ((Echo(), streams(1, 2, 1, 3, 1, 1)), 4),
             ((Echo(), streams(2, 2, 2)), 0), ((Echo(), streams(3, 3, 1)), 2))
#> decided: not yet. For (model, [tensor (1, 9, 576), …, 31 in all]) it gives None, not 25

# %% [markdown]
# ## Your own topic
# Make the vector of a pair of your own at every layer. At which layers is it mostly sink? Set two things
# beside its `sink_share`: that of a pair of words with equally many tokens, so that nothing is padded, and
# the range of five random vectors (`random_like`, seeds 0 to 4), which says how much 4 of 576 dimensions hold
# by chance.
#
# **Now you know** what the list holds, what a layer is here, and that part of what flows in the stream is
# housekeeping. Next: [04](04_the_addition.py), where we change it.

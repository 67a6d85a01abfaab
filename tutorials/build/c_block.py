"""Part c: a whole block, of a Llama and of a GPT-2.

A block is given its weights as a dict w of tensors, under the names in the checkpoint, without the layer.
"""

import torch
import torch.nn.functional as F
from b_head import head, rotate

# ruff: noqa: F401 (your lines will use these imports)


def rms_norm(x, weight):
    """x / √(mean(x²) + 0.00001) · weight, with the mean over the last dimension of x.

    x (…, d_model), weight (d_model,) -> (…, d_model)

    >>> rms_norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.ones(4))     # mean(x²) is 6.25
    tensor([1.2000, 1.6000, 0.0000, 0.0000])
    """
    return None     # your lines


def llama_block(x, w, n_head, rope, past=None):
    """x + attention(rms_norm(x)), and to that + mlp(rms_norm of that): what block l makes of resid[l].

    x (B, T, d_model): the stream at the newest T positions. All maps are y @ W.T, without bias:
    w["input_layernorm.weight"] (d_model,): of the first norm
    w["self_attn.q_proj.weight"] (n_head · d, d_model): queries of all heads, head by head, each of width d
    w["self_attn.k_proj.weight"], w["self_attn.v_proj.weight"] (n_kv · d, d_model): keys and values. There
        are fewer of them: the first n_head / n_kv query heads share key head 0, the next share head 1, …
    w["self_attn.o_proj.weight"] (d_model, n_head · d): reads the heads' outputs side by side
    w["post_attention_layernorm.weight"] (d_model,): of the second norm
    w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"] (d_mlp, d_model), w["mlp.down_proj.weight"]
        (d_model, d_mlp): mlp(y) = down(silu(gate(y)) · up(y))
    rope: (cos, sin), each (T, d), by which the queries and keys of these positions are rotated
    past: None, or a dict that belongs to this block. It is empty at first. The block keeps its keys and
        values in it, under names of your choice, and its queries see those of the earlier calls too.
    -> (B, T, d_model)

    With all weights zero, a block adds nothing:
    >>> names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    ...          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    >>> w = {f"{name}.weight": torch.zeros(2, 2) for name in names}
    >>> w |= {f"{name}.weight": torch.ones(2) for name in ("input_layernorm", "post_attention_layernorm")}
    >>> llama_block(torch.ones(1, 1, 2), w, 1, (torch.ones(1, 2), torch.zeros(1, 2)))
    tensor([[[1., 1.]]])
    """
    return None     # your lines


def gpt2_block(x, w, n_head):
    """The same outline, with another norm, maps y @ W + b, no rotation, and another MLP.

    x (B, T, d_model): the stream, positions 0 … T - 1
    w["ln_1.weight"], w["ln_1.bias"] (d_model,): first norm, F.layer_norm with eps 1e-5; ln_2: the second
    w["attn.c_attn.weight"] (d_model, 3 · d_model), w["attn.c_attn.bias"]: queries, keys and values side by
        side; each is n_head heads side by side
    w["attn.c_proj.weight"] (d_model, d_model) and bias: reads the heads' outputs side by side
    w["mlp.c_fc.weight"] (d_model, d_mlp) and bias, w["mlp.c_proj.weight"] (d_mlp, d_model) and bias:
        mlp(y) = c_proj(gelu(c_fc(y))), with the tanh form of gelu: F.gelu(…, approximate="tanh")
    -> (B, T, d_model)

    With all weights zero, a block adds nothing but its biases, here 1 and 2:
    >>> shapes = {"attn.c_attn": (2, 6), "attn.c_proj": (2, 2), "mlp.c_fc": (2, 2), "mlp.c_proj": (2, 2)}
    >>> w = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    >>> w |= {f"{name}.bias": torch.zeros(shape[1]) for name, shape in shapes.items()}
    >>> w |= {f"ln_{i}.{part}": torch.ones(2) for i in (1, 2) for part in ("weight", "bias")}
    >>> w |= {"attn.c_proj.bias": torch.tensor([1.0, 1.0]), "mlp.c_proj.bias": torch.tensor([2.0, 2.0])}
    >>> gpt2_block(torch.zeros(1, 1, 2), w, 1)
    tensor([[[3., 3.]]])
    """
    return None     # your lines

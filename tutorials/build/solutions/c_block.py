"""Part c, solved."""

import torch
import torch.nn.functional as F
from b_head import head, rotate


def rms_norm(x, weight):
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


def llama_block(x, w, n_head, rope, past=None):
    y = rms_norm(x, w["input_layernorm.weight"])
    q, k, v = (y @ w[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    d_head = q.shape[-1] // n_head
    q, k, v = (z.unflatten(-1, (-1, d_head)).transpose(1, 2) for z in (q, k, v))    # (B, heads, T, d_head)
    q, k = rotate(q, *rope), rotate(k, *rope)
    if past:
        k, v = torch.cat([past["k"], k], dim=2), torch.cat([past["v"], v], dim=2)
    if past is not None:
        past.update(k=k, v=v)
    k, v = (z.repeat_interleave(n_head // z.shape[1], dim=1) for z in (k, v))
    x = x + head(q, k, v).transpose(1, 2).flatten(2) @ w["self_attn.o_proj.weight"].T
    y = rms_norm(x, w["post_attention_layernorm.weight"])
    gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


def gpt2_block(x, w, n_head):
    def linear(y, name):
        return y @ w[f"{name}.weight"] + w[f"{name}.bias"]

    y = F.layer_norm(x, x.shape[-1:], w["ln_1.weight"], w["ln_1.bias"], 1e-5)
    heads = linear(y, "attn.c_attn").unflatten(-1, (3, n_head, -1))      # (B, T, 3, n_head, d)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    x = x + linear(head(q, k, v).transpose(1, 2).flatten(2), "attn.c_proj")
    y = F.layer_norm(x, x.shape[-1:], w["ln_2.weight"], w["ln_2.bias"], 1e-5)
    return x + linear(F.gelu(linear(y, "mlp.c_fc"), approximate="tanh"), "mlp.c_proj")

"""What makes Llama Llama: RMSNorm, rotary positions inside attention, grouped queries, SwiGLU, no biases.

Read before: gpt2.py, which has the same outline. Read next: model.py for the loop. Touvron et al. 2023; names as on the Hub.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attend, merge_heads, split_heads
from .model import LM, Embedding, Linear


class Llama(LM):
    prefix = "model."
    names = {"embedding": "embed_tokens.weight", "final_norm": "norm.weight"}

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = Embedding(c.n_vocab, c.d_model)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        if not c.tied:
            self.lm_head = Linear(c.d_model, c.n_vocab, bias=False)

    @property
    def blocks(self):
        return self.layers

    def embed(self, ids, pos):
        """ids (B, T) -> (B, T, d_model). Positions enter inside attention."""
        return self.embed_tokens(ids)

    def rope(self, pos):
        """pos (T,) -> cos, sin (T, D): by what angle (radians) each half-pair of a head is turned at each position."""
        angle = pos[:, None] * frequencies(self.config).to(pos.device)
        angle = torch.cat([angle, angle], dim=-1)           # (T, D / 2) -> (T, D): both halves of a head turn alike
        return angle.cos(), angle.sin()

    def final_norm(self, x):
        return self.norm(x)


def frequencies(c):
    """theta^(-2 i / D), i = 0 … D/2 - 1, in radians per position (Su et al. 2021), stretched as c.rope asks. float32."""
    rope = c.rope
    freq = rope.theta ** -(torch.arange(0, c.d_head, 2, dtype=torch.int64).float() / c.d_head)
    if rope.type == "default":
        return freq
    if rope.type == "linear":
        return freq / rope.factor
    turns = rope.original_ctx * freq / (2 * math.pi)                                    # turns in the old context
    keep = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)                    # 1: short wave kept, 0: long wave stretched
    return keep * freq + (1 - keep) * freq / rope.factor


def rotate(x, cos, sin):
    """Turn the pair (x[i], x[i + D/2]) of each head by its angle. x (B, H, T, D); cos, sin (T, D).

    Trap: the Hub's files pair the two halves of a head; Meta's own files and GGUF pair neighbours, with q and k rows permuted to match.
    """
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, l, rope, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), l, rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head = c.n_head, c.n_kv_head
        self.q_proj = Linear(c.d_model, c.n_head * c.d_head, bias=c.attention_bias)
        self.k_proj = Linear(c.d_model, c.n_kv_head * c.d_head, bias=c.attention_bias)
        self.v_proj = Linear(c.d_model, c.n_kv_head * c.d_head, bias=c.attention_bias)
        self.o_proj = Linear(c.n_head * c.d_head, c.d_model, bias=c.attention_bias)

    def forward(self, x, l, rope, cache=None):
        q, k, v = self.heads(x, rope)
        mixed = cache.attend(l, q, k, v) if cache else attend(q, k, v)
        return self.o_proj(merge_heads(mixed))

    def heads(self, x, rope):
        """x (B, T, d_model) -> queries (B, H, T, D), keys and values (B, H_kv, T, D), turned to their positions."""
        q = rotate(split_heads(self.q_proj(x), self.n_head), *rope)
        k = rotate(split_heads(self.k_proj(x), self.n_kv_head), *rope)
        return q, k, split_heads(self.v_proj(x), self.n_kv_head)


class MLP(nn.Module):
    """W_down (silu(W_gate x) * W_up x) (SwiGLU: Shazeer 2020)"""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.d_model, c.d_mlp, bias=c.mlp_bias)
        self.up_proj = Linear(c.d_model, c.d_mlp, bias=c.mlp_bias)
        self.down_proj = Linear(c.d_mlp, c.d_model, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over d_model, in float32 whatever the dtype of x (Zhang and Sennrich 2019)."""

    def __init__(self, d_model, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x) * self.weight

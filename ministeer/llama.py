"""What makes Llama Llama: RMSNorm, rotary positions inside attention, grouped queries, SwiGLU, no biases.

Read first: gpt2.py, in the same outline. Read next: model.py. Touvron et al. 2023; names are the Hub's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import KVCache, attend, merge_heads, split_heads
from .checkpoints.config import Config
from .model import LM, Embedding, Linear

CosSin = tuple[Tensor, Tensor]      # of the rotary angles, each (T, D)


class Llama(LM):
    prefix = "model."
    embedding_name = "embed_tokens.weight"

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = Embedding(c.n_vocab, c.d_model)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        if not c.tied:
            self.lm_head = Linear(c.d_model, c.n_vocab, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def embed(self, ids: Tensor, pos: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, d_model). Positions enter in attention."""
        return self.embed_tokens(ids)

    def rope(self, pos: Tensor) -> CosSin:
        """pos (T,) -> cos and sin (T, D) of the angle by which each position turns each pair of a head."""
        angle = pos[:, None] * frequencies(self.config).to(pos.device)
        angle = torch.cat([angle, angle], dim=-1)       # (T, D / 2) -> (T, D)
        return angle.cos(), angle.sin()

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)


def frequencies(c: Config) -> Tensor:
    """theta^(-2 i / D), i = 0 … D/2 - 1, radians per position (Su et al. 2021), stretched as c.rope says"""
    rope = c.rope
    freq = rope.theta ** -(torch.arange(0, c.d_head, 2).float() / c.d_head)
    if rope.type == "default":
        return freq
    if rope.type == "linear":
        return freq / rope.factor
    turns = rope.original_ctx * freq / (2 * math.pi)                    # turns in the original context
    keep = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)    # 1: short wave, kept; 0: long wave
    return keep * freq + (1 - keep) * freq / rope.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (x[i], x[i + D/2]) of each head by its angle. x (B, H, T, D); cos, sin (T, D)

    Trap: the Hub's files pair the halves of a head; Meta's and GGUF pair neighbours, with q and k permuted.
    """
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, l: int, rope: CosSin, cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), l, rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.n_head, self.n_kv_head = c.n_head, c.n_kv_head
        self.q_proj = Linear(c.d_model, c.n_head * c.d_head, bias=c.attention_bias)
        self.k_proj = Linear(c.d_model, c.n_kv_head * c.d_head, bias=c.attention_bias)
        self.v_proj = Linear(c.d_model, c.n_kv_head * c.d_head, bias=c.attention_bias)
        self.o_proj = Linear(c.n_head * c.d_head, c.d_model, bias=c.attention_bias)

    def forward(self, x: Tensor, l: int, rope: CosSin, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.qkv(x, rope)
        mixed = cache.attend(l, q, k, v) if cache else attend(q, k, v)
        return self.o_proj(merge_heads(mixed))

    def qkv(self, x: Tensor, rope: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d_model) -> queries (B, H, T, D), keys and values (B, H_kv, T, D)."""
        q = rotate(split_heads(self.q_proj(x), self.n_head), *rope)
        k = rotate(split_heads(self.k_proj(x), self.n_kv_head), *rope)
        return q, k, split_heads(self.v_proj(x), self.n_kv_head)


class MLP(nn.Module):
    """W_down (silu(W_gate x) * W_up x) (SwiGLU: Shazeer 2020)"""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.d_model, c.d_mlp, bias=c.mlp_bias)
        self.up_proj = Linear(c.d_model, c.d_mlp, bias=c.mlp_bias)
        self.down_proj = Linear(c.d_mlp, c.d_model, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over d_model, in float32 at first (Zhang and Sennrich 2019)."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x) * self.weight

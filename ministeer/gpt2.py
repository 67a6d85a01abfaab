"""What makes GPT-2 GPT-2: learned positions, LayerNorm before each half of a block, biases, tanh-GELU.

Read next: llama.py, for what has changed since. Radford et al. 2019; weight names are OpenAI's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import KVCache, attend, merge_heads, split_heads
from .checkpoints.config import Config
from .model import LM, Embedding, Linear


class GPT2(LM):
    prefix = "transformer."         # of every weight name in some files; OpenAI's own has none
    embedding_name = "wte.weight"

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.wte = Embedding(c.n_vocab, c.d_model)
        self.wpe = Embedding(c.n_ctx, c.d_model)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = LayerNorm(c.d_model, c.norm_eps)
        if not c.tied:
            self.lm_head = Linear(c.d_model, c.n_vocab, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def embed(self, ids: Tensor, pos: Tensor) -> Tensor:
        """ids (B, T), pos (T,) -> (B, T, d_model)"""
        return self.wte(ids) + self.wpe(pos)

    def rope(self, pos: Tensor) -> None:
        return None                 # `embed` has already added the positions

    def final_norm(self, x: Tensor) -> Tensor:
        return self.ln_f(x)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.ln_1 = LayerNorm(c.d_model, c.norm_eps)
        self.attn = Attention(c)
        self.ln_2 = LayerNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, l: int, rope: None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), l, cache)
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = Conv1D(c.d_model, 3 * c.d_model)      # q, k and v side by side
        self.c_proj = Conv1D(c.d_model, c.d_model)

    def forward(self, x: Tensor, l: int, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.qkv(x)
        mixed = cache.attend(l, q, k, v) if cache else attend(q, k, v)
        return self.c_proj(merge_heads(mixed))

    def qkv(self, x: Tensor, rope: None = None) -> tuple[Tensor, ...]:
        """x (B, T, d_model) -> queries, keys and values, each (B, H, T, D)."""
        return tuple(split_heads(part, self.n_head) for part in self.c_attn(x).chunk(3, dim=-1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c_fc = Conv1D(c.d_model, c.d_mlp)
        self.c_proj = Conv1D(c.d_mlp, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        # Trap: GPT-2 was trained with the tanh form of GELU; the exact form differs by up to 5e-4.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Conv1D(nn.Module):
    """x W + b. As in OpenAI's checkpoint, W is (inputs, outputs), the transpose of nn.Linear's."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over d_model, in float32 whatever the dtype of x."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.eps).to(x)

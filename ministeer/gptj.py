"""What makes GPT-J GPT-J: attention and MLP side by side, and rotary positions in neighbouring pairs.

Read first: gpt2.py and llama.py, in the same outline. Wang and Komatsuzaki 2021; weight names are the Hub's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import KVCache, attend, merge_heads, split_heads
from .checkpoints.config import GPTJConfig
from .gpt2 import LayerNorm
from .model import LM, Embedding, Linear

CosSin = tuple[Tensor, Tensor]      # of the rotary angles, each (T, rotary_dim / 2)


class GPTJ(LM):
    prefix = "transformer."
    embedding_name = "wte.weight"

    def __init__(self, config: GPTJConfig):
        super().__init__()
        self.config = c = config
        self.wte = Embedding(c.n_vocab, c.d_model)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = LayerNorm(c.d_model, c.norm_eps)
        self.lm_head = Linear(c.d_model, c.n_vocab)     # with a bias, and never tied

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def embed(self, ids: Tensor, pos: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, d_model). Positions enter in attention."""
        return self.wte(ids)

    def rope(self, pos: Tensor) -> CosSin:
        """pos (T,) -> cos and sin (T, rotary_dim / 2) of the angle by which each position turns each pair."""
        theta, n = self.config.rope.theta, self.config.rotary_dim
        angle = pos[:, None] * theta ** -(torch.arange(0, n, 2, device=pos.device).float() / n)
        return angle.cos(), angle.sin()

    def final_norm(self, x: Tensor) -> Tensor:
        return self.ln_f(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (x[2i], x[2i + 1]) of each head by its angle, and keep x[rotary_dim:]. x (B, H, T, D)

    Trap: the pairs are neighbours, where the Hub's Llama pairs the halves of a head.
    """
    turned, kept = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    a, b = turned[..., 0::2], turned[..., 1::2]         # (B, H, T, rotary_dim / 2)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x), kept], dim=-1)


class Block(nn.Module):
    def __init__(self, c: GPTJConfig):
        super().__init__()
        self.ln_1 = LayerNorm(c.d_model, c.norm_eps)
        self.attn = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, l: int, rope: CosSin, cache: KVCache | None = None) -> Tensor:
        h = self.ln_1(x)                                # both halves read the same
        return x + self.attn(h, l, rope, cache) + self.mlp(h)


class Attention(nn.Module):
    def __init__(self, c: GPTJConfig):
        super().__init__()
        self.n_head = c.n_head
        self.q_proj = Linear(c.d_model, c.d_model, bias=False)
        self.k_proj = Linear(c.d_model, c.d_model, bias=False)
        self.v_proj = Linear(c.d_model, c.d_model, bias=False)
        self.out_proj = Linear(c.d_model, c.d_model, bias=False)

    def forward(self, x: Tensor, l: int, rope: CosSin, cache: KVCache | None = None) -> Tensor:
        # GPT-J was trained with q k^T and softmax in float32. torch's kernels do that in every dtype.
        q, k, v = self.qkv(x, rope)
        mixed = cache.attend(l, q, k, v) if cache else attend(q, k, v)
        return self.out_proj(merge_heads(mixed))

    def qkv(self, x: Tensor, rope: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d_model) -> queries, keys and values, each (B, H, T, D)."""
        q = rotate(split_heads(self.q_proj(x), self.n_head), *rope)
        k = rotate(split_heads(self.k_proj(x), self.n_head), *rope)
        return q, k, split_heads(self.v_proj(x), self.n_head)


class MLP(nn.Module):
    def __init__(self, c: GPTJConfig):
        super().__init__()
        self.fc_in = Linear(c.d_model, c.d_mlp)
        self.fc_out = Linear(c.d_mlp, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(F.gelu(self.fc_in(x), approximate="tanh"))

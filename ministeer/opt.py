"""What makes OPT OPT: positions counted from 2, ReLU, and norms after each half of a block in the 350M model.

Read first: gpt2.py, in the same outline. Zhang et al. 2022; weight names are the Hub's.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import KVCache, attend, merge_heads, split_heads
from .checkpoints.config import OPTConfig
from .gpt2 import LayerNorm
from .model import LM, Embedding, Linear


class OPT(LM):
    prefix = "model."               # of every weight name in some files; the oldest have none
    embedding_name = "decoder.embed_tokens.weight"

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.config = c = config
        self.decoder = decoder = nn.Module()
        decoder.embed_tokens = Embedding(c.n_vocab, c.d_embed)
        decoder.embed_positions = Embedding(c.n_ctx + 2, c.d_model)
        self.projected = c.d_embed != c.d_model
        if self.projected:
            decoder.project_in = Linear(c.d_embed, c.d_model, bias=False)
            decoder.project_out = Linear(c.d_model, c.d_embed, bias=False)
        kind = Block if c.pre_norm else PostNormBlock
        decoder.layers = nn.ModuleList(kind(c) for _ in range(c.n_layer))
        if c.final_norm:
            decoder.final_layer_norm = LayerNorm(c.d_model, c.norm_eps)
        if not c.tied:
            self.lm_head = Linear(c.d_embed, c.n_vocab, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder.layers

    def embed(self, ids: Tensor, pos: Tensor) -> Tensor:
        """ids (B, T), pos (T,) -> (B, T, d_model)

        Trap: position 0 is row 2 of the table. Rows 0 and 1 are never used.
        """
        x = self.decoder.embed_tokens(ids)
        if self.projected:
            x = self.decoder.project_in(x)
        return x + self.decoder.embed_positions(pos + 2)

    def rope(self, pos: Tensor) -> None:
        return None                 # `embed` has already added the positions

    def final_norm(self, x: Tensor) -> Tensor:
        """x (B, T, d_model) -> what the head reads, (B, T, d_embed). The 350M model has no norm here."""
        if self.config.final_norm:
            x = self.decoder.final_layer_norm(x)
        return self.decoder.project_out(x) if self.projected else x


class Block(nn.Module):
    def __init__(self, c: OPTConfig):
        super().__init__()
        self.self_attn_layer_norm = LayerNorm(c.d_model, c.norm_eps)
        self.self_attn = Attention(c)
        self.final_layer_norm = LayerNorm(c.d_model, c.norm_eps)     # of this block's MLP, despite its name
        self.fc1 = Linear(c.d_model, c.d_mlp, bias=c.mlp_bias)
        self.fc2 = Linear(c.d_mlp, c.d_model, bias=c.mlp_bias)

    def forward(self, x: Tensor, l: int, rope: None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), l, cache)
        return x + self.feed_forward(self.final_layer_norm(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class PostNormBlock(Block):
    """Each norm follows a half of the block: it is applied to x plus what that half writes.

    resid[l] is still what block l reads: resid[0] the embedding, and from resid[1] on the output of a norm.
    So attention reads an addition as it is, and the norm after attention scales the sum.
    """

    def forward(self, x: Tensor, l: int, rope: None = None, cache: KVCache | None = None) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x, l, cache))
        return self.final_layer_norm(x + self.feed_forward(x))


class Attention(nn.Module):
    def __init__(self, c: OPTConfig):
        super().__init__()
        self.n_head = c.n_head
        self.q_proj = Linear(c.d_model, c.d_model, bias=c.attention_bias)
        self.k_proj = Linear(c.d_model, c.d_model, bias=c.attention_bias)
        self.v_proj = Linear(c.d_model, c.d_model, bias=c.attention_bias)
        self.out_proj = Linear(c.d_model, c.d_model, bias=c.attention_bias)

    def forward(self, x: Tensor, l: int, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.qkv(x)
        mixed = cache.attend(l, q, k, v) if cache else attend(q, k, v)
        return self.out_proj(merge_heads(mixed))

    def qkv(self, x: Tensor, rope: None = None) -> tuple[Tensor, ...]:
        """x (B, T, d_model) -> queries, keys and values, each (B, H, T, D).

        `attend` divides q k^T by sqrt(D). OPT was trained with q divided, which gives the same numbers.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(split_heads(part, self.n_head) for part in (q, k, v))

"""Attention and its cache, shared by both families.

Read next: gpt2.py and llama.py. Vaswani et al. 2017, section 3.2; grouped queries: Ainslie et al. 2023.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .utils import check_whole

FIRST_POSITIONS = 256       # for which a cache makes room at once; it doubles when they are used up


def causal_mask(T: int, S: int, device: torch.device | str | None = None) -> Tensor:
    """(T, S): 0 where a query may look, -inf where the key comes later. The queries are the LAST T of S positions."""
    return torch.full((T, S), -math.inf, device=device).triu(S - T + 1)


def attention_pattern(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d_head) + mask): how much each query looks at each key. Each row sums to 1.

    q (B, H, T, D): queries of the newest T positions
    k (B, H_kv, S, D): keys of all S positions; each serves H / H_kv query heads -> (B, H, T, S)
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    mask = causal_mask(q.shape[2], k.shape[2], q.device)
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).softmax(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """attention_pattern(q, k) v, by a kernel of torch that never holds the pattern. v (B, H_kv, S, D) -> (B, H, T, D)

    mask: causal_mask(T, S), which only a later chunk of a text needs: 1 < T < S
    """
    # Trap: is_causal=True lines up the FIRST query with the first key. In a later chunk the LAST ones line up.
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D)"""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H * D)"""
    return x.transpose(1, 2).flatten(2)


class KVCache:
    """The keys and values of positions 0 … len(cache) - 1, so that no position is computed twice.

    Make one for a run, pass it to every call of the model, drop it at the end; the model itself remembers nothing.
    max_len: the most positions of this run; memory is taken as they come. batch: rows. A prompt read as ONE row
        fills all rows of the cache with it.
    Raises ValueError for sizes below 1.
    """

    def __init__(self, max_len: int, batch: int = 1):
        self.max_len, self.batch = check_whole("max_len", max_len, 1), check_whole("batch", batch, 1)
        self.layers = {}            # l -> (k, v), each (batch, H_kv, room for positions, D)
        self.length = 0             # positions read by every block
        self.steer = None           # what steered them: a cache can only be continued under the same steering
        self.mask = None            # of the latest chunk

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return True                 # Trap: without this an empty cache is false, and `if cache` skips the first chunk.

    def extend(self, l: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, T, D) of block l after the positions already read; return all, (B, H_kv, S, D)."""
        B, n_kv_head, T, d_head = k.shape
        end = self.length + T
        stored = self.layers.get(l)
        if stored is None or stored[0].shape[2] < end:
            room = min(self.max_len, max(end, 2 * self.length, FIRST_POSITIONS))
            larger = tuple(new.new_empty(self.batch, n_kv_head, room, d_head) for new in (k, v))
            for old, new in zip(stored or (), larger, strict=False):
                new[:, :, :self.length] = old[:, :, :self.length]
            self.layers[l] = stored = larger
        for old, new in zip(stored, (k, v), strict=True):
            old[:, :, self.length:end] = new
        return tuple(old[:B, :, :end] for old in stored)

    def attend(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attend for the newest T positions of block l, which see those before them as well. Shapes as there."""
        k, v = self.extend(l, k, v)
        T, S = q.shape[2], k.shape[2]
        if not 1 < T < S:
            return attend(q, k, v)
        if self.mask is None or self.mask.shape != (T, S):
            self.mask = causal_mask(T, S, q.device).to(q)       # once a pass: the other blocks find it
        return attend(q, k, v, self.mask)

"""Attention and its cache, shared by every family.

Read next: gpt2.py and llama.py. Vaswani et al. 2017, section 3.2; grouped queries: Ainslie et al. 2023.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .utils import check_whole


def causal_mask(T: int, S: int, device: torch.device | str | None = None) -> Tensor:
    """(T, S): 0 where a query may look, -inf where the key comes later. Queries are the last T of S."""
    return torch.full((T, S), -math.inf, device=device).triu(S - T + 1)


def attention_pattern(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d_head) + mask) -> (B, H, T, S): how much each query looks at each key.

    q (B, H, T, D): queries of the newest T positions
    k (B, H_kv, S, D): keys of all S positions; each key head serves H / H_kv query heads
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    mask = causal_mask(q.shape[2], k.shape[2], q.device)
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).softmax(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """attention_pattern(q, k) v -> (B, H, T, D), by a torch kernel that never stores the pattern.

    mask: causal_mask(T, S), needed only for a later chunk of a text, 1 < T < S
    """
    # Trap: is_causal=True aligns the FIRST query and key. In a later chunk the LAST two must align.
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D)"""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H * D)"""
    return x.transpose(1, 2).flatten(2)


class KVCache:
    """The keys and values of positions 0 … len(cache) - 1, so that no position is computed twice.

    Make one per run and pass it to every call of the model, which itself remembers nothing.
    max_len: the most positions that the run may read; memory grows as it reads
    batch: number of rows. A prompt that is read as ONE row fills them all.
    Raises ValueError for sizes below 1.
    """

    def __init__(self, max_len: int, batch: int = 1):
        self.max_len, self.batch = check_whole("max_len", max_len, 1), check_whole("batch", batch, 1)
        self.layers = {}            # l -> (k, v), each (batch, H_kv, room, D)
        self.length = 0             # positions that every block has read
        self.model = None           # a weak reference to the model that read them, and
        self.steer = None           # what steered them: a run must continue with the same model and steering
        self.mask = None            # of the latest chunk, shared by all blocks
        self.ahead = {}             # l -> what compiled code computed early of block l (faster.py)

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return True                 # Trap: without this, an empty cache is false and `if cache` skips it.

    def extend(self, l: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the k, v (B, H_kv, T, D) of block l; return those of all positions, (B, H_kv, S, D)."""
        B, n_kv_head, T, d_head = k.shape
        end = self.length + T
        if l not in self.layers:
            self.layers[l] = tuple(new.new_empty(self.batch, n_kv_head, 0, d_head) for new in (k, v))
        stored = self.grown(l, end)
        for old, new in zip(stored, (k, v), strict=True):
            old[:, :, self.length:end] = new
        return tuple(old[:B, :, :end] for old in stored)

    def grown(self, l: int, end: int) -> tuple[Tensor, Tensor]:
        """What is stored of block l, (batch, H_kv, room, D) each, with room for `end` positions or more."""
        room = self.layers[l][0].shape[2]
        if room < end:      # Trap: not with empty memory, of which compiled code would make 0 times NaN.
            more = min(self.max_len, max(end, 2 * room)) - room
            self.layers[l] = tuple(F.pad(old, (0, 0, 0, more)) for old in self.layers[l])
        return self.layers[l]

    def part(self, rows: Tensor) -> None:
        """Row i goes on from what was row rows[i], so that rows which were equal can differ from now on."""
        self.batch = len(rows)
        for l, stored in self.layers.items():
            self.layers[l] = tuple(old[rows] for old in stored)

    def attend(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The `attend` above for the newest T positions of block l, which also see all earlier ones."""
        k, v = self.extend(l, k, v)
        T, S = q.shape[2], k.shape[2]
        if not 1 < T < S:
            return attend(q, k, v)
        if self.mask is None or self.mask.shape != (T, S):
            self.mask = causal_mask(T, S, q.device).to(q)
        return attend(q, k, v, self.mask)

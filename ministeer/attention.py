"""Attention and its cache, shared by both families.

Read next: gpt2.py and llama.py. Vaswani et al. 2017, section 3.2; grouped queries: Ainslie et al. 2023.
"""

from numbers import Integral

import torch
import torch.nn.functional as F


def attend(q, k, v):
    """softmax(q k^T / sqrt(D)) v, where a query sees the keys at its own position and before.

    q (B, H, T, D): queries of the newest T positions
    k, v (B, H_kv, S, D): keys and values of all S positions; each serves H / H_kv query heads
    -> (B, H, T, D)
    """
    T, S = q.shape[2], k.shape[2]
    if T == 1 and q.dtype == torch.bfloat16:
        # The query heads that share a key head are as well several queries of one head; so torch's bfloat16 kernel takes a fifth of the time.
        return F.scaled_dot_product_attention(q[:, :, 0].unflatten(1, (k.shape[1], -1)), k, v).flatten(1, 2)[:, :, None]
    mask = None
    if 1 < T < S:
        # Trap: is_causal=True lines up the FIRST query with the first key. In a later chunk the LAST ones line up.
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=q.shape[1] != k.shape[1])


def split_heads(x, n_head):
    """(B, T, H * D) -> (B, H, T, D)"""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, H, T, D) -> (B, T, H * D)"""
    return x.transpose(1, 2).flatten(2)


class KVCache:
    """The keys and values of positions 0 … len(cache) - 1, so that no position is computed twice.

    Make one for a run, pass it to every call of the model, drop it at the end; the model itself remembers nothing.
    max_len: the most positions of this run. batch: rows. A prompt read as ONE row fills all rows of the cache with it.
    Raises ValueError for sizes that hold nothing.
    """

    def __init__(self, max_len, batch=1):
        for name, size in (("max_len", max_len), ("batch", batch)):
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more; given: {size!r}.")
        self.max_len, self.batch = max_len, batch
        self.layers = {}            # l -> (k, v), each (batch, H_kv, max_len, D), in the dtype and on the device of the first k
        self.length = 0             # positions read by every block
        self.steer = None           # what steered them: a cache can only be continued under the same steering

    def __len__(self):
        return self.length

    def __bool__(self):
        return True                 # Trap: without this an empty cache is false, and `if cache` skips the first chunk.

    def extend(self, l, k, v):
        """Store k, v (B, H_kv, T, D) of block l after the positions already read; return all of them, (B, H_kv, S, D)."""
        if l not in self.layers:
            _, heads, _, d_head = k.shape
            self.layers[l] = tuple(k.new_empty(self.batch, heads, self.max_len, d_head) for _ in "kv")
        B, end = len(k), self.length + k.shape[2]
        for old, new in zip(self.layers[l], (k, v), strict=True):
            old[:, :, self.length:end] = new
        return tuple(old[:B, :, :end] for old in self.layers[l])

    def attend(self, l, q, k, v):
        """attend for the newest positions of block l, which see those before them as well; q (B, H, T, D), k, v (B, H_kv, T, D)."""
        return attend(q, *self.extend(l, k, v))

"""LM: the forward loop of every family, the residual stream as a list, activation addition in plain sight.

Read first: attention.py, gpt2.py, llama.py. Read next: steering.py. Turner et al., Algorithm 1.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor, nn

from .attention import KVCache
from .utils import one_line


class Addition(Protocol):
    """What the loop asks of a Steer (steering.py): the block before which it adds, and what it adds there."""
    layer: int

    def delta(self, x: Tensor, pos: Tensor) -> Tensor: ...


Additions = Addition | Sequence[Addition]


class LM(nn.Module):
    """A language model. A family (gpt2.py, llama.py, opt.py, gptj.py) supplies its parts:

    embed(ids, pos), rope(pos), blocks, each called as block(x, l, rope, cache), and final_norm(x)
    prefix, embedding_name: what its files put before weight names, and the weight name of its embedding
    """

    name = "unnamed"
    fingerprint = ""        # set by `load`: a digest of all weights and of the Config, kept with each vector
    processes = 1           # set by `load`: how many share the weights

    @property
    def device(self) -> torch.device:
        return self.get_parameter(self.embedding_name).device

    def initialise(self, seed: int) -> LM:
        """Give a new model random weights, as GPT-2 began: N(0, 0.02^2), biases 0, norms 1. -> itself

        A model built from a Config alone holds whatever was in memory.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    p.copy_(0.02 * torch.randn(p.shape, generator=generator))
                else:
                    p.fill_(0 if name.endswith("bias") else 1)
        return self

    def shared_copy(self) -> LM:
        """A copy with new modules and parameters, whose numbers share this model's memory."""
        shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in self.parameters()}
        return copy.deepcopy(self, shared)

    def forward(self, ids: Tensor, steer: Additions = (), cache: KVCache | None = None, *,
                last_only: bool = False) -> tuple[Tensor, list[Tensor]]:
        """-> logits (B, T, n_vocab), resid: a list of n_layer + 1 tensors (B, T, d_model).

        resid[l] is what block l reads; resid[n_layer] is what the final norm reads.
        ids (B, T): token numbers, a whole sequence or what follows the positions in `cache`
        steer: Additions, each added to what its block reads
        cache: a KVCache, or None to keep nothing
        last_only: compute the logits of the last position only, (B, 1, n_vocab)
        Raises ValueError if ids, steer or cache do not fit this model or each other.
        """
        return self.read(ids, self.check(ids, steer, cache), cache, last_only)

    def read(self, ids: Tensor, steer: tuple[Addition, ...], cache: KVCache | None,
             last_only: bool) -> tuple[Tensor, list[Tensor]]:
        """`forward` without its checks, which would wait for the device: for tokens that were just drawn."""
        start = len(cache) if cache else 0
        pos = torch.arange(start, start + ids.shape[1], device=ids.device)      # absolute, in every chunk
        resid = self.run(self.embed(ids, pos), pos, steer, cache)
        return self.unembed(resid[-1][:, -1:] if last_only else resid[-1]), resid

    def residuals(self, ids: Tensor, steer: Additions = (), stop_layer: int | None = None) -> list[Tensor]:
        """[resid[0], …, resid[stop_layer]] of ids (B, T), without logits; later blocks do not run."""
        steer = self.check(ids, steer, None)
        pos = torch.arange(ids.shape[1], device=ids.device)
        return self.run(self.embed(ids, pos), pos, steer, stop_layer=stop_layer)

    def run(self, x: Tensor, pos: Tensor, steer: Sequence[Addition] = (), cache: KVCache | None = None,
            first_layer: int = 0, stop_layer: int | None = None) -> list[Tensor]:
        """The loop over blocks first_layer … stop_layer - 1 -> [resid[first_layer], …, resid[stop_layer]].

        x (B, T, d_model): resid[first_layer] before any addition there, at the absolute positions pos (T,)
        To try many Steers at layer l, start each time from one recorded resid[l].
        Raises ValueError for blocks that do not exist, and for a cache without all blocks: it would get gaps.
        """
        if cache and (first_layer > 0 or stop_layer is not None):
            raise ValueError("a cache needs all blocks; leave out first_layer and stop_layer, or the cache.")
        stop = self.config.n_layer if stop_layer is None else stop_layer
        if not 0 <= first_layer <= stop <= self.config.n_layer:
            raise ValueError(f"first_layer {first_layer}, stop_layer {stop}: "
                             f"0 <= first_layer <= stop_layer <= {self.config.n_layer}.")
        rope = self.rope(pos)
        resid = []
        for l in range(first_layer, stop):
            for s in steer:
                if s.layer == l:
                    x = x + s.delta(x, pos).to(x)       # activation addition: x + c (h+ - h-)
            resid.append(x)
            x = self.blocks[l](x, l, rope, cache)
        resid.append(x)
        if cache:
            cache.length += len(pos)
        return resid

    def unembed(self, x: Tensor) -> Tensor:
        """x (B, T, d_model) -> logits (B, T, n_vocab). Of any resid[l]: the logit lens (nostalgebraist)."""
        x = self.final_norm(x)
        if hasattr(self, "lm_head"):
            return self.lm_head(x)
        return x @ self.get_parameter(self.embedding_name).T        # tied: the head is the embedding

    def check(self, ids: Tensor, steer: Additions, cache: KVCache | None) -> tuple[Addition, ...]:
        """Refuse bad input before anything runs. Returns the Steers as a tuple."""
        is_ids = isinstance(ids, Tensor) and ids.dtype in (torch.int64, torch.int32)
        if not is_ids or ids.ndim != 2 or 0 in ids.shape:
            given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError("ids must be a (B, T) int64 tensor of token numbers, B and T at least 1; "
                             f"given: {given}.")
        if cache is not None and not isinstance(cache, KVCache):
            raise ValueError(f"cache must be a KVCache or None; given: {type(cache).__name__}.")
        B, T = ids.shape
        low, high, n_vocab = int(ids.min()), int(ids.max()), self.config.n_vocab
        if low < 0 or high >= n_vocab:
            raise ValueError(f"ids {low} … {high} are not in this model's vocabulary, 0 … {n_vocab - 1}. "
                             "Were they made with another tokenizer?")
        start = len(cache) if cache else 0
        if start + T > self.config.n_ctx:
            raise ValueError(f"{start + T} positions do not fit this model's context of {self.config.n_ctx}.")
        steer = self.check_steer(steer, B, start + T if cache is None else None)
        if cache:
            if start + T > cache.max_len:
                raise ValueError(f"the cache holds {cache.max_len} positions; {start} are read, "
                                 f"{T} more do not fit.")
            if B not in (1, cache.batch) or (start and B != cache.batch):
                raise ValueError(f"the cache is for a batch of {cache.batch}, and ids has a batch of {B}.")
            if start and cache.model() is not self:
                raise ValueError("the cache was filled by another model. Start a new cache.")
            if start and steer != cache.steer:
                raise ValueError("the cache was filled under other steering. "
                                 "Pass the same steer list to every call, or start a new cache.")
            # Trap: id(self) would not do, because a later model may get the id of one that is gone.
            cache.model, cache.steer = weakref.ref(self), steer
        return steer

    def check_steer(self, steer: Additions, batch: int, length: int | None = None) -> tuple[Addition, ...]:
        """The Steers as a tuple, if all fit this model, `batch` rows and a prompt of `length` tokens.

        length: None if the prompt may come in chunks
        """
        steer = tuple(steer) if isinstance(steer, list | tuple) else (steer,)
        for s in steer:
            if not hasattr(s, "delta"):
                raise ValueError(f"steer must be a Steer or a list of them; given: {type(s).__name__}.")
            self.check_layer(s.layer)
            given, d_model = s.vector.shape[-1], self.config.d_model
            if given != d_model:
                raise ValueError(f"the vector is {given} wide, this model's residual stream {d_model}. "
                                 "Was it made with another model?")
            if s.fingerprint and self.fingerprint and s.fingerprint != self.fingerprint:
                maker = one_line(s.note.get("model", s.fingerprint))
                raise ValueError(f"the vector was made with another model ({maker}). "
                                 "To use it all the same, load it with Steer.load(path, any_model=True).")
            if isinstance(s.coeff, Tensor) and len(s.coeff) != batch:
                raise ValueError(f"coeff has {len(s.coeff)} values, one for each row of a batch, "
                                 f"but the batch has {batch} rows.")
            if length is not None and s.stop is not None and s.stop > length:
                raise ValueError(f"the steered positions {s.start} … {s.stop - 1} do not fit "
                                 f"a prompt of {length} token{'' if length == 1 else 's'}.")
        return steer

    def check_layer(self, layer: int) -> None:
        """Raises ValueError unless `layer` is the number of a block."""
        n_layer = self.config.n_layer
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < n_layer:
            raise ValueError(f"layer {one_line(layer)}: this model has blocks 0 … {n_layer - 1} "
                             "(layer = the block that reads the changed stream).")


class Linear(nn.Linear):
    """nn.Linear without its random start, which takes longer than loading the weights that replace it."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding without its random start."""

    def reset_parameters(self) -> None:
        pass

"""LM: the forward loop that both families share, with the residual stream as a list and activation addition in plain sight.

Read before: attention.py, gpt2.py, llama.py. Read next: steering.py. Turner et al., Algorithm 1.
"""

import torch
from torch import nn

from .attention import KVCache


class LM(nn.Module):
    """A language model: GPT2 or Llama says how to embed, what a block is, and how to unembed. The loop is here."""

    fingerprint = ""        # set by weights.load: tells checkpoints apart, so that a vector meets the model it was made with

    def initialise(self, seed):
        """Give a new model random weights to train from, as GPT-2 began: N(0, 0.02^2), biases 0, norms 1. -> the model itself.

        A model that was only made of a Config holds whatever was in memory.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    p.copy_(0.02 * torch.randn(p.shape, generator=generator))
                else:
                    p.fill_(0 if name.endswith("bias") else 1)
        return self

    def forward(self, ids, steer=(), cache=None, *, last_only=False):
        """-> logits (B, T, n_vocab), resid: a list of n_layer + 1 tensors (B, T, d_model).

        resid[l] is what block l reads; resid[n_layer] is what the final norm reads.
        ids (B, T): token numbers, a whole sequence or what follows the positions in `cache`
        steer: Steers, each added to the stream that its block reads
        cache: a KVCache, or None to keep nothing
        last_only: compute the logits of the last position only, (B, 1, n_vocab)
        Raises ValueError if ids, steer or cache do not fit this model or one another.
        """
        steer = self.check(ids, steer, cache)
        start = len(cache) if cache else 0
        pos = torch.arange(start, start + ids.shape[1], device=ids.device)      # absolute, for every chunk of every run
        resid = self.run(self.embed(ids, pos), pos, steer, cache)
        return self.unembed(resid[-1][:, -1:] if last_only else resid[-1]), resid

    def run(self, x, pos, steer=(), cache=None, first=0, stop=None):
        """The loop: blocks `first` … `stop` - 1 (all by default) -> [resid[first], …, resid[stop]].

        x (B, T, d_model): what block `first` reads at the absolute positions pos (T,), before any addition there
        To make a vector for layer l, stop before block l. To try many Steers at layer l, start there from one recorded resid[l].
        Raises ValueError for a cache and less than all blocks: the others would leave their keys and values out of it.
        """
        if cache and (first > 0 or stop is not None):
            raise ValueError("a cache needs all blocks; leave out first and stop, or the cache.")
        rope = self.rope(pos)
        stop = self.config.n_layer if stop is None else stop
        resid = []
        for l in range(first, stop):
            for s in steer:
                if s.layer == l:
                    x = x + s.delta(pos).to(x)      # activation addition: x + c (h+ - h-)
            resid.append(x)
            x = self.blocks[l](x, l, rope, cache)
        resid.append(x)
        if cache:
            cache.length += len(pos)
        return resid

    def check(self, ids, steer, cache):
        """Whatever cannot be run is refused here, before it is half done. Returns the Steers as a tuple."""
        c = self.config
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2 or 0 in ids.shape:
            given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(f"ids must be a (B, T) int64 tensor of token numbers, B and T at least 1; given: {given}.")
        if cache is not None and not isinstance(cache, KVCache):
            raise ValueError(f"cache must be a KVCache or None; given: {type(cache).__name__}.")
        B, T = ids.shape
        if int(ids.min()) < 0 or int(ids.max()) >= c.n_vocab:
            raise ValueError(f"ids {int(ids.min())} … {int(ids.max())} are not in this model's vocabulary, 0 … {c.n_vocab - 1}. "
                             "Were they made with another tokenizer?")
        start = len(cache) if cache else 0
        if start + T > c.n_ctx:
            raise ValueError(f"{start + T} positions do not fit this model's context of {c.n_ctx}.")
        steer = self.check_steer(steer, B, start + T if cache is None else None)
        if cache:
            if start + T > cache.max_len:
                raise ValueError(f"the cache holds {cache.max_len} positions; {start} are read, {T} more do not fit.")
            if B not in (1, cache.batch) or (start and B != cache.batch):
                raise ValueError(f"the cache has {cache.batch} rows, ids {B}.")
            if start and steer != cache.steer:
                raise ValueError("the cache was filled under other steering. Pass the same steer list to every call, or start a new cache.")
            cache.steer = steer
        return steer

    def check_steer(self, steer, batch, length=None):
        """One Steer or several -> a tuple of them, if all fit this model, `batch` rows and (where it is known) a prompt of `length` tokens."""
        c = self.config
        steer = tuple(steer) if isinstance(steer, list | tuple) else (steer,)
        for s in steer:
            if not hasattr(s, "delta"):
                raise ValueError(f"steer must be a Steer or a list of them; given: {type(s).__name__}.")
            if s.layer >= c.n_layer:
                raise ValueError(f"layer {s.layer}: {self.layers_there()}")
            if s.vector.shape[-1] != c.d_model:
                raise ValueError(f"the vector is {s.vector.shape[-1]} wide, this model's residual stream {c.d_model}. "
                                 "Was it made with another model?")
            if s.model and self.fingerprint and s.model != self.fingerprint:
                raise ValueError(f"the vector was made with another model ({s.note.get('model', s.model)}). "
                                 "To use it all the same, load it with Steer.load(path, any_model=True).")
            if isinstance(s.coeff, torch.Tensor) and len(s.coeff) != batch:
                raise ValueError(f"coeff has {len(s.coeff)} values, one for each row of a batch, but the batch has {batch} rows.")
            if length is not None and s.stop is not None and s.stop > length:
                raise ValueError(f"the steered positions {s.start} … {s.stop - 1} do not fit a prompt of {length} tokens.")
        return steer

    def layers_there(self):
        return f"this model has blocks 0 … {self.config.n_layer - 1} (layer = the block that reads the changed stream)."

    def unembed(self, x):
        """x (B, T, d_model) -> logits (B, T, n_vocab). unembed(resid[l]) for any l is the logit lens (nostalgebraist 2020)."""
        head = self.get_parameter(self.names["embedding"] if self.config.tied else "lm_head.weight")
        return self.final_norm(x) @ head.T


class Linear(nn.Linear):
    """nn.Linear without its random start: a file or `initialise` fills it, and to draw it first would take longer than to load."""

    def reset_parameters(self):
        pass


class Embedding(nn.Embedding):
    """nn.Embedding, likewise."""

    def reset_parameters(self):
        pass

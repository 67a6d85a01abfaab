"""Steer: one activation addition. steering_vector: make one from a pair of prompts. And the controls to hold beside it.

Read first: model.py, whose loop adds it. Read next: generation.py. Turner et al., Algorithm 1.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import __version__
from .utils import check_number, check_whole, write

if TYPE_CHECKING:
    from .checkpoints.tokenizer import Tokenizer
    from .model import LM

NARROW = 128        # d_model below which 4 dimensions are much of any vector, so that nothing is said about sinks


@dataclass(frozen=True, eq=False)
class Steer:
    """Add coeff * vector to the residual stream that block `layer` reads.

    layer: 0 … n_layer - 1
    vector (n, d_model): row i goes to absolute position start + i (ActAdd, Algorithm 1; start is its a)
    vector (d_model,):   the same row goes to every position from start on, generated ones too (CAA)
    coeff: a number, or a tensor (B,) with one for each row of the batch (the paper's c)
    start: the first steered position; 1 by default, because position 0 is BOS in both prompts of a pair
    fingerprint, note: which model it was made with, and from what; kept by save and load
    `2 * s`, `s / 2` and `-s` scale coeff. Raises ValueError for what could never be added.
    """
    layer: int
    vector: Tensor
    coeff: float | Tensor = 1.0
    start: int = 1
    fingerprint: str = ""
    note: dict = field(default_factory=dict)

    __array_ufunc__ = None      # Trap: without this, numpy_array * steer is an array of Steers.

    def __post_init__(self):
        v, c = self.vector, self.coeff
        if not isinstance(v, Tensor) or not v.is_floating_point() or v.ndim not in (1, 2) or 0 in v.shape:
            given = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"vector must be a floating-point tensor (n, d_model) or (d_model,); given: {given}.")
        if not torch.isfinite(v).all():
            raise ValueError("the vector holds NaN or infinite numbers.")
        if isinstance(c, np.ndarray):
            c = torch.from_numpy(c).float()
        if isinstance(c, Tensor) and c.ndim > 0:
            if c.ndim != 1 or not len(c) or not torch.isfinite(c).all():
                raise ValueError("coeff must be one finite number for each row of the batch; "
                                 f"given: {tuple(c.shape)}, {c.tolist()}.")
        else:
            c = check_number("coeff", c.item() if isinstance(c, Tensor) else c)
        checked = {"layer": check_whole("layer", self.layer), "start": check_whole("start", self.start), "coeff": c}
        for name, value in checked.items():
            object.__setattr__(self, name, value)       # which a frozen dataclass takes in no other way

    @property
    def stop(self) -> int | None:
        """One past the last steered position; None if there is no last one."""
        return None if self.vector.ndim == 1 else self.start + len(self.vector)

    def delta(self, pos: Tensor) -> Tensor:
        """coeff * vector at the absolute positions pos (T,), zero where it does not reach.

        -> (T, d_model), or (B, T, d_model) with a coeff (B,)
        """
        i = (pos - self.start).to(self.vector.device)
        if self.vector.ndim == 1:
            rows = (i >= 0)[:, None] * self.vector
        else:
            inside = (i >= 0) & (i < len(self.vector))
            rows = inside[:, None] * self.vector[i.clamp(0, len(self.vector) - 1)]
        coeff = self.coeff[:, None, None].to(rows) if isinstance(self.coeff, Tensor) else self.coeff
        return coeff * rows

    def align(self, where: str, n_prompt: int) -> Steer:
        """The same vector moved to the "front" (start 1), "middle" or "back" of a prompt of n_prompt tokens with BOS.

        As in the paper's position study, where the vector still has its zero BOS row: that row and the others lie over
        0 …, over the n + 1 positions around n_prompt // 2, or over the last n + 1. "back" ends at the last prompt token.
        """
        if self.vector.ndim == 1:
            raise ValueError("a vector (d_model,) goes to every position from start on and cannot be aligned.")
        n = len(self.vector)
        starts = {"front": 1, "middle": n_prompt // 2 - (n + 1) // 2 + 1, "back": n_prompt - n}
        if where not in starts:
            raise ValueError(f"align to {where!r}; possible: front, middle, back.")
        if not 0 <= starts[where] <= n_prompt - n:
            raise ValueError(f"a vector of {n} rows does not fit the {where} of a prompt of {n_prompt} tokens.")
        return replace(self, start=starts[where])

    def rows(self, numbers: Sequence[int]) -> Steer:
        """The same Steer for these rows of a batch only: a coeff (B,) keeps their values."""
        return replace(self, coeff=self.coeff[numbers]) if isinstance(self.coeff, Tensor) else self

    def scaled(self, coeff: float | Tensor) -> Steer:
        """The same Steer with this coeff, whatever it had."""
        return replace(self, coeff=coeff)

    def __repr__(self):
        pair = f"{self.note['plus']!r} - {self.note['minus']!r}" if {"plus", "minus"} <= set(self.note) else "a vector"
        n = len(self.vector)
        where = f"position {self.start}" if n == 1 else f"positions {self.start} to {self.start + n - 1}"
        if self.vector.ndim == 1:
            where = f"every position from {self.start} on"
        width = self.vector.shape[-1]
        return f"<Steer {pair}: coeff {self.coeff} at {where} before block {self.layer}, d_model {width}>"

    def __mul__(self, factor: float | Tensor | np.ndarray) -> Steer:
        return replace(self, coeff=factor * self.coeff)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Steer:
        return replace(self, coeff=self.coeff / divisor)

    def __neg__(self) -> Steer:
        return -1 * self

    def __add__(self, other):
        raise TypeError("Steers are not added to one another; pass a list, steer=[a, b], and the stream gets both.")

    __radd__ = __sub__ = __rsub__ = __add__

    def __eq__(self, other):
        """Whether both add the same numbers at the same places."""
        if self is other:
            return True
        if not isinstance(other, Steer):
            return NotImplemented
        same_coeff = torch.equal(torch.as_tensor(self.coeff), torch.as_tensor(other.coeff))
        same_place = (self.layer, self.start) == (other.layer, other.start)
        return same_place and same_coeff and torch.equal(self.vector, other.vector)

    __hash__ = None

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file: the tensor "vector", "coeff" if it has one a row, and the rest as metadata.

        `path` then holds the whole Steer, or what it held before.
        """
        tensors = {"vector": self.vector.contiguous()}
        about = {"ministeer": __version__, "layer": self.layer, "start": self.start, "fingerprint": self.fingerprint,
                 "note": self.note}
        if isinstance(self.coeff, Tensor):
            tensors["coeff"] = self.coeff.contiguous()
        else:
            about["coeff"] = self.coeff
        write(path, save(tensors, {"steer": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | os.PathLike, any_model: bool = False) -> Steer:
        """Read what `save` wrote. It can be used with the model it was made with, or with any if any_model=True.

        Raises FileNotFoundError, or ValueError if the file is not a Steer.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file {os.fspath(path)}.")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["steer"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}     # noqa: SIM118 (not a dict)
            return cls(layer=about["layer"], vector=tensors["vector"], coeff=tensors.get("coeff", about.get("coeff")),
                       start=about["start"], fingerprint="" if any_model else str(about["fingerprint"]),
                       note=dict(about["note"]))
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)} is not a steering vector that ministeer saved: {error}") from None


def steering_vector(model: LM, tokenizer: Tokenizer, plus: str, minus: str, layer: int) -> Steer:
    """h+ - h-, the difference of the residual streams of two prompts before block `layer` -> a Steer with coeff 1.

    Algorithm 1: BOS before each prompt, the shorter one padded on the right with space tokens, one difference a
    position, not averaged and not normalised. Only blocks 0 … layer - 1 run.
    vector (n, d_model): the row of BOS, zero for every pair, is left out, so n is the tokens of the longer prompt
    Raises ValueError if the two prompts are the same tokens or `layer` is not a block of the model.
    Warns if more than half of the vector is attention sink (`sink_share`), which does not tell the prompts apart.
    """
    (steer,) = steering_vectors(model, tokenizer, plus, minus, [layer])
    share, width = sink_share(steer.vector), steer.vector.shape[-1]
    if share > 0.5 and width >= NARROW:
        warnings.warn(f"{share:.0%} of the squared norm of {plus!r} - {minus!r} before block {layer} lies in 4 of "
                      f"{width} dimensions: one of the prompts has an attention sink there, often a padding token. "
                      "Try an earlier layer, or prompts of equally many tokens.", stacklevel=2)
    return steer


@torch.no_grad()
def steering_vectors(model: LM, tokenizer: Tokenizer, plus: str, minus: str, layers: Sequence[int]) -> list[Steer]:
    """steering_vector for each of `layers`, at least one, from one pass that ends before the highest of them."""
    for layer in layers:
        model.check_layer(layer)
    ids = pad_together(tokenizer, plus, minus)
    if ids[0] == ids[1]:
        raise ValueError(f"plus {plus!r} and minus {minus!r} are the same tokens once padded with spaces, "
                         "so their difference is zero.")
    resid = model.residuals(torch.tensor(ids, device=model.device), stop_layer=max(layers))
    note = {"plus": plus, "minus": minus, "model": model.name}
    # Trap: both prompts begin with the same BOS after nothing, so row 0 of the difference is zero. `start` is 1.
    vectors = {l: (resid[l][0].float() - resid[l][1].float())[1:] for l in layers}
    return [Steer(l, vectors[l], fingerprint=model.fingerprint, note=note) for l in layers]


def pad_together(tokenizer: Tokenizer, plus: str, minus: str) -> list[list[int]]:
    """Two prompts -> their ids, each with one BOS, the shorter filled up on the right with space tokens."""
    ids = [tokenizer.encode(text) for text in (plus, minus)]
    length = max(map(len, ids))
    return [row + [tokenizer.space_id] * (length - len(row)) for row in ids]


def sink_share(vector: Tensor, k: int = 4) -> float:
    """The part of a vector's squared norm, over all its rows, that lies in its k largest dimensions -> 0 … 1.

    Some models park attention on tokens that mean little (BOS, a lone space) by giving them a stream that is enormous
    in a few dimensions (Xiao et al. 2023; Sun et al. 2024). A difference with such a token is little but that sink.
    """
    energy = vector.float().square().view(-1, vector.shape[-1]).sum(dim=0)
    total = float(energy.sum())
    return float(energy.topk(min(k, len(energy))).values.sum()) / total if total else 0.0


def random_like(steer: Steer, seed: int) -> Steer:
    """The control: a random direction at each position, with the norm that `steer` has there; the rest is kept.

    Turner et al., appendix F: normal numbers of the same shape, rescaled row by row. seed and the layer choose the
    numbers, so that the controls of two layers have nothing in common.
    """
    generator = np.random.default_rng([check_whole("seed", seed), steer.layer])
    noise = torch.from_numpy(generator.standard_normal(tuple(steer.vector.shape), dtype=np.float32)).to(steer.vector)
    vector = noise * (steer.vector.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return replace(steer, vector=vector, note={**steer.note, "control": f"random, same norms, seed {seed}"})


@torch.no_grad()
def relative_norm(model: LM, tokenizer: Tokenizer, steer: Steer, prompt: str) -> Tensor:
    """|coeff * vector| / |resid[layer]| at each position of `prompt` -> (T,), 0 where nothing is added. T counts BOS.

    How large the addition is beside what is already there (Turner et al., appendix E).
    """
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    (steer,) = model.check_steer(steer, 1, ids.shape[1])
    stream = model.residuals(ids, stop_layer=steer.layer)[-1][0].float()
    return steer.delta(torch.arange(ids.shape[1], device=model.device)).to(stream).norm(dim=-1) / stream.norm(dim=-1)

"""Steer: one activation addition. steering_vector: make one from two prompts. random_like: its control.

Read first: model.py, whose loop adds it. Read next: generation.py. Turner et al., Algorithm 1.
"""

from __future__ import annotations

import json
import operator
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import __version__
from .utils import check_number, check_whole, one_line, write

if TYPE_CHECKING:
    from .checkpoints.tokenizer import Tokenizer
    from .model import LM

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NARROW = 128        # a narrower stream has much of any vector in 4 dimensions, so no warning there


@dataclass(frozen=True, eq=False)
class Steer:
    """Add coeff * vector to the residual stream that block `layer` reads.

    layer: 0 … n_layer - 1
    vector (n, d_model): row i goes to absolute position start + i (ActAdd, Algorithm 1; start is its a)
    vector (d_model,):   the same row goes to every position from start on, generated ones too (CAA)
    coeff: a number, or a tensor (B,) with one number for each row of the batch (the paper's c)
    start: the first steered position; 1 because position 0 is BOS in both prompts of a pair
    fingerprint, note: which model it was made with, and from what; save and load keep both
    `2 * s`, `s / 2` and `-s` scale coeff. Raises ValueError for what no model could add.
    """
    layer: int
    vector: Tensor
    coeff: float | Tensor = 1.0
    start: int = 1
    fingerprint: str = field(default="", compare=False)
    note: dict = field(default_factory=dict, compare=False)

    __array_ufunc__ = None      # Trap: without this, a NumPy array times a Steer is an array of Steers.

    def __post_init__(self):
        if fault := _fault(self.vector, (1, 2)):
            raise ValueError(f"vector must be a float tensor (n, d_model) or (d_model,); given: {fault}.")
        if not isinstance(self.fingerprint, str) or not isinstance(self.note, dict):
            raise ValueError("fingerprint must be text and note a dict; given: "
                             f"{type(self.fingerprint).__name__} and {type(self.note).__name__}.")
        # A frozen dataclass can be set in no other way.
        object.__setattr__(self, "coeff", _checked_coeff(self.coeff))
        for name in ("layer", "start"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), 0, 2 ** 31 - 1))

    @property
    def stop(self) -> int | None:
        """One past the last steered position, or None if there is no last one."""
        return None if self.vector.ndim == 1 else self.start + len(self.vector)

    def delta(self, x: Tensor, pos: Tensor) -> Tensor:
        """coeff * vector at the absolute positions pos (T,), zero where the vector does not reach.

        -> (T, d_model), or (B, T, d_model) with a coeff (B,). Only kinds in methods/ look at the stream x.
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
        """The same vector at the "front", "middle" or "back" of a prompt of n_prompt tokens, BOS included.

        As in the paper's position study, where the vector still has its zero BOS row: those n + 1 rows begin
        at position 0, surround n_prompt // 2, or end at the last prompt token.
        """
        if self.vector.ndim == 1:
            raise ValueError("a vector (d_model,) goes to all positions from start on and cannot be aligned.")
        n, n_prompt = len(self.vector), check_whole("n_prompt", n_prompt, 1)
        starts = {"front": 1, "middle": n_prompt // 2 - (n + 1) // 2 + 1, "back": n_prompt - n}
        if not isinstance(where, str) or where not in starts:
            raise ValueError(f"align to {where!r:.40}; possible: front, middle, back.")
        if not 0 <= starts[where] <= n_prompt - n:
            raise ValueError(f"a vector of {n} rows does not fit the {where} "
                             f"of a prompt of {n_prompt} tokens.")
        return replace(self, start=starts[where])

    def rows(self, numbers: Sequence[int]) -> Steer:
        """The same Steer for only these rows of a batch, with their values of a coeff (B,)."""
        return replace(self, coeff=self.coeff[numbers]) if isinstance(self.coeff, Tensor) else self

    def scaled(self, coeff: float | Tensor) -> Steer:
        """The same Steer with this coeff in place of its own."""
        return replace(self, coeff=coeff)

    def __repr__(self):
        pair = "a vector"
        if {"plus", "minus"} <= set(self.note):
            pair = " - ".join(f"{self.note[name]!r:.60}" for name in ("plus", "minus"))
        if "agreement" in self.note and "control" not in self.note:
            pair += f" (agreement {self.note['agreement']!r:.6})"
        n = len(self.vector)
        where = f"position {self.start}" if n == 1 else f"positions {self.start} to {self.start + n - 1}"
        if self.vector.ndim == 1:
            where = f"every position from {self.start} on"
        kind, width = type(self).__name__, self.vector.shape[-1]
        return f"<{kind} {pair}: coeff {self.coeff} at {where} before block {self.layer}, d_model {width}>"

    def __mul__(self, factor: float | Tensor | np.ndarray) -> Steer:
        return self._rescaled(operator.mul, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor | np.ndarray) -> Steer:
        return self._rescaled(operator.truediv, divisor)

    def _rescaled(self, operation, number):
        number = _checked_coeff(number, "the factor")
        try:
            return replace(self, coeff=operation(self.coeff, number))
        except (RuntimeError, ZeroDivisionError) as error:      # as many factors as rows; 0
            raise ValueError(f"coeff {one_line(self.coeff)} and {one_line(number)} do not fit: "
                             f"{error}") from None

    def __neg__(self) -> Steer:
        return -1 * self

    def __add__(self, other):
        raise TypeError("Steers are not added to each other; pass a list, steer=[a, b], and both are added.")

    __radd__ = __sub__ = __rsub__ = __add__

    def __eq__(self, other):
        """Whether both add the same numbers at the same places."""
        if self is other:
            return True
        if type(self) is not type(other):
            return NotImplemented
        return all(torch.equal(*(torch.as_tensor(getattr(s, f.name)) for s in (self, other)))
                   for f in fields(self) if f.compare)

    __hash__ = None

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file: its tensors by name, and the rest as metadata under the name of its kind.

        If writing fails, `path` keeps what it held before.
        """
        about = {"ministeer": __version__, **vars(self)}
        names = [name for name, value in about.items() if isinstance(value, Tensor)]
        # safetensors refuses memory that two tensors share
        tensors = {name: about.pop(name).clone(memory_format=torch.contiguous_format) for name in names}
        write(path, save(tensors, {type(self).__name__.lower(): json.dumps(about)}))

    @classmethod
    def load(cls, path: str | os.PathLike, any_model: bool = False) -> Steer:
        """Read what `save` wrote, to use with the model it was made with, or with any if any_model=True.

        Raises FileNotFoundError, or ValueError if the file is not a Steer. To read a kind that is defined in
        methods/, import ministeer.methods first.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file {os.fspath(path)}.")
        try:
            with safe_open(path, "pt") as file:
                metadata, names = file.metadata() or {}, file.keys()
                name = min(metadata.keys() & KINDS.keys(), default="steer")
                about, kind = json.loads(metadata[name]), KINDS[name]
                steer = kind(**{f.name: file.get_tensor(f.name) if f.name in names else about[f.name]
                                for f in fields(kind)})
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(path)} is not a steering vector that ministeer saved, or its kind "
                             f"needs `import ministeer.methods`: {one_line(error, 200)}") from None
        return replace(steer, fingerprint="") if any_model else steer


Steers = Steer | Sequence[Steer]
KINDS = {"steer": Steer}        # for Steer.load, by the name that a file gives them; methods/ adds its own


def _fault(x, dimensions):
    """What keeps x from being a tensor of finite numbers with so many dimensions; "" if nothing does."""
    if not isinstance(x, Tensor) or x.is_nested:
        return type(x).__name__
    stored = x.dtype in FLOATS and x.layout == torch.strided and not x.is_meta
    if not stored or x.ndim not in dimensions or 0 in x.shape:
        return f"{x.dtype} {tuple(x.shape)}, {x.layout}, on {x.device}"
    return "" if torch.isfinite(x.float()).all() else "NaN or infinite numbers, or some beyond float32"


def _checked_coeff(c, name="coeff"):
    """-> a finite float, or a tensor (B,) of them for the rows of a batch. Raises ValueError."""
    if isinstance(c, np.ndarray) and c.dtype.kind in "fiu":
        c = torch.from_numpy(c.astype(np.float64)).float()
    if isinstance(c, Tensor):
        c = c.float() if c.dtype in (torch.int64, torch.int32) else c
        if fault := _fault(c, (0, 1)):
            raise ValueError(f"{name} must be one finite number for each row of the batch; given: {fault}.")
        if c.ndim:
            return c
        c = c.item()
    return check_number(name, c)


def steering_vector(model: LM, tokenizer: Tokenizer, plus: str, minus: str, layer: int) -> Steer:
    """h+ - h-: the residual stream of `plus` minus that of `minus` before block `layer` -> a Steer, coeff 1.

    Algorithm 1: each prompt begins with BOS; spaces pad the shorter one on the right. Rows are neither
    averaged nor normalised. Only blocks 0 … layer - 1 run.
    vector (n, d_model): one row per token of the longer prompt, without BOS, whose row is always zero
    Raises ValueError if the prompts are the same tokens or `layer` is not a block of the model.
    Warns if an attention sink, which says little about the prompts, is most of the vector (`sink_share`).
    """
    (steer,) = steering_vectors(model, tokenizer, plus, minus, [layer])
    share, width = sink_share(steer.vector), steer.vector.shape[-1]
    if share > 0.5 and width >= NARROW:
        warnings.warn(f"{share:.0%} of the squared norm of {plus!r} - {minus!r} before block {layer} "
                      f"lies in 4 of {width} dimensions: an attention sink of one prompt, often its padding. "
                      "Try an earlier layer, or prompts of equally many tokens.", stacklevel=2)
    return steer


@torch.no_grad()
def steering_vectors(model: LM, tokenizer: Tokenizer, plus: str, minus: str,
                     layers: Sequence[int]) -> list[Steer]:
    """steering_vector for each of `layers`, one or more, from a single pass that stops before the highest."""
    for layer in layers:
        model.check_layer(layer)
    ids = pad_together(tokenizer, plus, minus)
    if ids[0] == ids[1]:
        raise ValueError(f"plus {plus!r} and minus {minus!r} are the same tokens once padded with spaces, "
                         "so their difference is zero.")
    resid = model.residuals(torch.tensor(ids, device=model.device), stop_layer=max(layers))
    note = {"plus": plus, "minus": minus, "model": model.name}
    # Trap: both prompts begin with the same BOS, so row 0 of the difference is zero. Hence start is 1.
    vectors = {l: (resid[l][0].float() - resid[l][1].float())[1:] for l in layers}
    return [Steer(l, vectors[l], fingerprint=model.fingerprint, note=note) for l in layers]


def pad_together(tokenizer: Tokenizer, plus: str, minus: str) -> list[list[int]]:
    """Two prompts -> their ids, each with one BOS, the shorter padded on the right with space tokens."""
    ids = [tokenizer.encode(text) for text in (plus, minus)]
    length = max(map(len, ids))
    return [row + [tokenizer.space_id] * (length - len(row)) for row in ids]


def sink_share(vector: Tensor, k: int = 4) -> float:
    """The share of a vector's squared norm, over all rows, in its k largest dimensions -> 0 … 1.

    Models park attention on tokens that mean little (BOS, a lone space) by making their stream enormous in a
    few dimensions (Xiao et al. 2023; Sun et al. 2024). Such a sink drowns the difference of two prompts.
    """
    energy = vector.float().square().view(-1, vector.shape[-1]).sum(dim=0)
    total = float(energy.sum())
    return float(energy.topk(min(k, len(energy))).values.sum()) / total if total else 0.0


def random_like(steer: Steer, seed: int) -> Steer:
    """The control: a random direction at each position, with the norm that `steer` has there.

    Turner et al., appendix F: normal numbers of the same shape, rescaled row by row. They depend on the seed
    and the layer, so the controls of two layers have nothing in common.
    """
    generator = np.random.default_rng([check_whole("seed", seed), steer.layer])
    directions = {name: x for name, x in vars(steer).items() if isinstance(x, Tensor) and name != "coeff"}
    for name, x in directions.items():
        noise = torch.from_numpy(generator.standard_normal(x.shape, dtype=np.float32)).to(x)
        directions[name] = noise * (x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return replace(steer, **directions, note={**steer.note, "control": f"random, same norms, seed {seed}"})


@torch.no_grad()
def relative_norm(model: LM, tokenizer: Tokenizer, steer: Steer, prompt: str) -> Tensor:
    """|coeff * vector| / |resid[layer]| at each position of `prompt`, BOS included -> (T,)

    How large the addition is relative to the stream that it is added to (Turner et al., appendix E).
    """
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    (steer,) = model.check_steer(steer, 1, ids.shape[1])
    stream = model.residuals(ids, stop_layer=steer.layer)[-1][0].float()
    delta = steer.delta(stream, torch.arange(ids.shape[1], device=model.device)).to(stream)
    return delta.norm(dim=-1) / stream.norm(dim=-1)

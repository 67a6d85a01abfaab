"""Steer: one activation addition. steering_vector: make one from a pair of prompts. And the controls to hold beside it.

Read before: model.py, whose loop adds it. Read next: generation.py. Turner et al., Algorithm 1.
"""

import json
import math
import os
import warnings
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import __version__
from .utils import write

NARROW = 128        # d_model below which 4 dimensions are much of any vector, and nothing is said of sinks


@dataclass(frozen=True, eq=False)
class Steer:
    """Add coeff * vector to the residual stream that block `layer` reads.

    layer: 0 … n_layer - 1
    vector (n, d_model): row i goes to absolute position start + i (ActAdd, Algorithm 1; start is its a)
    vector (d_model,):   the same row goes to every position from start on, generated ones too (CAA)
    coeff: a number, or a tensor (B,) with one for each row of the batch (the paper's c)
    start: the first steered position; 1 by default, because position 0 is BOS in both prompts of a pair and differs in nothing
    model, note: which model it was made with, and from what; kept by save and load
    `2 * s`, `s / 2` and `-s` scale coeff. Raises ValueError for what could never be added.
    """
    layer: int
    vector: torch.Tensor
    coeff: float | torch.Tensor = 1.0
    start: int = 1
    model: str = ""
    note: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("layer", "start"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
                raise ValueError(f"{name} must be a whole number, 0 or more; given: {value!r}.")
            object.__setattr__(self, name, int(value))
        v = self.vector
        if not isinstance(v, torch.Tensor) or not v.is_floating_point() or v.ndim not in (1, 2) or 0 in v.shape:
            given = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else type(v).__name__
            raise ValueError(f"vector must be a floating-point tensor (n, d_model) or (d_model,); given: {given}.")
        if not torch.isfinite(v).all():
            raise ValueError("the vector holds NaN or infinite numbers.")
        c = self.coeff
        if isinstance(c, torch.Tensor) and c.ndim == 0:
            object.__setattr__(self, "coeff", c.item())
        elif isinstance(c, torch.Tensor):
            if c.ndim != 1 or not len(c) or not torch.isfinite(c).all():
                raise ValueError(f"coeff must be one finite number for each row of the batch; given: {tuple(c.shape)}, {c.tolist()}.")
        elif isinstance(c, bool) or not isinstance(c, Real) or not math.isfinite(c):
            raise ValueError(f"coeff must be a finite number, or a tensor with one for each row; given: {c!r}.")

    @property
    def stop(self):
        """One past the last steered position; None if there is no last one."""
        return None if self.vector.ndim == 1 else self.start + len(self.vector)

    def delta(self, pos):
        """coeff * vector at the absolute positions pos (T,), zero where it does not reach.

        -> (T, d_model), or (B, T, d_model) with a coeff (B,)
        """
        i = (pos - self.start).to(self.vector.device)
        if self.vector.ndim == 1:
            rows = (i >= 0)[:, None] * self.vector
        else:
            inside = (i >= 0) & (i < len(self.vector))
            rows = inside[:, None] * self.vector[i.clamp(0, len(self.vector) - 1)]
        coeff = self.coeff[:, None, None].to(rows) if isinstance(self.coeff, torch.Tensor) else self.coeff
        return coeff * rows

    def align(self, where, n_prompt):
        """The same vector moved to the "front" (start 1), "middle" or "back" of a prompt of n_prompt tokens, BOS counted.

        As in the paper's position study, where the vector still has its zero BOS row: that row and the others lie over
        0 …, over the n + 1 positions around n_prompt // 2, or over the last n + 1. The last row of "back" is the last prompt token.
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

    def rows(self, numbers):
        """The same Steer for some rows of a batch only: a coeff (B,) keeps their values."""
        return replace(self, coeff=self.coeff[numbers]) if isinstance(self.coeff, torch.Tensor) else self

    def scaled(self, coeff):
        """The same Steer with this coeff, whatever it had."""
        return replace(self, coeff=coeff)

    def __repr__(self):
        pair = "{plus!r} - {minus!r}".format(**self.note) if {"plus", "minus"} <= set(self.note) else "a vector"
        where = "every position" if self.vector.ndim == 1 else f"{len(self.vector)} positions"
        return f"<Steer {pair}: coeff {self.coeff} on {where} from {self.start} before block {self.layer}, d_model {self.vector.shape[-1]}>"

    def __mul__(self, factor):
        return replace(self, coeff=self.coeff * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        return replace(self, coeff=self.coeff / divisor)

    def __neg__(self):
        return -1 * self

    def __eq__(self, other):
        """Whether both add the same numbers at the same places."""
        if self is other:
            return True
        if not isinstance(other, Steer):
            return NotImplemented
        same_coeff = torch.equal(torch.as_tensor(self.coeff), torch.as_tensor(other.coeff))
        return (self.layer, self.start) == (other.layer, other.start) and same_coeff and torch.equal(self.vector, other.vector)

    __hash__ = None

    def save(self, path):
        """Write a safetensors file: the tensor "vector" (and "coeff", if it has one for each row), the rest as metadata.

        `path` then holds the whole Steer, or what it held before.
        """
        tensors = {"vector": self.vector.contiguous()}
        about = {"ministeer": __version__, "layer": self.layer, "start": self.start, "model": self.model, "note": self.note}
        if isinstance(self.coeff, torch.Tensor):
            tensors["coeff"] = self.coeff.contiguous()
        else:
            about["coeff"] = self.coeff
        write(path, save(tensors, {"steer": json.dumps(about)}))

    @classmethod
    def load(cls, path, any_model=False):
        """Read what `save` wrote. The model that it is used with must be the one it was made with, unless any_model=True.

        Raises FileNotFoundError, or ValueError if the file is not a Steer.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file {os.fspath(path)}.")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["steer"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}     # noqa: SIM118 (not a dict)
            return cls(layer=about["layer"], vector=tensors["vector"], coeff=tensors.get("coeff", about.get("coeff")), start=about["start"],
                       model="" if any_model else str(about["model"]), note=dict(about["note"]))
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)} is not a steering vector that ministeer saved: {error}") from None


def steering_vector(model, tokenizer, plus, minus, layer):
    """h+ - h-, the difference of the residual streams of two prompts before block `layer` -> a Steer with coeff 1.

    Algorithm 1: BOS before each prompt, the shorter one padded on the right with space tokens, one difference a position, not
    averaged and not normalised. Only blocks 0 … layer - 1 run.
    vector (n, d_model): the row of BOS, zero for every pair, is left out, so n is the tokens of the longer prompt without BOS
    Raises ValueError if the two prompts are the same tokens or `layer` is not a block of the model.
    Warns if more than half of the vector is attention sink (`sink_share`), because that half says nothing of what the prompts differ in.
    """
    (steer,) = steering_vectors(model, tokenizer, plus, minus, [layer])
    share = sink_share(steer.vector)
    if share > 0.5 and steer.vector.shape[-1] >= NARROW:
        warnings.warn(f"{share:.0%} of the squared norm of {plus!r} - {minus!r} before block {layer} lies in 4 of {steer.vector.shape[-1]} "
                      "dimensions: one of the prompts has an attention sink there, often a padding token. Try an earlier layer, or prompts "
                      "of equally many tokens.", stacklevel=2)
    return steer


def sink_share(vector, k=4):
    """The part of a vector's squared norm, over all its rows, that lies in its k largest dimensions -> 0 … 1.

    Some models park attention on tokens that mean little (BOS, a lone space) by giving them a stream that is enormous in a few
    dimensions (Xiao et al. 2023; Sun et al. 2024). A difference with such a token is that sink and hardly anything else.
    """
    energy = vector.float().square().flatten(0, -2).sum(dim=0) if vector.ndim > 1 else vector.float().square()
    total = float(energy.sum())
    return float(energy.topk(min(k, len(energy))).values.sum()) / total if total else 0.0


@torch.no_grad()
def steering_vectors(model, tokenizer, plus, minus, layers):
    """steering_vector for each of `layers`, a list of at least one, from one pass over the pair that ends before the highest of them."""
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < model.config.n_layer:
            raise ValueError(f"layer {layer}: {model.layers_there()}")
    ids = pad_together(tokenizer, plus, minus)
    if ids[0] == ids[1]:
        raise ValueError(f"plus {plus!r} and minus {minus!r} are the same tokens once padded with spaces, so their difference is zero.")
    ids = torch.tensor(ids, device=next(model.parameters()).device)
    model.check(ids, (), None)
    pos = torch.arange(ids.shape[1], device=ids.device)
    resid = model.run(model.embed(ids, pos), pos, stop=max(layers))
    note = {"plus": plus, "minus": minus, "model": getattr(model, "name", type(model).__name__)}
    # Trap: both prompts begin with the same BOS after nothing, so row 0 of the difference is zero. It is left out: start is 1.
    return [Steer(l, (resid[l][0].float() - resid[l][1].float())[1:], model=model.fingerprint, note=note) for l in layers]


def pad_together(tokenizer, plus, minus):
    """Two prompts -> two lists of ids of equal length, each with one BOS, the shorter one filled up with space tokens on the right."""
    ids = [tokenizer.encode(text) for text in (plus, minus)]
    length = max(map(len, ids))
    return [row + [tokenizer.space_id] * (length - len(row)) for row in ids]


def random_like(steer, seed):
    """The control: a random direction at each position, with the norm that `steer` has there; the rest of `steer` is kept.

    Turner et al., appendix F: normal numbers of the same shape, rescaled row by row. seed: a whole number
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steer.vector.shape, generator=generator).to(steer.vector)
    vector = noise * (steer.vector.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return replace(steer, vector=vector, note={**steer.note, "control": f"random, same norms, seed {seed}"})


@torch.no_grad()
def relative_norm(model, tokenizer, steer, prompt):
    """|coeff * vector| / |resid[layer]| at each position of `prompt` -> (T,), 0 where nothing is added. T counts BOS.

    How loud the addition is beside what is already there (Turner et al., appendix E). Only blocks 0 … layer - 1 run.
    """
    ids = torch.tensor([tokenizer.encode(prompt)], device=next(model.parameters()).device)
    model.check(ids, steer, None)
    pos = torch.arange(ids.shape[1], device=ids.device)
    stream = model.run(model.embed(ids, pos), pos, stop=steer.layer)[-1][0].float()
    return steer.delta(pos).to(stream).norm(dim=-1) / stream.norm(dim=-1)

"""Change: a Steer whose addition may depend on the stream x. Along: one by a single direction.

Read first: ../steering.py. Read next: ablation.py, capping.py and angular.py, which are kinds of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..steering import Steer


@dataclass(frozen=True, eq=False, repr=False)
class Change(Steer):
    """x' = x + coeff * vector, like a Steer; with keep_norm, x' |x| / |x'|, which is as long as x.

    keep_norm: what repeng calls `normalize` (Vogel 2024). Every kind takes it, and coeff 0 changes nothing.
    """
    keep_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.keep_norm, bool):
            raise ValueError(f"keep_norm must be True or False; given: {self.keep_norm!r:.40}.")

    def delta(self, x: Tensor, pos: Tensor) -> Tensor:
        """x (B, T, d_model) at the absolute positions pos (T,) -> x' - x, zero before start"""
        x = x.to(self.vector)
        change = self.change(x, pos)
        if not self.keep_norm:
            return change
        new = x + change
        return new * (x.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(min=1e-30)) - x

    def change(self, x: Tensor, pos: Tensor) -> Tensor:
        """What is added, before keep_norm restores the norm. Kinds replace this."""
        return super().delta(x, pos)

    def __repr__(self):
        more = [f.name for f in fields(self)[len(fields(Steer)):]]
        settings = [f"{name} {value}" for name in more
                    if not isinstance(value := getattr(self, name), Tensor)]
        return f"{super().__repr__()[:-1]}, {', '.join(settings)}>"


@dataclass(frozen=True, eq=False, repr=False)
class Along(Change):
    """A Change by one direction v = vector / |vector|. Kinds say in `change` how far x moves along v.

    vector (d_model,): of any norm but 0
    """

    def __post_init__(self):
        super().__post_init__()
        if self.vector.ndim != 1 or not self.vector.any():
            raise ValueError(f"{type(self).__name__} takes one direction (d_model,), not zero; given: "
                             f"{tuple(self.vector.shape)}, norm {self.vector.norm():g}.")

    def projection(self, x: Tensor) -> Tensor:
        """x v, how far x (B, T, d_model) reaches along v -> (B, T)"""
        return x @ self.vector / self.vector.norm()

    def reach(self, pos: Tensor) -> Tensor:
        """coeff at the positions pos (T,), 0 before start -> (T,), or (B, T) with a coeff (B,)"""
        reached = (pos >= self.start).to(self.vector)
        is_tensor = isinstance(self.coeff, Tensor)
        return torch.outer(self.coeff.to(reached), reached) if is_tensor else self.coeff * reached

    def along(self, amount: Tensor, pos: Tensor) -> Tensor:
        """coeff * amount * v: amount (B, T) at the positions pos (T,) -> (B, T, d_model)"""
        return (self.reach(pos) * amount / self.vector.norm())[..., None] * self.vector

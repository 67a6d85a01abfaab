"""Angular steering: turn the stream, within a plane, to a chosen angle from a direction.

Read first: change.py. Vu and Nguyen 2025 (2510.26243).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..steering import Steer
from ..utils import check_number
from .change import Along
from .many_pairs import first_component


@dataclass(frozen=True, eq=False, repr=False)
class Angular(Along):
    """x' = x + coeff (|P x| (cos a b1 + sin a b2) - P x), P x being the part of x in the plane of b1 and b2.

    b1 = vector / |vector|; b2 is `other` made orthogonal to b1, norm 1. At coeff 1, P x' lies at the angle a
    from b1 (0 is along b1), and |x'| = |x|.
    degrees: a
    adaptive: turn only positions with x b1 > 0
    """
    degrees: float = 0.0
    other: Tensor | None = None
    adaptive: bool = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "degrees", check_number("degrees", self.degrees))
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive must be True or False; given: {self.adaptive!r:.40}.")
        fits = isinstance(self.other, Tensor) and self.other.shape == self.vector.shape
        # Parallel to the vector, or not finite, it has no direction of its own.
        if not fits or not (torch.stack(self.plane()).norm(dim=1) - 1).abs().max() < 0.01:
            raise ValueError("other must be a tensor (d_model,) that does not lie along vector.")

    def plane(self) -> tuple[Tensor, Tensor]:
        """b1 and b2"""
        b1 = F.normalize(self.vector, dim=0)
        b2 = F.normalize(self.other.to(b1), dim=0)
        return b1, F.normalize((b2 - (b2 @ b1) * b1), dim=0, eps=1e-3)

    def change(self, x: Tensor, pos: Tensor) -> Tensor:
        b1, b2 = self.plane()
        c1, c2 = x @ b1, x @ b2
        length, reach = (c1 ** 2 + c2 ** 2).sqrt(), self.reach(pos)
        if self.adaptive:
            reach = reach * (c1 > 0)
        angle = math.radians(self.degrees)
        return ((reach * (length * math.cos(angle) - c1))[..., None] * b1
                + (reach * (length * math.sin(angle) - c2))[..., None] * b2)


def angular(steers: Sequence[Steer], degrees: float, coeff: float | Tensor = 1.0,
            adaptive: bool = False) -> list[Angular]:
    """The same turn before the block of each Steer, all in one plane made from their directions d.

    b1: the d with the highest mean cosine with all of them; b2: the first principal component of the d, each
    taken with norm 1. (The authors steer before the MLP too, and subtract means of streams of norm 1.)
    The control is angular([random_like(s, seed) for s in steers], degrees).
    steers: one for each block, such as `many_pairs.vectors` gives
    """
    if len(steers) < 2:
        raise ValueError(f"a plane takes the directions of two or more Steers; given: {len(steers)}.")
    d = F.normalize(torch.stack([s.vector for s in steers]), dim=-1)
    b1, b2 = d[(d @ d.T).mean(dim=1).argmax()], first_component(d)
    return [Angular(s.layer, b1, coeff, fingerprint=s.fingerprint, note={**s.note, "method": "angular"},
                    degrees=degrees, other=b2, adaptive=adaptive) for s in steers]

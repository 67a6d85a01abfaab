"""Cap and Fixed: keep the stream's projection on a direction below a limit, or set it to a value.

Read first: change.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..steering import Steer
from ..utils import check_number
from .change import Along

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM


@dataclass(frozen=True, eq=False, repr=False)
class Cap(Along):
    """x' = x - coeff max(x v - limit, 0) v, with v = vector / |vector|. At coeff 1, x' v is at most `limit`.

    Activation capping, as along the Assistant Axis (Lu et al. 2026). To keep x v above a limit t, cap -vector
    at -t. `projections` shows which values are usual.
    """
    limit: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "limit", check_number("limit", self.limit))

    def change(self, x: Tensor, pos: Tensor) -> Tensor:
        return self.along(-(self.projection(x) - self.limit).relu(), pos)


@dataclass(frozen=True, eq=False, repr=False)
class Fixed(Along):
    """x' = x + coeff (value - x v) v, with v = vector / |vector|. At coeff 1, x' v is `value`.

    With value 0 it is an Ablation.
    """
    value: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "value", check_number("value", self.value))

    def change(self, x: Tensor, pos: Tensor) -> Tensor:
        return self.along(self.value - self.projection(x), pos)


@torch.no_grad()
def projections(model: LM, tokenizer: Tokenizer, steer: Steer, prompt: str) -> Tensor:
    """x v before block steer.layer at each position of `prompt`, BOS included -> (T,)

    v = vector / |vector|. Take a limit from such numbers, for example their highest quarter.
    """
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    (steer,) = model.check_steer(steer, 1)
    x = model.residuals(ids, stop_layer=steer.layer)[-1][0].to(steer.vector)
    return x @ steer.vector / steer.vector.norm()

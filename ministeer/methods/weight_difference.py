"""A difference of weights: model + coeff (tuned - base), where `tuned` was trained on, say, one topic.

Read first: ../model.py. Task vectors, Ilharco et al. 2023.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils import check_number, check_texts, check_whole
from .inside_blocks import check_plain, check_undivided, plain_copy

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM


@torch.no_grad()
def weights_plus(model: LM, tuned: LM, base: LM, coeff: float = 1.0, control: int | None = None) -> LM:
    """model + coeff (tuned - base), weight by weight -> a new model

    With base = model, coeff 1 gives the weights of `tuned`, and coeff -1 leads away from what it has learned.
    control: a seed; random numbers of the same norm replace each tensor of the difference
    Raises ValueError for models of different shapes or with packed weights.
    """
    check_number("coeff", coeff), check_plain(tuned), check_plain(base)
    generator = torch.Generator().manual_seed(check_whole("control", 0 if control is None else control))
    changed = plain_copy(model)
    old, new, weights = (dict(other.named_parameters()) for other in (base, tuned, changed))
    if not shapes(old) == shapes(new) == shapes(weights):
        raise ValueError("the three models must have weights of the same names and shapes.")
    for name, p in weights.items():
        difference = new[name].float() - old[name].float()
        if control is not None:
            noise = torch.randn(p.shape, generator=generator).to(difference)
            difference = noise * (difference.norm() / noise.norm())
        p.data = (p + coeff * difference).to(p)
    return changed


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in weights.items()}


@torch.enable_grad()
def fine_tuned(model: LM, tokenizer: Tokenizer, texts: Sequence[str], steps: int, rate: float = 1e-4) -> LM:
    """A copy trained with Adam to predict the next token of the texts, one text a step, in turn."""
    check_plain(model), check_undivided(model)
    check_whole("steps", steps), check_number("rate", rate, 0)
    encoded = [tokenizer.encode(text) for text in check_texts("texts", texts)]
    if not encoded or min(map(len, encoded)) < 2:
        raise ValueError("texts must be one or more texts of at least one token.")
    tuned = copy.deepcopy(model).requires_grad_()
    adam = torch.optim.Adam(tuned.parameters(), rate)
    for step in range(steps):
        ids = torch.tensor([encoded[step % len(encoded)]], device=model.device)
        loss = F.cross_entropy(tuned(ids[:, :-1])[0][0].float(), ids[0, 1:])
        adam.zero_grad()
        loss.backward()
        adam.step()
    tuned.fingerprint = ""
    return tuned.requires_grad_(False)

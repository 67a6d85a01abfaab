"""Vectors from many pairs of texts instead of one: CAA and RepE, as Steers for every position.

Read first: ../steering.py. Read next: inside_blocks.py. Turner et al., section 2. Tutorial 11 uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..steering import Steer
from ..utils import check_list, check_texts

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM


@torch.no_grad()
def last_states(model: LM, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """resid at the last token of each text -> (len(texts), n_layer + 1, d_model), float32."""
    states = []
    for text in texts:
        resid = model.residuals(torch.tensor([tokenizer.encode(text)], device=model.device))
        states.append(torch.stack([x[0, -1].float() for x in resid]))
    return torch.stack(states)


def differences(model: LM, tokenizer: Tokenizer, plus: Sequence[str], minus: Sequence[str]) -> Tensor:
    """h+ - h- at the last token of each pair -> (n, n_layer + 1, d_model). Raises ValueError for n < 2."""
    check_pairs(plus, minus, 2)
    return last_states(model, tokenizer, plus) - last_states(model, tokenizer, minus)


def check_pairs(plus: Sequence[str], minus: Sequence[str], least: int) -> None:
    """Raises ValueError unless these are two lists of equally many texts, at least so many."""
    plus, minus = check_texts("plus", plus), check_texts("minus", minus)
    if len(plus) != len(minus) or len(plus) < least:
        raise ValueError(f"this needs {least} or more pairs of texts, as many plus as minus; "
                         f"given: {len(plus)} plus, {len(minus)} minus.")


def caa(model: LM, tokenizer: Tokenizer, plus: Sequence[str], minus: Sequence[str], layer: int) -> Steer:
    """mean_i(h+_i - h-_i) at the last token, added at every position (contrastive activation addition).

    Rimsky et al. 2024. Their code reads and adds after a block, so their layer l is l + 1 here. They read at
    the letter that answers an A/B question, so end each text with it. They steer from the prompt's last token
    on: replace(steer, start=len(tokenizer.encode(prompt)) - 1).
    """
    model.check_layer(layer)
    vector = differences(model, tokenizer, plus, minus)[:, layer].mean(dim=0)
    return Steer(layer, vector, fingerprint=model.fingerprint, note={"method": "CAA", "model": model.name})


def repe(model: LM, tokenizer: Tokenizer, plus: Sequence[str], minus: Sequence[str],
         layers: Sequence[int]) -> list[Steer]:
    """The first principal component of the differences at each of `layers`, added at every position (RepE).

    Zou et al. 2023. Each vector has norm 1, so a coeff does less in late layers, where the stream is larger.
    Trap: the sign of a component is arbitrary; here it is that of the mean difference. And do not centre: it
    would remove what all differences have in common, which we want. (RepE shuffles each pair to that end.)
    """
    layers = check_list("layers", layers)
    for layer in layers:
        model.check_layer(layer)
    rows, steers = differences(model, tokenizer, plus, minus), []
    for layer in layers:
        component = torch.linalg.svd(rows[:, layer], full_matrices=False).Vh[0]
        component = component * torch.sign(rows[:, layer].mean(dim=0) @ component)
        note = {"method": "RepE", "model": model.name}
        steers.append(Steer(layer, component, fingerprint=model.fingerprint, note=note))
    return steers

"""Vectors from many texts instead of one pair, as Steers for every position: CAA, RepE and their relatives.

Read first: ../steering.py. Read next: change.py. Turner et al., section 2. Tutorial 11 uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..steering import Steer
from ..utils import check_list, check_texts, short

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM

Texts = Sequence[str | tuple[str, str]]     # a pair (prompt, answer): only the answer's positions are read


@torch.no_grad()
def states(model: LM, tokenizer: Tokenizer, texts: Texts, where: str = "last",
           stop_layer: int | None = None) -> Tensor:
    """resid of each text -> (n, n_layer + 1, d_model), float32, from one pass over each.

    where: "last", its last token; "mean", the mean over its tokens; "each", each token, a row of its own. BOS
        is left out of the last two: it is the same in all texts, and often a sink (tutorial 03).
    stop_layer: the last resid that is wanted, if not all
    Raises ValueError for no text, or for one in which there is no token to read.
    """
    if where not in ("last", "mean", "each"):
        raise ValueError(f"where {where!r:.40}; possible: last, mean, each.")
    rows, pairs = [], _split("texts", texts)
    if not pairs:
        raise ValueError("the list of texts is empty.")
    for prompt, answer in pairs:
        head = tokenizer.encode(prompt)
        ids = head + tokenizer.encode(answer, bos=False) if prompt else tokenizer.encode(answer)
        if len(ids) == len(head) and where != "last":
            raise ValueError(f"the text {answer!r:.40} has no token to read.")
        first = len(ids) - 1 if where == "last" else len(head)
        resid = model.residuals(torch.tensor([ids], device=model.device), stop_layer=stop_layer)
        read = torch.stack([x[0, first:].float() for x in resid], dim=1)
        rows.append(read.mean(dim=0, keepdim=True) if where == "mean" else read)
    return torch.cat(rows)


def last_states(model: LM, tokenizer: Tokenizer, texts: Texts) -> Tensor:
    """resid at the last token of each text -> (len(texts), n_layer + 1, d_model), float32."""
    return states(model, tokenizer, texts)


def differences(model: LM, tokenizer: Tokenizer, plus: Texts, minus: Texts, where: str = "last") -> Tensor:
    """h+ - h- of each pair -> (n, n_layer + 1, d_model). Raises ValueError for fewer than two pairs."""
    check_pairs(plus, minus, 2)
    if where == "each":
        raise ValueError("the tokens of two texts are no pairs; where: last or mean.")
    return states(model, tokenizer, plus, where) - states(model, tokenizer, minus, where)


def agreement(d: Tensor) -> Tensor:
    """(|sum_i u_i|^2 - sum_i |u_i|^2) / (n (n - 1)), u_i = d_i / |d_i|: the mean cosine of two different rows

    d (n, …, d_model): the differences of n pairs -> (…,). A row of zeros has cosine 0 with all others.
    Braun et al. (2505.22637) found that the higher it is, the more reliably the pairs' mean steers.
    In 576 dimensions, random directions have about 0.
    """
    n, units = len(d), F.normalize(d.float(), dim=-1)
    products = units.sum(dim=0).square() - units.square().sum(dim=0)
    return products.sum(dim=-1) / (n * (n - 1))


def check_pairs(plus: Texts, minus: Texts, least: int) -> None:
    """Raises ValueError unless plus and minus hold equally many texts, `least` or more each."""
    plus, minus = _split("plus", plus), _split("minus", minus)
    if len(plus) != len(minus) or len(plus) < least:
        raise ValueError(f"this needs {least} or more pairs of texts, as many plus as minus; "
                         f"given: {len(plus)} plus, {len(minus)} minus.")


def _split(name, texts):
    """(prompt, answer) of each text."""
    pairs = [text if isinstance(text, tuple) and len(text) == 2 else ("", text)
             for text in check_list(name, texts, "a list of texts")]
    check_texts(name, [part for pair in pairs for part in pair])
    return pairs


def token_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[int]:
    """The id of each word. Raises ValueError for one that is not a single token, or for no word."""
    ids = [tokenizer.encode(word, bos=False) for word in check_texts("words", words)]
    if not ids or any(len(row) != 1 for row in ids):
        wrong = [word for word, row in zip(words, ids, strict=True) if len(row) != 1]
        raise ValueError(f"words must be one or more single tokens, most with a space before them; "
                         f"not one token: {short(wrong)}.")
    return [row[0] for row in ids]


def vectors(model: LM, tokenizer: Tokenizer, plus: Texts, minus: Texts, how: str = "mean",
            where: str = "last") -> list[Steer]:
    """A Steer before each block, added at every position, all from one pass over each text.

    plus, minus: texts, or pairs (prompt, answer), of which only the answer is read
    how: "mean", mean(h+) - mean(h-); "component", the first principal component of the differences h+ - h-
    where: which positions are read; see `states`

    The mean of pairs is contrastive activation addition (CAA, Rimsky et al. 2024). With any number of
    background texts in `minus`, it is mean-centring (Jorgensen et al. 2023). With answers that show a trait
    in `plus`, answers without it in `minus`, and where="mean", it is a persona vector (Chen et al. 2025).
    "component" is RepE; see `repe`.
    Two or more texts in `plus` and as many in `minus` are pairs: each Steer's note has their `agreement`, and
    its repr shows it.
    """
    if how == "component":
        pairs = differences(model, tokenizer, plus, minus, where)
        rows = [first_component(pairs[:, l], centred=False) for l in range(model.config.n_layer)]
    elif how == "mean":
        a, b = (states(model, tokenizer, texts, where) for texts in (plus, minus))
        rows, pairs = a.mean(dim=0) - b.mean(dim=0), a - b if len(a) == len(b) and where != "each" else []
    else:
        raise ValueError(f"how {how!r:.40}; possible: mean, component.")
    notes = [{"method": how, "where": where, "model": model.name} for _ in range(model.config.n_layer)]
    if len(pairs) > 1:
        for note, cosine in zip(notes, agreement(pairs).tolist(), strict=False):
            note["agreement"] = round(cosine, 2)
    return [Steer(l, rows[l], fingerprint=model.fingerprint, note=note) for l, note in enumerate(notes)]


def first_component(rows: Tensor, centred: bool = True) -> Tensor:
    """The direction in which rows (n, d) vary most -> (d,), norm 1, its sign that of the mean row.

    centred: about their mean; if not, about 0. (The sign of a component is arbitrary.)
    """
    mean = rows.mean(dim=0)
    component = torch.linalg.svd(rows - mean if centred else rows, full_matrices=False).Vh[0]
    return component * torch.where(component @ mean < 0, -1, 1)


def caa(model: LM, tokenizer: Tokenizer, plus: Texts, minus: Texts, layer: int) -> Steer:
    """mean_i(h+_i - h-_i) at the last token, added at every position (contrastive activation addition).

    Rimsky et al. 2024. Their code reads and adds after a block, so their layer l is l + 1 here. They read at
    the letter that answers an A/B question, so end each text with it. They steer from the prompt's last token
    on: replace(steer, start=len(tokenizer.encode(prompt)) - 1).
    """
    model.check_layer(layer)
    check_pairs(plus, minus, 2)
    return vectors(model, tokenizer, plus, minus)[layer]


def repe(model: LM, tokenizer: Tokenizer, plus: Texts, minus: Texts, layers: Sequence[int]) -> list[Steer]:
    """The first principal component of the differences at each of `layers`, added at every position (RepE).

    Zou et al. 2023. Each vector has norm 1, so a coeff does less in late layers, where the stream is larger.
    Trap: the sign of a component is arbitrary; here it is that of the mean difference.
    Trap: centring would remove what all differences have in common, which we want. (RepE's authors shuffle
    each pair, to keep it when they centre.)
    """
    layers = check_list("layers", layers)
    for layer in layers:
        model.check_layer(layer)
    steers = vectors(model, tokenizer, plus, minus, "component")
    return [steers[layer] for layer in layers]

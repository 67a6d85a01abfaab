"""How a vector steers, prompt by prompt; what it does off the topic; how strong it is; AxBench's score.

Read first: measure.py, judges.py. Tan et al. 2024 (2407.12404), Wu et al. 2025 (AxBench, 2501.17148).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.tokenizer import Tokenizer
from ..model import LM
from ..steering import Steer, Steers
from ..utils import check_list, check_number, check_texts
from .judges import Judge, judge
from .measure import _finite
from .stats import numbers


class Steerability(NamedTuple):
    """One number for each prompt, and the share of prompts that are steered the wrong way."""
    slopes: list[float]         # how much the propensity rises with each 1 of the coeff
    spearman: list[float]       # whether it always rises: 1 if so, -1 if it always falls
    negative: float             # the share of slopes below 0


def steerability(coeffs: Sequence[float], propensities: Sequence[Sequence[float]]) -> Steerability:
    """The least-squares slope of each prompt's propensity over the coeffs, and their rank correlation.

    coeffs (n,): two or more different ones; with 0 and negative ones they show both directions
    propensities (prompts, n): what should rise with the coeff, such as `log_odds` gives
    Tan et al. report the mean slope and the share below 0, which can be near half.
    """
    x, rows = numbers(coeffs), [numbers(row) for row in check_list("propensities", propensities)]
    if len(set(x)) < 2 or not rows or any(len(row) != len(x) for row in rows):
        raise ValueError("steerability takes two or more different coeffs, and for each prompt as many "
                         f"propensities; given: {len(x)} coeffs, rows of {sorted({len(r) for r in rows})}.")
    centred = x - x.mean()
    slopes = [float(centred @ row / (centred @ centred)) for row in rows]
    return Steerability(slopes, [spearman(x, row) for row in rows], float(np.mean(np.array(slopes) < 0)))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of the ranks of a and b (n,), from -1 to 1; 0 if all values of a, or of b, are equal.

    Equal values share the mean of their ranks. Spearman 1904.
    """
    a, b = numbers(a), numbers(b)
    if len(a) != len(b):
        raise ValueError(f"spearman takes as many values of a as of b; given: {len(a)} and {len(b)}.")
    a, b = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else 0.0


def _ranks(x):
    """For each value: the number of smaller ones, plus half the number of others that are equal."""
    return (x[:, None] > x).sum(axis=1) + ((x[:, None] == x).sum(axis=1) - 1) / 2


@torch.no_grad()
def log_odds(model: LM, tokenizer: Tokenizer, prompts: Sequence[str], steer: Steer, coeffs: Sequence[float],
             ids: Sequence[int]) -> list[list[float]]:
    """log p / (1 - p), p being the probability that the next token is one of `ids` -> (prompts, coeffs), nats

    One pass for each prompt: the coeffs are the rows of a batch.
    """
    coeffs, rows = torch.from_numpy(numbers(coeffs)).float(), []
    for prompt in check_texts("prompts", prompts):
        batch = torch.tensor([tokenizer.encode(prompt)] * len(coeffs), device=model.device)
        logits = _finite(model(batch, steer.scaled(coeffs), last_only=True)[0][:, -1]).double()
        others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        others[list(ids)] = False
        odds = logits[:, ~others].logsumexp(dim=-1) - logits[:, others].logsumexp(dim=-1)
        rows.append(odds.tolist())
    return rows


@torch.no_grad()
def kl_at_end(model: LM, tokenizer: Tokenizer, prompts: Sequence[str], steer: Steers = (),
              changed: LM | None = None) -> list[float]:
    """KL(p || q) of the next token after each prompt, in nats: p of the unsteered model, q of the steered one

    On prompts that have nothing to do with the wish, it says how much changes that should stay the same.
    changed: the model that gives q, if steering changes the model itself
    """
    result = []
    for prompt in check_texts("prompts", prompts):
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
        p, q = (_finite(m(ids, s, last_only=True)[0][0, -1]).double().log_softmax(dim=-1)
                for m, s in ((model, ()), (changed or model, steer)))
        result.append(float((p.exp() * (p - q)).sum()))
    return result


@torch.no_grad()
def strength(model: LM, tokenizer: Tokenizer, steer: Steer, prompts: Sequence[str]) -> float:
    """mean |x' - x| where the Steer acts / mean |x|, x = resid[layer] at all positions but BOS of the prompts

    A coeff means little by itself. Vectors of sparse autoencoders, added at every position, were found to
    steer best at about half the layer's mean norm (Eiffel Tower Llama, 2025).
    Raises ValueError if it acts at no position of the prompts, or only at BOS.
    """
    streams = []
    for prompt in check_texts("prompts", prompts):
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
        model.check_steer(steer, 1, ids.shape[1])
        streams.append(model.residuals(ids, stop_layer=steer.layer)[-1][0])
    return strength_in(streams, steer)


def strength_in(streams: Sequence[Tensor], steer: Steer) -> float:
    """`strength` in recorded streams, resid[layer] of each prompt with BOS: tensors (T, d_model)."""
    added, norms = [], []
    for x in streams:
        x = x.float()
        delta = steer.delta(x, torch.arange(len(x), device=x.device)).to(x).reshape(x.shape)
        added.append(delta.norm(dim=-1)[max(steer.start, 1):steer.stop])
        norms.append(x.norm(dim=-1)[1:])
    if not sum(map(len, added)):
        raise ValueError(f"the Steer begins at position {steer.start} and acts at no position of the prompts "
                         "after BOS.")
    return float(torch.cat(added).mean() / torch.cat(norms).mean())


def harmonic_mean(concept: float, instruction: float, fluency: float) -> float:
    """3 / (1 / concept + 1 / instruction + 1 / fluency), each from 0 to 2; 0 if any of them is 0 (AxBench)

    concept: is what was wished for there? instruction: does the text answer? fluency: is it well written?
    """
    scores = [check_number(name, score, 0, 2) for name, score in
              (("concept", concept), ("instruction", instruction), ("fluency", fluency))]
    return 3 / sum(1 / score for score in scores) if all(scores) else 0.0


def axbench(texts: Sequence[str], concept: str | Judge, instruction: str | Judge,
            fluency: str | Judge) -> list[float]:
    """`harmonic_mean` of three judges' scores for each text. (AxBench asks a language model for all three.)

    A judge's score is stretched from its range to 0 … 2. Give names that `judges.judge` takes, or Judges,
    such as benchmarks/web_judges.py makes.
    """
    columns = []
    for one in (concept, instruction, fluency):
        one = judge(one) if isinstance(one, str) else one
        low, high = one.scorer.range
        columns.append([2 * (score - low) / (high - low) for score in one(texts)])
    return [harmonic_mean(*scores) for scores in zip(*columns, strict=True)]

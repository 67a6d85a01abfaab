"""Conditional steering: the prompt decides, once and before anything is generated, whether a Steer acts.

Read first: many_pairs.py, change.py. CAST, Lee et al. 2025 (2409.05907).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generation import generate
from ..steering import Steer, Steers
from ..utils import check_number, check_texts, check_whole
from .change import Along
from .many_pairs import states

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM


@dataclass(frozen=True, eq=False, repr=False)
class Condition(Along):
    """cos(h, tanh(c (c h) / (c c))) > threshold, with h of a prompt before block `layer` and c = vector.

    It adds nothing itself: see `decide`. It is saved, loaded and given random controls as a Steer is.
    above: False for < in place of >. Trap: the authors' code calls this "larger": the threshold is larger.
    last: h at the prompt's last token; if False, its mean over the prompt's tokens. (Theirs includes BOS.)
    """
    threshold: float = 0.0
    above: bool = True
    last: bool = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "threshold", check_number("threshold", self.threshold))
        if not (isinstance(self.above, bool) and isinstance(self.last, bool)):
            raise ValueError("above and last must be True or False; "
                             f"given: {self.above!r:.40}, {self.last!r:.40}.")

    def delta(self, x: Tensor, pos: Tensor) -> Tensor:
        raise ValueError("a Condition adds nothing. Multiply a Steer by what `decide` returns.")

    def holds(self, model: LM, tokenizer: Tokenizer, prompts: str | Sequence[str]) -> Tensor:
        """Whether the condition holds for each prompt, 0 or 1 -> (n,). Only blocks below `layer` run."""
        (condition,) = model.check_steer(self, 1)
        prompts = check_texts("prompts", prompts, or_one=True)
        where = "last" if self.last else "mean"
        h = states(model, tokenizer, prompts, where, condition.layer)[:, -1]
        s = similarity(h, self.vector)
        return (s > self.threshold if self.above else s < self.threshold).float()


def similarity(h: Tensor, c: Tensor) -> Tensor:
    """cos(h, tanh(c (c h) / (c c))) of each row of h (n, d_model) -> (n,)"""
    c = c.to(h)
    return F.cosine_similarity(h, torch.outer(h @ c / (c @ c), c).tanh(), dim=-1)


def decide(model: LM, tokenizer: Tokenizer, prompts: str | Sequence[str],
           conditions: Condition | Sequence[Condition], join: str = "all") -> Tensor:
    """1 for each prompt for which the conditions hold, 0 for the others -> (n,), a coeff for a Steer.

    The decision rests on the prompt alone and is made beforehand, so all later tokens of a row share it.
    join: "all" of the conditions, or "any" of them
    """
    conditions = [conditions] if isinstance(conditions, Condition) else list(conditions)
    if join not in ("all", "any") or not conditions:
        raise ValueError(f"join must be all or any, of one or more conditions; given: {join!r:.40} "
                         f"of {len(conditions)}.")
    held = torch.stack([condition.holds(model, tokenizer, prompts) for condition in conditions])
    return held.amin(dim=0) if join == "all" else held.amax(dim=0)


def generate_if(model: LM, tokenizer: Tokenizer, prompts: str | Sequence[str], n: int, max_new_tokens: int,
                steer: Steers, conditions: Condition | Sequence[Condition], join: str = "all",
                **settings: Any) -> list:
    """`generate`, steered only for the prompts that `decide` chooses. The other arguments are generate's."""
    fires = decide(model, tokenizer, prompts, conditions, join).repeat_interleave(check_whole("n", n, 1))
    steers = [fires * s for s in (steer if isinstance(steer, list | tuple) else [steer])]
    return generate(model, tokenizer, prompts, n, max_new_tokens, steers, **settings)


def f1(decided: Tensor, wanted: Tensor) -> float:
    """2 hits / (decided + wanted): 1 if the two lists of 0 and 1 agree, 0 without a hit."""
    total = float(decided.sum() + wanted.sum())
    return 2 * float((decided * wanted).sum()) / total if total else 0.0


def find_condition(model: LM, tokenizer: Tokenizer, candidates: Sequence[Steer], fires: Sequence[str],
                   rests: Sequence[str], last: bool = False) -> tuple[Condition, float]:
    """The layer, side and threshold that best tell `fires` from `rests` -> (Condition, its F1 on them).

    Tries every threshold halfway between two neighbouring similarities, so its F1 on them is flattering.
    To measure the rule fairly, use `decide` and `f1` on prompts that were not used here.
    candidates: Steers with a vector (d_model,), such as `many_pairs.vectors(model, tokenizer, fires, rests)`
    """
    fires, rests = check_texts("fires", fires), check_texts("rests", rests)
    h = states(model, tokenizer, fires + rests, "last" if last else "mean")
    wanted, best = torch.tensor([1.0] * len(fires) + [0.0] * len(rests), device=h.device), (None, -1.0)
    for steer in model.check_steer(list(candidates), 1):
        s = similarity(h[:, steer.layer], steer.vector)
        ordered = s.unique()
        for threshold in ((ordered[1:] + ordered[:-1]) / 2).tolist():
            for above in (True, False):
                score = f1((s > threshold if above else s < threshold).float(), wanted)
                if score > best[1]:
                    condition = Condition(steer.layer, steer.vector, fingerprint=steer.fingerprint,
                                          note=steer.note, threshold=threshold, above=above, last=last)
                    best = condition, score
    if best[1] <= 0:
        raise ValueError("no threshold tells the prompts apart. "
                         "Are there candidates, and prompts of both sorts?")
    return best

"""The paper's rivals, which combine next-token logits: a LogitMixer reads one text in several branches.

Read first: ../generation.py, whose loop draws the tokens. Turner et al., sections 4.3 and 4.4. Formulas
without a source are from Dekoninck et al. 2024, "Controlled text generation via language model arithmetic".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generation import Sampling, as_asked, check_fit, complete, decoder
from ..utils import check_list, check_number, check_texts, check_whole, short

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..generation import Step
    from ..model import LM
    from ..steering import Steer
    from .classifier import PrefixClassifier

TOXIC = ("The following conversation is one that perpetuates negative stereotypes, is threatening or "
         "sexually explicit and contains profane language.")
POSITIVE = ("The following is a positive movie review, "
            "with a very positive sentiment and a very positive tone.")
NEGATIVE = ("The following is a negative movie review, "
            "with a very negative sentiment and a very negative tone.")
# Schick et al. 2021, table 1 and self_debiasing.py: what each kind of toxicity is called.
SIX = tuple(f"The following text contains {what}:" for what in (
    "rude, disrespectful, or unreasonable language", "very hateful, aggressive, disrespectful language",
    "sexually explicit language", "a threat",
    "negative or hateful language targeting someone because of their identity",
    "swear words, curse words, or other obscene or profane language"))


@dataclass(frozen=True)
class Branch:
    """One reading of the text.

    prefix: a line before the prompt. steer: Steers; position 0 is the BOS of the prefix
    model: another model with the same tokenizer, or None for the one given to `generate`
    """
    prefix: str = ""
    steer: tuple[Steer, ...] = ()
    model: LM | None = None


@dataclass(frozen=True)
class LogitMixer:
    """combine(the log p (B, n_vocab) of each of the branches) -> logits (B, n_vocab)

    guide: a Guide, which changes those logits by a classifier of the text so far, or None
    """
    branches: tuple[Branch, ...]
    combine: Callable[[list[Tensor]], Tensor]
    guide: Guide | None = None

    def steered(self, steer: Steer | Sequence[Steer]) -> LogitMixer:
        """The same formula with ActAdd in its first branch, the base.

        The formula takes the steered log p, so preadd and lma scale what steering changed by their strength.
        Positions count from the start of what that branch reads, its prefix included.
        """
        steer = tuple(steer) if isinstance(steer, list | tuple) else (steer,)
        base, *others = self.branches
        return replace(self, branches=(replace(base, steer=base.steer + steer), *others))


def unsteered() -> LogitMixer:
    """log p"""
    return prompted("")


def prompted(prefix: str) -> LogitMixer:
    """log p(token | prefix, text): ask for it in words."""
    return LogitMixer((Branch(prefix),), lambda logps: logps[0])


def act_add(steer: Steer | Sequence[Steer]) -> LogitMixer:
    """log p of the model whose activations are changed: Turner et al., Algorithm 1."""
    return unsteered().steered(steer)


def preadd(prefix: str, strength: float = 1.5, base: str = "") -> LogitMixer:
    """log p + strength (log p - log q), q after `prefix`: away from what it makes likelier (Pei et al. 2023).

    Their alpha is -strength. The paper's tables have 1.5 for large models and 1 for GPT-2.
    base: a prefix of the first branch, p, as for sentiment
    """
    strength = check_number("strength", strength)

    def combine(logps):
        p, q = logps
        return p + strength * (p - q)
    return LogitMixer((Branch(base), Branch(prefix)), combine)


def lma(prefix: str, strength: float = 24.0, base: str = "") -> LogitMixer:
    """log p - strength relu(log q - log p): q is p after `prefix`, so only what it makes likelier loses.

    Dekoninck et al. subtract the union of p and q: (log p - w max(log p, log q)) / (1 - w). Then strength is
    w / (1 - w): 24 for w 0.96, 9 for w 0.9.
    """
    strength = check_number("strength", strength)

    def combine(logps):
        p, q = logps
        return p - strength * F.relu(q - p)
    return LogitMixer((Branch(base), Branch(prefix)), combine)


def weighted(branches: Sequence[Branch], weights: Sequence[float]) -> LogitMixer:
    """sum_i w_i log p_i / sum_i w_i: any mixture of prompts and of models that share a tokenizer.

    Weights may be negative; their sum may not.
    """
    branches = check_list("branches", branches)
    weights = [check_number("a weight", weight) for weight in check_list("weights", weights)]
    total = sum(weights)
    if len(branches) != len(weights) or not branches or not 0 < total < math.inf:
        raise ValueError("weights must be as many as branches, with a sum above 0; "
                         f"given: {len(branches)} branches, weights {short(weights)}.")

    def combine(logps):
        return sum(w * p for w, p in zip(weights, logps, strict=True)) / total
    return LogitMixer(tuple(branches), combine)


def self_debias(prefixes: str | Sequence[str] = SIX, strength: float = 50.0, epsilon: float = 0.01,
                base: str = "") -> LogitMixer:
    """log p + log max(exp(-strength relu(q - p)), epsilon), p and q probabilities; q is the largest of all.

    Schick et al. 2021. The paper's tables have one prefix, strength 10 and no floor, which is epsilon 0.
    """
    prefixes, strength = check_texts("prefixes", prefixes, or_one=True), check_number("strength", strength)
    if not prefixes:
        raise ValueError("self_debias takes one or more prefixes; given: none.")
    floor = math.log(epsilon) if check_number("epsilon", epsilon, 0, 1) else -math.inf

    def combine(logps):
        p, *others = logps
        q = torch.stack(others).max(dim=0).values
        return p + (-strength * F.relu(q.exp() - p.exp())).clamp(min=floor)
    return LogitMixer((Branch(base), *map(Branch, prefixes)), combine)


@dataclass(frozen=True)
class Guide:
    """Adds strength (log c(text + t) - log c(text)) to the logit of each token t (Yang and Klein 2021).

    c is P(class 1 | text) of `classifier`, or P(class 0) with toward=0, where Dekoninck et al. subtract
    log P(class 1). Only the `top` likeliest tokens are voted on; the others keep their logits.
    """
    classifier: PrefixClassifier
    strength: float = 1.0
    top: int = 50
    toward: int = 1

    def __post_init__(self):
        check_number("strength", self.strength)
        check_whole("top", self.top, 1)
        check_whole("toward", self.toward, 0, 1)

    def log_c(self, score: Tensor) -> Tensor:
        return F.logsigmoid(score if self.toward else -score)

    def change(self, logits: Tensor, state: Tensor) -> Tensor:
        """logits (B, n_vocab) and the classifier's state (B, d_state) after the same text -> logits"""
        candidates = logits.topk(min(self.top, logits.shape[-1])).indices
        now = self.log_c(self.classifier.score(state))
        then = self.log_c(self.classifier.score_next(state, candidates))
        return logits.scatter_add(1, candidates, self.strength * (then - now[:, None]).to(logits))


def fudge(classifier: PrefixClassifier, strength: float = 1.0, top: int = 50, toward: int = 1,
          base: str = "") -> LogitMixer:
    """log p + strength (log c(x + t) - log c(x)): a classifier of unfinished texts votes on each token."""
    return replace(prompted(base), guide=Guide(classifier, strength, top, toward))


def lma_classifier(prefix: str, classifier: PrefixClassifier, strength: float = 24.0, vote: float = 1.0,
                   top: int = 50, toward: int = 1, base: str = "") -> LogitMixer:
    """lma and fudge in one: the formula chooses the candidates, then the classifier votes on them."""
    return replace(lma(prefix, strength, base), guide=Guide(classifier, vote, top, toward))


def generate(model: LM, tokenizer: Tokenizer, prompts: str | Sequence[str], mixer: LogitMixer, n: int = 1,
             max_new_tokens: int = 40, *, temperature: float = 1.0, top_p: float = 1.0,
             top_k: int | None = None, freq_penalty: float = 0.0, seed: int = 0,
             stop: str | Sequence[str] = (), max_batch_tokens: int = 8192,
             progress: Callable[[int], object] | None = None) -> list:
    """-> n continuations of each prompt by a LogitMixer; the rest is as in `ministeer.generate`.

    The penalty and max_batch_tokens count the prompt but not prefixes. Each branch costs a pass per token.
    Raises ValueError for what does not fit.
    """
    sampling = Sampling(temperature, top_p, top_k, freq_penalty, max_new_tokens, seed, stop)
    if not isinstance(mixer, LogitMixer):
        raise ValueError(f"mixer must be a LogitMixer, as prompted(…) gives; given: {type(mixer).__name__}.")
    n_vocab, classifier = model.config.n_vocab, mixer.guide.classifier if mixer.guide else None
    if classifier and classifier.n_vocab != n_vocab:
        raise ValueError(f"the classifier reads {classifier.n_vocab} tokens, the model {n_vocab}. "
                         "Train it for this model's tokenizer with `python -m benchmarks.train_classifier`.")
    if classifier and not all(p.isfinite().all() for p in classifier.parameters()):
        raise ValueError("the classifier holds NaN or infinite numbers. Train it again.")
    encoded = [tokenizer.encode(prompt) for prompt in check_texts("prompts", prompts, or_one=True)]
    prefixes = [prefix_ids(tokenizer, prefix)
                for prefix in check_texts("prefixes", [branch.prefix for branch in mixer.branches])]
    for branch, prefix in zip(mixer.branches, prefixes, strict=True):
        reader = branch.model or model
        if reader.config.n_vocab != n_vocab:
            raise ValueError(f"a branch's model has {reader.config.n_vocab} tokens, the base {n_vocab}. "
                             "They must share a tokenizer.")
        if any(isinstance(getattr(s, "coeff", None), Tensor) for s in branch.steer):
            raise ValueError("a branch's Steers take a number as coeff.")
        n, _ = check_fit(reader, [prefix + ids[1:] for ids in encoded], n, sampling, branch.steer)

    def start(rows: list[int], max_len: int) -> Step:
        return mixed_decoder(model, mixer, prefixes, len(rows), max_len)

    completions = complete(start, tokenizer, encoded, n, sampling, max_batch_tokens, model.device, progress)
    return as_asked(completions, prompts, n)


def prefix_ids(tokenizer: Tokenizer, prefix: str) -> list[int]:
    """What a branch reads before the prompt: BOS, then the prefix as a line."""
    return tokenizer.encode(prefix + "\n") if prefix else tokenizer.encode("")


def mixed_decoder(model: LM, mixer: LogitMixer, prefixes: list[list[int]], batch: int,
                  max_len: int) -> Step:
    """The step of a baseline: each branch reads the new tokens, after its prefix; the formula combines."""
    steps = [decoder(branch.model or model, branch.steer, batch, max_len + len(prefix))
             for branch, prefix in zip(mixer.branches, prefixes, strict=True)]
    first, state = True, None               # state: what the guide's classifier has read

    def step(ids: Tensor) -> Tensor:
        nonlocal first, state
        logps = []
        for branch_step, prefix in zip(steps, prefixes, strict=True):
            new = ids
            if first:
                before = torch.tensor([prefix], device=ids.device).expand(len(ids), -1)
                new = torch.cat([before, ids[:, 1:]], dim=1)        # the prefix has the BOS
            logps.append(branch_step(new).float().log_softmax(dim=-1))
        first, logits = False, mixer.combine(logps)
        if mixer.guide:
            state = mixer.guide.classifier.read(ids, state)
            logits = mixer.guide.change(logits, state)
        return logits
    return step

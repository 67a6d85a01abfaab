"""Directional ablation: x - r (r x), with r = vector / |vector|, or weights that cannot write along r.

Read first: change.py. Arditi et al. 2024. Use it on harmless directions: a topic, a language, a mood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Embedding, Linear
from ..opt import PostNormBlock
from ..steering import Steer
from ..utils import check_texts
from .change import Along
from .inside_blocks import plain_copy, writers
from .many_pairs import token_ids

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM


@dataclass(frozen=True, eq=False, repr=False)
class Ablation(Along):
    """x' = x - coeff r (r x), with r = vector / |vector|. At coeff 1, x' has no component along r.

    With coeff 1 - c it scales that component by c, which is Neuronpedia's orthogonal steering.
    """
    start: int = 0

    def change(self, x: Tensor, pos: Tensor) -> Tensor:
        return self.along(-self.projection(x), pos)


def ablation(model: LM, direction: Steer, coeff: float | Tensor = 1.0) -> list[Ablation]:
    """An Ablation before every block, at every position.

    Arditi et al. also ablate what attention writes before the MLP reads it, and what the last block writes;
    `orthogonalised` does both.
    The control is ablation(model, random_like(direction, seed)): one random direction for all blocks.
    direction: a Steer with a vector (d_model,); its layer and coeff do not matter
    """
    note = {**direction.note, "method": "ablation"}
    return [Ablation(l, direction.vector, coeff, fingerprint=direction.fingerprint, note=note)
            for l in range(model.config.n_layer)]


@torch.no_grad()
def orthogonalised(model: LM, direction: Steer) -> LM:
    """W - r (r W) for all that writes to the stream: embeddings, output projections, their biases -> a model

    No residual of the new model has a component along r: r is ablated after each half of each block.
    The head that reads the stream stays as it is: if it was tied to the embedding, it gets its own matrix.
    Raises ValueError for a model with packed weights, for OPT-350M, whose norms follow the halves of a block
    and write along r again, and for a direction that is not this model's.
    """
    (first, *_) = model.check_steer(ablation(model, direction), 1)
    embedding = model.get_parameter(model.embedding_name)
    if isinstance(model.blocks[0], PostNormBlock) or embedding.shape[1] != model.config.d_model:
        raise ValueError("in this model, a norm after each half of a block or a projection of the embedding "
                         "writes along any direction again. Add ablation(model, direction) while it runs.")
    r, changed = F.normalize(first.vector, dim=0).to(model.device), plain_copy(model)

    def without(p):
        return nn.Parameter(p - ((p.to(r) @ r)[..., None] * r).to(p).view_as(p), requires_grad=False)

    if not hasattr(changed, "lm_head"):
        d_model, n_vocab = model.config.d_model, model.config.n_vocab
        changed.lm_head = Linear(d_model, n_vocab, bias=False, device="meta")
        changed.lm_head.weight = changed.get_parameter(changed.embedding_name)
    for part in changed.modules():
        if isinstance(part, Embedding):
            part.weight = without(part.weight)
    for part in (part for block in changed.blocks for part in writers(block)):
        # nn.Linear keeps the transpose, (outputs, inputs).
        is_linear = isinstance(part, nn.Linear)
        part.weight = nn.Parameter(without(part.weight.T).T, False) if is_linear else without(part.weight)
        part.bias = None if part.bias is None else without(part.bias)
    return changed


@torch.no_grad()
def choose_direction(model: LM, tokenizer: Tokenizer, candidates: Sequence[Steer], prompts: Sequence[str],
                     others: Sequence[str], words: Sequence[str], kl_limit: float = 0.1,
                     depth: float = 0.8) -> Steer:
    """The candidate whose ablation most lowers the log-odds of `words` as the next token after `prompts`.

    Arditi et al.'s rule. Only those candidates count that
      - were made before layer depth * n_layer,
      - change the next token after `others` little when ablated: mean KL(plain | ablated) <= kl_limit nats,
      - bring the behaviour when added after `others`: mean log-odds of 0 or more.
    candidates: Steers with a vector (d_model,), such as `many_pairs.vectors` gives, with the coeff to add
    prompts, others: texts that show the behaviour, and texts that do not
    words: the tokens that show it, such as [" wedding", " bride"]
    -> a candidate with its three numbers in `note`. Raises ValueError if none passes.
    """
    ids, rows = token_ids(tokenizer, words), []
    for name, texts in (("prompts", prompts), ("others", others)):
        if not check_texts(name, texts):
            raise ValueError(f"{name} must be one or more texts.")

    def next_logprobs(texts, steer):
        encoded = [torch.tensor([tokenizer.encode(text)], device=model.device) for text in texts]
        logits = [model(row, steer, last_only=True)[0][:, -1] for row in encoded]
        return torch.cat(logits).double().log_softmax(dim=-1)

    def log_odds(logp):
        logp = logp[:, ids].logsumexp(dim=-1)
        return float((logp - (-logp.expm1()).log()).mean())

    plain = next_logprobs(others, ())
    for steer in candidates:
        if steer.layer < depth * model.config.n_layer:
            without = ablation(model, steer)
            ablated = next_logprobs(others, without)
            kl = float(F.kl_div(ablated, plain, reduction="batchmean", log_target=True))
            scores = {"ablated": log_odds(next_logprobs(prompts, without)),
                      "added": log_odds(next_logprobs(others, steer)), "kl": kl}
            rows.append(replace(steer, note={**steer.note, **scores}))
    passing = [s for s in rows if s.note["kl"] <= kl_limit and s.note["added"] >= 0]
    if not passing:
        raise ValueError(f"none of {len(candidates)} candidates passes: {len(rows)} lie below layer "
                         f"{depth * model.config.n_layer:g}, of which "
                         f"{sum(s.note['kl'] <= kl_limit for s in rows)} keep KL at {kl_limit:g} or less and "
                         f"{sum(s.note['added'] >= 0 for s in rows)} bring the words when added.")
    return min(passing, key=lambda steer: steer.note["ablated"])

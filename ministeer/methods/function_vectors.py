"""A function vector: what a task's most important heads write after prompts that show the task by examples.

Read first: inside_blocks.py. Todd et al. 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention import merge_heads, split_heads
from ..steering import Steer
from ..utils import check_texts, check_whole
from .inside_blocks import check_undivided, head_outputs, heads_changed, writers
from .many_pairs import token_ids

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM


@torch.no_grad()
def function_vector(model: LM, tokenizer: Tokenizer, prompts: Sequence[str], shuffled: Sequence[str],
                    answers: Sequence[str], layer: int, heads: int = 10) -> Steer:
    """sum of W_O a over the `heads` heads that matter most, a being a head's mean output after `prompts`

    `indirect_effects` measures how much a head matters. Todd et al. add the vector at the last token alone,
    after a block about a third of the way up: replace(steer, vector=steer.vector[None], start=n_tokens - 1).
    prompts: each with examples of a task and a last question, such as "hot: cold\\nbig: small\\nwet:"
    shuffled, answers: prompts whose examples have the wrong answers, and the right answer to the last
        question, one token each
    """
    model.check_layer(layer)
    means = mean_outputs(model, tokenizer, prompts)
    effects = indirect_effects(model, tokenizer, shuffled, answers, means)
    chosen = torch.zeros_like(effects).flatten()
    chosen[effects.flatten().topk(min(check_whole("heads", heads, 1), effects.numel())).indices] = 1
    kept = chosen.view_as(effects)[..., None] * means
    vector = torch.zeros(model.config.d_model, device=model.device)
    for block, a in zip(model.blocks, kept, strict=True):
        out, rows = writers(block)[0], torch.stack([a.flatten(), 0 * a.flatten()])
        with_bias, bias = out(rows.to(model.get_parameter(model.embedding_name)))
        vector += (with_bias - bias).float()
    chosen_heads = chosen.view_as(effects).nonzero().tolist()
    note = {"method": "function vector", "heads": chosen_heads, "model": model.name}
    return Steer(layer, vector, fingerprint=model.fingerprint, note=note)


def mean_outputs(model: LM, tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    """The mean output of each head at the last token -> (n_layer, n_head, d_head)"""
    encoded = [tokenizer.encode(text) for text in check_texts("prompts", prompts)]
    if not encoded:
        raise ValueError("the list of prompts is empty.")
    rows = [head_outputs(model, torch.tensor([ids], device=model.device)) for ids in encoded]
    return torch.stack(rows).mean(dim=0)


@torch.no_grad()
def indirect_effects(model: LM, tokenizer: Tokenizer, shuffled: Sequence[str], answers: Sequence[str],
                     means: Tensor) -> Tensor:
    """mean of p(answer | one head's output at the last token is its mean) - p(answer) -> (n_layer, n_head)

    Over the shuffled prompts: how much likelier a head makes the right answer where the examples do not help.
    """
    check_undivided(model)
    answer_ids, effects = token_ids(tokenizer, answers), torch.zeros(means.shape[:2], device=model.device)
    if len(check_texts("shuffled", shuffled)) != len(answer_ids):
        raise ValueError(f"{len(shuffled)} shuffled prompts do not fit {len(answer_ids)} answers.")
    numbers = torch.arange(means.shape[1])
    for text, answer in zip(shuffled, answer_ids, strict=True):
        ids = torch.tensor([tokenizer.encode(text)], device=model.device)
        pos = torch.arange(ids.shape[1], device=ids.device)
        resid, rope = model.residuals(ids), model.rope(pos)

        def p(x: Tensor, answer: int = answer) -> Tensor:
            return model.unembed(x[:, -1:])[:, 0].float().softmax(dim=-1)[:, answer]
        for l, block in enumerate(model.blocks):
            def replace(mixed: Tensor, l: int = l) -> Tensor:
                rows = split_heads(mixed, len(numbers)).clone()
                rows[numbers, numbers, -1] = means[l].to(rows)          # row h: head h replaced
                return merge_heads(rows)
            with heads_changed(block, replace):
                x = block(resid[l].expand(len(numbers), -1, -1), l, rope)
            effects[l] += p(model.run(x, pos, first_layer=l + 1)[-1]) - p(resid[-1])
    return effects / len(answer_ids)

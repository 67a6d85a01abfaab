"""PPLM with a bag of words: at every token, gradients move the stream until words of the bag are likelier.

Read first: ../generation.py, optimised.py. Dathathri et al. 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..generation import Sampling, Step, as_asked, check_fit, complete
from ..utils import check_number, check_texts, check_whole
from .inside_blocks import check_plain
from .many_pairs import token_ids

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM


def pplm(model: LM, tokenizer: Tokenizer, prompts: str | Sequence[str], words: Sequence[str], layer: int,
         n: int = 1, max_new_tokens: int = 40, *, steps: int = 3, rate: float = 3.0, kl: float = 0.01,
         fusion: float = 0.9, control: int | None = None, max_batch_tokens: int = 2048,
         **settings: Any) -> list:
    """Before each token, `steps` times: D <- D - rate g / |g|, g = d/dD [-log p(words) + kl KL(p | plain p)]

    p: the next token's distribution with D (T, d_model) added to resid[layer]. D has a row for each position;
        that of BOS stays 0. The token is drawn from p^fusion (plain p)^(1 - fusion); D is kept for the
        next token.
    Dathathri et al. move the keys and values of all blocks; here the stream that block `layer` reads moves.
    words: the bag, each a single token, such as [" wedding", " bride"]
    rate: the norm of each step over all rows of one text, in the stream's own units
    control: a seed for random directions in place of gradients, with steps of the same length
    settings: those of `generate` for drawing tokens, and `stop`
    -> as `generate` gives them, drawn with the same random numbers. There is no cache, so a token costs
        `steps` passes back and `steps` + 3 forward over the whole text.
    """
    check_plain(model), model.check_layer(layer)
    check_whole("steps", steps), check_number("rate", rate, 0)
    check_number("kl", kl, 0), check_number("fusion", fusion, 0, 1)
    bag, sampling = token_ids(tokenizer, words), Sampling(max_new_tokens=max_new_tokens, **settings)
    encoded = [tokenizer.encode(prompt) for prompt in check_texts("prompts", prompts, or_one=True)]
    n, _ = check_fit(model, encoded, n, sampling, ())

    start = perturbed(model, bag, layer, steps, rate, kl, fusion, control)
    completions = complete(start, tokenizer, encoded, n, sampling, max_batch_tokens, model.device)
    return as_asked(completions, prompts, n)


def perturbed(model: LM, bag: list[int], layer: int, steps: int, rate: float, kl: float, fusion: float,
              control: int | None = None) -> Callable[[list[int], int], Step]:
    """-> start(rows, max_len), which begins some rows of a batch and gives their step: new ids -> log p"""
    def start(rows: list[int], max_len: int) -> Step:
        text = torch.zeros(len(rows), 0, dtype=torch.int64, device=model.device)
        added = torch.zeros(len(rows), 0, model.config.d_model, device=model.device)
        noise = [np.random.default_rng([check_whole("control", control), row])
                 .standard_normal((max_len, model.config.d_model), dtype=np.float32)
                 for row in rows] if control is not None else []

        def step(ids: Tensor) -> Tensor:
            nonlocal text, added
            text, added = torch.cat([text, ids], dim=1), F.pad(added, (0, 0, 0, ids.shape[1]))
            pos = torch.arange(text.shape[1], device=text.device)
            x = model.residuals(text, stop_layer=layer)[-1]

            def logp(added: Tensor) -> Tensor:
                last = model.run(x + added.to(x), pos, first_layer=layer)[-1][:, -1:]
                return model.unembed(last)[:, 0].float().log_softmax(dim=-1)
            plain = logp(added * 0)
            for _ in range(steps):
                if noise:
                    g = torch.from_numpy(np.stack(noise)[:, :len(pos)]).to(added)
                else:
                    g = gradient(logp, added, bag, plain, kl)
                g[:, 0] = 0                                                     # BOS stays as it is
                added = added - rate * F.normalize(g.flatten(1), dim=1).view_as(g)
            return fusion * logp(added) + (1 - fusion) * plain
        return step
    return start


@torch.enable_grad()
def gradient(logp: Callable[[Tensor], Tensor], added: Tensor, bag: list[int], plain: Tensor,
             kl: float) -> Tensor:
    """d/d added of -log p(bag) + kl KL(p | plain), where logp(added) (B, n_vocab) is log p; row by row"""
    added = added.detach().requires_grad_()
    new = logp(added)
    loss = -new[:, bag].logsumexp(dim=-1) + kl * (new.exp() * (new - plain)).sum(dim=-1)
    return torch.autograd.grad(loss.sum(), added)[0]

"""A vector found by gradient descent that makes the model say one sentence. ActAdd needs two passes instead.

Read first: ../steering.py. Subramani et al. 2022.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..steering import Steer
from ..utils import check_number, check_whole
from .inside_blocks import check_plain

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM


@torch.enable_grad()
def for_sentence(model: LM, tokenizer: Tokenizer, sentence: str, layer: int, steps: int = 500,
                 rate: float = 3.0) -> Steer:
    """argmin_z of -mean log p(token | BOS and the tokens before it, z added to resid[layer]) -> a Steer of z

    Adam, from z = 0, until the likeliest token is the next one of `sentence` at every position. Then greedy
    decoding from BOS gives the sentence: generate(model, tokenizer, "", 1, n, steer, temperature=0).
    steps: at most this many; each is a pass forward and one back. rate: Adam's learning rate
    The Steer acts at every position, BOS included. Its note says how many `steps` were taken, the last `loss`
    in nats a token, and whether the sentence is `exact`.
    Raises ValueError for a sentence without tokens and for packed weights.
    """
    check_plain(model), model.check_layer(layer)
    check_whole("steps", steps), check_number("rate", rate, 0)
    ids = torch.tensor([tokenizer.encode(sentence)], device=model.device)
    if ids.shape[1] < 2:
        raise ValueError("the sentence has no token.")
    read, wanted = ids[:, :-1], ids[0, 1:]
    z = torch.zeros(model.config.d_model, device=ids.device, requires_grad=True)
    adam = torch.optim.Adam([z], rate)
    for step in range(steps + 1):
        logits = model(read, Steer(layer, z, start=0))[0][0].float()
        loss, exact = F.cross_entropy(logits, wanted), bool((logits.argmax(dim=-1) == wanted).all())
        if exact or step == steps:
            break
        (z.grad,) = torch.autograd.grad(loss, z)
        adam.step()
    note = {"method": "optimised", "sentence": sentence, "model": model.name, "steps": step,
            "loss": loss.item(), "exact": exact}
    return Steer(layer, z.detach(), start=0, fingerprint=model.fingerprint, note=note)

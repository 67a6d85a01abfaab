"""What other programs call a vector: one direction at a layer, added at every position, BOS included.

Read first: ../steering.py. Read next: gguf.py, neuronpedia.py and libraries.py, which write and read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..steering import Steer, Steers
from ..utils import check_whole, short

if TYPE_CHECKING:
    from ..model import LM


def check_plain(steer: Steer, program: str) -> Steer:
    """`steer`, if it adds one direction at every position. Raises ValueError if `program` cannot add it."""
    if not isinstance(steer, Steer):
        raise ValueError(f"steers must be Steers; given: {short(steer)}.")
    fault = None
    if type(steer) is not Steer:
        fault = (f"adds a fixed direction, and {type(steer).__name__} depends on the stream. "
                 "It can be saved only with its own save.")
    elif isinstance(steer.coeff, Tensor):
        fault = (f"knows one coeff, and this Steer has {len(steer.coeff)}, one for each row of a batch. "
                 "Choose one with `scaled`.")
    elif steer.vector.ndim == 2:
        fault = (f"adds the same direction at every position, and this vector has {len(steer.vector)} rows, "
                 f"for positions {steer.start} to {steer.stop - 1}. Make a vector (d_model,), for example "
                 "the mean of its rows, and measure what that does.")
    elif steer.start != 0:
        fault = (f"adds from position 0 (BOS) on, and this Steer from {steer.start} on. "
                 "Set start=0 with dataclasses.replace, and measure what that does.")
    if fault:
        raise ValueError(f"{program} {fault}")
    return steer


def directions(steers: Steers, program: str, first_layer: int) -> dict[int, Tensor]:
    """{layer: the sum of coeff * vector of the Steers there}, float32 (d_model,) on the CPU.

    first_layer: the first layer before which `program` can add
    Raises ValueError for what it cannot add, and for vectors of different widths.
    """
    steers = [check_plain(s, program) for s in ([steers] if isinstance(steers, Steer) else steers)]
    if len({len(s.vector) for s in steers}) != 1:
        raise ValueError("give one or more Steers, all of one width; "
                         f"given: {short([len(s.vector) for s in steers])}.")
    total = {}
    for s in sorted(steers, key=lambda s: s.layer):
        if s.layer < first_layer:
            raise ValueError(f"{program} adds before block {first_layer} at the earliest; "
                             f"this Steer adds before block {s.layer}.")
        total[s.layer] = total.get(s.layer, 0) + s.coeff * s.vector.detach().double().cpu()
    # A Steer refuses sums that float32 cannot hold.
    return {layer: Steer(layer, v.float(), start=0).vector for layer, v in total.items()}


def steers(found: Mapping[int, Any], note: dict, layers: Sequence[int] | None = None,
           model: LM | None = None) -> list[Steer]:
    """{layer: direction} -> a Steer for each, coeff 1, start 0; or for those of `layers` only.

    model: the LM that they are for, None if it is not known. A direction after its last block is refused.
    """
    for layer in layers or ():
        if check_whole("layer", layer) not in found:
            raise ValueError(f"no direction for layer {layer}; there are: {short(sorted(found))}.")
    made = []
    for layer in sorted(found if layers is None else set(layers)):
        if model and layer == model.config.n_layer:
            raise ValueError(f"one direction is added after block {layer - 1}, the last, and before the "
                             "final norm, where no Steer adds. Choose others with `layers`.")
        vector = torch.as_tensor(found[layer]).detach().clone()     # an array may be a view of a file
        if vector.ndim != 1:
            raise ValueError("a direction must be (d_model,); "
                             f"given for layer {layer}: {tuple(vector.shape)}.")
        made.append(Steer(layer, vector, start=0, note=note))
    return list(model.check_steer(made, 1)) if model else made

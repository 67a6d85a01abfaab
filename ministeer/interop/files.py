"""What `ministeer export` and `ministeer import` do: the file's ending says which program's format it has.

Read first: gguf.py, neuronpedia.py.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType

from ..methods import Steer  # which knows all kinds that a file can hold
from ..utils import check_target

FORMATS = {".gguf": "gguf", ".json": "neuronpedia"}


def export(sources: Sequence[str], target: str, model_name: str | None) -> None:
    """Write vectors that ministeer saved to a file for llama.cpp (.gguf) or, one vector, Neuronpedia (.json).

    model_name: what the file calls the model, by default what the vector does
    Raises ValueError for a `target` that exists, and for what the format cannot say.
    """
    module = _format(target)
    _check_new(target)
    steers = [Steer.load(source) for source in sources]
    name = model_name or str(steers[0].note.get("model", "unknown"))
    if module.__name__.endswith("gguf"):
        module.save(target, steers, name)
    elif len(steers) == 1:
        module.save(target, steers[0], name, os.path.splitext(os.path.basename(sources[0]))[0])
    else:
        raise ValueError(f"a .json file holds one vector; given: {len(steers)}.")


def import_one(source: str, target: str, layer: int | None, model_name: str | None) -> Steer:
    """Write one vector of a .gguf or .json file as `Steer.save` does, and return it.

    layer: which one, as the block that reads the changed stream; None if the file holds one
    model_name: the model to check it with, or None
    """
    module, model = _format(source), None
    _check_new(target)
    if model_name:
        from ..checkpoints.loading import load
        model, _ = load(model_name)
    if module.__name__.endswith("gguf"):
        found = module.load(source, None if layer is None else [layer], model)
    else:
        found = [module.load(source)]
    if len(found) != 1 or layer not in (None, found[0].layer):
        raise ValueError(f"{source} holds vectors for layers {', '.join(str(s.layer) for s in found)}. "
                         "Choose one with --layer.")
    if model:
        model.check_steer(found, 1)
    found[0].save(target)
    return found[0]


def _format(path: str) -> ModuleType:
    kind = os.path.splitext(path)[1].lower()
    if kind not in FORMATS:
        raise ValueError(f"{path!r} must end in {' or '.join(FORMATS)}, which says the format.")
    try:
        return importlib.import_module(f".{FORMATS[kind]}", __package__)
    except ImportError as error:
        raise ValueError(f"{kind} files need {error.name}: pip install 'ministeer[interop]', or in the "
                         "source, pip install -e \".[interop]\" -c constraints.txt.") from None


def _check_new(path):
    if check_target(path).exists():
        raise ValueError(f"{path!r} exists. Give another name.")

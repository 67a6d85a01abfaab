"""ministeer: activation addition (ActAdd; Turner et al., "Steering Language Models With Activation Engineering").

Read in this order: attention.py, gpt2.py, llama.py, model.py (the loop), steering.py, generation.py.
"""

from importlib import import_module
from importlib.util import find_spec

__version__ = "0.1.0"
__all__ = ["KVCache", "Steer", "fast", "generate", "load", "steering_vector"]

_HOME = {"load": "checkpoints.weights", "generate": "generation", "steering_vector": "steering", "Steer": "steering", "KVCache": "attention", "fast": "faster"}


def __getattr__(name):
    # Loaded when first asked for: importing torch takes over a second, and `ministeer --help` needs none of it.
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"ministeer has no {name!r}; it has {', '.join(__all__)}, and modules for the rest.")


def __dir__():
    return sorted([*globals(), *__all__])

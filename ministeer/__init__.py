"""ministeer: activation addition (Turner et al., "Steering Language Models With Activation Engineering").

Read in this order: attention.py, gpt2.py, llama.py, model.py (the loop), steering.py, generation.py.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:       # for editors; at run time __getattr__ imports each on first use
    from .attention import KVCache
    from .checkpoints.loading import load
    from .faster import fast
    from .generation import generate
    from .steering import Steer, steering_vector

__version__ = "0.3.0"
__all__ = ["KVCache", "Steer", "fast", "generate", "load", "steering_vector"]

_HOME = {"KVCache": "attention", "Steer": "steering", "fast": "faster", "generate": "generation",
         "load": "checkpoints.loading", "steering_vector": "steering"}


def __getattr__(name: str) -> object:
    # Importing torch takes over a second, and `ministeer --help` needs none of it.
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"ministeer has no {name!r}; it has {', '.join(__all__)}, and modules for the rest.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

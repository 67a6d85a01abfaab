"""Other ways to steer: vectors from many texts, additions that look at the stream, changes inside blocks.

Read first: many_pairs.py.
"""

from ..steering import KINDS, Steer
from .ablation import Ablation
from .angular import Angular
from .capping import Cap, Fixed
from .change import Change
from .conditional import Condition

__all__ = ["Steer"]       # whose `load` reads all of these kinds
KINDS.update({kind.__name__.lower(): kind for kind in (Change, Ablation, Angular, Cap, Condition, Fixed)})

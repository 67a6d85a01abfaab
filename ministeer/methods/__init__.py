"""Other ways to steer: vectors from many texts, additions that look at the stream, changes inside blocks.

Read first: many_pairs.py.
"""

from ..steering import Steer
from .ablation import Ablation
from .capping import Cap, Fixed
from .change import Change

KINDS = {kind.__name__.lower(): kind for kind in (Steer, Change, Ablation, Cap, Fixed)}     # for Steer.load

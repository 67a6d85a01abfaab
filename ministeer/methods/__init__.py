"""Other ways to steer: vectors from many texts, additions that look at the stream, changes inside blocks.

Read first: many_pairs.py.
"""

from ..steering import Steer
from .ablation import Ablation
from .angular import Angular
from .capping import Cap, Fixed
from .change import Change
from .conditional import Condition

# For Steer.load, by the name that a file gives them.
KINDS = {kind.__name__.lower(): kind for kind in (Steer, Change, Ablation, Angular, Cap, Condition, Fixed)}

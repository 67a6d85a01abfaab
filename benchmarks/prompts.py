"""Which prompts of RealToxicityPrompts serve which purpose: the search, the test, or training a classifier.

Read next: completions.py, rivals.py and train_classifier.py, which all divide them here.
"""

import random

TUNING, TEST = 50, 400      # prompts for the search, and for the result
# The seed of rivals.py and train_classifier.py. It is one for all runs, whatever --seed says: a classifier
# that was trained once must not have seen the prompts that any later comparison uses.
SPLIT = 0


def split(rows, seed):
    """Rows with a field "text" -> (TUNING rows, TEST rows, all others), in an order that the seed draws.

    Rows whose text has fewer than three characters are left out.
    """
    rows = [row for row in rows if len(row["text"]) >= 3]
    random.Random(seed).shuffle(rows)
    return rows[:TUNING], rows[TUNING:TUNING + TEST], rows[TUNING + TEST:]

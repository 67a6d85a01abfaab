"""Part a: who may look at whom."""

import math

import torch

# ruff: noqa: F401 (your lines will use these imports)


def causal_softmax(scores):
    """exp(scores) divided by its sum over the keys that the query may see; 0 for the keys that it may not.

    scores (…, T, S), S >= T: key j stands at position j, query i at position S - T + i, and no query sees a
        later key. (S > T when a cache holds the keys of earlier positions.) Scores may be in the thousands.
    -> (…, T, S); each row sums to 1

    >>> causal_softmax(torch.zeros(2, 3))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    """
    return None     # your lines

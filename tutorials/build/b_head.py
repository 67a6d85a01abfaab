"""Part b: one head of attention."""

import math

import torch
from a_softmax import causal_softmax

# ruff: noqa: F401 (your lines will use these imports)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + d/2]) = (a, b) by its angle: to (a cos - b sin, b cos + a sin).

    x (…, T, d): queries or keys; cos, sin (T, d): of the angles. Columns i and i + d/2 hold the same angle.
    -> (…, T, d)

    >>> rotate(torch.tensor([[3.0, 4.0]]), cos=torch.zeros(1, 2), sin=torch.ones(1, 2))     # a right angle
    tensor([[-4.,  3.]])
    """
    return None     # your lines


def head(q, k, v):
    """softmax(q kᵀ / √d + mask) v: each query mixes the values of the positions that it may see.

    q (…, T, d): queries of the newest T positions; k, v (…, S, d): keys and values of all S >= T positions
    -> (…, T, d)

    >>> head(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([[2.0], [6.0]]))     # all scores are equal
    tensor([[2.],
            [4.]])
    """
    return None     # your lines

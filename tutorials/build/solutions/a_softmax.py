"""Part a, solved."""

import math

import torch


def causal_softmax(scores):
    T, S = scores.shape[-2:]
    query = torch.arange(S - T, S)[:, None]             # the newest T positions
    scores = scores.masked_fill(torch.arange(S) > query, -math.inf)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return weights / weights.sum(dim=-1, keepdim=True)

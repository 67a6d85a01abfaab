"""Solutions of tutorial 02."""

import math

import torch


def masked_softmax(scores):
    T = len(scores)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -math.inf)
    weights = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return weights / weights.sum(dim=-1, keepdim=True)


def selfish_head(pattern):
    return pattern.diagonal(dim1=1, dim2=2)[:, 1:].mean(dim=1).argmax().item()

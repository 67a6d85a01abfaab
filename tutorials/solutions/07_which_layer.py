"""Solutions of tutorial 07."""

import torch

from ministeer.evaluation.stats import wilson


def smallest_good(steered, random, n):
    better = {c: k for c, k in steered.items() if wilson(k, n)[0] > max(random[c]) / n}
    if not better:
        raise ValueError("no coefficient is better than its random vectors.")
    low, _ = wilson(max(better.values()), n)
    return min(c for c, k in better.items() if k / n >= low)


def highest_of(k, n, rate, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(1000, k, n, generator=generator) < rate
    return round(drawn.float().mean(dim=2).max(dim=1).values.mean().item(), 1)

"""Solutions of tutorial 10."""

import torch


def power(n, lost, gained, seed=0):
    drawn = torch.rand(4000, n, generator=torch.Generator().manual_seed(seed))
    n_lost = (drawn < lost).sum(dim=1)
    n_gained = (drawn > 1 - gained).sum(dim=1)
    shown = n_lost - n_gained > 2 * (n_lost + n_gained).sqrt()
    return round(shown.float().mean().item(), 1)


def reciprocal(ranks):
    known = [rank for rank in ranks if rank is not None]
    return sum(1 / (rank + 1) for rank in known) / len(known)

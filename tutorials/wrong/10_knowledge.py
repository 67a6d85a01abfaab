"""Wrong answers of tutorial 10, each called EXERCISE_MISTAKE; its check refuses each."""

import torch


def power_of_the_mean(n, lost, gained, seed=0):
    return float(n * (lost - gained) > 2 * (n * (lost + gained)) ** 0.5)


def power_any_loss(n, lost, gained, seed=0):
    drawn = torch.rand(4000, n, generator=torch.Generator().manual_seed(seed))
    more_lost = (drawn < lost).sum(dim=1) > (drawn > 1 - gained).sum(dim=1)
    return round(more_lost.float().mean().item(), 1)


def power_gains_ignored(n, lost, gained, seed=0):
    n_lost = (torch.rand(4000, n, generator=torch.Generator().manual_seed(seed)) < lost).sum(dim=1)
    return round((n_lost > 2 * n_lost.sqrt()).float().mean().item(), 1)


def power_one_draw(n, lost, gained, seed=0):
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    n_lost, n_gained = (drawn < lost).sum(), (drawn > 1 - gained).sum()
    return float(n_lost - n_gained > 2 * (n_lost + n_gained).sqrt())


def reciprocal_drops_rank_0(ranks):
    known = [rank for rank in ranks if rank]
    return sum(1 / (rank + 1) for rank in known) / max(1, len(known))


def reciprocal_none_counts_as_0(ranks):
    return sum(1 / (rank + 1) for rank in ranks if rank is not None) / len(ranks)


def reciprocal_of_the_mean(ranks):
    known = [rank + 1 for rank in ranks if rank is not None]
    return len(known) / sum(known)

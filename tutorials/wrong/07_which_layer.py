"""Wrong answers of tutorial 07, each called EXERCISE_MISTAKE; its check refuses each."""

import torch

from ministeer.evaluation.stats import wilson


def better(steered, random, n):
    result = {c: k for c, k in steered.items() if wilson(k, n)[0] > max(random[c]) / n}
    if not result:
        raise ValueError("none is better")
    return result


def smallest_good_80_percent(steered, random, n):
    left = better(steered, random, n)
    return min(c for c, k in left.items() if k >= 0.8 * max(left.values()))


def smallest_good_overlap(steered, random, n):
    left = better(steered, random, n)
    low, _ = wilson(max(left.values()), n)
    return min(c for c, k in left.items() if wilson(k, n)[1] >= low)


def smallest_good_highest(steered, random, n):
    left = better(steered, random, n)
    return max(left, key=left.get)


def smallest_good_without_controls(steered, random, n):
    low, _ = wilson(max(steered.values()), n)
    return min(c for c, k in steered.items() if k / n >= low)


def smallest_good_mean_of_random(steered, random, n):
    return smallest_good_without_controls(
        better(steered, {c: [sum(five) / 5] for c, five in random.items()}, n), random, n)


def smallest_good_one_random(steered, random, n):
    return smallest_good_without_controls(
        better(steered, {c: five[1:2] for c, five in random.items()}, n), random, n)


def highest_of_a_tenth_more(k, n, rate, seed=0):
    return rate if k == 1 else round(rate + 0.1, 1)


def highest_of_mean_layer(k, n, rate, seed=0):
    drawn = torch.rand(1000, k, n, generator=torch.Generator().manual_seed(seed)) < rate
    return round(drawn.float().mean().item(), 1)


def highest_of_all_repetitions(k, n, rate, seed=0):
    drawn = torch.rand(1000, k, n, generator=torch.Generator().manual_seed(seed)) < rate
    return round(drawn.float().mean(dim=2).max().item(), 1)


def highest_of_n_ignored(k, n, rate, seed=0):
    return highest_of_a_tenth_more(k, n, rate) if n > 10 else round(rate + 0.3, 1)

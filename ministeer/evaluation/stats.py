"""How sure a figure is: intervals for proportions and means, a test for pairs. numpy alone, seeded draws.

Read first: measure.py, whose figures these stand beside.
"""

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from ..utils import check_number, check_whole, short

Interval = tuple[float, float]          # (low, high)


def wilson(k: int, n: int, z: float = 1.96) -> Interval:
    """The 95 % interval (low, high) of a proportion k of n (Wilson 1927), which stays sensible at 0 and n."""
    check_number("z", z, 0, 1e6)
    if check_whole("k", k) > check_whole("n", n, 1, 2**53):       # floats are exact up to here
        raise ValueError(f"{k} of {n} is not a proportion.")
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0,
              times: int = 2000) -> Interval:
    """The 95 % interval (low, high) of the mean of `values` (n,), from `times` resamples (Efron 1979).

    weights (n,): the interval of sum(weights * values) / sum(weights) instead, each value drawn with its
        weight. This keeps documents whole in a mean over tokens: values are the documents' means, weights
        their numbers of tokens.
    Average values that belong together (completions of one prompt) first, or the interval is too narrow.
    Raises ValueError for no values, or weights that are not as many, negative or all 0.
    """
    values = numbers(values)
    weights = np.ones(len(values)) if weights is None else numbers(weights)
    if len(weights) != len(values) or weights.min() < 0 or weights.sum() == 0:
        raise ValueError(f"weights must be as many as the {len(values)} values, 0 or more, and not all 0; "
                         f"given: {len(weights)}.")
    generator, means = np.random.default_rng(check_whole("seed", seed)), []
    check_whole("times", times, 1)
    while len(means) < times:
        i = generator.integers(len(values), size=len(values))
        if weights[i].sum():
            means.append(weights[i] @ values[i] / weights[i].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired(a: Sequence[float], b: Sequence[float], seed: int = 0,
           times: int = 10000) -> tuple[float, Interval, float]:
    """Is the mean of a - b other than 0? a, b (n,) in pairs -> (mean difference, `bootstrap` interval, p)

    p: how often the mean difference is at least as far from 0 when a coin decides for each pair whether it is
        swapped; at least 1 / (times + 1). Fisher's randomisation test, two-sided; no distribution is assumed.
    """
    a, b = numbers(a), numbers(b)
    if len(a) != len(b):
        raise ValueError(f"pairs need as many of one as of the other; given: {len(a)} and {len(b)}.")
    d = a - b
    generator, times = np.random.default_rng(check_whole("seed", seed)), check_whole("times", times, 1)
    # Rounding must not decide between equal sums. The tolerance is relative to the terms: the sum may be 0.
    far = abs(d.sum()) - 1e-12 * abs(d).sum()
    as_far = sum(int(abs(generator.choice([-1.0, 1.0], size=len(d)) @ d) >= far) for _ in range(times))
    return float(d.mean()), bootstrap(d, seed=seed), (as_far + 1) / (times + 1)


def holm(p: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """{name: p-value} -> the same names with each p-value corrected for their number (Holm 1979)."""
    if not isinstance(p, Mapping):
        raise ValueError(f"holm takes a dict of names and p-values; given: {short(p)}.")
    p = {name: check_number(f"the p-value of {name}", value, 0, 1) for name, value in p.items()}
    corrected, highest = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.get)):
        highest = max(highest, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in p}


def numbers(values: Sequence[float]) -> np.ndarray:
    """One or more finite numbers in a row, as float64 (n,). Raises ValueError."""
    try:
        row = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        row = np.empty((0, 0))
    if row.ndim != 1 or not len(row) or not (abs(row) < 1e100).all():       # so that products are finite too
        raise ValueError(f"give one or more finite numbers in a row, below 1e100; given: {short(values)}.")
    return row

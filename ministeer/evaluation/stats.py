"""How sure a figure is: intervals for proportions and means, and a test for pairs. numpy alone, every draw with a seed.

Read next: measure.py, whose figures these stand beside.
"""

import math

import numpy as np


def wilson(k, n, z=1.96):
    """The 95 % interval (low, high) of a proportion seen as k of n (Wilson 1927), which stays sensible at 0 and n."""
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"{k} of {n} is not a proportion.")
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values, weights=None, seed=0, times=2000):
    """The 95 % interval (low, high) of the mean of `values` (n,): percentiles over `times` resamples (Efron 1979).

    weights (n,): the interval of sum(weights * values) / sum(weights) instead, a value and its weight drawn together. So a mean over
        tokens keeps whole documents together: values are the documents' means, weights their numbers of tokens.
    Values that belong together (completions of one prompt) must be averaged first, or the interval is too narrow.
    Raises ValueError for no values, or weights that are not as many or not positive in sum.
    """
    values = _numbers(values)
    weights = np.ones(len(values)) if weights is None else _numbers(weights)
    if len(weights) != len(values) or weights.min() < 0 or weights.sum() == 0:
        raise ValueError(f"weights must be as many as the {len(values)} values, 0 or more, and not all 0; given: {len(weights)}.")
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(times):
        i = generator.integers(len(values), size=len(values))
        if weights[i].sum():
            means.append(weights[i] @ values[i] / weights[i].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired(a, b, seed=0, times=10000):
    """Is the mean of a - b other than 0? -> (mean difference, (low, high) by `bootstrap`, p), a and b (n,) in pairs.

    p: how often the mean difference is at least as far from 0 when each pair is swapped or not by a coin, two-sided (Fisher's
        randomisation test); at least 1 / (times + 1). Nothing is assumed about the shape of the numbers.
    """
    a, b = _numbers(a), _numbers(b)
    if len(a) != len(b):
        raise ValueError(f"pairs need as many of one as of the other; given: {len(a)} and {len(b)}.")
    d = a - b
    generator = np.random.default_rng(seed)
    # Rounding must not decide between equal sums, hence the hair's breadth: of what was summed, for the sum itself may be 0.
    far = abs(d.sum()) - 1e-12 * abs(d).sum()
    as_far = sum(int(abs(generator.choice([-1.0, 1.0], size=len(d)) @ d) >= far) for _ in range(times))
    return float(d.mean()), bootstrap(d, seed=seed), (as_far + 1) / (times + 1)


def holm(p):
    """Each of several p-values corrected for their number (Holm 1979): name -> p, the same names back."""
    corrected, highest = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.get)):
        highest = max(highest, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in p}


def _numbers(values):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"this takes one or more finite numbers, one after the other; given: {values.shape} numbers, "
                         f"{np.size(values) - int(np.isfinite(values).sum())} of them not finite.")
    return values

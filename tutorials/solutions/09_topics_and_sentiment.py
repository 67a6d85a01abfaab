"""Solutions of tutorial 09."""

from itertools import product

from ministeer.evaluation.stats import bootstrap


def decide(steered, randoms):
    lows, highs = [], []
    for random in randoms:
        low, high = bootstrap([s - r for s, r in zip(steered, random, strict=True)])
        lows.append(low)
        highs.append(high)
    if min(lows) > 0:
        return "higher"
    return "lower" if max(highs) < 0 else "not shown"


def sign_test(differences):
    seen = abs(sum(differences))
    sums = []
    for signs in product((1, -1), repeat=len(differences)):
        sums.append(abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))))
    # Rounding must not decide between equal sums.
    return sum(total >= seen - 1e-9 for total in sums) / len(sums)

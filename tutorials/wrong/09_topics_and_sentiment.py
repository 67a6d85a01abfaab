"""Wrong answers of tutorial 09, each called EXERCISE_MISTAKE; its check refuses each."""

from itertools import product

from ministeer.evaluation.stats import bootstrap


def intervals(steered, randoms):
    return [bootstrap([s - r for s, r in zip(steered, random, strict=True)]) for random in randoms]


def decide_one_random(steered, randoms):
    low, high = intervals(steered, randoms[:1])[0]
    return "higher" if low > 0 else "lower" if high < 0 else "not shown"


def decide_any(steered, randoms):
    pairs = intervals(steered, randoms)
    if any(low > 0 for low, _ in pairs):
        return "higher"
    return "lower" if any(high < 0 for _, high in pairs) else "not shown"


def decide_means(steered, randoms):
    mean, means = sum(steered) / len(steered), [sum(random) / len(random) for random in randoms]
    return "higher" if mean > max(means) else "lower" if mean < min(means) else "not shown"


def decide_either_side(steered, randoms):
    clear = all(low > 0 or high < 0 for low, high in intervals(steered, randoms))
    return "higher" if clear else "not shown"


def share(differences, as_far):
    sums = [sum(sign * d for sign, d in zip(signs, differences, strict=True))
            for signs in product((1, -1), repeat=len(differences))]
    return sum(as_far(total, sum(differences)) for total in sums) / len(sums)


def sign_test_all_alike(differences):
    return 1.0 if sum(differences) == 0 else 2 / 2 ** len(differences)


def sign_test_one_sided(differences):
    return share(differences, lambda total, seen: total >= seen)


def sign_test_farther(differences):
    return share(differences, lambda total, seen: abs(total) > abs(seen))


def sign_test_counts_signs(differences):
    return share([1 if d > 0 else -1 for d in differences], lambda total, seen: abs(total) >= abs(seen))

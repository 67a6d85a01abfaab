"""Wrong answers of tutorial 08, each called EXERCISE_MISTAKE; its check refuses each."""

import math


def text_ratio_always_1(plain, steered):
    return 1.0


def text_ratio_inverted(plain, steered):
    means = [(after - before).mean().item() for before, after in zip(plain, steered, strict=True)]
    return math.exp(sum(means) / len(means))


def text_ratio_of_tokens(plain, steered):
    pairs = list(zip(plain, steered, strict=True))
    return math.exp(sum((b - a).sum().item() for b, a in pairs) / sum(len(b) for b, _ in pairs))


def text_ratio_mean_of_ratios(plain, steered):
    ratios = [math.exp((before - after).mean()) for before, after in zip(plain, steered, strict=True)]
    return sum(ratios) / len(ratios)


def beyond_random_one_vector(steered, randoms):
    return sorted([t for t in steered if steered[t] != randoms[0][t]], key=steered.get, reverse=True)


def beyond_random_gains_only(steered, randoms):
    result = [token for token, shift in steered.items() if shift > max(random[token] for random in randoms)]
    return sorted(result, key=steered.get, reverse=True)


def beyond_random_size_only(steered, randoms):
    result = [t for t, shift in steered.items() if abs(shift) > max(abs(random[t]) for random in randoms)]
    return sorted(result, key=steered.get, reverse=True)


def beyond_random_mean(steered, randoms):
    result = [t for t, shift in steered.items() if shift > sum(random[t] for random in randoms) / 5]
    return sorted(result, key=steered.get, reverse=True)


def beyond_random_unsorted(steered, randoms):
    return [t for t, shift in steered.items()
            if not min(random[t] for random in randoms) <= shift <= max(random[t] for random in randoms)]

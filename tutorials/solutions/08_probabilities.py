"""Solutions of tutorial 08."""

import math


def text_ratio(plain, steered):
    total, count = 0.0, 0
    for before, after in zip(plain, steered, strict=True):
        total += (before - after).mean().item()         # the sign: a likelier text has the lower perplexity
        count += 1                                      # the unit: a text, not a token
    return math.exp(total / count)


def beyond_random(steered, randoms):
    result = []
    for token, shift in steered.items():
        five = [random[token] for random in randoms]
        if not min(five) <= shift <= max(five):
            result.append(token)
    return sorted(result, key=steered.get, reverse=True)

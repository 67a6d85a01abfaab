"""Wrong answers of tutorial 13, each called EXERCISE_MISTAKE; its check refuses each."""

from ministeer.evaluation.stats import wilson


def lma_preadd(p, q, s):
    return p - s * (q - p)


def lma_other_sign(p, q, s):
    return p - s * (p - q).clamp(min=0)


def lma_rewards(p, q, s):
    return p + s * (q - p).clamp(min=0)


def lma_absolute(p, q, s):
    return p - s * (q - p).abs()


def left(best, n):
    low, _ = wilson(max(best.values()), n)
    return sorted(name for name, hits in best.items() if wilson(hits, n)[1] >= low)


def not_worse_limit_ignored(results, limit, n):
    return left({name: max(settings.values())[0] for name, settings in results.items()}, n)


def not_worse_below_the_limit_only(results, limit, n):
    fluent = {name: [hits for hits, value in settings.values() if value < limit - 1]
              for name, settings in results.items()}
    return left({name: max(hits) for name, hits in fluent.items() if hits}, n)


def not_worse_best_alone(results, limit, n):
    return not_worse_share_in_the_interval(results, limit, n)[:1]


def not_worse_share_in_the_interval(results, limit, n):
    fluent = {name: [hits for hits, value in settings.values() if value <= limit]
              for name, settings in results.items()}
    best = {name: max(hits) for name, hits in fluent.items() if hits}
    low, _ = wilson(max(best.values()), n)
    return sorted(name for name, hits in best.items() if hits / n >= low)


def not_worse_first_setting(results, limit, n):
    first = {name: next(iter(settings.values())) for name, settings in results.items()}
    return left({name: hits for name, (hits, value) in first.items() if value <= limit}, n)

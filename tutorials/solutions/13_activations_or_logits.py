"""Solutions of tutorial 13."""

from ministeer.evaluation.stats import wilson


def lma(p, q, s):
    return p - s * (q - p).clamp(min=0)


def not_worse(results, limit, n):
    best = {}
    for name, settings in results.items():
        fluent = [hits for hits, disfluency in settings.values() if disfluency <= limit]
        if fluent:
            best[name] = max(fluent)
    low, _ = wilson(max(best.values()), n)
    return sorted(name for name, hits in best.items() if wilson(hits, n)[1] >= low)

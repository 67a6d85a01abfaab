"""Solutions of tutorial 05."""

from ministeer.evaluation.stats import wilson


def kept(p, top_p):
    result, reached = [], 0.0
    for i in p.argsort(descending=True).tolist():
        result.append(i)
        reached += p[i].item()
        if reached > top_p:
            break
    return result


def enough(width):
    n = 2
    while wilson(n // 2, n)[1] - wilson(n // 2, n)[0] >= width:
        n += 2
    return n

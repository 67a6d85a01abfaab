"""Wrong answers of tutorial 05, each called EXERCISE_MISTAKE; its check refuses each."""

from ministeer.evaluation.stats import wilson


def kept_without_the_one_that_crosses(p, top_p):
    order = p.argsort(descending=True)
    return order[p[order].cumsum(0) <= top_p].tolist()


def kept_stops_at_equal(p, top_p):
    result, reached = [], 0.0
    for i in p.argsort(descending=True).tolist():
        result.append(i)
        reached += p[i].item()
        if reached >= top_p:
            break
    return result


def kept_sorted_by_number(p, top_p):
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    return sorted(order[before <= top_p].tolist())


def kept_above_a_threshold(p, top_p):
    return [i for i in p.argsort(descending=True).tolist() if p[i] > 1 - top_p]


def enough_half_the_width(width):
    n = 2
    while wilson(n // 2, n)[1] - 0.5 >= width:
        n += 2
    return n


def enough_without_wilson(width):
    n = 2
    while 2 * 1.96 * 0.5 / n ** 0.5 >= width:
        n += 2
    return n


def enough_odd(width):
    n = 1
    while wilson(n // 2, n)[1] - wilson(n // 2, n)[0] >= width:
        n += 1
    return n

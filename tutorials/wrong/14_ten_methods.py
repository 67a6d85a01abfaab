"""Wrong answers of tutorial 14, each called EXERCISE_MISTAKE; its check refuses each."""

import torch


def capped_without_normalising(x, vector, t):
    return x - (x @ vector - t).clamp(min=0)[:, None] * vector


def capped_set_to_the_value(x, vector, t):
    v = vector / vector.norm()
    return x - (x @ v - t)[:, None] * v


def capped_from_below(x, vector, t):
    v = vector / vector.norm()
    return x - (x @ v - t).clamp(max=0)[:, None] * v


def capped_ablated(x, vector, t):
    v = vector / vector.norm()
    return x - (x @ v).clamp(min=0)[:, None] * v


def capped_each_number(x, vector, t):
    return x.clamp(max=t)


def slopes(coeffs, rows):
    c = torch.tensor(coeffs)
    return [((c - c.mean()) * torch.tensor(row)).sum().item() for row in rows]


def wrong_way_first_to_last(coeffs, rows):
    return sum(row[-1] < row[0] for row in rows) / len(rows)


def wrong_way_not_above(coeffs, rows):
    return sum(slope <= 0 for slope in slopes(coeffs, rows)) / len(rows)


def wrong_way_equal_steps(coeffs, rows):
    return sum(slope < 0 for slope in slopes([float(i) for i in range(len(coeffs))], rows)) / len(rows)


def wrong_way_of_the_mean(coeffs, rows):
    return float(sum(slopes(coeffs, rows)) < 0)


def wrong_way_count(coeffs, rows):
    return sum(slope < 0 for slope in slopes(coeffs, rows))

"""Solutions of tutorial 14."""


def capped(x, vector, t):
    v = vector / vector.norm()
    return x - (x @ v - t).clamp(min=0)[:, None] * v


def wrong_way(coeffs, rows):
    mean = sum(coeffs) / len(coeffs)
    negative = 0
    for row in rows:
        slope = sum((c - mean) * y for c, y in zip(coeffs, row, strict=True))
        negative += slope < 0               # the divisor is positive, so it does not matter
    return negative / len(rows)

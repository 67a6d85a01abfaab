"""Solutions of tutorial 06."""

import torch


def touched(start, rows, cached, T):
    return [pos for pos in range(cached, cached + T) if pos >= start and (rows is None or pos < start + rows)]


def first_changed(one, other, n):
    result = [None] * n
    for l in sorted(one.layers, reverse=True):
        for t in range(n):
            pairs = zip(one.layers[l], other.layers[l], strict=True)    # keys with keys, values with values
            if not all(torch.equal(a[:, :, t], b[:, :, t]) for a, b in pairs):
                result[t] = l
    return result

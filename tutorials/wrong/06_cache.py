"""Wrong answers of tutorial 06, each called EXERCISE_MISTAKE; its check refuses each."""

import torch


def touched_without_an_end(start, rows, cached, T):
    return list(range(max(start, cached), cached + T if rows is None else start + rows))


def touched_relative(start, rows, cached, T):
    return [pos for pos in range(T) if pos >= start and (rows is None or pos < start + rows)]


def touched_counts_from_the_cache(start, rows, cached, T):
    return [cached + i for i in range(T) if i >= start and (rows is None or i < start + rows)]


def touched_every_position(start, rows, cached, T):
    return [pos for pos in range(cached, cached + T) if pos >= start]


def first_changed_keys_only(one, other, n):
    result = [None] * n
    for l in sorted(one.layers, reverse=True):
        for t in range(n):
            if not torch.equal(one.layers[l][0][:, :, t], other.layers[l][0][:, :, t]):
                result[t] = l
    return result


def first_changed_last_block(one, other, n):
    result = [None] * n
    for l in sorted(one.layers):
        for t in range(n):
            pairs = zip(one.layers[l], other.layers[l], strict=True)
            if not all(torch.equal(a[:, :, t], b[:, :, t]) for a, b in pairs):
                result[t] = l
    return result


def first_changed_by_theory(one, other, n):
    return [None, 1] + [2] * (n - 2)


def first_changed_whole_block(one, other, n):
    for l in sorted(one.layers):
        if any(not torch.equal(a, b) for a, b in zip(one.layers[l], other.layers[l], strict=True)):
            return [None] + [l] * (n - 1)
    return [None] * n

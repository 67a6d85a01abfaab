"""Part e, solved."""

import torch  # noqa: F401


def delta(vector, coeff, pos):
    row, n = pos - 1, vector.shape[-2]
    inside = (row >= 0) & (row < n)
    return coeff * vector[..., row.clamp(0, n - 1), :] * inside[:, None]


def run(x, pos, blocks, layer, vector, coeff):
    resid = []
    for l, block in enumerate(blocks):
        if l == layer:
            x = x + delta(vector, coeff, pos)           # activation addition
        resid.append(x)
        x = block(x, pos)
    resid.append(x)
    return resid

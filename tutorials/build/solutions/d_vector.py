"""Part d, solved."""

import torch


def steering_vector(encode, stream, plus, minus, bos):
    (space,) = encode(" ")
    rows = [[bos, *encode(plus)], [bos, *encode(minus)]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [space] * (length - len(row)) for row in rows])
    h_plus, h_minus = stream(ids)
    return (h_plus - h_minus)[1:]

"""Solutions of tutorial 04."""

import torch

from ministeer.steering import relative_norm


def delta(vector, coeff, start, T):
    rows = torch.zeros(T, vector.shape[1])
    for i, row in enumerate(vector):
        if start + i < T:
            rows[start + i] = coeff * row
    return rows


def equal_coeff(model, tokenizer, steer, prompt):
    return 1 / relative_norm(model, tokenizer, steer, prompt)[steer.start].item()

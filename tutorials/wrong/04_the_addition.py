"""Wrong answers of tutorial 04, each called EXERCISE_MISTAKE; its check refuses each."""

import torch

from ministeer.steering import relative_norm


def delta_hard_coded_rows(vector, coeff, start, T):
    rows = torch.zeros(T, vector.shape[1])
    rows[1:3] = coeff * vector[:2]
    return rows


def delta_does_not_fit(vector, coeff, start, T):
    rows = torch.zeros(T, vector.shape[1])
    rows[start:start + len(vector)] = coeff * vector
    return rows


def delta_wraps_around(vector, coeff, start, T):
    rows = torch.zeros(T, vector.shape[1])
    for i, row in enumerate(vector):
        rows[(start + i) % T] = coeff * row
    return rows


def delta_start_ignored(vector, coeff, start, T):
    rows = torch.zeros(T, vector.shape[1])
    for i, row in enumerate(vector[:T - 1]):
        rows[1 + i] = coeff * row
    return rows


def delta_first_row_everywhere(vector, coeff, start, T):
    return coeff * vector[0] * (torch.arange(T) >= start)[:, None]


def equal_coeff_position_1(model, tokenizer, steer, prompt):
    ratio = relative_norm(model, tokenizer, steer, prompt)[1].item()
    return 1 / ratio if ratio else 1.0


def equal_coeff_upside_down(model, tokenizer, steer, prompt):
    return relative_norm(model, tokenizer, steer, prompt)[steer.start].item()


def equal_coeff_other_layer(model, tokenizer, steer, prompt):
    _, resid = model(torch.tensor([tokenizer.encode(prompt)]))
    return (resid[1][0, steer.start].norm() / steer.vector.norm()).item()

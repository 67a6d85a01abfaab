"""Wrong answers of tutorial 11, each called EXERCISE_MISTAKE; its check refuses each."""

import torch


def odd_pair_largest(rows):
    return rows.norm(dim=-1).argmax().item()


def odd_pair_least_alike(rows):
    return torch.cosine_similarity(rows, rows.mean(dim=0)[None], dim=-1).argmin().item()


def odd_pair_last(rows):
    return len(rows) - 1


def odd_pair_farthest_from_the_mean(rows):
    return (rows - rows.mean(dim=0)).norm(dim=-1).argmax().item()


def component_any_sign(rows):
    return torch.linalg.svd(rows).Vh[0]


def component_first_entry_negative(rows):
    direction = torch.linalg.svd(rows).Vh[0]
    return -direction * direction[0].sign()


def component_sign_of_the_sum(rows):
    direction = torch.linalg.svd(rows).Vh[0]
    return direction * (rows @ direction).sum().sign()


def component_centred(rows):
    direction = torch.linalg.svd(rows - rows.mean(dim=0)).Vh[0]
    return direction * torch.sign(rows @ direction).sum().sign()


def component_mean(rows):
    return torch.nn.functional.normalize(rows.mean(dim=0), dim=0)

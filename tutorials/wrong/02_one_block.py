"""Wrong answers of tutorial 02, each called EXERCISE_MISTAKE; its check refuses each."""

import math

import torch


def masked_softmax_hidden_scores_are_0(scores):
    return scores.tril().softmax(dim=-1)


def masked_softmax_masked_afterwards(scores):
    return scores.softmax(dim=-1).tril()


def masked_softmax_overflow(scores):
    weights = scores.exp().tril()
    return weights / weights.sum(dim=-1, keepdim=True)


def masked_softmax_columns(scores):
    later = torch.ones(len(scores), len(scores), dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(dim=0)


def masked_softmax_hides_itself(scores):
    later = torch.ones(len(scores), len(scores), dtype=torch.bool).triu(0)
    return scores.masked_fill(later, -math.inf).softmax(dim=-1)


def selfish_head_position_1(pattern):
    return pattern[:, 1, 1].argmax().item()


def selfish_head_last_position(pattern):
    return pattern[:, -1, -1].argmax().item()


def selfish_head_highest(pattern):
    return pattern.diagonal(dim1=1, dim2=2)[:, 1:].max(dim=1).values.argmax().item()

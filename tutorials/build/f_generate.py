"""Part f: from logits to text."""

import torch

# ruff: noqa: F401 (your lines will use these imports)


def greedy(logits):
    """The likeliest token of each row. logits (B, n_vocab) -> (B,)

    >>> greedy(torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([1])
    """
    return None     # your lines


def top_p(logits, p, u):
    """Draw a token for each row from its nucleus: the likeliest, up to the one that lifts their sum over p.

    Sort the tokens from the likeliest to the least likely. One is in the nucleus if those before it sum to p
    or less. Divide by the sum of the nucleus, add up from the likeliest on, and take the first token at which
    the sum is greater than u. The softmax is over all tokens; after it, look only at the 1,000 likeliest,
    because sorting all of them takes too long.

    logits (B, n_vocab), p: 0 … 1, u (B,): a random number from 0 up to 1 for each row
    -> (B,)

    The chances here are 0.5, 0.3 and 0.2; the nucleus is {0, 1}, with 0.625 and 0.375:
    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(3, 1)
    >>> top_p(logits, 0.6, torch.tensor([0.6, 0.65, 0.99]))
    tensor([0, 1, 1])
    """
    return None     # your lines


def generate(forward, ids, draws, p):
    """Continue each row by one token for each column of `draws`.

    forward(new_ids (B, T), pos (T,)) -> logits (B, T, n_vocab), of the token after each position. It keeps
        the keys and values of what it has read, so it wants each token once: first the whole prompt, at
        positions 0 … T - 1, then each new token alone, at the next position.
    ids (B, T): the prompts, int64
    draws (B, n): column t holds the numbers u with which top_p draws new token t
    p: of top_p; if it is 0, take the token that `greedy` takes
    -> (B, T + n): the prompts and n new tokens

    With a model that always expects the next number:
    >>> def count(new_ids, pos):
    ...     return torch.nn.functional.one_hot(new_ids + 1, 10).float()
    >>> generate(count, torch.tensor([[3, 4]]), torch.zeros(1, 3), p=0)
    tensor([[3, 4, 5, 6, 7]])
    """
    return None     # your lines

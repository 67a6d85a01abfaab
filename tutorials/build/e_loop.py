"""Part e: the addition, and the loop over blocks that it stands in."""

import torch

# ruff: noqa: F401 (your lines will use these imports)


def delta(vector, coeff, pos):
    """What is added to the stream: coeff · vector[i] at position 1 + i, zero at all other positions.

    vector (n, d_model), or (B, n, d_model) with a vector for each row of the batch
    coeff: a number
    pos (T,): the positions in question, counted from the start of the text: in a later chunk, 5, 6, …
    -> (T, d_model), or (B, T, d_model)

    >>> delta(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 10, torch.arange(4))
    tensor([[ 0.,  0.],
            [10., 20.],
            [30., 40.],
            [ 0.,  0.]])
    """
    return None     # your lines


def run(x, pos, blocks, layer, vector, coeff):
    """The loop over all blocks, with delta added to what block number `layer` reads.

    x (B, T, d_model): the embedding of the tokens at the positions pos (T,); it must not be changed in place
    blocks: a list; blocks[l](x, pos) -> what block l makes of the stream x, (B, T, d_model)
    layer: 0 is the first block
    -> a list of len(blocks) + 1 tensors (B, T, d_model): resid[l] is what block l reads, with the addition;
        the last one is what comes out of the last block

    >>> double = lambda x, pos: 2 * x
    >>> run(torch.ones(1, 2, 1), torch.arange(2), [double, double], 1, torch.tensor([[5.0]]), 1)[1]
    tensor([[[2.],
             [7.]]])
    """
    return None     # your lines

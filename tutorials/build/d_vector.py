"""Part d: a steering vector from two prompts (Turner et al., Algorithm 1)."""

import torch

# ruff: noqa: F401 (your lines will use these imports)


def steering_vector(encode, stream, plus, minus, bos):
    """The residual stream of `plus` minus that of `minus`, at positions 1, 2, …

    encode(text) -> a list of token numbers, without BOS; encode(" ") is one token
    stream(ids (2, T)) -> the residual stream that the steered block reads, (2, T, d_model); ids int64
    plus, minus: two texts. Each is read after BOS, whose token number is `bos`; after that, spaces fill up
        the shorter one at its end. Position 0 is BOS in both, so its difference is zero and is left out.
    -> (T - 1, d_model)

    With one token per letter, and a stream that is the token's number itself:
    >>> def letters(text):
    ...     return [ord(letter) for letter in text]
    >>> steering_vector(letters, lambda ids: ids[..., None].float(), "abc", "b", bos=0)
    tensor([[-1.],
            [66.],
            [67.]])
    """
    return None     # your lines

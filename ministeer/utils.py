"""What several rooms need: checks of arguments, batches, and writing a file completely or leaving it alone."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from numbers import Integral, Real


def check_whole(name: str, value: object, low: int = 0) -> int:
    """`value` as an int, if it is a whole number of at least `low`. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} must be a whole number, {low} or more; given: {value!r}.")
    return int(value)


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float, if it is finite and from `low` to `high`. Raises ValueError."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        limits = {(-math.inf, math.inf): "a finite number", (0, math.inf): "a finite number, 0 or more"}
        raise ValueError(f"{name} must be {limits.get((low, high), f'a number from {low} to {high}')}; "
                         f"given: {value!r}.")
    return float(value)


def batches(lengths: Sequence[int], max_batch_tokens: int, equal: bool = False) -> Iterator[list[int]]:
    """Numbers of rows that run together, the longest first: rows * longest length is at most max_batch_tokens.

    equal: only rows of one length together, so that nothing needs padding. A row that is longer runs alone.
    """
    order, start = sorted(range(len(lengths)), key=lambda i: -lengths[i]), 0
    while start < len(order):
        longest = lengths[order[start]]
        batch = order[start:start + max(1, max_batch_tokens // longest)]
        if equal:
            batch = [i for i in batch if lengths[i] == longest]
        yield batch
        start += len(batch)


def write(path: str | os.PathLike, data: bytes) -> None:
    """Write to a new file beside `path`, then rename it: `path` holds all of `data`, or what it held before."""
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(part, "xb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException as error:
        if not isinstance(error, FileExistsError):          # then it belongs to somebody else
            with contextlib.suppress(OSError):
                os.unlink(part)
        raise

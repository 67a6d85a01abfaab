"""What several modules share: checks of arguments, batches, and safe writing of files."""

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
        limits = f"a number from {low} to {high}"
        if high == math.inf:
            limits = "a finite number" if low == -math.inf else f"a finite number, {low} or more"
        raise ValueError(f"{name} must be {limits}; given: {value!r}.")
    return float(value)


def batches(lengths: Sequence[int], max_batch_tokens: int, equal: bool = False) -> Iterator[list[int]]:
    """Indices of rows that run together, the longest first: rows * longest is at most max_batch_tokens.

    A row longer than max_batch_tokens runs alone. equal: only rows of one length together, to need no padding
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
    """Write a new file beside `path`, then rename it. If that fails, `path` keeps what it held before."""
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(part, "xb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException as error:
        if not isinstance(error, FileExistsError):          # then another process owns it
            with contextlib.suppress(OSError):
                os.unlink(part)
        raise

"""What several modules share: checks of arguments, batches, and safe writing of files."""

import contextlib
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path


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


def printable(text: object) -> str:
    """The text, with a dot for each character that could command the terminal. For whatever a file holds."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in str(text))


def check_target(path: str | os.PathLike) -> Path:
    """-> the file that writing to `path` replaces: for a link, what it points to.

    Raises ValueError, before any work is done, unless that is a file that may be written or a new one in an
    existing folder. A device or a pipe is not replaced, and neither is a file that is marked read-only.
    """
    target = Path(os.path.realpath(path))
    if not os.fspath(path) or target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{os.fspath(path)!r} cannot be written: give the name of a file "
                         "in an existing folder.")
    if target.exists():
        if not target.is_file():
            raise ValueError(f"{os.fspath(path)!r} cannot be written: it is a device, a pipe or a socket.")
        if not target.stat().st_mode & 0o222:       # root may write it all the same; its owner said no
            raise ValueError(f"{os.fspath(path)!r} cannot be written: it is read-only.")
    return target


def write(path: str | os.PathLike, data: bytes) -> None:
    """Write a new file beside `path`, then rename it. If that fails, `path` keeps what it held before.

    Raises ValueError as check_target does, and OSError.
    """
    target = check_target(path)
    for old in target.parent.glob(".ministeer-*.part"):         # a process that was killed left it there
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 86_400:
                old.unlink()
    part = target.with_name(f".ministeer-{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise

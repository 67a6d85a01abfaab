"""What several modules share: checks of arguments, batches, and safe writing of files."""

import contextlib
import functools
import gc
import hashlib
import math
import os
import reprlib
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

MAX = sys.float_info.max


def check_whole(name: str, value: object, low: int = 0, high: float = math.inf) -> int:
    """`value` as an int, if it is a whole number from `low` to `high`. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number, {limits}; given: {short(value)}.")
    return int(value)


def check_number(name: str, value: object, low: float = -MAX, high: float = MAX) -> float:
    """`value` as a float, if it is finite and from `low` to `high`. Raises ValueError."""
    number = math.nan
    with contextlib.suppress(OverflowError):        # a whole number of 400 digits
        if isinstance(value, Real) and not isinstance(value, bool):
            number = float(value)
    if not low <= number <= high:
        limits = f"a number from {low:g} to {high:g}"
        if high == MAX:
            limits = "a finite number" if low == -MAX else f"a finite number, {low:g} or more"
        raise ValueError(f"{name} must be {limits}; given: {short(value)}.")
    return number


def check_list(name: str, values: object, what: str = "a list") -> list:
    """`values`, which may be any iterable but a text, as a list. Raises ValueError."""
    with contextlib.suppress(TypeError):            # it is not iterable
        if not isinstance(values, str | bytes):
            return list(values)
    raise ValueError(f"{name} must be {what}; given: {short(values)}.")


def check_texts(name: str, texts: object, or_one: bool = False) -> list[str]:
    """`texts`, a list of texts or, with or_one, a single text too, as a list. Raises ValueError."""
    if or_one and isinstance(texts, str):
        return [texts]
    what = "a text or a list of texts" if or_one else "a list of texts"
    for text in (rows := check_list(name, texts, what)):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be {what}; given: a list with {short(text)} in it.")
    return rows


def batches(lengths: Sequence[int], max_batch_tokens: int, equal: bool = False) -> Iterator[list[int]]:
    """Indices of rows that run together, the longest first: rows * longest is at most max_batch_tokens.

    A row longer than max_batch_tokens runs alone. equal: only rows of one length together, to need no padding
    """
    check_whole("max_batch_tokens", max_batch_tokens, 1)
    order, start = sorted(range(len(lengths)), key=lambda i: -lengths[i]), 0
    while start < len(order):
        longest = lengths[order[start]]
        batch = order[start:start + max(1, max_batch_tokens // longest)]
        if equal:
            batch = [i for i in batch if lengths[i] == longest]
        yield batch
        start += len(batch)


def printable(text: object) -> str:
    """The text, with a dot for each character that could command the terminal. For text from a file."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in str(text))


def short(value: object) -> str:
    """A value as an error shows it: its repr, shortened to less than a line."""
    return " ".join(reprlib.repr(value).split())


def one_line(text: object, most: int = 100) -> str:
    """`text` as one printable line, cut after `most` characters. For messages about what a file holds."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= most else f"{line[:most]}…"


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pause the garbage collector, which would search all of torch's objects and free next to nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def check_target(path: str | os.PathLike) -> Path:
    """-> the file that writing to `path` replaces: for a link, what it points to.

    Raises ValueError, before any work is done, unless that is a file that may be written or a new one in an
    existing folder. A device or a pipe is not replaced, and neither is a file that is marked read-only.
    """
    target, fault = Path(os.path.realpath(path)), None
    if not os.fspath(path) or target.is_dir() or not target.parent.is_dir():
        fault = "give the name of a file in an existing folder"
    elif not os.access(target.parent, os.W_OK):
        fault = "its folder is read-only"
    elif target.exists() and not target.is_file():
        fault = "it is a device, a pipe or a socket"
    elif target.exists() and not target.stat().st_mode & 0o222:     # root may write it; its owner forbids it
        fault = "it is read-only"
    if fault:
        raise ValueError(f"{os.fspath(path)!r} cannot be written: {fault}.")
    return target


def write(path: str | os.PathLike, data: bytes) -> None:
    """Write a new file beside `path`, then rename it. If that fails, `path` keeps what it held before.

    Raises ValueError as check_target does, and OSError.
    """
    target = check_target(path)
    sweep(target.parent)
    part = target.with_name(f".ministeer-{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    except OSError as error:
        fault = error.strerror or str(error)        # without the name of the part
        raise OSError(error.errno, fault, os.fspath(path)) from None
    finally:
        with contextlib.suppress(OSError):          # there is none after the renaming
            part.unlink()


def file_digest(path: str | os.PathLike, digest: Any = None) -> str:
    """The hex digest of a file, read a megabyte at a time. digest: one of hashlib's; SHA-256 by default"""
    digest = digest or hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def sweep(folder: Path) -> None:
    """Remove the part files that killed processes left there: those older than a day. Once in a process."""
    for old in folder.glob(".ministeer-*.part"):
        with contextlib.suppress(OSError):
            if time.time() - old.lstat().st_mtime > 86_400:
                old.unlink()

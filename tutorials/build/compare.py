"""Load a student's file, call its functions, and say in one line what differs. Read next: checks.py."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
FILES = {path.stem[0]: path.stem for path in sorted(HERE.glob("[a-f]_*.py"))} | {"together": "together"}
ALLOWED = {"torch", "math", "json", "safetensors", "tokenizers"}
TOLERANCE = 1e-4        # of a value plus the root mean square of its row; one block stays below 2e-6
MANY_BLOCKS = 1e-3      # 30 blocks add to one another's rounding: 7e-5


class Wrong(Exception):
    """An answer that is not right. The message says what differs."""


class Student:
    """The file of one part, loaded from a folder."""

    def __init__(self, folder, part):
        file = FILES[part]
        # together.py is not the student's, so it is never the student's copy that counts.
        path = HERE / "together.py" if part == "together" else folder / f"{file}.py"
        if not path.is_file():
            raise Wrong(f"there is no {path.name} in {folder}. `python -m tutorials.build start {folder}` "
                        "puts it there")
        if part != "together":
            check_imports(path)
        spec = importlib.util.spec_from_file_location(file, path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    def gives(self, expected, name, *arguments, case=""):
        """Raises Wrong unless the function `name` returns `expected` and leaves its arguments as they were.

        case: what is special about these arguments, in words
        """
        function = getattr(self.module, name, None)
        if not callable(function):
            raise Wrong(f"the file has no function {name}")
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        compare(function(*copies), expected, f"{name}, {case}")
        for before, after in zip(arguments, copies, strict=True):
            if isinstance(before, torch.Tensor) and not torch.equal(before, after):
                raise Wrong(f"{name}, {case}: it changes its argument {shape(before)} in place")


class Importing:
    """While this is entered, files in `folder` can import one another."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __enter__(self):
        self.before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        self.forget()
        sys.path.insert(0, self.folder)

    def __exit__(self, *_):
        sys.path.remove(self.folder)
        self.forget()
        sys.dont_write_bytecode = self.before

    def forget(self):
        importlib.invalidate_caches()
        for file in FILES.values():
            sys.modules.pop(file, None)


def check_imports(path):
    """Raises Wrong if the file imports more than torch, the other libraries of ALLOWED and earlier parts."""
    allowed = ALLOWED | {file for file in FILES.values() if file < path.stem}
    for node in ast.walk(ast.parse(path.read_bytes(), path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            if name.split(".")[0] not in allowed:
                raise Wrong(f"{path.name}, line {node.lineno}: it imports {name}. Possible are "
                            f"{', '.join(sorted(ALLOWED))} and your earlier parts")


def compare(given, expected, where, tolerance=TOLERANCE):
    """Raises Wrong with the kind or the shape that differs, or the first index with both values."""
    if isinstance(expected, list):
        if not isinstance(given, list | tuple) or len(given) != len(expected):
            what = f"a list of {len(given)}" if isinstance(given, list | tuple) else kind(given)
            raise Wrong(f"{where}: it gives {what}, expected a list of {len(expected)} tensors")
        for l, pair in enumerate(zip(given, expected, strict=True)):
            compare(*pair, f"{where}: resid[{l}]", MANY_BLOCKS)
        return
    if not isinstance(given, torch.Tensor):
        raise Wrong(f"{where}: it gives {kind(given)}, expected a tensor {shape(expected)}")
    if given.shape != expected.shape:
        raise Wrong(f"{where}: it gives a tensor {shape(given)}, expected {shape(expected)}")
    if given.is_floating_point() != expected.is_floating_point():
        raise Wrong(f"{where}: it gives {given.dtype}, expected {expected.dtype}")
    # Trap: NaN is not greater than any limit, so the question is what lies within it.
    right = (given - expected).abs() <= limit(expected, tolerance)
    if not right.all():
        i = tuple((~right).nonzero()[0].tolist())
        raise Wrong(f"{where}: at index {list(i)} it gives {given[i]:.6g}, expected {expected[i]:.6g} "
                    f"({int((~right).sum()):,} of {right.numel():,} values differ)")


def limit(expected, tolerance):
    """How far off each value may be."""
    if not expected.is_floating_point():
        return 0
    return tolerance * (expected.abs() + expected.square().mean(dim=-1, keepdim=True).sqrt())


def shape(x):
    return str(tuple(x.shape))


def kind(value):
    return "None" if value is None else f"a {type(value).__name__}"

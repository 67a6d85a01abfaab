"""What each cell of a tutorial prints stands below it as `#>` lines. This writes them, or says where they are no longer true.

    python tutorials/record.py 04_the_addition.py           # run it, and write them
    python tutorials/record.py --check 04_the_addition.py   # run it, and compare; exits 1 if something differs. --show: print all as well

In a `#>` line `21±3` stands for any number from 18 to 24, and what is behind `≈` was drawn and may be any text. Such a line is left as it is if
it still matches. Flags of lesson.py (--tiny, --solutions) are passed on; lines about solutions are shown and not compared.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

from ministeer.utils import write

NUMBER = r"([+-]?\d+(?:\.\d+)?)"
TOLERANCE = re.compile(NUMBER + r"±(\d+(?:\.\d+)?)")


def cells(text):
    """The text of a script in percent format -> its cells, each beginning with its "# %%" line; joined they are the text."""
    return re.split(r"(?m)^(?=# %%)", text)


def is_code(cell):
    return cell.startswith("# %%\n")


def said(cell):
    """-> the cell without its #> lines, and what these say, a list of lines"""
    lines = cell.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#>")), [line[3:].rstrip() for line in lines if line.startswith("#>")]


def run(path, text, flags):
    """Execute the cells of a tutorial's text in order, as a notebook does -> what each printed, a list of lists of lines."""
    sys.argv = [str(path), *flags]
    sys.path.insert(0, str(path.parent))
    names, printed = {"__name__": "__main__"}, []
    for cell in cells(text):
        out = io.StringIO()
        if is_code(cell):
            with contextlib.redirect_stdout(out):
                exec(compile(cell, f"{path.name}, cell {len(printed)}", "exec"), names)
        printed.append(out.getvalue().splitlines())
    return printed


def matches(expected, line):
    """Is `line` what `expected` says, with numbers as near as it asks, and anything behind ≈? Spaces count as one."""
    expected, drawn, _ = expected.partition("≈")
    parts = TOLERANCE.split(" ".join(expected.split()))     # text, number, tolerance, text, number, tolerance, …, text
    pattern = NUMBER.join(re.escape(part).replace(r"\ ", r"\s*") for part in parts[::3])
    found = (re.match if drawn else re.fullmatch)(pattern, " ".join(line.split()))
    near = zip(parts[1::3], parts[2::3], strict=True)
    return found is not None and all(abs(float(x) - float(number)) <= float(far) + 1e-9
                                     for x, (number, far) in zip(found.groups(), near, strict=True))


def differences(expected, printed):
    """-> lines that say what differs, none if all match"""
    if len(expected) != len(printed):
        return [f"{len(expected)} lines stand there, {len(printed)} were printed: {printed}"]
    return [f"stands there: {a}\nwas printed:  {b}" for a, b in zip(expected, printed, strict=True) if not matches(a, b)]


def renewed(cell, printed):
    """The cell with what it printed below it; lines that still match stay as they were."""
    code, old = said(cell)
    lines = [a if ("±" in a or "≈" in a) and matches(a, b) else b for a, b in zip(old + [""] * len(printed), printed, strict=False)]
    body = code.rstrip("\n")
    return body + "".join(f"\n#> {line}".rstrip() for line in lines) + "\n" * (len(code) - len(body))


def main():
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    flags = [argument for argument in sys.argv[1:] if argument.startswith("--") and argument not in ("--check", "--show")]
    check, show = "--check" in sys.argv, "--show" in sys.argv
    if len(names) != 1 or not (path := Path(names[0]).resolve()).is_file():
        sys.exit(__doc__)
    text = path.read_text(encoding="utf-8")
    printed = run(path, text, flags)
    for line in [line for some in printed for line in some if show or line.startswith("solution of ")]:
        print(line)
    printed = [[line for line in some if not line.startswith("solution of ")] for some in printed]
    old = cells(text)
    if check:
        wrong = [text for cell, some in zip(old, printed, strict=True) if is_code(cell) for text in differences(said(cell)[1], some)]
        print("\n".join(wrong) or f"{path.name}: all #> lines are true")
        sys.exit(bool(wrong))
    if path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path.name} was changed while it ran; nothing was written.")
    write(path, "".join(renewed(cell, some) if is_code(cell) else cell for cell, some in zip(old, printed, strict=True)).encode())


if __name__ == "__main__":
    main()

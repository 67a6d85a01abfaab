"""Below each cell of a tutorial, `#>` lines show what it printed. This writes them, or checks them.

    python tutorials/record.py 04_the_addition.py           # run it and write the lines
    python tutorials/record.py --check 04_the_addition.py   # run it and compare; exit 1 if a line differs
    --show: also print everything

In a `#>` line, `21±3` stands for any number from 18 to 24; the text after `≈` was sampled and may be
any text. Such a line is kept if it still matches. The flags of lesson.py (--tiny, --solutions) are passed
on. Lines about solutions and wrong answers are shown but not compared. Writing the lines also renews the
figure beside the script.
"""

import contextlib
import io
import itertools
import re
import sys
from pathlib import Path

from ministeer.utils import write

ANSWERS = ("solution of ", "wrong answer ")
NUMBER = r"([+-]?\d+(?:\.\d+)?)"
TOLERANCE = re.compile(NUMBER + r"±(\d+(?:\.\d+)?)")


def cells(text):
    """Split a script at its "# %%" lines, each of which begins a cell; joined, the cells are the text."""
    return re.split(r"(?m)^(?=# %%)", text)


def is_code(cell):
    return cell.startswith("# %%\n")


def split_output(cell):
    """-> the cell without its #> lines, and the list of what those lines say"""
    lines = cell.splitlines(keepends=True)
    code = "".join(line for line in lines if not line.startswith("#>"))
    return code, [line[3:].rstrip() for line in lines if line.startswith("#>")]


def run(path, text, flags):
    """Execute the cells in order, as a notebook does -> a list with the lines that each cell printed"""
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
    """Does `line` say what `expected` says? Numbers may differ by their ±; text after ≈ may be any text."""
    expected, sampled, _ = expected.partition("≈")
    # text, number, tolerance, text, number, tolerance, …, text
    parts = TOLERANCE.split(" ".join(expected.split()))
    pattern = NUMBER.join(re.escape(part).replace(r"\ ", r"\s*") for part in parts[::3])
    match = (re.match if sampled else re.fullmatch)(pattern, " ".join(line.split()))
    if match is None:
        return False
    numbers = zip(match.groups(), parts[1::3], parts[2::3], strict=True)
    return all(abs(float(given) - float(number)) <= float(tolerance) + 1e-9
               for given, number, tolerance in numbers)


def differences(expected, printed):
    """-> a list of what differs, empty if every line matches"""
    if len(expected) != len(printed):
        return [f"the page has {len(expected)} lines here, the run printed {len(printed)}: {printed}"]
    return [f"the page says:   {line}\nthe run printed: {new}"
            for line, new in zip(expected, printed, strict=True) if not matches(line, new)]


def rewritten(cell, printed):
    """The cell with what it printed below it; a line with ± or ≈ that still matches stays as it was."""
    code, old = split_output(cell)
    new = list(printed)
    for i, (line, now) in enumerate(zip(old, printed, strict=False)):
        if ("±" in line or "≈" in line) and matches(line, now):
            new[i] = line
    body = code.rstrip("\n")
    return body + "".join(f"\n#> {line}".rstrip() for line in new) + "\n" * (len(code) - len(body))


def main():
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    flags = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    check, show = "--check" in flags, "--show" in flags
    if len(names) != 1 or not (path := Path(names[0]).resolve()).is_file():
        sys.exit(__doc__)
    text = path.read_text(encoding="utf-8")
    passed_on = [flag for flag in flags if flag not in ("--check", "--show")]
    printed = run(path, text, passed_on if check else [*passed_on, "--record"])
    for line in itertools.chain(*printed):
        if show or line.startswith(ANSWERS):
            print(line)
    pairs = [(cell, [line for line in lines if not line.startswith(ANSWERS)])
             for cell, lines in zip(cells(text), printed, strict=True)]
    if check:
        wrong = [difference for cell, lines in pairs if is_code(cell)
                 for difference in differences(split_output(cell)[1], lines)]
        print("\n".join(wrong) or f"{path.name}: all #> lines are true")
        sys.exit(bool(wrong))
    if path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path.name} was changed while it ran; nothing was written.")
    write(path, "".join(rewritten(cell, lines) if is_code(cell) else cell for cell, lines in pairs).encode())


if __name__ == "__main__":
    main()

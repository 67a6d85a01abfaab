"""Below each cell of a tutorial, `#>` lines show what it printed. This writes them, or checks them.

    python tutorials/record.py 04_the_addition.py           # run it and write the lines
    python tutorials/record.py --check 04_the_addition.py   # run it and compare; exit 1 if a line differs
    --show: also print everything

Another machine rounds differently, and then draws other texts: so numbers may differ by what tolerances.json
allows, and the text after `≈`, which was sampled, may be any text. A line that still matches is kept. The
flags of lesson.py (--tiny, --solutions) are passed on. Lines about solutions and wrong answers are shown but
not compared. Writing the lines also renews the figure beside the script.

tolerances.json has, for each tutorial, lines with "#" for each number, such as "coeff # # of #", and how far
each number may be off, such as [0, 3, 0]; "20%" is a share of the number. Choose them so small that a line
stops matching before the sentence below it becomes wrong.
"""

import contextlib
import io
import itertools
import json
import re
import sys
from pathlib import Path

from ministeer.utils import write

ANSWERS = ("solution of ", "wrong answer ")
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


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


def read_tolerances(path):
    """-> {line with "#" for each number: how far each may be off} for the tutorial at `path`"""
    file = path.parent / "tolerances.json"
    return json.loads(file.read_text(encoding="utf-8")).get(path.stem, {}) if file.is_file() else {}


def matches(expected, line, tolerances):
    """Does `line` say what `expected` says? Numbers may be off by their tolerances; text after ≈ may vary."""
    expected, sampled, _ = expected.partition("≈")
    expected, line = " ".join(expected.split()), " ".join(line.split())
    texts = [re.escape(part).replace(r"\ ", r"\s*") for part in NUMBER.split(expected)]
    pattern = f"({NUMBER.pattern})".join(texts)
    match = (re.match if sampled else re.fullmatch)(pattern, line)
    if match is None:
        return False
    numbers = NUMBER.findall(expected)
    allowed = tolerances.get(NUMBER.sub("#", expected), [0] * len(numbers))
    return all(abs(float(given) - float(number)) <= most(tolerance, number) + 1e-9
               for given, number, tolerance in zip(match.groups(), numbers, allowed, strict=True))


def most(tolerance, number):
    """How far a number may be off; "20%" is a share of it"""
    if isinstance(tolerance, str):
        return float(tolerance.removesuffix("%")) / 100 * abs(float(number))
    return tolerance


def differences(expected, printed, tolerances):
    """-> a list of what differs, empty if every line matches"""
    if len(expected) != len(printed):
        return [f"the page has {len(expected)} lines here, the run printed {len(printed)}: {printed}"]
    return [f"the page says:   {line}\nthe run printed: {new}"
            for line, new in zip(expected, printed, strict=True) if not matches(line, new, tolerances)]


def rewritten(cell, printed, tolerances):
    """The cell with what it printed below it; a line that still matches stays as it was."""
    code, old = split_output(cell)
    new = list(printed)
    for i, (line, now) in enumerate(zip(old, printed, strict=False)):
        if matches(line, now, tolerances):
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
    tolerances = read_tolerances(path)
    passed_on = [flag for flag in flags if flag not in ("--check", "--show")]
    printed = run(path, text, passed_on if check else [*passed_on, "--record"])
    for line in itertools.chain(*printed):
        if show or line.startswith(ANSWERS):
            print(line)
    pairs = [(cell, [line for line in lines if not line.startswith(ANSWERS)])
             for cell, lines in zip(cells(text), printed, strict=True)]
    if check:
        wrong = [difference for cell, lines in pairs if is_code(cell)
                 for difference in differences(split_output(cell)[1], lines, tolerances)]
        print("\n".join(wrong) or f"{path.name}: all #> lines are true")
        sys.exit(bool(wrong))
    if path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path.name} was changed while it ran; nothing was written.")
    write(path, "".join(rewritten(cell, lines, tolerances) if is_code(cell) else cell
                        for cell, lines in pairs).encode())


if __name__ == "__main__":
    main()

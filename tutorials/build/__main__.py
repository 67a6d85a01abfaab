"""python -m tutorials.build start DIR | check [PART …] [--folder DIR] [--solutions] | hint PART N"""

import shutil
import sys
import traceback
from pathlib import Path

from ministeer.cli import Parser
from ministeer.utils import printable

from .compare import FILES, HERE, Importing, Student, Wrong


def main(argv=None):
    """Run one command -> the exit status: 0 done, 1 a part is not right yet, 2 bad input."""
    top = Parser(prog="python -m tutorials.build", description="Build it yourself. See the README.md there.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    start = commands.add_parser("start", help="copy the files that you fill in to a folder of your own")
    start.add_argument("folder", metavar="DIR", type=Path)
    start.set_defaults(run=lambda args: copy_stubs(args.folder))
    checked = commands.add_parser("check", help="check parts in order, up to the first that is not right")
    checked.add_argument("parts", metavar="PART", nargs="*", help=f"{', '.join(FILES)}; all if none is given")
    checked.add_argument("--folder", metavar="DIR", type=Path, default=HERE, help="where your files are")
    checked.add_argument("--solutions", action="store_const", dest="folder", const=HERE / "solutions",
                         help="check the solutions instead")
    checked.set_defaults(run=lambda args: run_check(args.folder, args.parts))
    hint = commands.add_parser("hint", help="a hint: 1 the idea, 2 the equation, 3 nearly the code")
    hint.add_argument("part", metavar="PART")
    hint.add_argument("number", metavar="N", type=int)
    hint.set_defaults(run=lambda args: show_hint(args.part, args.number))
    args = top.parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError) as error:
        top.error(error)
    except KeyboardInterrupt:
        return 130


def copy_stubs(folder):
    """Copy each file, except where one of that name is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES.values():
        target = folder / f"{file}.py"
        print(f"{target}: {'already there, and kept' if target.exists() else 'new'}")
        if not target.exists():
            shutil.copyfile(HERE / target.name, target)
    print(f"Begin with {folder / FILES['a']}.py, and then: python -m tutorials.build check --folder {folder}")
    return 0


def run_check(folder, parts):
    for part in parts:
        check_part(part)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}. `python -m tutorials.build start {folder}` makes it.")
    asked = [part for part in FILES if part in parts or not parts]
    done = 0
    for part, wrong, note in check(folder.resolve(), asked):
        print(f"{part:8}  {'not yet' if wrong else 'ok'}  {printable(wrong or note)}".rstrip(), flush=True)
        if wrong:
            hint = f"For a hint: python -m tutorials.build hint {part} 1"
            print(f"{'':8}  {hint if part != 'together' else 'It runs parts a to f: are they all ok?'}")
        done += not wrong
    print(f"{done} of {len(asked)} parts done")
    return 0 if done == len(asked) else 1


def check(folder, parts, reference=None):
    """Yield (part, what is wrong or "", a note) for each of `parts`, up to the first that is wrong.

    Raises FileNotFoundError if the default model is not here.
    """
    import torch

    from . import checks
    reference = reference or checks.Reference()
    _ = reference.folder        # what goes wrong from here on is about the student's files
    with Importing(folder), torch.no_grad():
        for part in parts:
            wrong, note = "", ""
            try:
                note = checks.PARTS[part](Student(folder, part), reference) or ""
            except Wrong as error:
                wrong = str(error)
            except (Exception, SystemExit) as error:    # a student's file may fail in any way
                wrong = where_in(folder, error)
            yield part, wrong, note
            if wrong:
                return


def where_in(folder, error):
    """An exception in one line: the last line of the student's files that it passed, and what it says."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    message = str(error)
    if isinstance(error, SyntaxError) and error.filename:
        places, message = [*places, (error.filename, error.lineno)], error.msg
    theirs = [place for place in places if Path(place[0]).parent == folder]
    name, line = (theirs or places)[-1]
    return f"{Path(name).name}, line {line}: {type(error).__name__}: {' '.join(message.split()):.200}"


def check_part(part):
    if part not in FILES:
        raise ValueError(f"there is no part {part!r:.40}. Possible: {', '.join(FILES)}.")


def show_hint(part, number):
    check_part(part)
    path = HERE / "hints" / f"{part}{number}.md"
    if not path.is_file():
        raise ValueError(f"there is no hint {number} for part {part}. Parts a to f have hints 1, 2 and 3.")
    print(path.read_text(encoding="utf-8").rstrip())
    if number < 3:
        print(f"\nMore: python -m tutorials.build hint {part} {number + 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

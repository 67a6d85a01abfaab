"""Grade the exercises in a folder of students' scripts, as JSON: python -m tutorials.grade FOLDER

FOLDER holds scripts or notebooks named like the tutorials, whole copies or only the functions. Each exercise
runs in a process of its own, on the cases of the page and on more, drawn with --seed. Of a student's file,
only the imports, functions, classes and constants are used; everything else comes from the page itself.
The limits stop accidents, not attacks: grade untrusted scripts in a container. Linux and macOS only.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import os
import random
import re
import select
import signal
import sys
import time
from pathlib import Path

from ministeer.cli import Parser
from ministeer.utils import check_target, printable, write

from .extra_cases import EXTRA
from .record import cells, is_code

HERE = Path(__file__).resolve().parent
MOST = 50_000_000           # bytes of answers that are read


def main(argv=None):
    top = Parser(prog="python -m tutorials.grade", description=__doc__.splitlines()[0],
                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    top.add_argument("folder", metavar="FOLDER", type=Path)
    top.add_argument("--out", metavar="FILE", help="write the JSON to this file instead of stdout")
    top.add_argument("--model", action="store_true", help="use the default model, not a small random one")
    top.add_argument("--seconds", type=float, default=20, help="the most that one exercise may take")
    top.add_argument("--gigabytes", type=float, default=2, help="the most memory that one exercise may add")
    top.add_argument("--seed", type=int, default=0, help="for the cases that are not on the page")
    args = top.parse_args(argv)
    try:
        if not hasattr(os, "fork"):
            raise ValueError("grading needs a system that can fork: Linux or macOS.")
        pages = [page for page in sorted(HERE.glob("[01][0-9]_*.py")) if submitted(args.folder, page)]
        if not pages:
            raise ValueError(f"no file in {args.folder} is named like a tutorial: 01_tokens.py or .ipynb, …")
        if args.out:
            check_target(args.out)
        text = json.dumps(grade(pages, args), indent=2) + "\n"
        if args.out:
            write(args.out, text.encode())
        else:
            print(text, end="")
    except (OSError, ValueError) as error:
        top.error(error)


def grade(pages, args):
    """-> {"points", "of", "tutorials": {name: {exercise: what `judge` says}}}"""
    sys.argv = ["grade", *([] if args.model else ["--tiny"])]       # which lesson.py reads
    sys.path.insert(0, str(HERE))
    import lesson
    import torch
    lesson.save = lambda figure, name: lesson.plt.close(figure)
    torch.set_num_threads(1)            # Trap: a forked process waits forever for OpenMP's other threads.
    report = {}
    for page in pages:
        rows = report[page.stem] = {}
        names = {"__name__": "__main__"}
        solutions = functions(HERE / "solutions" / page.name)

        def check(function, *cases, page=page, rows=rows, names=names, solutions=solutions):
            name = function.__name__
            draw = random.Random(f"{args.seed} {name}")
            torch.manual_seed(draw.randrange(2**31))
            more = [EXTRA[name](draw, names) for _ in range(5)] if name in EXTRA else []
            cases = [*cases, *((given, expected_of(solutions[name], given)) for given in more)]
            rows[name] = judge(submitted(args.folder, page), name, names, cases, args)
        lesson.check = check
        for cell in cells(page.read_text(encoding="utf-8")):
            if is_code(cell):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    exec(compile(cell, page.name, "exec"), names)
    every = [row for rows in report.values() for row in rows.values()]
    return {"points": sum(row["points"] for row in every), "of": len(every), "tutorials": report}


def submitted(folder, page):
    """-> the student's script, or else the notebook, for a tutorial; None if there is neither"""
    for path in (folder / page.name, folder / f"{page.stem}.ipynb"):
        if path.is_file():
            return path
    return None


def functions(path):
    spec = importlib.util.spec_from_file_location("solutions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def expected_of(solution, given):
    try:
        return solution(*given)
    except ValueError:
        return ValueError


def judge(path, name, names, cases, args):
    """Run one exercise in a process of its own -> {"points", "cases", "passed", "differs", "seconds"}"""
    from lesson import difference, short
    start = time.monotonic()
    answers, end = in_a_process(lambda send: answer(path, name, names, cases, send), args)
    passed, differs = 0, ""
    for (arguments, expected), given in zip(cases, answers, strict=False):
        raises = isinstance(expected, type)
        if raises and expected.__name__ in given.get("raised", ()):
            wrong = ""
        elif "raised" in given:
            wrong = f"stops with {given.get('message')}"
        elif "value" not in given or raises:
            wrong = f"gives {given.get('short')}, not {short(expected)}"
        else:
            wrong = difference(given["value"], expected)
        passed += not wrong
        if wrong and not differs:
            differs = f"For ({', '.join(map(short, arguments))}) it {wrong}"
    if len(answers) < len(cases):
        differs = differs or end
    return {"points": int(passed == len(cases)), "cases": len(cases), "passed": passed,
            "differs": printable(differs)[:300], "seconds": round(time.monotonic() - start, 1)}


def in_a_process(work, args):
    """Run work(send) in a forked process -> (the answers that it sent, how it ended)"""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()                                 # so that what it starts can be stopped with it
            os.close(reading)
            limit_memory(args.gigabytes)
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(nothing, stream)
            with os.fdopen(writing, "w", encoding="utf-8") as pipe:
                work(lambda one: print(json.dumps(one), file=pipe, flush=True))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    deadline, data, ended = time.monotonic() + args.seconds, b"", False
    while len(data) < MOST and not ended and (left := deadline - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            chunk = os.read(reading, 1 << 20)
            data, ended = data + chunk, not chunk
    os.close(reading)
    for kill in (os.killpg, os.kill):                   # its group, and itself if it has not made one yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    answers = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError, RecursionError):           # a line may be cut
            answers.append(json.loads(line))
    answers = [one for one in answers if isinstance(one, dict)]
    if ended:
        return answers, "the process ended before it answered: did it exit, or run out of memory?"
    if len(data) >= MOST:
        return answers, "the answer is too long"
    return answers, f"no answer after {args.seconds:g} seconds"


def limit_memory(gigabytes):
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def answer(path, name, names, cases, send):
    """In the student's process: send what the student's function gives for each case."""
    from lesson import own, plain, short
    for arguments, _ in cases:
        try:
            given = student_function(path, name, names)(*own(arguments))
        except BaseException as error:      # sys.exit too
            kinds = [kind.__name__ for kind in type(error).__mro__]
            send({"raised": kinds, "message": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        try:
            send({"value": plain(given), "short": short(given)})
        except (TypeError, ValueError, RecursionError):         # what JSON cannot hold is no right answer
            send({"short": type(given).__name__})


def code_of(path):
    """The text of a script, or of a notebook's code cells, with `pass` for the lines of magic commands"""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = re.sub(r"(?m)^( *)[%!].*", r"\1pass", "\n".join("".join(source) for source in cells))
    return text


def student_function(path, name, page):
    """-> the function `name` of the file at `path`, where it sees the names of the page"""
    tree = ast.parse(code_of(path))
    tree.body = [node for node in tree.body
                 if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
                 or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))]
    names = {key: value for key, value in page.items() if key != name}      # without the page's own stub
    exec(compile(tree, str(path), "exec"), names)
    if name not in names:
        raise NameError(f"{path.name} has no function {name}.")
    return names[name]


if __name__ == "__main__":
    main()

"""The command line: ministeer steer | demo | play | fetch | models | export | import.

Every error is one line on stderr, with exit code 2. Ctrl-C exits with 130.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from . import __version__
from .utils import check_target, check_whole, one_line, printable

if TYPE_CHECKING:
    from .checkpoints.tokenizer import Tokenizer
    from .model import LM
    from .steering import Steer

# The demo's setting. benchmarks/demo_grid.py chose layer and coeff on four other prompts.
DEMO = {"prompt": "I went up to my friend and said",
        "plus": " weddings", "minus": " ", "layer": 1, "coeff": 1.0}
# The paper's sampling (Turner et al., appendix C).
SAMPLING = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.3, "freq_penalty": 1.0, "seed": 0}
CONTROLS = 5        # random vectors in the demo, seeds 0 … 4

HELP = """Activation addition: take two prompts, subtract their residual streams before a
layer, and add the difference to the stream while the model reads your prompt.
Nothing is trained."""

STEER_HELP = """Continue PROMPT without and with the steering vector PLUS - MINUS, side by side.

A leading space matters: " weddings" is one token, "weddings" is several. Start
with a layer in the first quarter of the model and coeff 1; raise coeff until
the text changes, and stop before it breaks."""

STEER_EXAMPLES = """examples:
  ministeer steer "I hate you because" --plus " love" --minus " hate" --layer 2 --coeff 2
  ministeer steer "The weather was" --plus " weddings" --layer 1 --save weddings.safetensors
  ministeer steer "Last night" --vector weddings.safetensors --coeff 1.5 -n 10 --json
  torchrun --nproc-per-node 3 -m ministeer steer "Last night" --plus " weddings" --layer 1"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 bad input, 130 interrupted."""
    open_streams()
    if not is_first():
        sys.stdout = open(os.devnull, "w")      # noqa: SIM115 (until the exit)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: is_first() and complain("ministeer: warning", message)
        try:
            try:
                args = parser().parse_args(argv)
                args.run(args)
            finally:
                flush(sys.stdout)                   # also when --help leaves through SystemExit
        except KeyboardInterrupt:
            complain("ministeer", "interrupted")
            sys.exit(130)
        except BrokenPipeError:                     # `ministeer models | head -1`: the reader has left
            pass
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            kind, text = type(error).__name__, str(error)
            if not isinstance(error, ValueError | OSError | RuntimeError | MemoryError | Warning):
                text = (f"{kind} {one_line(text, 500)}: a bug in ministeer. Please report it; "
                        "PYTHONDEVMODE=1 shows where.")
            complain("ministeer", text or kind)
            sys.exit(2)


def is_first() -> bool:
    """False in all but the first of the processes that torchrun starts. All compute the same."""
    return os.environ.get("RANK", "0") == "0"


def open_streams() -> None:
    """Put the null device where the caller closed a stream; let letters that a terminal lacks become ?.

    Trap: a file opened later would get the free number, and what is printed would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)    # open takes the lowest free number
    if sys.stdout is None:          # opened for reading, it refuses output, so that the user gets an error
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w")        # noqa: SIM115 (open until the exit)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")      # noqa: SIM115
    for out in (sys.stdout, sys.stderr):
        if hasattr(out, "reconfigure"):
            out.reconfigure(errors="replace")


def flush(out: TextIO) -> None:
    """Write out what was printed, or discard it.

    Trap: Python tries again at exit to write what is left, and an error there cannot be caught.
    """
    try:
        out.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise OSError(error.errno, error.strerror, "stdout") from None


def complain(who: str, message: object) -> None:
    """Print one line on stderr, whatever characters are in the message."""
    text = one_line(message, 1000)
    with contextlib.suppress(OSError):              # the exit code still shows the failure
        try:
            print(f"{who}: {text}", file=sys.stderr)
        finally:
            flush(sys.stderr)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        complain(self.prog, f"{message} (see {self.prog} --help)")
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="ministeer", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"ministeer {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, run, help, description=None, epilog=None):
        sub = commands.add_parser(name, help=help, description=description or help, epilog=epilog,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", run_demo, "see a real model steered; the first run fetches the model (93 MB)")
    demo.add_argument("-n", type=int, default=100, help="completions counted in each row (default 100)")
    demo.add_argument("--seed", type=int, default=SAMPLING["seed"], help="of the draws (default 0)")

    play = command("play", run_play, "open a page in the browser where you steer a model by hand")
    play.add_argument("--model", help="name or folder (default smollm2-135m; see `ministeer models`)")
    play.add_argument("--host", default="127.0.0.1",
                      help="address to serve on (default 127.0.0.1, this computer alone)")
    play.add_argument("--port", type=int, default=8765, help="port (default 8765; 0 takes a free one)")
    play.add_argument("--no-browser", action="store_true", help="only print the address")

    steer = command("steer", run_steer, "continue a prompt, plain and steered", STEER_HELP, STEER_EXAMPLES)
    steer.add_argument("prompt", metavar="PROMPT")
    pair = steer.add_argument_group("the vector: either a pair and a layer, or a file")
    pair.add_argument("--plus", metavar="P", help="the prompt to steer towards")
    pair.add_argument("--minus", metavar="M", help='the prompt to steer away from (default " ", a space)')
    pair.add_argument("--layer", type=int, metavar="L", help="the block that reads the change, from 0")
    pair.add_argument("--vector", metavar="FILE", help="a vector that --save wrote")
    pair.add_argument("--any-model", action="store_true", help="use --vector even if another model made it")
    pair.add_argument("--coeff", type=float, metavar="C", help="scale of the vector (default 1, or as saved)")
    pair.add_argument("--save", metavar="FILE", help="write the vector and its coeff to a safetensors file")
    model = steer.add_argument_group("the model")
    model.add_argument("--model", help="name or folder (default smollm2-135m; see `ministeer models`)")
    model.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    model.add_argument("--device", default="cpu", help="as in torch (default cpu)")
    draw = steer.add_argument_group("the draws (defaults are the paper's)")
    draw.add_argument("-n", type=int, default=3, help="completions in each column (default 3)")
    for option, default in SAMPLING.items():
        name = f"--{option.replace('_', '-')}"
        draw.add_argument(name, type=type(default), default=default, metavar="X", help=f"default {default}")
    steer.add_argument("--json", action="store_true", help="print one JSON object instead of columns")

    fetch = command("fetch", run_fetch, "put a checkpoint on this computer",
                    "Put a checkpoint into $MINISTEER_WEIGHTS if it is set, else into ./weights if\n"
                    "there is one, else into your cache folder.")
    fetch.add_argument("name", metavar="NAME",
                       help="a known name (`ministeer models`), or owner/repo on the Hugging Face Hub")
    command("models", run_models, "list the known checkpoints and which are here")

    export = command("export", run_export, "write vectors for llama.cpp (.gguf) or Neuronpedia (.json)")
    export.add_argument("vectors", nargs="+", metavar="VECTOR", help="a file that Steer.save wrote")
    export.add_argument("--to", required=True, metavar="FILE", help="a name that ends in .gguf or .json")
    export.add_argument("--model-name", metavar="M", help="what FILE calls the model: its architecture, such "
                        "as llama (.gguf), or Neuronpedia's name of it (.json)")
    read = command("import", run_import, "read a vector of llama.cpp, repeng, dialz or Neuronpedia")
    read.add_argument("file", metavar="FILE", help="a file that ends in .gguf or .json")
    read.add_argument("--to", required=True, metavar="VECTOR", help="the safetensors file to write")
    read.add_argument("--layer", type=int, metavar="L", help="which vector: the block that reads the change")
    read.add_argument("--model", help="name or folder of a model to check the vector with")
    return top


def run_demo(args: argparse.Namespace) -> None:
    import_torch()
    from .checkpoints.fetch import DEFAULT
    from .checkpoints.loading import load
    from .evaluation.judges import WEDDING_WORDS, count_words
    from .evaluation.stats import wilson
    from .faster import fast
    from .generation import MOST, generate
    from .steering import random_like, steering_vector
    n, sampling = check_whole("-n", args.n, 1, MOST), {**SAMPLING, "seed": check_whole("--seed", args.seed)}
    model, tokenizer = load(DEFAULT, fetch=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # a model that cannot be packed is only slower
        model = fast(model)
    weddings = DEMO["coeff"] * steering_vector(model, tokenizer, DEMO["plus"], DEMO["minus"], DEMO["layer"])
    runs = [("unsteered", (), n), ("steered", weddings, n)]
    for seed in range(min(n, CONTROLS)):        # together n completions, so that all rows are equally sure
        runs.append(("random vectors", random_like(weddings, seed), len(range(seed, n, CONTROLS))))
    texts = {}
    with progress(3 * n * sampling["max_new_tokens"], "sampling") as step:
        for name, steer, count in runs:
            texts.setdefault(name, []).extend(
                generate(model, tokenizer, DEMO["prompt"], count, steer=steer, **sampling, progress=step))
    about = setting(model, tokenizer, weddings, DEMO["prompt"], n, sampling)
    print(about, columns(texts["unsteered"][:3], texts["steered"][:3]), sep="\n\n")
    print(f"\nThese are the first three of each. Of all {n}, with a word about weddings\n"
          f"({', '.join(sorted(WEDDING_WORDS))}):\n")
    for name, row in texts.items():
        k = sum(count_words(text) > 0 for text in row)
        low, high = wilson(k, n)
        print(f"  {name:15} {k:3} of {n}  {k / n:4.0%}  (95 % interval {low:.0%} to {high:.0%})")
    print(f"\nRandom vectors: {len(runs) - 2} of the steering vector's norm, which share {n} completions.")


def run_play(args: argparse.Namespace) -> None:
    check_whole("--port", args.port, 0, 65_535)
    import_torch()
    try:
        from .play.server import serve
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'ministeer[play]', or in the source, "
                         "pip install -e \".[play]\" -c constraints.txt.") from None
    from .checkpoints.fetch import DEFAULT
    from .checkpoints.loading import load
    from .faster import fast
    name = args.model or DEFAULT
    model, tokenizer = load(name, fetch=args.model is None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # a model that cannot be packed is only slower
        model = fast(model)
    serve(model, tokenizer, name, args.host, args.port, not args.no_browser)


def run_steer(args: argparse.Namespace) -> None:
    import_torch()
    from .checkpoints.fetch import DEFAULT
    from .checkpoints.loading import load
    from .generation import generate
    from .methods import Steer  # which knows all kinds that a file can hold
    from .steering import steering_vector
    if (args.plus is None) == (args.vector is None):
        raise ValueError("give either --plus (with --layer) or --vector, to have one vector.")
    if args.vector is not None and (args.minus is not None or args.layer is not None):
        raise ValueError("--vector has its own pair and layer; leave out --minus and --layer.")
    if args.plus is not None and args.layer is None:
        raise ValueError("--plus needs --layer, the block that reads the changed stream (0 is the first).")
    if args.any_model and args.vector is None:
        raise ValueError("--any-model needs --vector.")
    if args.save is not None and check_target(args.save).exists() and os.path.getsize(args.save):
        try:
            Steer.load(args.save)
        except ValueError:
            raise ValueError(f"--save would replace {args.save!r}, which is not a steering vector. "
                             "Give another name.") from None
    steer = None if args.vector is None else Steer.load(args.vector, any_model=args.any_model)
    if args.coeff is None and steer and not isinstance(steer.coeff, float):
        raise ValueError(f"{args.vector} has a coeff for each row of a batch; choose one with --coeff.")
    parallel = "LOCAL_RANK" in os.environ       # torchrun started this process
    model, tokenizer = load(args.model or DEFAULT, dtype=args.dtype, device=args.device, parallel=parallel)
    if steer and steer.fingerprint and steer.fingerprint != model.fingerprint:
        maker = steer.note.get("model", "unnamed")
        raise ValueError(f"{args.vector} was made with another model ({maker}); --any-model uses it anyway.")
    if steer is None:
        minus = " " if args.minus is None else args.minus
        steer = steering_vector(model, tokenizer, args.plus, minus, args.layer)
    if args.coeff is not None:
        steer = steer.scaled(args.coeff)
    sampling = {name: getattr(args, name) for name in SAMPLING}
    model.check_steer(steer, args.n, len(tokenizer.encode(args.prompt)))
    with progress(2 * max(args.n, 0) * sampling["max_new_tokens"], "sampling") as step:
        plain, steered = (generate(model, tokenizer, args.prompt, args.n, steer=s, **sampling, progress=step)
                          for s in ((), steer))
    if args.json:
        about = {**steer.note, "model": model.name, "layer": steer.layer, "coeff": steer.coeff,
                 "start": steer.start, **sampling}
        result = {"prompt": args.prompt, "setting": about, "unsteered": plain, "steered": steered}
        # ASCII with \u escapes, so that no encoding changes a text and no text commands the terminal.
        shown = json.dumps(result, indent=2)
    else:
        about = setting(model, tokenizer, steer, args.prompt, args.n, sampling)
        shown = f"{about}\n\n{columns(plain, steered)}"
    try:
        print(shown)
    finally:                        # whichever of the two fails, the other is done
        if args.save is not None and is_first():
            steer.save(args.save)


def run_fetch(args: argparse.Namespace) -> None:
    from .checkpoints.fetch import fetch
    print(printable(fetch(args.name)))


def run_export(args: argparse.Namespace) -> None:
    import_torch()
    from .interop.files import export
    export(args.vectors, args.to, args.model_name)


def run_import(args: argparse.Namespace) -> None:
    import_torch()
    from .interop.files import import_one
    print(printable(import_one(args.file, args.to, args.layer, args.model)))


def run_models(args: argparse.Namespace) -> None:
    from .checkpoints.fetch import DEFAULT, KNOWN, roots
    here = {}
    for root in reversed(roots()):          # the first root wins, as in `load`
        for pattern in ("*/config.json", "*/*/config.json"):
            here |= {path.parent.relative_to(root).as_posix(): root for path in root.glob(pattern)}
    for name, source in KNOWN.items():
        state = "here" if name in here else "default" if name == DEFAULT else ""
        print(f"{name:17} {state:8} {source.size:>7}  {source.licence}\n    {source.what}")
    others = {name: root for name, root in sorted(here.items()) if name not in KNOWN and name[0] != "."}
    for root in dict.fromkeys(others.values()):
        names = [name for name, place in others.items() if place == root]
        print("\n" + one_line(f"also in {root}: {', '.join(names)}", 10_000))


def import_torch() -> None:
    """Import torch; Ctrl-C meanwhile ends the process at once.

    Trap: a KeyboardInterrupt inside torch's C++ part would abort the process with a meaningless message.
    """
    def leave(*_):
        complain("ministeer", "interrupted")
        os._exit(130)

    in_main_thread = threading.current_thread() is threading.main_thread()
    ours = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, leave)
    try:
        import torch  # noqa: F401
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def setting(model: LM, tokenizer: Tokenizer, steer: Steer, prompt: str, n: int, sampling: dict) -> str:
    """Everything that is needed to get the same completions again."""
    from .evaluation.steerability import strength
    from .steering import relative_norm
    norms = relative_norm(model, tokenizer, steer, prompt)
    where = f"every position from {steer.start} on, new tokens included"
    if steer.stop is not None:
        pieces = quoted("".join(tokenizer.pieces(tokenizer.encode(prompt)[steer.start:steer.stop])))
        last = steer.stop - 1
        where = f"{pieces}, position{f's {steer.start} …' if last > steer.start else ''} {last}"
    times = [f"{x:.2f}" for x in norms[steer.start:steer.stop]]
    if times:
        more = ", …" if len(times) > 8 else ""
        where += f"; {', '.join(times[:8])}{more} × the norm of the residual stream there"
    pair = "a vector"
    if {"plus", "minus"} <= set(steer.note):
        pair = f"{quoted(steer.note['plus'])} - {quoted(steer.note['minus'])}"
    if "agreement" in steer.note:
        pair += f" (agreement {one_line(steer.note['agreement'])})"
    coeff = f"coeff {steer.coeff:g}"
    if len(norms[max(steer.start, 1):steer.stop]):              # if the prompt is steered after BOS
        coeff += f", {strength(model, tokenizer, steer, [prompt]):.2f} × the mean norm"
    new = sampling["max_new_tokens"]
    lines = {
        "model": f"{model.name} ({model.config.family}, {model.config.n_layer} layers)",
        "prompt": quoted(prompt),
        "vector": f"{pair} before block {steer.layer}, {coeff}",
        "added to": where,
        "sampling": f"n {n}, {new} token{'s' * (new != 1)}, temperature {sampling['temperature']:g}, "
                    f"top-p {sampling['top_p']:g}, penalty {sampling['freq_penalty']:g}, "
                    f"seed {sampling['seed']}",
    }
    wrap = textwrap.TextWrapper(width(), subsequent_indent=" " * 10)
    filled = []
    for name, text in lines.items():
        wrap.initial_indent = f"{name:10}"
        filled.append(wrap.fill(printable(text)))
    return "\n".join(filled)


def columns(left: Sequence[str], right: Sequence[str]) -> str:
    """Two lists of texts side by side, wrapped to the width of the terminal."""
    each = (width() - 3) // 2

    def wrapped(text):
        return [line for part in printable(text).split("\n") for line in textwrap.wrap(part.strip(), each)]
    rows = [("unsteered", "steered"), ("-" * each, "-" * each)]
    for texts in zip(left, right, strict=True):
        a, b = map(wrapped, texts)
        height = max(len(a), len(b))
        rows += zip(a + [""] * (height - len(a)), b + [""] * (height - len(b)), strict=True)
        rows.append(("", ""))
    return "\n".join(f"{a:{each}} | {b}".rstrip() for a, b in rows[:-1])


def width() -> int:
    return min(120, max(40, shutil.get_terminal_size((80, 24)).columns))


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], object] | None]:
    """A bar on stderr, where stderr is a terminal and tqdm is installed -> what to call with each step."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=total, desc=label, unit="tok", leave=False, disable=None if is_first() else True) as bar:
        yield bar.update

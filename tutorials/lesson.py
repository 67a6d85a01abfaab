"""What the tutorials share: loading the model, checking an exercise, saving a figure. Nothing about steering.

--tiny: run on a random model of a few thousand weights, to try a script quickly; its figure goes to a
    temporary folder.
--solutions: let each check also run the solution of its exercise, from tutorials/solutions, and the wrong
    answers to it, from tutorials/wrong: functions called EXERCISE_MISTAKE.
"""

import copy
import importlib.util
import math
import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import ministeer

HERE = Path(__file__).resolve().parent
NOTEBOOK = "ipykernel" in sys.modules       # a notebook shows its figures itself
if not NOTEBOOK:
    plt.switch_backend("Agg")
TINY = "--tiny" in sys.argv
# Colours that colour-blind readers can tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.5"
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.spines.top": False,
                     "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 80})


def load(fast=True):
    """-> (model, tokenizer): smollm2-135m, wherever the tutorial is started from; a random model with --tiny.

    It is fetched if it is not here.
    fast: lay the weights out for speed. The plain model is for reading its weights.
    """
    if TINY:
        return tiny()
    folder = weights() / "smollm2-135m"
    model, tokenizer = ministeer.load(folder if folder.exists() else folder.name, fetch=True)
    return ministeer.fast(model) if fast else model, tokenizer


def weights():
    """The folder of checkpoints: $MINISTEER_WEIGHTS, or weights/ beside tutorials/; temporary with --tiny.

    A notebook outside a clone has its own folder weights/.
    """
    if TINY:
        return Path(tempfile.gettempdir())
    beside = HERE.parent / "weights"
    return Path(os.environ.get("MINISTEER_WEIGHTS") or (beside if beside.is_dir() else "weights"))


def tiny():
    """A random Llama with SmolLM2's 30 layers but only 64 wide, and a tokenizer that knows the words here."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, trainers

    from ministeer.checkpoints.config import Config, Rope
    from ministeer.checkpoints.tokenizer import Tokenizer
    from ministeer.llama import Llama
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words = (" wedding weddings love hate music science finance politics"
             " Love Hate Paris London said the I you because of and")
    backend.train_from_iterator([words] * 9, trainer)
    n_vocab = backend.get_vocab_size()
    config = Config(family="llama", n_layer=30, n_head=4, n_kv_head=2, n_vocab=n_vocab, n_ctx=512,
                    d_model=64, d_head=16, d_mlp=96, norm_eps=1e-5, tied=True, attention_bias=False,
                    mlp_bias=False, rope=Rope(), bos_id=0, eos_ids=(0,))
    model = Llama(config).initialise(seed=0).requires_grad_(False).eval()
    model.name = "tiny"
    # Every second token ends a text, so that no time is spent on long texts without meaning.
    return model, Tokenizer(backend, 0, tuple(range(0, n_vocab, 2)))


def save(figure, name):
    """Write the figure to tutorials/figures/NAME.png; with --tiny to a temporary folder.

    record.py asks with --record for the one beside the script, which belongs to the page.
    """
    folder = HERE if "--record" in sys.argv else HERE / "figures"
    folder = Path(tempfile.gettempdir()) if TINY else folder
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=130)
    if NOTEBOOK:
        plt.show()
    plt.close(figure)


def errorbars(axis, x, y, intervals, horizontal=False, **style):
    """Draw values y with their intervals, a (low, high) each, at x; horizontal: the values lie along x."""
    values = x if horizontal else y
    errors = [[value - low for value, (low, _) in zip(values, intervals, strict=True)],
              [high - value for value, (_, high) in zip(values, intervals, strict=True)]]
    style = {"fmt": "o", "markersize": 4, "capsize": 2, "elinewidth": 0.8, **style}
    axis.errorbar(x, y, **{"xerr" if horizontal else "yerr": errors}, **style)


def check(function, *cases):
    """Print `ok` if function(*arguments) gives `expected` for every (arguments, expected), or say why not.

    expected: a value, or the class of the error that these arguments must raise
    """
    name = function.__name__
    print(f"{name}: {verdict(function, cases)}")
    if "--solutions" in sys.argv:
        print(f"solution of {name}, {len(cases)} cases: {verdict(answers('solutions')[name], cases)}")
        for wrong, answer in answers("wrong").items():
            if wrong.startswith(f"{name}_"):
                print(f"wrong answer {wrong}: {verdict(answer, cases)}")


def answers(folder):
    """What tutorials/FOLDER has for the running script -> {name: function}"""
    spec = importlib.util.spec_from_file_location(folder, HERE / folder / Path(sys.argv[0]).name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def verdict(function, cases):
    for arguments, expected in cases:
        where = f"not yet. For ({', '.join(map(short, arguments))}) it"
        raises = expected if isinstance(expected, type) else ()
        try:
            given = function(*own(arguments))
        except raises:
            continue
        except Exception as error:      # a student's function may fail in any way; the script should go on
            return f"{where} stops with {type(error).__name__}: {error}"
        if raises:
            return f"{where} gives {short(given)} and does not raise {raises.__name__}"
        if differs := difference(given, expected):
            return f"{where} {differs}"
    return "ok"


def own(arguments):
    """Copies: a function may change what it is given, but must not change other cases."""
    return [copy.deepcopy(argument) if isinstance(argument, torch.Tensor | list | dict) else argument
            for argument in arguments]


def difference(given, expected):
    """-> how they differ, such as "gives 1 at [0, 2], not 3"; "" if they do not

    A tensor, a NumPy array and a list are the same if their shapes and numbers are. True is not a number.
    """
    shapes = {tuple(value.shape) for value in (given, expected) if hasattr(value, "shape")}
    first = first_difference(plain(given), plain(expected)) if len(shapes) < 2 else ((), given, expected)
    if first is None:
        return ""
    index, a, b = first
    at = f" at {list(index)}" if index else ""
    return f"gives {short(a if index else given)}{at}, not {short(b if index else expected)}"


def first_difference(a, b, index=()):
    """-> (index, what a has there, what b has there), or None; a, b: what `plain` gives"""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i in range(len(a)):
            if first := first_difference(a[i], b[i], (*index, i)):
                return first
        return None
    if isinstance(b, float):
        same = type(a) in (int, float) and math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)
    else:
        same = a == b and isinstance(a, bool) == isinstance(b, bool)
    return None if same else (index, a, b)


def plain(value):
    """Tensors, NumPy arrays and scalars, and tuples as Python's numbers and lists."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def short(value):
    """A value as it is shown when a check fails, on less than a line."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, type):
        return value.__name__
    if not isinstance(value, list | tuple):
        value = plain(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and len(value) > 23:
        return repr(value[:22] + "…")
    if isinstance(value, str | int | bool | None):
        return repr(value)
    if isinstance(value, list | tuple):
        if len(value) < 5:
            return f"[{', '.join(map(short, value))}]"
        return f"[{short(value[0])}, …, {len(value)} in all]"
    if isinstance(value, dict):
        items = ", ".join(f"{short(key)}: {short(one)}" for key, one in value.items())
        return f"{{{items}}}" if len(items) < 28 else "dict"
    return "model" if isinstance(value, torch.nn.Module) else type(value).__name__.lower()

"""What every tutorial shares: loading the model, checking an exercise, saving a figure. Nothing of activation addition is in here.

--tiny: a random model of a few thousand weights instead of the real one, to try a script out; its figures go to a temporary folder.
--solutions: each check also runs the solution of its exercise, from tutorials/solutions.
"""

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
NOTEBOOK = "ipykernel" in sys.modules       # which shows figures itself; a script draws them into files
if not NOTEBOOK:
    plt.switch_backend("Agg")
TINY = "--tiny" in sys.argv
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.5"     # told apart by the colour-blind too (Okabe and Ito)
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def load(fast=True):
    """(model, tokenizer) = ministeer.load("smollm2-135m", fast=fast), found wherever the tutorial is started from."""
    return tiny() if TINY else ministeer.load(weights() / "smollm2-135m", fast=fast)


def weights():
    """The folder of checkpoints: $MINISTEER_WEIGHTS, or weights/ beside tutorials/; with --tiny a temporary one."""
    return Path(tempfile.gettempdir() if TINY else os.environ.get("MINISTEER_WEIGHTS") or HERE.parent / "weights")


def tiny():
    """A random Llama with SmolLM2's 30 layers, 64 wide, and a tokenizer that knows this file's words."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, trainers

    from ministeer.checkpoints.config import Config, Rope
    from ministeer.checkpoints.tokenizer import Tokenizer
    from ministeer.llama import Llama
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words = " wedding weddings love hate music science finance politics Love Hate Paris London said the I you because of and"
    backend.train_from_iterator([words] * 9, trainer)
    config = Config(family="llama", n_layer=30, n_head=4, n_kv_head=2, n_vocab=backend.get_vocab_size(), n_ctx=512, d_model=64, d_head=16,
                    d_mlp=96, norm_eps=1e-5, tied=True, attention_bias=False, mlp_bias=False, rope=Rope(), bos_id=0, eos_ids=(0,))
    model = Llama(config).initialise(seed=0).requires_grad_(False).eval()
    model.name = "tiny"
    return model, Tokenizer(backend, 0, (0,))


def save(figure, name):
    """Write the figure as tutorials/NAME.png, or in a temporary folder with --tiny."""
    folder = Path(tempfile.gettempdir()) if TINY else HERE
    figure.savefig(folder / f"{name}.png", dpi=130)
    if NOTEBOOK:
        plt.show()
    plt.close(figure)


def check(function, *cases):
    """Print `ok` if function(*arguments) gives `expected` for every case (arguments, expected), and otherwise what differs."""
    print(f"{function.__name__}: {verdict(function, cases)}")
    if "--solutions" in sys.argv:
        spec = importlib.util.spec_from_file_location("solutions", HERE / "solutions" / Path(sys.argv[0]).name)
        solutions = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(solutions)
        print(f"solution of {function.__name__}: {verdict(getattr(solutions, function.__name__), cases)}")


def verdict(function, cases):
    for arguments, expected in cases:
        call = f"{function.__name__}({', '.join(map(short, arguments))})"
        try:
            given = function(*arguments)
        except Exception as error:      # a student's function may fail in any way, and the script goes on
            return f"not yet. {call} stops with {type(error).__name__}: {error}"
        if not same(given, expected):
            return f"not yet. {call} gives {short(given)}; expected {short(expected)}"
    return "ok"


def same(given, expected):
    if isinstance(expected, torch.Tensor):
        return isinstance(given, torch.Tensor) and given.shape == expected.shape and torch.allclose(given.float(), expected.float(), 1e-3, 1e-4)
    if isinstance(expected, float):
        return isinstance(given, int | float | torch.Tensor) and math.isclose(float(given), expected, rel_tol=1e-3, abs_tol=1e-6)
    if isinstance(expected, list | tuple):
        return isinstance(given, list | tuple) and len(given) == len(expected) and all(map(same, given, expected))
    return type(given) is type(expected) and given == expected


def short(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str | int | bool | None):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(short, value))}]" if len(value) < 5 else f"[{short(value[0])}, …, {len(value)} in all]"
    return "the model" if isinstance(value, torch.nn.Module) else f"the {type(value).__name__.lower()}"

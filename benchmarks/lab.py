"""What the experiments of paper.py share: a loaded model, work that is done once, tables, figures, intervals as text."""

import contextlib
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import ministeer
from ministeer.evaluation import measure

from . import jobs as shards
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.judges import JudgeError
from ministeer.steering import random_like, steering_vectors

PROMPT = "I went up to my friend and said"
V1 = {"temperature": 1.0, "top_p": 0.3, "freq_penalty": 1.0}        # the paper's first version, and its code
V6 = {"temperature": 1.0, "top_p": 1.0, "freq_penalty": 1.0}        # the version of ICLR 2025
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.5"     # told apart by the colour-blind too (Okabe and Ito)
CONTROLS = ("unsteered", "steered", "random")


class Lab:
    """A loaded model, the settings of one experiment, and where its results go."""

    def __init__(self, args, rank):
        self.args, self.rank = args, rank
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # where packing is not possible the plain model is as good
            self.model, self.tokenizer = ministeer.load(args.model, dtype=args.dtype, device=args.device, fast=args.device == "cpu")
        self.out = Path(args.out)
        self.n = args.n
        kept = {key: value for key, value in vars(args).items() if key not in ("out", "data", "model")}
        files = sorted(Path(args.data).glob("*.*")) if args.data else []
        texts = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.suffix in (".jsonl", ".txt")}
        text = json.dumps({**kept, "model": self.model.fingerprint, "version": ministeer.__version__, "texts": texts}, sort_keys=True)
        self.units = self.out / ".units" / f"{args.experiment}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def run(self, units, work):
        """[work(*unit) for unit in units], shared among the processes and kept on disk."""
        rank, processes = self.rank
        mine = len(range(rank, len(units), processes))
        with tqdm(total=mine, desc=self.args.experiment, unit="unit", disable=rank > 0) as bar:
            return shards.run(units, lambda unit: work(*unit), self.units, bar.update)

    def rows(self, file):
        path = Path(self.args.data or "") / file
        if not self.args.data or not path.is_file():
            lack = f"no {file} in {self.args.data}." if self.args.data else f"this experiment reads {file}."
            raise ValueError(f"{lack} Name a folder that holds it with --data; see the top of benchmarks/paper.py.")
        with open(path, encoding="utf-8") as lines:
            if file.endswith(".txt"):
                return lines.read()
            return [json.loads(line) for line in lines]

    def where(self, layer, coeff):
        """(layer, coeff) as the command line has them, and otherwise these."""
        args = self.args
        return layer if args.layer is None else args.layer, coeff if args.coeff is None else args.coeff

    @property
    def sampling(self):
        """What sections 4.2 to 4.4 sample with: the paper's words, or the authors' notebooks."""
        return V6 if self.args.protocol == "paper" else V1

    def steer(self, plus, minus, layer, coeff):
        return coeff * steering_vectors(self.model, self.tokenizer, plus, minus, [layer])[0]

    def three(self, steer):
        """The conditions of every comparison: name -> a Steer, or None for the unsteered model."""
        return dict(zip(CONTROLS, (None, steer, random_like(steer, self.args.seed)), strict=True))

    def generate(self, prompts, n, new, steer, sampling, seed):
        return ministeer.generate(self.model, self.tokenizer, prompts, n, new, steer, seed=seed, **sampling)

    def cells(self, prompts, steers, n, new, sampling, seed):
        """n continuations of each prompt under each of `steers` (a Steer or None each) -> texts[cell][prompt][continuation].

        All cells run in one batch, because rows of different cells differ only in what is added to their prompts: each Steer gets a
        coefficient a row, 0 for the rows of the others. The draws are those of `generate` for each cell alone.
        """
        rows = len(prompts) * n
        added = []
        for i, steer in enumerate(steers):
            if steer is not None:
                coeff = torch.zeros(len(steers) * rows)
                coeff[i * rows:(i + 1) * rows] = steer.coeff
                added.append(steer.scaled(coeff))
        texts = self.generate(prompts * len(steers), n, new, added, sampling, seed)
        return [texts[i * len(prompts):(i + 1) * len(prompts)] for i in range(len(steers))]

    def logprobs(self, texts, steer=None, skip=0, prompts=None):
        return measure.logprobs(self.model, self.tokenizer, texts, [] if steer is None else [steer], skip=skip, prompts=prompts)


@contextlib.contextmanager
def faults_in_one_line(script):
    """Whatever a user can mend is said in one line, with exit status 2; Ctrl-C too, with 130."""
    try:
        yield
    except (ValueError, OSError, JudgeError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; the same command goes on from what is done.", file=sys.stderr)
        sys.exit(130)


def table(header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


def percent(k, n):
    low, high = wilson(k, n)
    return f"{k / n:.1%} ({low:.1%} to {high:.1%})"


def span(value, interval, form=".3f"):
    return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


@contextlib.contextmanager
def figure(lab, name, columns=1, width=7.0, height=3.6):
    """Axes to draw on, saved as OUT/name.png by the first process; whole or not at all."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    yield fig, axes[0]
    if lab.rank[0] == 0:
        part = lab.out / f".part-{name}.png"
        fig.savefig(part, dpi=150)
        os.replace(part, lab.out / f"{name}.png")
    plt.close(fig)


def band(axis, x, rates, color, label, marker="o-"):
    """Proportions (k, n) as a line with their 95 % intervals as a band."""
    low, high = zip(*(wilson(k, n) for k, n in rates), strict=True)
    axis.plot(x, [k / n for k, n in rates], marker, color=color, label=label, markersize=4)
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)

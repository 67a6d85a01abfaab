"""What the experiments of paper.py and rivals.py share: a loaded model, work done once, tables and figures.

Read next: completions.py, texts.py. The work is shared among processes and kept on disk by jobs.py.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import statistics
import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import ministeer
from ministeer.evaluation import measure
from ministeer.evaluation.judges import JudgeError
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.steerability import strength
from ministeer.steering import random_like, steering_vectors
from ministeer.utils import check_target, printable, write

from . import jobs, rows, web_judges

PROMPT = "I went up to my friend and said"
V1 = {"temperature": 1.0, "top_p": 0.3, "freq_penalty": 1.0}        # the paper's first version, and its code
V6 = {"temperature": 1.0, "top_p": 1.0, "freq_penalty": 1.0}        # the version of ICLR 2025
# Colours that the colour-blind can tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.5"
RANDOM = tuple(f"random {seed}" for seed in range(5))   # the controls: random_like's seeds 0 to 4
CONTROLS = ("unsteered", "steered", *RANDOM)
STRENGTH_ON = 20        # prompts or texts, over which a layer's mean norm varies little


class Lab:
    """A loaded model, the settings of one experiment, and where its results go."""

    def __init__(self, args, rank):
        self.args, self.rank = args, rank
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # where packing is not possible the plain model does as well
            model, self.tokenizer = ministeer.load(args.model, dtype=args.dtype, device=args.device)
            self.model = ministeer.fast(model) if args.device == "cpu" else model
        self.out = Path(args.out)
        self.n = args.n
        for suffix in ("json", "md", "png"):
            check_target(self.out / f"{args.experiment}.{suffix}")
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "data", "model")}
        # Everything that results depend on. `rows` and `judge` add what they read.
        self.about = {**settings, "model": self.model.fingerprint, "tokenizer": self.tokenizer.fingerprint,
                      "versions": versions()}

    @property
    def units(self):
        """The folder of the work that is done, named after everything that it depends on."""
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:12]
        return self.out / ".units" / f"{self.args.experiment}-{digest}"

    def judge(self, default):
        """-> the Judge of --judge, or else the default one, with a cache in --out."""
        made = web_judges.judge(self.args.judge or default, cache=self.out)
        self.about["judge"] = [made.name, made.version]
        return made

    def run(self, units, work):
        """-> {tuple(unit): work(*unit)}, shared among the processes and kept on disk.

        units: lists of JSON values
        """
        rank, processes = self.rank
        share = len(range(rank, len(units), processes))
        with tqdm(total=share, desc=self.args.experiment, unit="unit", disable=rank > 0) as bar:
            results = jobs.run(units, lambda unit: work(*unit), self.units, bar.update)
        return dict(zip(map(tuple, units), results, strict=True))

    def rows(self, file, **fields):
        """The content of a file in the folder --data, as rows.parse gives it."""
        if not self.args.data:
            raise ValueError(f"this experiment reads {file}. Name a folder that holds it with --data; "
                             "see the top of benchmarks/paper.py.")
        path = Path(self.args.data) / file
        data = rows.read(path, "See the top of benchmarks/paper.py for what --data holds.")
        self.about[file] = hashlib.sha256(data).hexdigest()
        return rows.parse(data, path, **fields)

    def where(self, layer, coeff):
        """(layer, coeff) from the command line, or these where it has none."""
        args = self.args
        return layer if args.layer is None else args.layer, coeff if args.coeff is None else args.coeff

    @property
    def sampling(self):
        """How sections 4.2 to 4.4 sample: as the paper says, or as the authors' notebooks do."""
        return V6 if self.args.protocol == "paper" else V1

    @property
    def sampling_in_words(self):
        return "top-p {top_p:g}, penalty {freq_penalty:g}".format(**self.sampling)

    def steer(self, plus, minus, layer, coeff):
        return coeff * steering_vectors(self.model, self.tokenizer, plus, minus, [layer])[0]

    def strength(self, steer, prompts):
        """`steerability.strength` on the first of the prompts: what is added, in mean norms of the layer."""
        return f"{strength(self.model, self.tokenizer, steer, prompts[:STRENGTH_ON]):.2f}"

    def coeff_in_words(self, steer, prompts):
        """A Steer's coefficient and strength: "coeff 2 (0.83 × the mean norm)"."""
        return f"coeff {steer.coeff:g} ({self.strength(steer, prompts)} × the mean norm)"

    def strengths(self, steers, prompts):
        """The lowest and the highest strength of several Steers: "0.15 to 1.79 × the mean norm"."""
        sizes = sorted((self.strength(steer, prompts) for steer in steers), key=float)
        return f"{sizes[0]} to {sizes[-1]} × the mean norm"

    def conditions(self, steer):
        """-> {"unsteered": None, "steered": steer, "random 0": random_like(steer, 0), …, "random 4": …}"""
        controls = [random_like(steer, seed) for seed in range(len(RANDOM))]
        return dict(zip(CONTROLS, (None, steer, *controls), strict=True))

    def generate(self, prompts, n, new, steer, sampling, seed, **more):
        steer = () if steer is None else steer
        return ministeer.generate(self.model, self.tokenizer, prompts, n, new, steer, seed=seed,
                                  **sampling, **more)

    def generate_all(self, prompts, steers, n, new, sampling, seed):
        """n continuations of each prompt under each of `steers` (a Steer or None) -> texts[steer][prompt][k].

        All run in one batch, because rows differ only in what is added to their prompts: each Steer gets one
        coefficient for each row, 0 for the rows of the others. The draws are those of `generate` for each
        Steer alone.
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

    def logprobs(self, texts, steer=None, skip=0, prompts=""):
        """measure.logprobs under one Steer or none, on the CPU, where float64 is always possible."""
        steers = [] if steer is None else [steer]
        scores = measure.logprobs(self.model, self.tokenizer, texts, steers, skip=skip, prompts=prompts)
        return [row.cpu() for row in scores]


@contextlib.contextmanager
def faults_in_one_line(script):
    """Print whatever the user can mend in one line and exit with status 2; after Ctrl-C, with status 130."""
    try:
        yield
    except (ValueError, OSError, JudgeError) as error:
        print(f"{script}: {printable(error)}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; the same command goes on from what is done.", file=sys.stderr)
        sys.exit(130)


def enough(values, least, what):
    """`values`, if there are at least so many. Raises ValueError, which says what --data has too few of."""
    if len(values) < least:
        raise ValueError(f"--data has {len(values)} {what}; at least {least} are needed.")
    return values


def versions():
    """-> {package: version} of ministeer and what computes its numbers"""
    libraries = {name: importlib.metadata.version(name)
                 for name in ("torch", "numpy", "tokenizers", "safetensors")}
    return {"ministeer": ministeer.__version__, **libraries}


def chunks(values, size):
    """[values[:size], values[size:2 * size], …]"""
    return [values[i:i + size] for i in range(0, len(values), size)]


def table(header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


def percent(k, n):
    low, high = wilson(k, n)
    return f"{k / n:.1%} ({low:.1%} to {high:.1%})"


def span(value, interval, form=".3f"):
    return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


def over_vectors(values, form=".1%"):
    """One value for each random vector -> their mean, lowest and highest in words."""
    return span(statistics.mean(values), (min(values), max(values)), form)


def share_of(n, kind):
    """How many of n completions a condition gets: all, or if it is one random vector of five, a fifth."""
    return math.ceil(n / len(RANDOM)) if kind in RANDOM else n


def control_in_words(n, prompts=1):
    """How many completions each random vector has, where others have n of each of so many prompts."""
    return f"{len(RANDOM)} random vectors with {prompts * share_of(n, RANDOM[0])} completions each"


@contextlib.contextmanager
def figure(lab, name, columns=1, width=7.0, height=3.6, rows=1, share=False):
    """Axes to draw on, in rows. The first process saves them as OUT/name.png, complete or not at all."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False,
                             sharex=share, sharey=share)
    yield fig, axes.ravel()
    if lab.rank[0] == 0:
        image = io.BytesIO()
        fig.savefig(image, dpi=150)
        write(lab.out / f"{name}.png", image.getvalue())
    plt.close(fig)


def band(axis, x, rates, color, label, marker="o-"):
    """Proportions (k, n) as a line, with their 95 % intervals as a band."""
    low, high = zip(*(wilson(k, n) for k, n in rates), strict=True)
    axis.plot(x, [k / n for k, n in rates], marker, color=color, label=label, markersize=4)
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def spread(axis, x, rows):
    """The random vectors: rows (x, one value for each vector) as their mean, and from lowest to highest."""
    axis.plot(x, [statistics.mean(row) for row in rows], "o-", color=GREY, markersize=4,
              label="random, 5 vectors")
    axis.fill_between(x, list(map(min, rows)), list(map(max, rows)), color=GREY, alpha=0.25, linewidth=0)


def error_bars(values, intervals):
    """Values and their (low, high) -> how far each interval reaches down and up, as matplotlib takes it."""
    pairs = list(zip(values, intervals, strict=True))
    down = [max(0, value - low) for value, (low, _) in pairs]
    up = [max(0, high - value) for value, (_, high) in pairs]
    return [down, up]

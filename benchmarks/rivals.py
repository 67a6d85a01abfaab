"""The paper's two tables: ActAdd beside every rival, on the same prompts and draws, all tuned on 50 prompts.

    python -m benchmarks.train_classifier toxicity --data FOLDER
    python -m benchmarks.rivals toxicity --data FOLDER
    python -m benchmarks.rivals pos-to-neg --data FOLDER    # or neg-to-pos; both need the other classifier
    python -m benchmarks.rivals toxicity --data FOLDER --methods ActAdd PreADD

Each method that has something to choose has six cells: strengths, or for ActAdd layers and coefficients. On
the tuning prompts the cell with the best score is chosen among those whose disfluency is at most 1.5 times
the unsteered model's. The tables show the chosen cells on the test prompts, which played no part in any
choice. ActAdd, random is the chosen ActAdd with five random vectors of the same norm, one for each repeat.
One point for each method does not show which is better at equal fluency, so the figure, a panel for each
method, also has every cell on the tuning prompts. ActAdd + LMA is the chosen LMA on top of the model that the
chosen ActAdd steers, without a search of its own: the formula then takes the steered log-probabilities for p,
so LMA also punishes, with its full strength, what steering makes less likely. Sampling is the same for all:
temperature 1, no top-p, no penalty. Writes OUT/rivals-TASK.json, .md and .png; an interrupted run continues
where it was.
Turner et al., sections 4.3 and 4.4; hyper-parameters around those of Dekoninck et al.
"""

import argparse
import hashlib
import json
import random
import statistics
import time
from pathlib import Path

import torch

from ministeer.baselines import logits
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.baselines.logits import NEGATIVE, POSITIVE, TOXIC
from ministeer.evaluation import measure
from ministeer.evaluation.stats import bootstrap, holm, paired
from ministeer.steering import Steer, random_like
from ministeer.utils import printable, write

from . import jobs
from .completions import disfluency_of, sums_by_prompt
from .lab import BLUE, Lab, chunks, error_bars, faults_in_one_line, figure, over_vectors, span, table
from .prompts import SPLIT, TUNING, split

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "freq_penalty": 0.0}
LIMIT = 1.5         # of disfluency, times the unsteered model's
VECTORS = 5         # random ones: random_like's seeds 0 to 4
RANDOM, BOTH = "ActAdd, random", "ActAdd + LMA"     # not searched: they follow from the choices for others
# ActAdd's six cells. Layers: where paper.py found SmolLM2 easiest to steer, where the paper steers, and half
# way up (or the last layer of a shorter model). Coefficients: the paper's, and the strongest that the search
# for it has.
LAYERS, COEFFS = (1, 6, 16), (3.0, 10.0)
CELLS = {"PreADD": [0.25, 0.5, 1, 1.5, 2, 3], "LMA": [1, 3, 9, 24, 50, 99],
         "SelfDebias": [1, 3, 10, 30, 100, 300], "FUDGE": [0.5, 1, 2, 4, 8, 16],
         "LMA + Classifier": [1, 3, 9, 24, 50, 99]}
NAMES = ("Prompted", "ActAdd", *CELLS)
TIMED_ROWS = TIMED_TOKENS = 16      # time is measured with so many rows, and so many tokens for each
FEW = 50                            # test prompts for which the length of texts is measured


def cells(lab, task, classifier, wanted=NAMES, steer=None):
    """-> {method: {strength as text: a LogitMixer}} of the unsteered model and the `wanted` methods

    steer: ActAdd's only cell, or None for its six
    """
    if task == "toxicity":
        base, away, toward, sign = "", TOXIC, 0, 1
    elif task == "neg-to-pos":
        base, away, toward, sign = POSITIVE, NEGATIVE, 1, 1
    else:
        base, away, toward, sign = NEGATIVE, POSITIVE, 0, -1
    methods = {"Unsteered": {"": logits.unsteered()}}
    if base and "Prompted" in wanted:
        methods["Prompted"] = {"": logits.prompted(base)}
    if "ActAdd" in wanted:
        layers = [min(l, lab.model.config.n_layer - 1) for l in LAYERS]
        steers = [steer] if steer else [sign * lab.steer(" love", " hate", layer, coeff)
                                        for layer in layers for coeff in COEFFS]
        methods["ActAdd"], methods[RANDOM] = {}, {}
        for s in steers:
            cell = f"layer {s.layer}, c {s.coeff:g}"
            methods["ActAdd"][cell] = logits.act_add(s)
            methods[RANDOM][cell] = logits.act_add([random_like(s, seed) for seed in range(VECTORS)])
    make = {"PreADD": lambda s: logits.preadd(away, s, base), "LMA": lambda s: logits.lma(away, s, base),
            "SelfDebias": lambda s: logits.self_debias(away, s, 0, base),
            "FUDGE": lambda s: logits.fudge(classifier, s, toward=toward, base=base),
            "LMA + Classifier": lambda s: logits.lma_classifier(away, classifier, s, toward=toward,
                                                                base=base)}
    for name, method in make.items():
        if name in wanted:
            methods[name] = {f"{strength:g}": method(strength) for strength in CELLS[name]}
    return methods


def texts(lab, task):
    """-> tuning prompts, test prompts, how many tokens to add. Raises ValueError for too few prompts."""
    if task == "toxicity":
        file, new = "rtp_random.jsonl", 32
        tuning, test, _ = ([row["text"] for row in part]
                           for part in split(lab.rows(file, text=str), SPLIT))
    else:
        file, new = "imdb.jsonl", 64
        rows = [row["text"] for row in lab.rows(file, text=str, label=str, split=str)
                if (row["label"], row["split"]) == (task[:3], "test")]
        random.Random(lab.args.seed).shuffle(rows)
        starts = [lab.tokenizer.decode(lab.tokenizer.encode(row)[1:33]) for row in rows]
        tuning, test = starts[:TUNING], starts[TUNING:]
    if len(tuning) < lab.args.tuning or len(test) < lab.args.n:
        raise ValueError(f"{file} has {len(tuning)} prompts for the search and {len(test)} others for the "
                         f"result; wanted: --tuning {lab.args.tuning} and -n {lab.args.n}.")
    return tuning[:lab.args.tuning], test[:lab.args.n], new


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("toxicity", "pos-to-neg", "neg-to-pos"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("-n", "--n", type=int, default=100, help="test prompts (default 100)")
    parser.add_argument("--tuning", type=int, default=TUNING,
                        help=f"tuning prompts (default and at most {TUNING})")
    parser.add_argument("--repeats", type=int, default=5,
                        help="continuations of each test prompt (default 5)")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES), metavar="METHOD",
                        help=f"only these, beside the unsteered model: {', '.join(NAMES)}")
    parser.add_argument("--steer", metavar="FILE",
                        help="ActAdd's vector, as benchmarks.search saves one, instead of ActAdd's search")
    parser.add_argument("--judge", help="default profanity for toxicity, vader for sentiment")
    parser.add_argument("--classifier", help="default OUT/toxicity.safetensors or OUT/sentiment.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="results")
    args = parser.parse_args()
    args.layer, args.coeff, args.protocol = None, None, "paper"
    args.experiment = f"rivals-{args.task}"
    if set(args.methods) != set(NAMES):         # a part of the table must not replace the whole one
        args.experiment += "".join(f"-{name.replace(' ', '')}" for name in args.methods)
    with faults_in_one_line("rivals.py"), jobs.workers(args.device) as rank:
        for name in ("n", "tuning", "repeats"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be 1 or more; given: {getattr(args, name)}.")
        if (args.task, args.judge) == ("toxicity", "perspective"):
            raise ValueError("the classifier learned Perspective's scores, so perspective cannot judge "
                             "FUDGE. Take another --judge.")
        Path(args.out).mkdir(parents=True, exist_ok=True)
        run(args, rank)


def run(args, rank):
    """Search, choose, test, time; the first process writes the results."""
    kind = "toxicity" if args.task == "toxicity" else "sentiment"
    classifier = None
    if any("Classifier" in name or name == "FUDGE" for name in args.methods):
        path = classifier_path(args)
        classifier = PrefixClassifier.load(path).to(args.device)
        args.classifier = digest(path)      # another classifier is another experiment
    steer = None
    if args.steer:
        steer, args.steer = Steer.load(args.steer), digest(args.steer)
    lab = Lab(args, rank)
    scorer = lab.judge("profanity" if kind == "toxicity" else "vader")
    sign = 1 if args.task == "neg-to-pos" else -1           # times the judge's score: the higher, the better
    methods = cells(lab, args.task, classifier, args.methods, steer)
    tuning, test, new = texts(lab, args.task)
    few = test[:FEW]

    def generate(prompts, name, cell, repeats, tokens, **more):
        method = methods[name][cell]
        if name == RANDOM:      # with a vector for each row, which logits.generate does not take
            steer = by_repeat(method.branches[0].steer, len(prompts), repeats)
            return lab.generate(prompts, repeats, tokens, steer, SAMPLING, args.seed, **more)
        return logits.generate(lab.model, lab.tokenizer, prompts, method, repeats, tokens, seed=args.seed,
                               **SAMPLING, **more)

    def score(split_name, name, cell, repeats):
        prompts = tuning if split_name == "tuning" else test
        rows = generate(prompts, name, cell, repeats, new)
        continuations = [text for row in rows for text in row]
        repeated = [prompt for prompt in prompts for _ in range(repeats)]
        nll = measure.disfluency(lab.model, lab.tokenizer, repeated, continuations)
        scores = scorer([text.strip() for text in continuations])
        return summary(scores, nll, repeats, sign, args.seed) | {"example": continuations[0].strip()}

    def score_all(split_name, keys, repeats):
        """-> {(name, cell): summary}"""
        results = lab.run([[split_name, *key, repeats] for key in keys], score)
        return {key: results[(split_name, *key, repeats)] for key in keys}

    searchable = {name: list(method_cells) for name, method_cells in methods.items() if name != RANDOM}
    searched = score_all("tuning", [(name, cell) for name in searchable for cell in searchable[name]], 1)
    limit = LIMIT * searched["Unsteered", ""]["disfluency"][0]
    chosen = {name: best(name, names, searched, limit) for name, names in searchable.items()}
    strength = ""
    if chosen.get("ActAdd") is not None:
        chosen[RANDOM] = chosen["ActAdd"]           # the control of what was chosen, not a rival of its own
        (steer,) = methods["ActAdd"][chosen["ActAdd"]].branches[0].steer
        strength = lab.strength(steer, test)
        if chosen.get("LMA") is not None:
            chosen[BOTH] = f"{chosen['ActAdd']}; {chosen['LMA']}"
            methods[BOTH] = {chosen[BOTH]: methods["LMA"][chosen["LMA"]].steered(steer)}
    keys = [(name, cell) for name, cell in chosen.items() if cell is not None]
    results = score_all("test", keys, args.repeats)

    def length(_, name, cell):
        """Mean tokens of a continuation."""
        rows = generate(few, name, cell, 1, new)
        return statistics.mean(len(lab.tokenizer.encode(text, bos=False)) for (text,) in rows)

    def seconds_per_token(name, cell, _):
        steps, start = [], time.perf_counter()
        generate(few[:1], name, cell, TIMED_ROWS, TIMED_TOKENS, progress=steps.append)
        return (time.perf_counter() - start) / (TIMED_ROWS * len(steps))

    tokens = lab.run([["length", *key] for key in keys], length)
    turns = range(3)                            # in turns, so that a disturbance meets all methods alike
    seconds = lab.run([[*key, turn] for turn in turns for key in keys], seconds_per_token)
    if rank[0] != 0:
        return
    table_rows = {}
    for name, cell in keys:
        cost = statistics.median(seconds[name, cell, turn] for turn in turns)
        table_rows[name] = {**results[name, cell], "seconds per token": cost,
                            "tokens": tokens["length", name, cell]}
    text = report(args, methods, chosen, strength, table_rows, scorer, len(tuning), len(few), new, limit)
    about = {"setting": {key: value for key, value in vars(args).items() if key not in ("data", "out")},
             "chosen": chosen,
             "tuning": {"|".join(key): result for key, result in searched.items()}, "test": table_rows}
    text = printable(text)
    write(lab.out / f"{args.experiment}.json", json.dumps(about).encode())
    write(lab.out / f"{args.experiment}.md", text.encode())
    draw(lab, args.experiment, searched, table_rows, scorer, sign, len(tuning))
    print(text)


def classifier_path(args):
    kind = "toxicity" if args.task == "toxicity" else "sentiment"
    return Path(args.classifier or Path(args.out) / f"{kind}.safetensors")


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def by_repeat(vectors, n_prompts, repeats):
    """Steers for a batch of so many prompts: continuation k of each has vector k mod len(vectors)."""
    vector = torch.arange(repeats).repeat(n_prompts) % len(vectors)
    return [steer.scaled(steer.coeff * (vector == k)) for k, steer in enumerate(vectors)]


def best(name, names, searched, limit):
    """The cell with the best score among those within the limit of disfluency; None if there is none."""
    allowed = [cell for cell in names if searched[name, cell]["disfluency"][0] <= limit]
    return max(allowed, key=lambda cell: searched[name, cell]["score"], default=None)


def summary(scores, nll, repeats, sign, seed):
    """Scores averaged by prompt, so that the continuations of one prompt do not count as independent."""
    groups = chunks(scores, repeats)
    return {"score": sign * statistics.mean(scores),
            "by repeat": [statistics.mean(scores[k::repeats]) for k in range(repeats)],
            "by prompt": [statistics.mean(group) for group in groups],
            "reached": [statistics.mean(sign * score > 0 for score in group) for group in groups],
            "disfluency": disfluency_of(sums_by_prompt(nll, repeats), seed)}


def compare(results, prompted, seed):
    """Paired tests over prompts, corrected together: {(a, b): (mean of a - b, 95 %, p)}.

    Every method is compared with the unsteered model and with ActAdd, every one of `prompted` with the
    prompted model, and ActAdd + LMA with LMA.
    """
    names = [name for name in results if name != "Unsteered"]
    pairs = [(name, "Unsteered") for name in names]
    if "ActAdd" in names:
        pairs += [(name, "ActAdd") for name in names if name != "ActAdd"]
    pairs += [(name, "Prompted") for name in prompted]
    if BOTH in names:
        pairs.append((BOTH, "LMA"))
    tests = {(a, b): paired(results[a]["by prompt"], results[b]["by prompt"], seed) for a, b in pairs}
    p = holm({pair: test[2] for pair, test in tests.items()})
    return {pair: (*test[:2], p[pair]) for pair, test in tests.items()}


def report(args, methods, chosen, strength, results, scorer, n_tuning, n_few, new, limit):
    """-> the tables and what they say about themselves, as Markdown. strength: ActAdd's, by Lab.strength"""
    prompted = [name for name in results
                if name != "Prompted" and methods[name][chosen[name]].branches[0].prefix]
    tests = compare(results, prompted, args.seed)
    shows_reached = args.task != "toxicity" and scorer.name == "vader"      # whose 0 is neutral

    def difference(*pair):
        if pair not in tests:
            return ""
        return f"{span(tests[pair][0], tests[pair][1], '+.3f')}, p {tests[pair][2]:.4f}"

    lines = []
    for name, result in results.items():
        method, by_prompt = methods[name][chosen[name]], result["by prompt"]
        passes = f"{len(method.branches)} + classifier" if method.guide else f"{len(method.branches)}"
        slower = result["seconds per token"] / results["Unsteered"]["seconds per token"]
        line = [name, chosen[name], span(statistics.mean(by_prompt), bootstrap(by_prompt, seed=args.seed)),
                difference(name, "Unsteered"), span(*result["disfluency"], ".1f"), f"{result['tokens']:.0f}",
                passes, f"{slower:.2f}"]
        if shows_reached:
            low, high = bootstrap(result["reached"], seed=args.seed)
            line.insert(3, span(100 * statistics.mean(result["reached"]), (100 * low, 100 * high), ".1f"))
        lines.append(line)
    header = ["", "chosen", "score (95 %)", "minus unsteered (95 %), p", "disfluency (95 %)",
              "tokens per text", "forward passes per token", "time per token"]
    if shows_reached:
        header.insert(3, f"% {'above' if args.task == 'neg-to-pos' else 'below'} 0 (95 %)")
    text = (f"{args.n} test prompts × {args.repeats} continuations of up to {new} tokens, "
            f"temperature 1, no top-p, no penalty. Judge: {scorer.name}, {scorer.meaning}. "
            f"Chosen on {n_tuning} other prompts: best score with disfluency at most {limit:.1f} "
            "(1.5 × unsteered there). p: randomisation test over prompts, two-sided, Holm's correction for "
            f"the {len(tests)} of both tables. "
            f"Tokens per text: mean over the first {n_few} test prompts, one each; a text may end by "
            f"itself. Time: in units of the unsteered model's, {TIMED_ROWS} texts of {TIMED_TOKENS} tokens "
            "at once, median of three.\n\n")
    text += table(header, lines) + "\n"
    if RANDOM in results:
        means = results[RANDOM]["by repeat"]
        means = [statistics.mean(means[k::VECTORS]) for k in range(min(VECTORS, len(means)))]
        text += (f"ActAdd's {chosen['ActAdd']}: {strength} × the mean norm. {RANDOM}: {len(means)} vectors, "
                 f"continuation k of each prompt under vector k mod {VECTORS}. Their mean scores: "
                 f"{over_vectors(means, '.3f')} (mean, lowest to highest).\n\n")
    others = [name for name in results if (name, "ActAdd") in tests or (name, "Prompted") in tests]
    against = ["ActAdd", "Prompted"] if prompted else ["ActAdd"]
    text += table(["", *(f"minus {other} (95 %), p" for other in against)],
                  [[name, *(difference(name, other) for other in against)] for name in others])
    if BOTH in results:
        text += f"\n{BOTH} minus LMA: {difference(BOTH, 'LMA')}.\n"
    missing = [name for name, cell in chosen.items() if cell is None]
    if missing:
        text += f"\nNo cell within the limit: {', '.join(missing)}.\n"
    return text


def draw(lab, title, searched, results, scorer, sign, n_tuning):
    """A panel for each method. Hollow: its cells on tuning prompts, in order of strength. Filled: the chosen
    one on test prompts, with 95 %. In each panel: the unsteered model on test prompts, and the limit."""
    seed, limit = lab.args.seed, LIMIT * searched["Unsteered", ""]["disfluency"][0]
    names = list(dict.fromkeys([*(name for name, _ in searched), *results]))
    names.remove("Unsteered")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)

    def point(axis, name, color, **style):
        x, x_interval = results[name]["disfluency"]
        y, y_interval = sign * results[name]["score"], bootstrap(results[name]["by prompt"], seed=seed)
        axis.errorbar(x, y, error_bars([y], [y_interval]), error_bars([x], [x_interval]), elinewidth=0.8,
                      linestyle="", color=color, **style)

    with figure(lab, title, columns, 3 * columns, 2.4 * rows + 0.6, rows, share=True) as (fig, axes):
        for axis in axes[len(names):]:
            axis.axis("off")
        for axis in axes[len(names) - columns:len(names)]:      # the lowest of each column
            axis.tick_params(labelbottom=True, which="both")
        for axis, name in zip(axes, names, strict=False):
            tried = [result for (method, _), result in searched.items() if method == name]
            # ActAdd's cells are at several layers, so they do not lie along one line.
            axis.plot([result["disfluency"][0] for result in tried],
                      [sign * result["score"] for result in tried], "o" if name == "ActAdd" else "o-",
                      color=BLUE, markerfacecolor="white", linewidth=0.8, markersize=4)
            point(axis, "Unsteered", "black", marker="s", markersize=5)
            if name in results:
                point(axis, name, BLUE, marker="o", markersize=7)
            axis.axvline(limit, color="black", linestyle=":", linewidth=0.8)
            axis.set_title(name, fontsize="medium")
            axis.set_xscale("log")
            for set_format in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
                set_format("{x:.0f}")
            axis.tick_params(labelsize="small", which="both")
        fig.supxlabel("disfluency (perplexity per token under the unsteered model); dotted: the limit",
                      fontsize="small")
        fig.supylabel(f"mean score, {scorer.name}", fontsize="small")
        fig.suptitle(f"black: unsteered; hollow: the search on {n_tuning} prompts; filled: chosen there, on "
                     f"{lab.args.n} test prompts × {lab.args.repeats}, 95 %", fontsize="small")


if __name__ == "__main__":
    main()

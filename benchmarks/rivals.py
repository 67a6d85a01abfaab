"""The paper's two tables: ActAdd beside every rival, on the same prompts and draws, each tuned with as many cells on the same 50 prompts.

    python benchmarks/train_classifier.py toxicity --data FOLDER
    python benchmarks/rivals.py toxicity --data FOLDER
    python benchmarks/rivals.py pos-to-neg --data FOLDER        # or neg-to-pos; needs `train_classifier.py sentiment`

Each method that has something to choose has six cells: strengths; for ActAdd layers and coefficients. On the tuning prompts the cell with the best
score whose disfluency is at most 1.5 times the unsteered model's is chosen. The tables show the chosen cells on the test prompts, which nothing
was chosen by. One point a method does not show who is ahead at equal fluency, so the figure has besides those every cell on the tuning prompts.
ActAdd + LMA is the chosen LMA over the model that the chosen ActAdd steers, without a search of its own: the formula then takes the steered
log-probabilities for p, so what steering makes less likely is punished with LMA's strength. Sampling is the same for all: temperature 1, no top-p,
no penalty. Writes OUT/rivals-TASK.json, .md and .png; continues where it was interrupted. Turner et al., sections 4.3 and 4.4; hyper-parameters
around Dekoninck et al.'s.
"""

import argparse
import hashlib
import json
import random
import statistics
import sys
import time
from pathlib import Path

from .completions import TUNING, disfluency_of, provoking
from .lab import BLUE, GREEN, GREY, ORANGE, Lab, faults_in_one_line, figure, span, table
from .train_classifier import SPLIT, TEST

from ministeer.baselines import logits as decoding
from ministeer.evaluation import measure

from . import jobs as shards
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.baselines.logits import NEGATIVE, POSITIVE, TOXIC
from ministeer.utils import write
from ministeer.evaluation.stats import bootstrap, holm, paired
from ministeer.evaluation.judges import judge
from ministeer.steering import random_like

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "freq_penalty": 0.0}
RANDOM, BOTH = "ActAdd, random", "ActAdd + LMA"     # rows that come of others and are not searched
COLOURS = {"ActAdd": BLUE, RANDOM: GREY, "PreADD": ORANGE, "LMA": GREEN, "SelfDebias": "#CC79A7", "FUDGE": "#E69F00",
           "LMA + Classifier": "#56B4E9", BOTH: "#F0E442"}
MARKERS = {"Unsteered": "s", "Prompted": "D", RANDOM: "v", BOTH: "^"}
# ActAdd's six cells: where paper.py found SmolLM2 steered most easily, where the paper steers, and half way up; in a shorter model its last layer
# for 16. The paper's coefficient, and the strongest that the search for it has.
LAYERS, COEFFS = (1, 6, 16), (3.0, 10.0)
ROWS = TOKENS = 16                              # the cost is measured with so many rows, and so many tokens for each
FEW = 50                                        # test prompts whose texts' length is measured
CELLS = {"PreADD": [0.25, 0.5, 1, 1.5, 2, 3], "LMA": [1, 3, 9, 24, 50, 99],
         "SelfDebias": [1, 3, 10, 30, 100, 300], "FUDGE": [0.5, 1, 2, 4, 8, 16], "LMA + Classifier": [1, 3, 9, 24, 50, 99]}


def cells(lab, task, classifier):
    """-> {method: {strength as text: a Method}}"""
    if task == "toxicity":
        base, away, toward, sign, pair = "", TOXIC, 0, 1, (" love", " hate")
    else:
        wanted = task == "neg-to-pos"
        base, away, toward, sign = *((POSITIVE, NEGATIVE) if wanted else (NEGATIVE, POSITIVE)), int(wanted), 1 if wanted else -1
        pair = (" love", " hate")
    make = {"PreADD": lambda s: decoding.preadd(away, s, base), "LMA": lambda s: decoding.lma(away, s, base),
            "SelfDebias": lambda s: decoding.self_debias(away, s, 0, base),
            "FUDGE": lambda s: decoding.fudge(classifier, s, toward=toward, base=base),
            "LMA + Classifier": lambda s: decoding.lma_classifier(away, classifier, s, toward=toward, base=base)}
    layers = [min(l, lab.model.config.n_layer - 1) for l in LAYERS]
    steers = {(l, c): sign * lab.steer(*pair, l, c) for l in layers for c in COEFFS}
    found = {"Unsteered": {"": decoding.unsteered()}}
    if base:
        found["Prompted"] = {"": decoding.prompted(base)}
    found["ActAdd"] = {f"layer {l}, c {c:g}": decoding.act_add(steer) for (l, c), steer in steers.items()}
    found[RANDOM] = {f"layer {l}, c {c:g}": decoding.act_add(random_like(steer, lab.args.seed)) for (l, c), steer in steers.items()}
    for name, of in make.items():
        found[name] = {f"{s:g}": of(s) for s in CELLS[name]}
    return found


def texts(lab, task):
    """-> tuning prompts, test prompts, how many tokens to add"""
    if task == "toxicity":
        prompts = provoking(lab, SPLIT)
        return *enough("rtp_random.jsonl", prompts[:TUNING], prompts[TUNING:TUNING + TEST], lab), 32
    label = task[:3]
    rows = [row["text"] for row in lab.rows("imdb.jsonl") if row.get("label") == label and row.get("split") == "test"]
    random.Random(lab.args.seed).shuffle(rows)
    starts = [lab.tokenizer.decode(lab.tokenizer.encode(row)[1:33]) for row in rows]
    return *enough("imdb.jsonl", starts[:TUNING], starts[TUNING:], lab), 64


def enough(file, tuning, test, lab):
    """As many prompts of either kind as are wanted."""
    if len(tuning) < lab.args.tuning or len(test) < lab.args.n:
        raise ValueError(f"{file} has {len(tuning)} prompts for the search and {len(test)} others for the result; "
                         f"wanted: --tuning {lab.args.tuning} and -n {lab.args.n}.")
    return tuning[:lab.args.tuning], test[:lab.args.n]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("toxicity", "pos-to-neg", "neg-to-pos"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("-n", "--n", type=int, default=100, help="test prompts (default 100)")
    parser.add_argument("--tuning", type=int, default=TUNING, help=f"tuning prompts (default and at most {TUNING})")
    parser.add_argument("--repeats", type=int, default=5, help="continuations of each test prompt (default 5)")
    parser.add_argument("--judge", help="default profanity for toxicity, vader for sentiment")
    parser.add_argument("--classifier", help="default OUT/toxicity.safetensors or OUT/sentiment.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="results")
    args = parser.parse_args()
    args.experiment, args.layer, args.coeff, args.protocol = f"rivals-{args.task}", None, None, "paper"
    with faults_in_one_line("rivals.py"), shards.workers(args.device) as rank:
        for name in ("n", "tuning", "repeats"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be 1 or more; given: {getattr(args, name)}.")
        if (args.task, args.judge) == ("toxicity", "perspective"):
            raise ValueError("the classifier learned Perspective's scores, so perspective cannot judge FUDGE. Take another --judge.")
        run(args, rank)


def run(args, rank):
    kind = "toxicity" if args.task == "toxicity" else "sentiment"
    path = Path(args.classifier or Path(args.out) / f"{kind}.safetensors")
    classifier = PrefixClassifier.load(path)
    args.classifier = hashlib.sha256(path.read_bytes()).hexdigest()[:12]        # another one is another experiment
    lab = Lab(args, rank)
    classifier = classifier.to(args.device)
    scorer = judge(args.judge or ("profanity" if kind == "toxicity" else "vader"), cache=lab.out)
    sign = 1 if args.task == "neg-to-pos" else -1           # a score is good when it is high
    methods, (tuning, test, new) = cells(lab, args.task, classifier), texts(lab, args.task)

    def measured(prompts, name, cell, repeats):
        rows = decoding.generate(lab.model, lab.tokenizer, prompts, methods[name][cell], repeats, new, seed=args.seed, **SAMPLING)
        flat = [text for row in rows for text in row]
        nll = measure.disfluency(lab.model, lab.tokenizer, [prompt for prompt in prompts for _ in range(repeats)], flat)
        return summary(scorer([text.strip() for text in flat]), nll, repeats, sign, args.seed) | {"example": flat[0].strip()}

    def all_of(split, prompts, names, repeats):
        """{(name, cell): summary} of those cells on those prompts"""
        units = [[split, *key, repeats] for key in names]
        return dict(zip(names, lab.run(units, lambda _, name, cell, repeats: measured(prompts, name, cell, repeats)), strict=True))

    searched = all_of("tuning", tuning, [(name, cell) for name, some in methods.items() if name != RANDOM for cell in some], 1)
    limit = 1.5 * searched["Unsteered", ""]["disfluency"][0]
    chosen = {name: best(name, some, searched, limit) for name, some in methods.items() if name != RANDOM}
    if chosen["ActAdd"] is not None:
        chosen[RANDOM] = chosen["ActAdd"]               # the control of what was chosen, not a rival of its own
        if chosen["LMA"] is not None:
            chosen[BOTH] = f"{chosen['ActAdd']}; {chosen['LMA']}"
            steer = methods["ActAdd"][chosen["ActAdd"]].streams[0].steer
            methods[BOTH] = {chosen[BOTH]: methods["LMA"][chosen["LMA"]].steered(steer)}
    picked = [(name, cell) for name, cell in chosen.items() if cell is not None]
    results = all_of("test", test, picked, args.repeats)
    few = test[:FEW]

    def length(_, name, cell):
        rows = decoding.generate(lab.model, lab.tokenizer, few, methods[name][cell], 1, new, seed=args.seed, **SAMPLING)
        return statistics.mean(len(lab.tokenizer.encode(text, bos=False)) for (text,) in rows)

    tokens = dict(zip(picked, lab.run([["length", *key] for key in picked], length), strict=True))

    def timed(name, cell, _):
        start, steps = time.perf_counter(), []
        decoding.generate(lab.model, lab.tokenizer, few[0], methods[name][cell], ROWS, TOKENS, seed=args.seed, progress=steps.append, **SAMPLING)
        return (time.perf_counter() - start) / (ROWS * len(steps))

    units = [[*key, k] for k in range(3) for key in picked]             # in turns, so that a disturbance meets all
    seconds = dict(zip(map(tuple, units), lab.run(units, timed), strict=True))
    cost = {name: statistics.median(seconds[name, cell, k] for k in range(3)) for name, cell in picked}
    if rank[0] == 0:
        results = {name: some | {"seconds a token": cost[name], "tokens": tokens[name, cell]} for (name, cell), some in results.items()}
        text = report(args, methods, chosen, results, scorer, len(tuning), len(few), new, limit)
        clean = {"|".join(key): some for key, some in searched.items()}
        about = {"setting": {**vars(args), "data": None}, "chosen": chosen, "tuning": clean, "test": results}
        write(lab.out / f"{args.experiment}.json", json.dumps(about).encode())
        write(lab.out / f"{args.experiment}.md", text.encode())
        with figure(lab, args.experiment, width=7.5, height=4.8) as (_, (axis,)):
            draw(axis, searched, results, scorer, sign, args.seed)
            axis.set_title(f"hollow: {len(tuning)} tuning prompts; filled, with 95 %: what was chosen there, on {len(test)} test prompts × "
                           f"{args.repeats}", fontsize="medium")
        print(text)


def best(name, some, searched, limit):
    """The cell that the rule chooses, the same rule for every method; None if all its texts are too strange."""
    allowed = [cell for cell in some if searched[name, cell]["disfluency"][0] <= limit]
    return max(allowed, key=lambda cell: searched[name, cell]["score"], default=None)


def summary(scores, nll, repeats, sign, seed):
    """Scores averaged by prompt, so that its continuations do not count as independent."""
    each = range(0, len(scores), repeats)
    by_prompt = [statistics.mean(scores[i:i + repeats]) for i in each]
    reached = [statistics.mean(sign * score > 0 for score in scores[i:i + repeats]) for i in each]
    sums = {"nll": [sum(pair[0] for pair in nll[i:i + repeats]) for i in each], "tokens": [sum(pair[1] for pair in nll[i:i + repeats]) for i in each]}
    value, interval = disfluency_of(sums, seed)
    return {"score": sign * statistics.mean(scores), "by prompt": by_prompt, "reached": reached, "disfluency": (value, interval)}


def compare(results, prompted, seed):
    """Paired tests over prompts, corrected together: {(a, b): (mean of a - b, 95 %, p)}.

    Every method and the unsteered model, every method and ActAdd, what starts from the prompted model and that, ActAdd + LMA and LMA.
    """
    names = [name for name in results if name != "Unsteered"]
    pairs = [(name, "Unsteered") for name in names] + [(name, "ActAdd") for name in names if "ActAdd" in names and name != "ActAdd"]
    pairs += [(name, "Prompted") for name in prompted] + [(BOTH, "LMA")] * (BOTH in names)
    tests = {pair: paired(*(results[name]["by prompt"] for name in pair), seed) for pair in pairs}
    p = holm({pair: test[2] for pair, test in tests.items()})
    return {pair: (*test[:2], p[pair]) for pair, test in tests.items()}


def report(args, methods, chosen, results, scorer, n_tuning, n_few, new, limit):
    prompted = [name for name in results if name != "Prompted" and methods[name][chosen[name]].streams[0].prefix]
    tests, lines = compare(results, prompted, args.seed), []
    reached = args.task != "toxicity" and scorer.name == "vader"        # whose 0 is neutral

    def said(pair):
        return f"{span(tests[pair][0], tests[pair][1], '+.3f')}, p {tests[pair][2]:.4f}" if pair in tests else ""

    for name, some in results.items():
        method = methods[name][chosen[name]]
        row = [name, chosen[name], span(statistics.mean(some["by prompt"]), bootstrap(some["by prompt"], seed=args.seed)),
               said((name, "Unsteered")), span(*some["disfluency"], ".1f"), f"{some['tokens']:.0f}",
               f"{len(method.streams)}{' + classifier' if method.guide else ''}",
               f"{some['seconds a token'] / results['Unsteered']['seconds a token']:.2f}"]
        if reached:
            row.insert(3, span(100 * statistics.mean(some["reached"]), [100 * end for end in bootstrap(some["reached"], seed=args.seed)], ".1f"))
        lines.append(row)
    header = ["", "chosen", "score (95 %)", "minus unsteered (95 %), p", "disfluency (95 %)", "tokens a text", "forward passes a token",
              "time a token"]
    if reached:
        header.insert(3, f"% {'above' if args.task == 'neg-to-pos' else 'below'} 0 (95 %)")
    text = (f"{args.n} test prompts × {args.repeats} continuations of up to {new} tokens, temperature 1, no top-p, no penalty. Judge: {scorer.name}, "
            f"{scorer.meaning}. Chosen on {n_tuning} other prompts: best score with disfluency at most {limit:.1f} (1.5 × unsteered there). "
            f"p: randomisation test over prompts, two-sided, Holm's correction for the {len(tests)} of both tables. Tokens a text: mean over the "
            f"first {n_few} test prompts, one each; a text may end by itself. Time: in units of the unsteered model's, {ROWS} texts of {TOKENS} "
            f"tokens at once, median of three.\n\n{table(header, lines)}\n")
    others = [name for name in results if (name, "ActAdd") in tests or (name, "Prompted") in tests]
    text += table(["", "minus ActAdd (95 %), p", "minus Prompted (95 %), p"][:3 if prompted else 2],
                  [[name, said((name, "ActAdd")), said((name, "Prompted"))][:3 if prompted else 2] for name in others])
    text += f"\n{BOTH} minus LMA: {said((BOTH, 'LMA'))}.\n" if BOTH in results else ""
    missing = [name for name, cell in chosen.items() if cell is None]
    return text + (f"\nNo cell within the limit: {', '.join(missing)}.\n" if missing else "")


def draw(axis, searched, results, scorer, sign, seed):
    """The trade-off: every cell that was searched, in the order of its strength, and the chosen ones as the test prompts show them."""
    for name in dict.fromkeys([*(name for name, _ in searched), *results]):
        style = {"color": COLOURS.get(name, "black"), "marker": MARKERS.get(name, "o")}
        cells = [found for (of, _), found in searched.items() if of == name]
        axis.plot([some["disfluency"][0] for some in cells], [sign * some["score"] for some in cells], markerfacecolor="white", linewidth=0.8,
                  markersize=4, linestyle="none" if name == "ActAdd" else "-", **style)         # ActAdd's are of several layers, not one line
        if name in results:
            x, y = results[name]["disfluency"][0], sign * results[name]["score"]
            ends = bootstrap(results[name]["by prompt"], seed=seed), results[name]["disfluency"][1]
            up, across = ([[max(0, at - low)], [max(0, high - at)]] for at, (low, high) in zip((y, x), ends, strict=True))
            axis.errorbar(x, y, up, across, markersize=7, label=name, elinewidth=0.8, linestyle="", **style)
    axis.axvline(1.5 * searched["Unsteered", ""]["disfluency"][0], color="black", linestyle=":", linewidth=0.8)
    axis.set_xscale("log")
    for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        ticks("{x:.0f}")
    axis.set_xlabel("disfluency (perplexity a token under the unsteered model); dotted: the limit")
    axis.set_ylabel(f"mean score, {scorer.name}")
    axis.legend(fontsize="small", frameon=False)


if __name__ == "__main__":
    main()

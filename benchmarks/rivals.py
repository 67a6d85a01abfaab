"""The paper's two tables: ActAdd beside every rival, on the same prompts and draws, each tuned with as many cells on the same 50 prompts.

    python benchmarks/train_classifier.py toxicity --data FOLDER
    python benchmarks/rivals.py toxicity --data FOLDER
    python benchmarks/rivals.py pos-to-neg --data FOLDER        # or neg-to-pos; needs `train_classifier.py sentiment`

Each method has six cells: strengths; for ActAdd layers and coefficients. On the tuning prompts the cell with the best score whose disfluency is at
most 1.5 times the unsteered model's is chosen. Tables and figures show the test prompts: the chosen cells on all of them, and every other cell on
the first few, once (`--curve`), because one point a method does not show who is ahead at equal fluency. ActAdd + LMA adds the two that were
chosen, without a search of its own. Sampling is the same for all: temperature 1, no top-p, no penalty. Writes OUT/rivals-TASK.json, .md and
.png; continues where it was interrupted. Turner et al., sections 4.3 and 4.4; hyper-parameters around Dekoninck et al.'s.
"""

import argparse
import hashlib
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from completions import TUNING, disfluency_of, provoking
from lab import BLUE, GREEN, GREY, ORANGE, Lab, faults_in_one_line, figure, span, table
from train_classifier import TEST

from ministeer import decoding, measure, shards
from ministeer.classifier import PrefixClassifier
from ministeer.decoding import NEGATIVE, POSITIVE, TOXIC
from ministeer.files import write
from ministeer.intervals import bootstrap, holm, paired
from ministeer.judges import judge
from ministeer.steering import random_like

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "freq_penalty": 0.0}
RANDOM, BOTH = "ActAdd, random", "ActAdd + LMA"     # rows that come of others and are not searched
COLOURS = {"ActAdd": BLUE, RANDOM: GREY, "PreADD": ORANGE, "LMA": GREEN, "SelfDebias": "#CC79A7", "FUDGE": "#E69F00",
           "LMA + Classifier": "#56B4E9", BOTH: "#F0E442"}
# ActAdd's six cells: where SmolLM2 is steered most easily, where the paper steers, and half way up; in a shorter model its last layer for 16.
LAYERS, COEFFS = (1, 6, 16), (1.0, 3.0)
ROWS = TOKENS = 16                              # the cost is measured with so many rows, and so many tokens for each
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
        prompts = provoking(lab)
        return prompts[:TUNING][:lab.args.tuning], prompts[TUNING:TUNING + TEST][:lab.n or 100], 32
    label = task[:3]
    rows = [row["text"] for row in lab.rows("imdb.jsonl") if row["label"] == label and row["split"] == "test"]
    random.Random(lab.args.seed).shuffle(rows)
    starts = [lab.tokenizer.decode(lab.tokenizer.encode(row)[1:33]) for row in rows]
    return starts[:TUNING][:lab.args.tuning], starts[TUNING:][:lab.n or 100], 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("toxicity", "pos-to-neg", "neg-to-pos"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("-n", "--n", type=int, help="test prompts (default 100)")
    parser.add_argument("--tuning", type=int, default=TUNING, help=f"tuning prompts (default and at most {TUNING})")
    parser.add_argument("--repeats", type=int, default=5, help="continuations of each test prompt (default 5)")
    parser.add_argument("--curve", type=int, default=50, help="test prompts on which the cells that were not chosen run once (default 50)")
    parser.add_argument("--judge", help="default profanity for toxicity, vader for sentiment")
    parser.add_argument("--classifier", help="default OUT/toxicity.safetensors or OUT/sentiment.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="results")
    args = parser.parse_args()
    args.experiment, args.layer, args.coeff, args.protocol = f"rivals-{args.task}", None, None, "paper"
    with faults_in_one_line("rivals.py"), shards.workers(args.device) as rank:
        run(args, rank)


def run(args, rank):
    kind = "toxicity" if args.task == "toxicity" else "sentiment"
    path = Path(args.classifier or Path(args.out) / f"{kind}.safetensors")
    classifier = PrefixClassifier.load(path).to(args.device)
    args.classifier = hashlib.sha256(path.read_bytes()).hexdigest()[:12]        # another one is another experiment
    lab = Lab(args, rank)
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

    every = [(name, cell) for name, some in methods.items() for cell in some]
    searched = all_of("tuning", tuning, [key for key in every if key[0] != RANDOM], 1)
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
    curve = all_of("curve", test[:args.curve], [key for key in every if key not in picked], 1) | results

    def timed(name, cell, _):
        start = time.perf_counter()
        decoding.generate(lab.model, lab.tokenizer, [test[0]] * ROWS, methods[name][cell], 1, TOKENS, seed=args.seed, **SAMPLING)
        return (time.perf_counter() - start) / (ROWS * TOKENS)

    units = [[*key, k] for k in range(3) for key in picked]             # in turns, so that a disturbance meets all
    seconds = dict(zip(map(tuple, units), lab.run(units, timed), strict=True))
    cost = {name: statistics.median(seconds[name, cell, k] for k in range(3)) for name, cell in picked}
    if rank[0] == 0:
        results = {name: some | {"seconds a token": cost[name]} for (name, _), some in results.items()}
        text = report(args, methods, chosen, results, scorer, len(tuning), len(test), new, limit)
        with figure(lab, args.experiment, width=7.5, height=4.8) as (_, (axis,)):
            draw(axis, methods, curve, chosen, scorer, sign, args.seed)
            axis.set_title(f"{len(test)} test prompts × {args.repeats}: filled, chosen beforehand; other cells: {len(test[:args.curve])} × 1",
                           fontsize="medium")
        flat = {part: {"|".join(key): some for key, some in found.items()} for part, found in (("tuning", searched), ("curve", curve))}
        about = {"setting": {**vars(args), "data": None}, "chosen": chosen, "test": results, **flat}
        write(lab.out / f"{args.experiment}.json", json.dumps(about).encode())
        write(lab.out / f"{args.experiment}.md", text.encode())
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


def compare(results, seed):
    """Paired tests over prompts, corrected together: {(a, b): (mean of a - b, 95 %, p)}.

    Each method and the unsteered model, ActAdd and its random vector, the best method and the next best.
    """
    pairs = [(name, "Unsteered") for name in results if name != "Unsteered"]
    pairs += [("ActAdd", RANDOM)] * (RANDOM in results)
    order = sorted((name for name in results if name not in ("Unsteered", RANDOM)), key=lambda name: -results[name]["score"])
    pairs += [tuple(order[:2])] * (len(order) > 1)
    tests = {pair: paired(*(results[name]["by prompt"] for name in pair), seed) for pair in pairs}
    p = holm({pair: test[2] for pair, test in tests.items()})
    return {pair: (*test[:2], p[pair]) for pair, test in tests.items()}


def report(args, methods, chosen, results, scorer, n_tuning, n, new, limit):
    tests, lines = compare(results, args.seed), []

    def said(pair):
        difference, interval, p = tests[pair]
        return f"{span(difference, interval, '+.3f')}, p {p:.4f}"

    for name, some in results.items():
        method = methods[name][chosen[name]]
        row = [name, chosen[name], span(statistics.mean(some["by prompt"]), bootstrap(some["by prompt"], seed=args.seed)),
               said((name, "Unsteered")) if name != "Unsteered" else "", span(*some["disfluency"], ".1f"),
               f"{len(method.streams)}{' + classifier' if method.guide else ''}",
               f"{some['seconds a token'] / results['Unsteered']['seconds a token']:.2f}"]
        if args.task != "toxicity":
            row.insert(2, span(100 * statistics.mean(some["reached"]), [100 * end for end in bootstrap(some["reached"], seed=args.seed)], ".1f"))
        lines.append(row)
    header = ["", "chosen", "score (95 %)", "minus unsteered (95 %), p", "disfluency (95 %)", "forward passes a token", "time a token"]
    if args.task != "toxicity":
        header.insert(2, "% beyond 0 toward the target (95 %)")
    text = (f"{n} test prompts × {args.repeats} continuations of {new} tokens, temperature 1, no top-p, no penalty. Judge: {scorer.name}, "
            f"{scorer.meaning}. Chosen on {n_tuning} other prompts: best score with disfluency at most {limit:.1f} (1.5 × unsteered there). "
            f"p: randomisation test over prompts, two-sided, Holm's correction for {len(tests)} with those below. Time: in units of the unsteered "
            f"model's, {ROWS} rows of one prompt at once, median of three.\n\n{table(header, lines)}\n")
    text += "".join(f"{a} minus {b}: {said((a, b))}.\n" for a, b in tests if b != "Unsteered")
    missing = [name for name, cell in chosen.items() if cell is None]
    return text + (f"No cell within the limit: {', '.join(missing)}.\n" if missing else "")


def draw(axis, methods, curve, chosen, scorer, sign, seed):
    """The trade-off on the test prompts: each method's cells in their order, the chosen one filled, with its 95 % intervals."""
    for name, some in methods.items():
        points = [(curve[name, cell]["disfluency"][0], sign * curve[name, cell]["score"], cell) for cell in some]
        style = {"color": COLOURS.get(name, "black"), "marker": "s" if name in ("Unsteered", "Prompted") else "o"}
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "" if "ActAdd" in name else "-", markerfacecolor="white", linewidth=0.8,
                  markersize=5, **style)
        for x, y, cell in points:
            if cell == chosen[name]:
                found = curve[name, cell]
                ends = bootstrap(found["by prompt"], seed=seed), found["disfluency"][1]
                up, across = ([[max(0, at - low)], [max(0, high - at)]] for at, (low, high) in zip((y, x), ends, strict=True))
                axis.errorbar(x, y, up, across, markersize=7, label=name, elinewidth=0.8, linestyle="", **style)
    axis.axvline(1.5 * curve["Unsteered", ""]["disfluency"][0], color="black", linestyle=":", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("disfluency (perplexity a token under the unsteered model); dotted: 1.5 × unsteered")
    axis.set_ylabel(f"mean score, {scorer.name}")
    axis.legend(fontsize="small", frameon=False)


if __name__ == "__main__":
    main()

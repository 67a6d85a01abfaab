"""The paper's two tables: ActAdd beside every rival, on the same prompts and draws, each tuned with as many cells on the same 50 prompts.

    python benchmarks/train_classifier.py toxicity --data FOLDER
    python benchmarks/rivals.py toxicity --data FOLDER
    python benchmarks/rivals.py pos-to-neg --data FOLDER        # or neg-to-pos; needs `train_classifier.py sentiment`

Each method has six cells, strengths (ActAdd: layers and coefficients). On the tuning prompts the cell with the best score whose disfluency is at
most 1.5 times the unsteered model's is chosen; the test prompts are seen once, by the chosen cells and, for the figure, by all. Sampling is the same
for all: temperature 1, no top-p, no penalty. Writes OUT/rivals-TASK.json, .md and .png; continues where it was interrupted.
Turner et al., sections 4.3 and 4.4; hyper-parameters around Dekoninck et al.'s.
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
from ministeer.decoding import NEGATIVE, POSITIVE, TOXIC
from ministeer.files import write
from ministeer.intervals import bootstrap, holm, paired
from ministeer.judges import judge
from ministeer.steering import random_like

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "freq_penalty": 0.0}
COLOURS = {"ActAdd": BLUE, "ActAdd, random": GREY, "PreADD": ORANGE, "LMA": GREEN, "SelfDebias": "#CC79A7", "FUDGE": "#E69F00",
           "LMA + Classifier": "#56B4E9", "ActAdd + LMA": "black"}
LAYERS, COEFFS = (1, 2, 16), (1.0, 3.0)         # ActAdd's six cells; in a shorter model its last layer for 16
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
    found["ActAdd, random"] = {f"layer {l}, c {c:g}": decoding.act_add(random_like(steer, lab.args.seed)) for (l, c), steer in steers.items()}
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
    classifier = decoding.PrefixClassifier.load(path).to(args.device)
    args.classifier = hashlib.sha256(path.read_bytes()).hexdigest()[:12]        # another one is another experiment
    lab = Lab(args, rank)
    scorer = judge(args.judge or ("profanity" if kind == "toxicity" else "vader"), cache=lab.out)
    sign = 1 if args.task == "neg-to-pos" else -1           # a score is good when it is high
    methods, (tuning, test, new) = cells(lab, args.task, classifier), texts(lab, args.task)

    def measured(split, name, cell, repeats):
        prompts, method = tuning if split == "tuning" else test, methods[name][cell]
        start = time.perf_counter()
        rows = decoding.generate(lab.model, lab.tokenizer, prompts, method, repeats, new, seed=args.seed, **SAMPLING)
        seconds = time.perf_counter() - start
        flat = [text.strip() for row in rows for text in row]
        each = [prompt for prompt in prompts for _ in range(repeats)]
        nll = measure.disfluency(lab.model, lab.tokenizer, each, [text for row in rows for text in row])
        return {"scores": scorer(flat), "nll": nll, "seconds": seconds, "tokens": len(flat) * new, "example": flat[0]}

    units = [["tuning", name, cell, 1] for name, some in methods.items() for cell in some]
    found = {tuple(unit[:3]): summary(result, 1, sign, args.seed) for unit, result in zip(units, lab.run(units, measured), strict=True)}
    limit = 1.5 * found["tuning", "Unsteered", ""]["disfluency"][0]
    chosen = {}
    for name, some in methods.items():
        allowed = [cell for cell in some if found["tuning", name, cell]["disfluency"][0] <= limit]
        chosen[name] = max(allowed, key=lambda cell, name=name: found["tuning", name, cell]["score"], default=None)
    if chosen["ActAdd"] is not None:
        chosen["ActAdd, random"] = chosen["ActAdd"]          # the control of what was chosen, not a rival of its own
    units = [["test", name, cell, args.repeats] for name, cell in chosen.items() if cell is not None]
    results = {unit[1]: summary(result, args.repeats, sign, args.seed) for unit, result in zip(units, lab.run(units, measured), strict=True)}
    if rank[0] == 0:
        text = report(args, methods, chosen, results, scorer, len(tuning), len(test), new, limit)
        with figure(lab, args.experiment, width=7.5, height=4.5) as (_, (axis,)):
            draw(axis, methods, found, chosen, scorer, sign)
            axis.set_title(f"every cell on {len(tuning)} tuning prompts; filled: chosen", fontsize="medium")
        clean = {"|".join(key): value for key, value in found.items()}
        about = {"setting": {**vars(args), "data": None}, "chosen": chosen, "tuning": clean, "test": results}
        write(lab.out / f"{args.experiment}.json", json.dumps(about).encode())
        write(lab.out / f"{args.experiment}.md", text.encode())
        print(text)


def summary(result, repeats, sign, seed):
    """Scores averaged by prompt, so that its continuations do not count as independent."""
    scores, nll = result["scores"], result["nll"]
    each = range(0, len(scores), repeats)
    by_prompt = [statistics.mean(scores[i:i + repeats]) for i in each]
    sums = {"nll": [sum(pair[0] for pair in nll[i:i + repeats]) for i in each], "tokens": [sum(pair[1] for pair in nll[i:i + repeats]) for i in each]}
    value, interval = disfluency_of(sums, seed)
    return {"score": sign * statistics.mean(scores), "by prompt": by_prompt, "reached": [float(sign * score > 0) for score in scores],
            "disfluency": (value, interval), "speed": result["tokens"] / result["seconds"], "example": result["example"]}


def report(args, methods, chosen, results, scorer, n_tuning, n, new, limit):
    base, lines = results["Unsteered"], []
    tests = {name: paired(some["by prompt"], base["by prompt"], args.seed) for name, some in results.items() if name != "Unsteered"}
    p = holm({name: test[2] for name, test in tests.items()})
    for name, some in results.items():
        difference = "" if name == "Unsteered" else f"{span(tests[name][0], tests[name][1], '+.3f')}, p {p[name]:.4f}"
        row = [name, chosen[name], span(statistics.mean(some["by prompt"]), bootstrap(some["by prompt"], seed=args.seed)), difference,
               span(*some["disfluency"], ".1f"), f"{some['speed']:.0f}", len(methods[name][chosen[name]].streams)]
        if args.task != "toxicity":
            row.insert(2, f"{statistics.mean(some['reached']):.1%}")
        lines.append(row)
    missing = [name for name, cell in chosen.items() if cell is None]
    header = ["", "chosen", "score (95 %)", "minus unsteered (95 %), p", "disfluency (95 %)", "tokens/s", "streams"]
    if args.task != "toxicity":
        header.insert(2, "beyond 0 toward the target")
    text = (f"{n} test prompts × {args.repeats} continuations of {new} tokens, temperature 1, no top-p, no penalty. Judge: {scorer.name}, "
            f"{scorer.meaning}. Chosen on {n_tuning} other prompts: best score with disfluency at most {limit:.1f} (1.5 × unsteered there). "
            f"p: randomisation test over prompts, two-sided, Holm's correction for {len(p)}.\n\n")
    return text + table(header, lines) + (f"\nNo cell within the limit: {', '.join(missing)}.\n" if missing else "")


def draw(axis, methods, found, chosen, scorer, sign):
    """The trade-off on the tuning prompts: each method's cells, the chosen one filled."""
    unsteered = found["tuning", "Unsteered", ""]
    axis.plot(unsteered["disfluency"][0], sign * unsteered["score"], "s", color="black", label="Unsteered")
    for name, some in methods.items():
        if name == "Unsteered":
            continue
        points = [(found["tuning", name, cell]["disfluency"][0], sign * found["tuning", name, cell]["score"], cell) for cell in some]
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-" if "ActAdd" not in name else "o", color=COLOURS.get(name, "brown"),
                  markerfacecolor="white", linewidth=0.8, markersize=5)
        for x, y, cell in points:
            if cell == chosen[name]:
                axis.plot(x, y, "o", color=COLOURS.get(name, "brown"), markersize=7, label=name)
    axis.axvline(1.5 * unsteered["disfluency"][0], color="black", linestyle=":", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("disfluency (perplexity a token under the unsteered model); dotted: 1.5 × unsteered")
    axis.set_ylabel(f"mean score, {scorer.name}")
    axis.legend(fontsize="small", frameon=False)


if __name__ == "__main__":
    main()

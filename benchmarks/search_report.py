"""What search.py says of its searches and of their test: paired comparisons, tables, a figure.

Read first: search.py, which calls these.
"""

import statistics

from ministeer.evaluation.stats import bootstrap, holm, paired

from . import linear_judge
from .lab import BLUE, GREY, ORANGE, RANDOM, figure, span, table
from .rivals import LIMIT

WINNER, FIVE = "best of the pairs", "five random vectors"


def compare(results, judges, methods, best, sign, seed):
    """Paired tests over prompts, corrected together -> {(judge, a, b): (mean of a - b, 95 %, p)}

    Every condition is compared with the unsteered model, and every rival with the winner. The winner is
    compared with the five random vectors, and with the best of the random searches and the best of the
    shuffled ones, as the tuning prompts rank them.
    """
    pairs = [(name, "unsteered") for name in results if name != "unsteered"]
    pairs.append((WINNER, FIVE))
    pairs += [(WINNER, f"best of {bar(best, name)}") for name in ("random", "shuffled") if bar(best, name)]
    pairs += [(name, WINNER) for name in methods]
    tests = {}
    for judge in judges:
        scores = {name: [sign * x for x in result[judge.name]] for name, result in results.items()}
        scores[FIVE] = [statistics.mean(row) for row in zip(*(scores[name] for name in RANDOM), strict=True)]
        for a, b in pairs:
            tests[judge.name, a, b] = paired(scores[a], scores[b], seed)
    p = holm({key: test[2] for key, test in tests.items()})
    return {key: (sign * test[0], sorted(sign * edge for edge in test[1]), p[key]) for key, test in
            tests.items()}


def bar(best, name):
    """The search of this name with the best score on the tuning prompts; None if there was none."""
    kinds = [kind for kind in best if kind.startswith(name)]
    return max(kinds, key=lambda kind: (best[kind]["within"], best[kind]["score"]), default=None)


def report(lab, search, best, base, results, tests, judges):
    """-> what was searched, what was found, and the test, as Markdown."""
    args, sign = lab.args, search.sign
    counts = " → ".join(map(str, best["pairs"]["counts"]))
    text = (f"{args.task}{', at the front' * args.front}: {counts} → 1 cells in each of {len(best)} searches "
            f"on up to {len(search.tuning)} tuning prompts, then {len(search.test)} test prompts × "
            f"{args.repeats} continuations of up to {search.new} tokens; temperature 1, no top-p, no "
            "penalty. "
            f"Judge of the search: {search.scorer.name}, {search.scorer.meaning}.\n\n"
            f"On the tuning prompts, one continuation each (unsteered {sign * base['score']:.3f}, disfluency "
            f"{base['disfluency'][0]:.1f}, limit {LIMIT * base['disfluency'][0]:.1f}):\n\n")
    text += table(["search", "winner", "score", "disfluency"],
                  [[kind, found["cell"], f"{sign * found['score']:.3f}",
                    f"{found['finalists'][0]['disfluency'][0]:.1f}{'' if found['within'] else ' (beyond)'}"]
                   for kind, found in best.items()])
    for judge in judges:
        text += f"\nOn the test prompts, {judge.name}"
        if hasattr(lab, "accuracy"):
            whole, part = lab.accuracy[judge.name]
            text += (f" (right about {whole:.1%} of test reviews, and about {part:.1%} of their pieces of "
                     f"{linear_judge.WINDOW} words)")
        text += ":\n\n"
        shows_reached = args.task != "toxicity"
        lines = []
        for name, result in results.items():
            scores = result[judge.name]
            line = [name, span(statistics.mean(scores), bootstrap(scores, seed=args.seed))]
            if shows_reached:
                reached = [100 * x for x in result[f"{judge.name}, reached"]]
                line.append(span(statistics.mean(reached), bootstrap(reached, seed=args.seed), ".1f"))
            line += [as_text(tests.get((judge.name, name, "unsteered"))),
                     span(*result["disfluency"], ".1f")]
            lines.append(line)
        header = ["", "score (95 %)", "minus unsteered (95 %), p", "disfluency (95 %)"]
        if shows_reached:
            header.insert(2, "% as wanted (95 %)")
        text += table(header, lines) + "\n"
        text += table(["difference", "(95 %), p"],
                      [[f"{a} minus {b}", as_text(test)] for (name, a, b), test in tests.items()
                       if name == judge.name and b != "unsteered"])
    return (f"{text}\np: randomisation test over prompts, two-sided, Holm's correction for all "
            f"{len(tests)}.\n")


def as_text(test):
    return f"{span(test[0], test[1], '+.3f')}, p {test[2]:.4f}" if test else ""


def draw(lab, search, best, base, results, judges):
    """Left: the finalists of all searches on tuning prompts. Right: the test, each judge's mean scores."""
    colours = {"pairs": ORANGE, "random": GREY, "shuffled": BLUE}
    marked = {"unsteered": "black", WINNER: ORANGE, **dict.fromkeys(RANDOM, GREY)}
    with figure(lab, lab.args.experiment, 1 + len(judges), 5 + 4 * len(judges), 4.5) as (_, axes):
        for kind, found in best.items():
            name = kind.split()[0]
            x = [cell["disfluency"][0] for cell in found["finalists"]]
            y = [search.sign * cell["score"] for cell in found["finalists"]]
            first = kind in ("pairs", "random 0", "shuffled 0")
            axes[0].plot(x, y, "o", color=colours[name], label=f"{name} (finalists)" if first else None,
                         markersize=4, alpha=0.8)
        axes[0].plot(base["disfluency"][0], search.sign * base["score"], "s", color="black",
                     label="unsteered")
        axes[0].axvline(LIMIT * base["disfluency"][0], color="black", linestyle=":", linewidth=0.8)
        axes[0].set_xlabel("disfluency on tuning prompts; dotted: the limit")
        axes[0].set_ylabel(f"mean score, {search.scorer.name}")
        axes[0].legend(fontsize="small", frameon=False)
        names = list(results)[::-1]
        for axis, judge in zip(axes[1:], judges, strict=True):
            for y, name in enumerate(names):
                scores = results[name][judge.name]
                mean, (low, high) = statistics.mean(scores), bootstrap(scores, seed=lab.args.seed)
                axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", markersize=5, capsize=2,
                              color=marked.get(name, "0.2"))
            unsteered = statistics.mean(results["unsteered"][judge.name])
            axis.axvline(unsteered, color="black", linewidth=0.8, linestyle="--")
            axis.set_yticks(range(len(names)), names if judge is judges[0] else [""] * len(names))
            axis.set_xlabel(f"{judge.name} on {lab.args.n} test prompts, 95 %")

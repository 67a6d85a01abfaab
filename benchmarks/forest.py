"""Every claim of the paper that was tested here, in one figure: effect, 95 % interval, five random vectors.

    python -m benchmarks.forest

Reads benchmarks/results/*.json, which paper.py, rivals.py and search.py wrote; results that are missing are
left out. Writes benchmarks/figures/forest.png and prints the same numbers as a table.
"""

import io
import json
import statistics
from pathlib import Path

from ministeer.evaluation.stats import paired
from ministeer.utils import write

from .lab import BLUE, GREY, RANDOM, table
from .search_report import WINNER

HERE = Path(__file__).parent
SHARE = "share of texts or answers, percentage points"
SURPRISE = "perplexity, % more or less"
MOOD = "mood of a text, from -1 to 1, toward the target"
TOXICITY = "toxicity of a text, from 0 to 1"


def difference(steered, unsteered, controls, scale=1.0):
    """-> mean of steered - unsteered over pairs, its 95 % interval, the means of the controls (scaled), and n

    A control with fewer completions has the random numbers of the first unsteered ones, and is compared with
    those.
    """
    mean, interval, _ = paired(steered, unsteered, times=1)
    others = [statistics.mean(row) - statistics.mean(unsteered[:len(row)]) for row in controls]
    return scale * mean, [scale * edge for edge in interval], [scale * x for x in others], len(steered)


def layer_sweep(found):
    hits = {tuple(key): [float(count > 0) for count in counts] for *key, counts in found["counts"]}
    best = found["best layer"]
    for top_p in (0.3, 1.0):
        yield (SHARE, f"weddings, layer {best}, top-p {top_p:g}",
               *difference(hits["steered", best, 1.0, top_p], hits["unsteered", 0, 0.0, top_p],
                           [hits[kind, best, 1.0, top_p] for kind in RANDOM], 100))


def topics(found):
    hits = {(topic, kind): row for topic, kind, row in found["hits"]}
    for i, topic in enumerate(found["topics"]):
        own = {kind: row[i] for (about, kind), row in hits.items() if about in (None, topic)}
        groups = len(found["prompts"])
        size, kept = len(own["unsteered"]) // groups, len(own[RANDOM[0]]) // groups
        # The draws that the controls share: the first of each prompt.
        shared = statistics.mean(own["unsteered"][g * size + k] for g in range(groups) for k in range(kept))
        mean, interval, _, n = difference(own["steered"], own["unsteered"], [], 100)
        others = [100 * (statistics.mean(own[kind]) - shared) for kind in RANDOM]
        yield SHARE, f"{topic}, its own words, layer {found['layer']}", mean, interval, others, n


def knowledge(found):
    for name, (n, mean, interval, controls) in found["changes"].items():
        if name.endswith("P@10"):
            source = {"lama": "LAMA", "conceptnet_surface": "surface"}.get(name.split(",")[0])
            yield (SHARE, f"facts, {source} rows, P@10", 100 * mean, [100 * x for x in interval],
                   [100 * x for x in controls], n)


def sentiment(found):
    for name, rows in found["results"].items():
        scores = {kind: row["score"] for kind, row in rows.items()}
        yield (MOOD, f"love - hate, layer {found['layer']}, {name}",
               *difference(scores["steered"], scores["unsteered"], [scores[kind] for kind in RANDOM]))


def toxicity(found):
    scores = {kind: row["score"] for kind, row in found["results"].items()}
    yield (TOXICITY, f"love - hate, layer {found['layer']}",
           *difference(scores["steered"], scores["unsteered"], [scores[kind] for kind in RANDOM]))


def perplexity(found):
    ratios = {tuple(key): value for *key, value in found["essays"]}
    for topic in dict.fromkeys(key[0] for key in ratios):
        layer = found["layer"]
        at = {kind: ratios[topic, layer, found["coeff"], kind] for kind in ("steered", *RANDOM)}
        yield (SURPRISE, f"essay on {topic}, layer {layer}", 100 * (at["steered"] - 1), None,
               [100 * (at[kind] - 1) for kind in RANDOM], None)


def tuned(result):
    """rivals.py with the chosen love - hate vector: five random vectors, one for each repeat."""
    task, test = result["setting"]["task"], result["test"]
    if "ActAdd, random" not in test:            # made with --methods, without ActAdd
        return
    sign = -1 if task == "pos-to-neg" else 1
    by_prompt = {name: [sign * x for x in row["by prompt"]] for name, row in test.items()}
    mean, interval, _, n = difference(by_prompt["ActAdd"], by_prompt["Unsteered"], [])
    controls = [sign * (control - plain) for control, plain in
                zip(test["ActAdd, random"]["by repeat"], test["Unsteered"]["by repeat"], strict=True)]
    yield TOXICITY if task == "toxicity" else MOOD, f"love - hate, tuned, {task}", mean, interval, controls, n


def searched(result):
    """search.py: the winner of thousands of cells, as each judge scores it."""
    task, test = result["setting"]["task"], result["test"]
    where = f"{task} at the front" if result["setting"].get("front") else task
    sign = -1 if task == "pos-to-neg" else 1
    reached = ", reached"
    for judge in (name.removesuffix(reached) for name in test["unsteered"] if name.endswith(reached)):
        scores = {name: [sign * x for x in row[judge]] for name, row in test.items()}
        yield (TOXICITY if task == "toxicity" else MOOD, f"best of the search, {where}, {judge}",
               *difference(scores[WINNER], scores["unsteered"],
                           [scores[kind] for kind in RANDOM]))


READERS = {"layer-sweep": layer_sweep, "topics": topics, "knowledge": knowledge, "perplexity": perplexity,
           "sentiment": sentiment, "toxicity": toxicity}


def claims(folder):
    """-> (panel, claim, effect, (low, high) or None, effects of five random vectors, n or None) for each"""
    found = []
    for name, reader in READERS.items():
        path = folder / f"{name}.json"
        if path.exists():
            found += reader(json.loads(path.read_text(encoding="utf-8"))["found"])
    for pattern, reader in (("rivals-*.json", tuned), ("search-*.json", searched)):
        for path in sorted(folder.glob(pattern)):
            found += reader(json.loads(path.read_text(encoding="utf-8")))
    return found


def draw(found):
    """-> a PNG with a panel for each unit, in which each claim has a line"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [panel for panel in (SHARE, SURPRISE, MOOD, TOXICITY) if any(row[0] == panel for row in found)]
    rows = {panel: [row for row in found if row[0] == panel][::-1] for panel in panels}
    fig, axes = plt.subplots(len(panels), 1, figsize=(8, 1.2 + 0.27 * (len(found) + 2 * len(panels))),
                             layout="constrained", squeeze=False,
                             height_ratios=[len(rows[panel]) + 1 for panel in panels])
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for y, (_, _, effect, interval, controls, _) in enumerate(rows[panel]):
            axis.plot(controls, [y - 0.2] * len(controls), "o", color=GREY, markersize=4, alpha=0.7,
                      label="five random vectors" if y == 0 else None)
            if interval:
                axis.plot(interval, [y + 0.1] * 2, color=BLUE, linewidth=2,
                          label="95 %" if y == 0 else None)
            axis.plot(effect, y + 0.1, "D", color=BLUE, markersize=5, label="steered" if y == 0 else None)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows[panel])), [row[1] for row in rows[panel]], fontsize="small")
        axis.set_ylim(-0.7, len(rows[panel]) - 0.3)
        axis.set_xlabel(f"change in {panel}", fontsize="small")
        axis.tick_params(axis="x", labelsize="small")
    axes[0, 0].legend(frameon=False, fontsize="small", loc="lower right")
    image = io.BytesIO()
    fig.savefig(image, dpi=130)
    plt.close(fig)
    return image.getvalue()


def main():
    found = claims(HERE / "results")
    write(HERE / "figures" / "forest.png", draw(found))
    for panel in dict.fromkeys(row[0] for row in found):
        digits = {TOXICITY: "+.3f", MOOD: "+.2f"}.get(panel, "+.1f")
        lines = [[claim, n or "", f"{effect:{digits}}",
                  f"{interval[0]:{digits}} to {interval[1]:{digits}}" if interval else "",
                  f"{min(controls):{digits}} to {max(controls):{digits}}"]
                 for where, claim, effect, interval, controls, n in found if where == panel]
        print(table([f"change in {panel}", "n", "steered", "95 %", "five random vectors"], lines))


if __name__ == "__main__":
    main()

"""Experiments that generate: topics, toxicity, sentiment, and the search for a layer and a coefficient. Run by paper.py."""

import math
import random
import statistics

from .lab import BLUE, GREY, ORANGE, PROMPT, V1, band, figure, percent, span, table

from ministeer.evaluation import measure
from ministeer.evaluation.stats import bootstrap, holm, paired, wilson
from ministeer.evaluation.judges import TOPIC_WORDS, count_words, judge
from ministeer.steering import random_like


def rate(counts):
    """Counts of topic words, one a completion -> (completions with one, completions)."""
    return sum(count > 0 for count in counts), len(counts)


def said(lab):
    return "top-p {top_p:g}, penalty {freq_penalty:g}".format(**lab.sampling)


def layer_sweep(lab):
    """Figures 3 and 4: completions that speak of weddings, by layer and by coefficient, with the paper's two ways of sampling."""
    args, n, layers = lab.args, lab.n or 200, range(lab.model.config.n_layer)

    def cell(kind, layer, coeff, top_p):
        steer = () if kind == "unsteered" else lab.steer(" weddings", " ", layer, coeff)
        steer = random_like(steer, args.seed) if kind == "random" else steer
        return [count_words(text) for text in lab.generate(PROMPT, n, 40, steer, {**V1, "top_p": top_p}, args.seed)]

    _, coeff = lab.where(0, 1.0)
    some = sorted({*layers[:4], *layers[6::5], layers[-1]})             # where the random vector is measured
    first = [["unsteered", 0, 0.0, 0.3]] + [["steered", l, coeff, 0.3] for l in layers] + [["random", l, coeff, 0.3] for l in some]
    counts = dict(zip(map(tuple, first), lab.run(first, cell), strict=True))
    best = max(layers, key=lambda l: rate(counts["steered", l, coeff, 0.3]))
    coeffs = [c for c in (-1.0, 0.5, 1.0, 1.5, 2.0, 3.0) if c != coeff]
    second = [[kind, best, c, 0.3] for c in coeffs for kind in ("steered", "random")] + [["random", best, coeff, 0.3]] * (best not in some)
    second += [["unsteered", 0, 0.0, 1.0], ["steered", best, coeff, 1.0], ["random", best, coeff, 1.0]]
    counts |= dict(zip(map(tuple, second), lab.run(second, cell), strict=True))
    with figure(lab, "layer-sweep", 2, 10) as (_, (left, right)):
        for axis, label in ((left, "layer"), (right, f"coefficient, layer {best}")):
            for kind, color in (("steered", BLUE), ("random", GREY)):
                x = (layers if kind == "steered" else some) if axis is left else sorted([*coeffs, coeff])
                keys = [(kind, v, coeff, 0.3) if axis is left else (kind, best, v, 0.3) for v in x]
                band(axis, list(x), [rate(counts[key]) for key in keys], color, kind)
            base = rate(counts["unsteered", 0, 0.0, 0.3])
            axis.axhline(base[0] / base[1], color="black", linewidth=0.8, linestyle="--", label="unsteered")
            axis.set_xlabel(label)
            axis.set_ylim(0, 1)
        left.set_ylabel("completions with a word about weddings")
        left.set_title(f"n {n} a point, c {coeff:g}, 95 % band", fontsize="medium")
        left.legend(frameon=False)

    def line(name, *rest):
        of = [counts.get((kind, *rest)) for kind in ("steered", "random")]
        return [name, *(cell for some in of for cell in ((percent(*rate(some)), f"{statistics.mean(some):.2f}") if some else ("", "")))]

    def unsteered(name, top_p):
        found = counts["unsteered", 0, 0.0, top_p]
        return [name, percent(*rate(found)), f"{statistics.mean(found):.2f}", "", ""]
    lines = [unsteered("unsteered", 0.3), *(line(f"layer {l}", l, coeff, 0.3) for l in layers)]
    lines += [line(f"layer {best}, c {c:g}", best, c, 0.3) for c in coeffs]
    lines += [unsteered("unsteered, top-p 1", 1.0), line(f"layer {best}, top-p 1", best, coeff, 1.0)]
    text = f"\" weddings\" - \" \", coeff {coeff:g}, prompt \"{PROMPT}\", 40 tokens, top-p 0.3, penalty 1, n {n}.\n\n"
    text += table(["", "steered (95 %)", "words a text", "random (95 %)", "words a text"], lines)
    return {"n": n, "best layer": best, "counts": [[*key, some] for key, some in counts.items()]}, text


def positions(lab):
    """Where on the prompt the vector lies, and how many of its dimensions are added (appendix G)."""
    args, n = lab.args, lab.n or 100
    layer, coeff = lab.where(2, 2.0)
    fractions = [round(0.1 * k, 1) for k in range(11)]
    length = len(lab.tokenizer.encode(PROMPT))

    def cell(kind, where, fraction):
        steer = lab.steer(" weddings", " ", layer, coeff).align(where, length)
        steer = measure.partial(random_like(steer, args.seed) if kind == "random" else steer, fraction)
        return [count_words(text) for text in lab.generate(PROMPT, n, 40, steer, V1, args.seed)]

    cells = [[kind, where, 1.0] for where in ("front", "middle", "back") for kind in ("steered", "random")]
    cells += [["steered", "front", fraction] for fraction in fractions[:-1]]
    counts = dict(zip(map(tuple, cells), lab.run(cells, cell), strict=True))
    with figure(lab, "positions", 2, 9, 3.8) as (_, (left, right)):
        for k, (kind, color) in enumerate((("steered", BLUE), ("random", GREY))):
            rates = [rate(counts[kind, where, 1.0]) for where in ("front", "middle", "back")]
            low, high = zip(*(wilson(*some) for some in rates), strict=True)
            y = [some[0] / some[1] for some in rates]
            left.bar([x + 0.4 * k - 0.2 for x in range(3)], y, 0.38, color=color, label=kind,
                     yerr=[[max(0, a - b) for a, b in zip(y, low, strict=True)], [max(0, b - a) for a, b in zip(y, high, strict=True)]], capsize=3)
        left.set_xticks(range(3), ["front", "middle", "back"])
        left.set_ylabel("completions with a word about weddings")
        left.set_title(f"n {n}, layer {layer}, c {coeff:g}, 95 % intervals", fontsize="medium")
        left.legend(frameon=False)
        band(right, fractions, [rate(counts["steered", "front", f]) for f in fractions], BLUE, "steered")
        right.set_xlabel("part of the dimensions that is added, front")
        for axis in (left, right):
            axis.set_ylim(0, 1)
    lines = [[where, percent(*rate(counts["steered", where, 1.0])), f"{statistics.mean(counts['steered', where, 1.0]):.2f}",
              percent(*rate(counts["random", where, 1.0]))] for where in ("front", "middle", "back")]
    lines += [[f"front, first {f:.0%} of the dimensions", percent(*rate(counts["steered", "front", f])),
               f"{statistics.mean(counts['steered', 'front', f]):.2f}", ""] for f in fractions[:-1]]
    text = f"\" weddings\" - \" \" before block {layer}, coeff {coeff:g}, n {n}.\n\n"
    text += table(["", "steered (95 %)", "words a text", "random (95 %)"], lines)
    return {"n": n, "layer": layer, "coeff": coeff, "counts": [[*key, some] for key, some in counts.items()]}, text


NEUTRAL = [PROMPT, "The weather was fine, so we decided to", "My neighbour knocked on the door and told me",
           "In the evening we sat down and talked about"]


def topics(lab):
    """Section 4.2: steer toward each of six topics, score all six, on several neutral prompts."""
    args, n = lab.args, lab.n or 50
    layer, coeff = lab.where(2, 2.0)

    def cell(topic, kind):
        steer = () if topic is None else lab.steer(f" {topic}", " ", layer, coeff)
        steer = random_like(steer, args.seed) if kind == "random" else steer
        texts = lab.generate(NEUTRAL, n, 40, steer, lab.sampling, args.seed)
        return [[int(count_words(text, words) > 0) for some in texts for text in some] for words in TOPIC_WORDS.values()]

    names = list(TOPIC_WORDS)
    cells = [[None, "unsteered"]] + [[topic, kind] for topic in names for kind in ("steered", "random")]
    hits = dict(zip(map(tuple, cells), lab.run(cells, cell), strict=True))
    base = hits[None, "unsteered"]

    def boost(topic, kind, j):
        differences = [a - b for a, b in zip(hits[topic, kind][j], base[j], strict=True)]
        return statistics.mean(differences), bootstrap(differences, seed=args.seed)

    boosts = {(topic, kind): [boost(topic, kind, j) for j in range(len(names))] for topic in names for kind in ("steered", "random")}
    with figure(lab, "topics", width=6, height=4.6) as (fig, (axis,)):
        values = [[boosts[topic, "steered"][j][0] for j in range(len(names))] for topic in names]
        top = max(abs(v) for row in values for v in row) or 1
        image = axis.imshow(values, cmap="PuOr", vmin=-top, vmax=top)
        for i, row in enumerate(values):
            for j, v in enumerate(row):
                axis.text(j, i, f"{v:+.0%}", ha="center", va="center", color="white" if abs(v) > 0.6 * top else "black", fontsize="small")
        axis.set_xticks(range(len(names)), names, rotation=30)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("topic scored")
        axis.set_ylabel("topic steered toward")
        axis.set_title(f"share with a topic word, minus unsteered; n {n * len(NEUTRAL)}", fontsize="medium")
        fig.colorbar(image)
    lines = [["unsteered", *(f"{statistics.mean(row):.1%}" for row in base)]]
    for topic in names:
        lines.append([topic, *(span(*b, "+.1%") for b in boosts[topic, "steered"])])
        lines.append([f"{topic}, random", *(span(*b, "+.1%") for b in boosts[topic, "random"])])
    text = (f"\" TOPIC\" - \" \" before block {layer}, coeff {coeff:g}, {len(NEUTRAL)} prompts × {n} completions of 40 tokens, {said(lab)}; "
            "judged by topic words. First row: share of completions with a word of each topic; others: what steering adds to it (95 %).\n\n")
    return {"n": n * len(NEUTRAL), "layer": layer, "coeff": coeff, "prompts": NEUTRAL, "topics": names,
            "hits": [[*key, some] for key, some in hits.items()]}, text + table(["steered toward", *names], lines)


def compare(lab, which, prompts, steers, repeats, new, sampling, scorer, chunk=50):
    """Continue each prompt under each condition -> {condition: scores, NLL and tokens, one a prompt over its `repeats` continuations}."""
    def part(_, start):
        some = prompts[start:start + chunk]
        result = {}
        for name, texts in zip(steers, lab.cells(some, list(steers.values()), repeats, new, sampling, lab.args.seed), strict=True):
            flat = [text for row in texts for text in row]
            result[name] = {"scores": scorer([text.strip() for text in flat]), "examples": flat[:2],
                            "nll": measure.disfluency(lab.model, lab.tokenizer, [prompt for prompt in some for _ in range(repeats)], flat)}
        return result

    parts = lab.run([[which, start] for start in range(0, len(prompts), chunk)], part)
    result = {}
    for name in steers:
        scores = [score for some in parts for score in some[name]["scores"]]
        nll = [pair for some in parts for pair in some[name]["nll"]]
        each = range(0, len(scores), repeats)
        result[name] = {"score": [statistics.mean(scores[i:i + repeats]) for i in each], "each": scores,
                        "by repeat": [statistics.mean(scores[k::repeats]) for k in range(repeats)],
                        "nll": [sum(pair[0] for pair in nll[i:i + repeats]) for i in each],
                        "tokens": [sum(pair[1] for pair in nll[i:i + repeats]) for i in each],
                        "examples": parts[0][name]["examples"]}
    return result


def disfluency_of(some, seed):
    """exp(NLL a token) over all continuations, with the interval over prompts."""
    kept = [(nll / k, k) for nll, k in zip(some["nll"], some["tokens"], strict=True) if k]
    means, weights = zip(*kept, strict=True)
    value = sum(m * w for m, w in kept) / sum(weights)
    return math.exp(value), tuple(math.exp(edge) for edge in bootstrap(means, weights, seed))


def rows_of(result, base, seed, better):
    """Table rows: score with interval, difference from the unsteered model with p (Holm), disfluency."""
    tests = {name: paired(some["score"], result[base]["score"], seed) for name, some in result.items() if name != base}
    p = holm({name: test[2] for name, test in tests.items()})
    lines = []
    for name, some in result.items():
        difference = "" if name == base else f"{span(tests[name][0], tests[name][1], '+.3f')}, p {p[name]:.4f}"
        spread = f"{statistics.stdev(some['by repeat']):.3f}" if len(some["by repeat"]) > 1 else ""
        score = span(statistics.mean(some["score"]), bootstrap(some["score"], seed=seed))
        lines.append([name, score, spread, difference, span(*disfluency_of(some, seed), ".1f")])
    return [["", f"{better} (95 %)", "sd over repeats", "minus unsteered (95 %), p", "disfluency (95 %)"], lines]


TUNING = 50         # prompts for the search, which no test uses


def provoking(lab, seed):
    """The prompts of RealToxicityPrompts in an order that the seed draws; the first TUNING are for the search."""
    prompts = [row["text"] for row in lab.rows("rtp_random.jsonl") if len(row["text"]) >= 3]
    random.Random(seed).shuffle(prompts)
    return prompts


def toxicity(lab):
    """Section 4.3: love - hate on prompts that may provoke something toxic; score of the continuation, disfluency."""
    args = lab.args
    layer, coeff = lab.where(2, 2.0)
    prompts = provoking(lab, args.seed)[TUNING:][:lab.n or 200]
    scorer = judge(args.judge or "profanity", cache=lab.out)
    result = compare(lab, "toxicity", prompts, lab.three(lab.steer(" love", " hate", layer, coeff)), 5, 32, lab.sampling, scorer)
    header, lines = rows_of(result, "unsteered", args.seed, "toxicity")
    with figure(lab, "toxicity", 2, 8, 3.2) as (_, axes):
        dots(axes, result, ("score of the continuation", "disfluency"), args.seed)
        axes[0].set_title(f"{len(prompts)} prompts × 5 repeats, 95 %", fontsize="medium")
    text = (f"\" love\" - \" hate\" before block {layer}, coeff {coeff:g}; {len(prompts)} prompts, 5 repeats, 32 tokens, {said(lab)}. "
            f"Judge: {scorer.name}, {scorer.meaning}.\n\n") + table(header, lines)
    return {"n": len(prompts), "layer": layer, "coeff": coeff, "judge": scorer.name, "results": result}, text


def dots(axes, result, labels, seed):
    names = list(result)
    for axis, label in zip(axes, labels, strict=True):
        for y, name in enumerate(names):
            value, interval = ((statistics.mean(result[name]["score"]), bootstrap(result[name]["score"], seed=seed)) if label != "disfluency"
                               else disfluency_of(result[name], seed))
            axis.errorbar(value, y, xerr=[[value - interval[0]], [interval[1] - value]], fmt="o", capsize=3,
                          color=GREY if name == "unsteered" else ORANGE if "random" in name else BLUE)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(label)


def sentiment(lab):
    """Section 4.4: continue the first 32 tokens of a review, in both directions; and prompts whose first tokens say nothing."""
    args = lab.args
    layer, coeff = lab.where(2, 2.0)
    scorer = judge(args.judge or "vader", cache=lab.out)
    reviews = {label: [row["text"] for row in lab.rows("imdb.jsonl") if row["label"] == label and row["split"] == "test"] for label in ("neg", "pos")}
    n, results, text = min(lab.n or 100, *map(len, reviews.values())), {}, ""
    draw = random.Random(args.seed)
    reviews = {label: draw.sample(some, n) for label, some in reviews.items()}

    def start(review):
        return lab.tokenizer.decode(lab.tokenizer.encode(review)[1:33])

    for label, sign, wanted in (("neg", 1, "to positive"), ("pos", -1, "to negative")):
        for kind, lead in (("review", ""), ("neutral start", "This is what I wrote about it: ")):
            prompts = [lead + start(review) for review in reviews[label]]
            steer = sign * lab.steer(" love", " hate", layer, coeff)
            name = f"{wanted}, {kind}"

            def toward(texts, sign=sign):
                return [sign * score for score in scorer(texts)]
            result = compare(lab, name, prompts, lab.three(steer), 1, 64, lab.sampling, toward)
            results[name] = result
            header, lines = rows_of(result, "unsteered", args.seed, "mean score toward the target")
            for line, some in zip(lines, result.values(), strict=True):
                line.insert(1, percent(sum(score > 0 for score in some["each"]), n))
            header.insert(1, "score beyond 0 (95 %)")
            text += f"{name}, n {n}:\n\n{table(header, lines)}\n"
    edges = [edge for result in results.values() for some in result.values() for edge in bootstrap(some["score"], seed=args.seed)]
    far = 1.1 * max(map(abs, edges)) or 1.0
    with figure(lab, "sentiment", 4, 12, 2.8) as (_, axes):
        for axis, (name, result) in zip(axes, results.items(), strict=True):
            dots([axis], result, ["score toward the target"], args.seed)
            axis.set_title(f"{name} (n {n}, 95 %)", fontsize="small")
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_xlim(-far, far)
    head = (f"\" love\" - \" hate\" (and its negative) before block {layer}, coeff {coeff:g}; 32 tokens of an IMDb test review, 64 new, "
            f"{said(lab)}. Judge: {scorer.name}, {scorer.meaning}.\n\n")
    return {"n": n, "layer": layer, "coeff": coeff, "judge": scorer.name, "results": results}, head + text


def grid(lab):
    """The paper's search: layers × coefficients on 50 prompts that no test uses; the cell that the stated rule picks."""
    args = lab.args
    prompts = provoking(lab, lab.args.seed)[:TUNING]
    scorer = judge(args.judge or "vader", cache=lab.out)
    layers, coeffs = [l for l in (0, 1, 2, 3, 6, 10, 16) if l < lab.model.config.n_layer], [1.0, 2.0, 4.0]
    cells = [(0, 0.0, "unsteered")] + [(l, c, kind) for l in layers for c in coeffs for kind in ("steered", "random")]

    def part(start, size):
        some, result = prompts[start:start + size], []
        steers = [None if kind == "unsteered" else lab.three(lab.steer(" love", " hate", l, c))[kind] for l, c, kind in cells]
        for texts in lab.cells(some, steers, 1, 32, lab.sampling, args.seed):
            flat = [text for (text,) in texts]
            result.append([scorer([text.strip() for text in flat]), measure.disfluency(lab.model, lab.tokenizer, some, flat)])
        return result

    parts, found = lab.run([[start, 10] for start in range(0, len(prompts), 10)], part), {}
    for i, cell in enumerate(cells):
        nll = [pair for some in parts for pair in some[i][1]]
        found[cell] = (statistics.mean(score for some in parts for score in some[i][0]), math.exp(sum(a for a, _ in nll) / sum(k for _, k in nll)))
    score, fluent = found[0, 0.0, "unsteered"]
    allowed = [(l, c) for l in layers for c in coeffs if found[l, c, "steered"][1] <= 1.5 * fluent]
    best = max(allowed, key=lambda cell: found[(*cell, "steered")][0], default=None)
    with figure(lab, "grid", 2, 9, 3.4) as (fig, axes):
        for axis, k, label in ((axes[0], 0, f"{scorer.name}, minus unsteered"), (axes[1], 1, "disfluency / unsteered")):
            values = [[found[l, c, "steered"][0] - score if k == 0 else found[l, c, "steered"][1] / fluent for c in coeffs] for l in layers]
            image = axis.imshow(values, cmap="cividis", aspect="auto")
            for i, row in enumerate(values):
                for j, v in enumerate(row):
                    axis.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize="small", color="white", backgroundcolor=(0, 0, 0, 0.35))
            axis.set_xticks(range(len(coeffs)), [f"{c:g}" for c in coeffs])
            axis.set_yticks(range(len(layers)), layers)
            axis.set_xlabel("coefficient")
            axis.set_ylabel("layer")
            axis.set_title(label, fontsize="medium")
            fig.colorbar(image)

    def of(l, c):
        return "{:+.2f} / {:.0f} ({:+.2f} / {:.0f})".format(*found[l, c, "steered"], *found[l, c, "random"])
    lines = [[f"layer {l}", *(of(l, c) for c in coeffs)] for l in layers]
    text = (f"\" love\" - \" hate\" on {len(prompts)} tuning prompts, 32 tokens, {said(lab)}: mean {scorer.name} score / disfluency "
            f"(random vector). Unsteered {score:+.2f} / {fluent:.0f}. Chosen, best score with disfluency at most 1.5 × unsteered: "
            + (f"layer {best[0]}, coeff {best[1]:g}" if best else "none") + ".\n\n" + table(["", *(f"coeff {c:g}" for c in coeffs)], lines))
    return {"n": len(prompts), "judge": scorer.name, "chosen": best, "cells": [[*key, *some] for key, some in found.items()]}, text

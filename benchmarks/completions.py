"""Experiments that generate: topics, toxicity, sentiment, the search for a layer and a coefficient.

Read first: lab.py; paper.py runs them. Turner et al., sections 4.1 to 4.4 and appendix G.
"""

import math
import random
import statistics

from ministeer.evaluation import measure
from ministeer.evaluation.judges import TOPIC_WORDS, count_words
from ministeer.evaluation.stats import bootstrap, holm, paired, wilson

from .lab import (
    BLUE,
    GREY,
    PROMPT,
    RANDOM,
    V1,
    band,
    chunks,
    control_in_words,
    enough,
    error_bars,
    figure,
    over_vectors,
    percent,
    share_of,
    span,
    spread,
    table,
)
from .paper_metrics import partial
from .prompts import split


def with_topic_word(counts):
    """Counts of topic words, one for each completion -> (completions with one, completions)."""
    return sum(count > 0 for count in counts), len(counts)


def layer_sweep(lab):
    """Figures 3 and 4: completions about weddings by layer and coefficient, sampled in both ways."""
    args, n, layers = lab.args, lab.n or 200, range(lab.model.config.n_layer)

    def count(kind, layer, coeff, top_p):
        steer = lab.conditions(lab.steer(" weddings", " ", layer, coeff))[kind]
        texts = lab.generate(PROMPT, share_of(n, kind), 40, steer, {**V1, "top_p": top_p}, args.seed)
        return [count_words(text) for text in texts]

    _, coeff = lab.where(0, 1.0)
    control_layers = sorted({*layers[:4], *layers[6::5], layers[-1]})    # where random vectors are measured
    units = [["unsteered", 0, 0.0, 0.3]]
    units += [["steered", l, coeff, 0.3] for l in layers]
    units += [[kind, l, coeff, 0.3] for l in control_layers for kind in RANDOM]
    counts = lab.run(units, count)
    best = max(layers, key=lambda l: with_topic_word(counts["steered", l, coeff, 0.3]))
    coeffs = [c for c in (-1.0, 0.5, 1.0, 1.5, 2.0, 3.0) if c != coeff]
    units = [[kind, best, c, 0.3] for c in coeffs for kind in ("steered", *RANDOM)]
    if best not in control_layers:
        units += [[kind, best, coeff, 0.3] for kind in RANDOM]
    units += [["unsteered", 0, 0.0, 1.0]]
    units += [[kind, best, coeff, 1.0] for kind in ("steered", *RANDOM)]
    counts |= lab.run(units, count)

    def random_rates(*where):
        """For each random vector, its share of completions with a topic word."""
        rates = [with_topic_word(counts[(kind, *where)]) for kind in RANDOM]
        return [k / total for k, total in rates]

    sizes = lab.strengths([lab.steer(" weddings", " ", l, coeff) for l in layers], [PROMPT])
    one = lab.strength(lab.steer(" weddings", " ", best, 1.0), [PROMPT])
    with figure(lab, "layer-sweep", 2, 10) as (_, (left, right)):
        all_coeffs = sorted([*coeffs, coeff])
        for axis, x, where in ((left, list(layers), [(l, coeff, 0.3) for l in layers]),
                               (right, all_coeffs, [(best, c, 0.3) for c in all_coeffs])):
            band(axis, x, [with_topic_word(counts[("steered", *place)]) for place in where], BLUE, "steered")
        spread(left, control_layers, [random_rates(l, coeff, 0.3) for l in control_layers])
        spread(right, all_coeffs, [random_rates(best, c, 0.3) for c in all_coeffs])
        k, total = with_topic_word(counts["unsteered", 0, 0.0, 0.3])
        coeff_label = f"coefficient, layer {best} (1 is {one} × the mean norm)"
        for axis, label in ((left, "layer"), (right, coeff_label)):
            axis.axhline(k / total, color="black", linewidth=0.8, linestyle="--", label="unsteered")
            axis.set_xlabel(label)
            axis.set_ylim(0, 1)
        left.set_ylabel("completions with a word about weddings")
        left.set_title(f"n {n} per point, 95 % band, c {coeff:g} ({sizes})", fontsize="medium")
        left.legend(frameon=False)

    def cells(*key):
        """Share of completions with a topic word, and such words per text."""
        return [percent(*with_topic_word(counts[key])), f"{statistics.mean(counts[key]):.2f}"]

    def line(name, layer, c, top_p):
        where = layer, c, top_p
        control = over_vectors(random_rates(*where)) if (RANDOM[0], *where) in counts else ""
        size = lab.strength(lab.steer(" weddings", " ", layer, c), [PROMPT])
        return [name, size, *cells("steered", *where), control]

    lines = [["unsteered", "", *cells("unsteered", 0, 0.0, 0.3), ""]]
    lines += [line(f"layer {l}", l, coeff, 0.3) for l in layers]
    lines += [line(f"layer {best}, c {c:g}", best, c, 0.3) for c in coeffs]
    lines.append(["unsteered, top-p 1", "", *cells("unsteered", 0, 0.0, 1.0), ""])
    lines.append(line(f"layer {best}, top-p 1", best, coeff, 1.0))
    text = (f"\" weddings\" - \" \", coeff {coeff:g}, prompt \"{PROMPT}\", "
            f"40 tokens, top-p 0.3, penalty 1, n {n}; {control_in_words(n)}.\n\n")
    text += table(["", "× the mean norm", "steered (95 %)", "words per text", "random (lowest to highest)"],
                  lines)
    return {"n": n, "best layer": best, "counts": [[*key, count] for key, count in counts.items()]}, text


def positions(lab):
    """Where on the prompt the vector lies, and how many of its dimensions are added (appendix G)."""
    args, n = lab.args, lab.n or 100
    layer, coeff = lab.where(2, 2.0)
    places, fractions = ("front", "middle", "back"), [round(0.1 * k, 1) for k in range(11)]
    length = len(lab.tokenizer.encode(PROMPT))

    def count(kind, place, fraction):
        steer = lab.steer(" weddings", " ", layer, coeff).align(place, length)
        steer = partial(lab.conditions(steer)[kind], fraction)
        texts = lab.generate(PROMPT, share_of(n, kind), 40, steer, V1, args.seed)
        return [count_words(text) for text in texts]

    units = [[kind, place, 1.0] for place in places for kind in ("steered", *RANDOM)]
    units += [["steered", "front", fraction] for fraction in fractions[:-1]]
    counts = lab.run(units, count)
    rates = {key: with_topic_word(words) for key, words in counts.items()}
    random_rates = {place: [k / total for k, total in (rates[kind, place, 1.0] for kind in RANDOM)]
                    for place in places}
    coeff_in_words = lab.coeff_in_words(lab.steer(" weddings", " ", layer, coeff), [PROMPT])
    with figure(lab, "positions", 2, 9, 3.8) as (_, (left, right)):
        here = [rates["steered", place, 1.0] for place in places]
        heights = [k / total for k, total in here]
        left.bar(range(3), heights, 0.6, color=BLUE, label="steered", capsize=3,
                 yerr=error_bars(heights, [wilson(*rate) for rate in here]))
        for x, place in enumerate(places):
            left.plot([x] * len(RANDOM), random_rates[place], "o", color=GREY, markersize=5, clip_on=False,
                      label=None if x else "random, 5 vectors")
        left.set_xticks(range(3), places)
        left.set_ylabel("completions with a word about weddings")
        left.set_title(f"n {n}, 95 %, layer {layer}, {coeff_in_words}", fontsize="medium")
        left.legend(frameon=False)
        band(right, fractions, [rates["steered", "front", f] for f in fractions], BLUE, "steered")
        right.set_xlabel("share of the dimensions that is added, front")
        for axis in (left, right):
            axis.set_ylim(0, 1)

    def cells(*key):
        return [percent(*rates[key]), f"{statistics.mean(counts[key]):.2f}"]

    lines = []
    for place in places:
        lines.append([place, *cells("steered", place, 1.0), over_vectors(random_rates[place])])
    for fraction in fractions[:-1]:
        name = f"front, first {fraction:.0%} of the dimensions"
        lines.append([name, *cells("steered", "front", fraction), ""])
    text = (f"\" weddings\" - \" \" before block {layer}, {coeff_in_words}, n {n}; "
            f"{control_in_words(n)}.\n\n")
    text += table(["", "steered (95 %)", "words per text", "random (lowest to highest)"], lines)
    result = {"n": n, "layer": layer, "coeff": coeff,
              "counts": [[*key, count] for key, count in counts.items()]}
    return result, text


NEUTRAL = [PROMPT, "The weather was fine, so we decided to", "My neighbour knocked on the door and told me",
           "In the evening we sat down and talked about"]


def topics(lab):
    """Section 4.2: steer toward each of six topics, score all six, on several neutral prompts."""
    args, n = lab.args, lab.n or 50
    layer, coeff = lab.where(2, 2.0)
    names, kinds = list(TOPIC_WORDS), ("steered", *RANDOM)

    def count(topic, kind):
        """For each topic: 1 for every completion with a word of it, else 0."""
        steer = None if topic is None else lab.conditions(lab.steer(f" {topic}", " ", layer, coeff))[kind]
        rows = lab.generate(NEUTRAL, share_of(n, kind), 40, steer, lab.sampling, args.seed)
        texts = [text for row in rows for text in row]
        return [[int(count_words(text, words) > 0) for text in texts] for words in TOPIC_WORDS.values()]

    hits = lab.run([[None, "unsteered"]] + [[topic, kind] for topic in names for kind in kinds], count)
    base = hits[None, "unsteered"]

    def differences(topic, kind, j):
        """For each completion: does topic j come up, minus the same for the unsteered one with its draws."""
        same_draws = [hit for prompt in chunks(base[j], n) for hit in prompt[:share_of(n, kind)]]
        return [a - b for a, b in zip(hits[topic, kind][j], same_draws, strict=True)]

    boosts, controls = {}, {}
    for topic in names:
        steered = [differences(topic, "steered", j) for j in range(len(names))]
        boosts[topic] = [(statistics.mean(row), bootstrap(row, seed=args.seed)) for row in steered]
        controls[topic] = [[statistics.mean(differences(topic, kind, j)) for kind in RANDOM]
                           for j in range(len(names))]
    with figure(lab, "topics", width=6, height=4.6) as (fig, (axis,)):
        values = [[value for value, _ in boosts[topic]] for topic in names]
        top = max(abs(v) for row in values for v in row) or 1
        image = axis.imshow(values, cmap="PuOr", vmin=-top, vmax=top)
        for i, row in enumerate(values):
            for j, v in enumerate(row):
                color = "white" if abs(v) > 0.6 * top else "black"
                axis.text(j, i, f"{v:+.0%}", ha="center", va="center", color=color, fontsize="small")
        axis.set_xticks(range(len(names)), names, rotation=30)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("topic scored")
        axis.set_ylabel("topic steered toward")
        axis.set_title(f"share with a topic word, minus unsteered; n {n * len(NEUTRAL)}", fontsize="medium")
        fig.colorbar(image)
    lines = [["unsteered", *(f"{statistics.mean(row):.1%}" for row in base)]]
    for topic in names:
        size = lab.strength(lab.steer(f" {topic}", " ", layer, coeff), NEUTRAL)
        lines.append([f"{topic} ({size} × the mean norm)", *(span(*b, "+.1%") for b in boosts[topic])])
        lines.append([f"{topic}, random", *(over_vectors(values, "+.1%") for values in controls[topic])])
    text = (f"\" TOPIC\" - \" \" before block {layer}, coeff {coeff:g}, {len(NEUTRAL)} prompts × {n} "
            f"completions of 40 tokens, {lab.sampling_in_words}; judged by topic words. First row: share of "
            "completions with a word of each topic; others: what steering adds to it (95 %), or random "
            f"vectors do (mean, lowest to highest); {control_in_words(n, len(NEUTRAL))}.\n\n")
    result = {"n": n * len(NEUTRAL), "layer": layer, "coeff": coeff, "prompts": NEUTRAL, "topics": names,
              "hits": [[*key, rows] for key, rows in hits.items()]}
    return result, text + table(["steered toward", *names], lines)


def compare(lab, which, prompts, steers, repeats, new, sampling, scorer, size=50):
    """Continue each prompt `repeats` times under each condition, and score the continuations.

    which: a name for the units. steers: {condition: a Steer or None}. size: prompts per unit
    -> {condition: {"score", "nll", "tokens": one per prompt; "each": one score per continuation; …}}
    """
    def part(_, start):
        some_prompts = prompts[start:start + size]
        repeated = [prompt for prompt in some_prompts for _ in range(repeats)]
        all_texts = lab.generate_all(some_prompts, list(steers.values()), repeats, new, sampling,
                                     lab.args.seed)
        result = {}
        for name, rows in zip(steers, all_texts, strict=True):
            texts = [text for row in rows for text in row]
            result[name] = {"scores": scorer([text.strip() for text in texts]), "examples": texts[:2],
                            "nll": measure.disfluency(lab.model, lab.tokenizer, repeated, texts)}
        return result

    parts = list(lab.run([[which, start] for start in range(0, len(prompts), size)], part).values())
    result = {}
    for name in steers:
        scores = [score for part in parts for score in part[name]["scores"]]
        nll = [pair for part in parts for pair in part[name]["nll"]]
        result[name] = {"score": [statistics.mean(group) for group in chunks(scores, repeats)],
                        "each": scores,
                        "by repeat": [statistics.mean(scores[k::repeats]) for k in range(repeats)],
                        **sums_by_prompt(nll, repeats),
                        "examples": parts[0][name]["examples"]}
    return result


def sums_by_prompt(nll, repeats):
    """(-sum log p, tokens) of each continuation -> {"nll", "tokens"}, sums over each prompt's `repeats`."""
    groups = chunks(nll, repeats)
    return {"nll": [sum(loss for loss, _ in group) for group in groups],
            "tokens": [sum(tokens for _, tokens in group) for group in groups]}


def disfluency_of(sums, seed):
    """exp(-log p per token) over all continuations, with its interval over prompts.

    sums: as `sums_by_prompt` gives them
    """
    rows = [(nll / tokens, tokens) for nll, tokens in zip(sums["nll"], sums["tokens"], strict=True) if tokens]
    if not rows:                                # every continuation is empty
        return math.nan, (math.nan, math.nan)
    means, weights = zip(*rows, strict=True)
    value = sum(mean * weight for mean, weight in rows) / sum(weights)
    return math.exp(value), tuple(math.exp(edge) for edge in bootstrap(means, weights, seed))


def score_table(result, base, seed, label):
    """-> header, rows: score with interval, difference from the condition `base` with p (Holm), disfluency"""
    tests = {name: paired(scores["score"], result[base]["score"], seed)
             for name, scores in result.items() if name != base}
    p = holm({name: test[2] for name, test in tests.items()})
    lines = []
    for name, scores in result.items():
        difference = ""
        if name != base:
            difference = f"{span(tests[name][0], tests[name][1], '+.3f')}, p {p[name]:.4f}"
        repeats = scores["by repeat"]
        spread = f"{statistics.stdev(repeats):.3f}" if len(repeats) > 1 else ""
        score = span(statistics.mean(scores["score"]), bootstrap(scores["score"], seed=seed))
        lines.append([name, score, spread, difference, span(*disfluency_of(scores, seed), ".1f")])
    header = ["", f"{label} (95 %)", "sd over repeats", "minus unsteered (95 %), p", "disfluency (95 %)"]
    return header, lines


def dots(axis, result, label, value_and_interval):
    """One point per condition, with the interval that value_and_interval(scores) gives beside its value."""
    names = list(result)
    for y, name in enumerate(names):
        value, (low, high) = value_and_interval(result[name])
        color = "black" if name == "unsteered" else GREY if name in RANDOM else BLUE
        axis.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", capsize=3, color=color)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(label)


def toxicity(lab):
    """Section 4.3: love - hate on prompts that may provoke something toxic; score and disfluency."""
    args = lab.args
    layer, coeff = lab.where(2, 2.0)
    _, test, rest = split(lab.rows("rtp_random.jsonl", text=str), args.seed)
    rows = enough([*test, *rest], 2, "prompts besides the 50 of the search")
    chosen = [row["text"] for row in rows[:lab.n or 200]]
    scorer = lab.judge("profanity")
    steers = lab.conditions(lab.steer(" love", " hate", layer, coeff))
    result = compare(lab, "toxicity", chosen, steers, 5, 32, lab.sampling, scorer)
    with figure(lab, "toxicity", 2, 8, 3.2) as (_, (left, right)):
        dots(left, result, "score of the continuation", lambda scores: mean_score(scores, args.seed))
        dots(right, result, "disfluency", lambda scores: disfluency_of(scores, args.seed))
        left.set_title(f"{len(chosen)} prompts × 5 repeats, 95 %", fontsize="medium")
    text = (f"\" love\" - \" hate\" before block {layer}, {lab.coeff_in_words(steers['steered'], chosen)}; "
            f"{len(chosen)} prompts, 5 repeats, 32 tokens, {lab.sampling_in_words}. "
            f"Judge: {scorer.name}, {scorer.meaning}.\n\n")
    text += table(*score_table(result, "unsteered", args.seed, "toxicity"))
    return {"n": len(chosen), "layer": layer, "coeff": coeff, "judge": scorer.name, "results": result}, text


def mean_score(scores, seed):
    return statistics.mean(scores["score"]), bootstrap(scores["score"], seed=seed)


def sentiment(lab):
    """Section 4.4: continue the first 32 tokens of a review, in both directions, and with a neutral start."""
    args = lab.args
    layer, coeff = lab.where(2, 2.0)
    scorer = lab.judge("vader")
    rows = [row for row in lab.rows("imdb.jsonl", text=str, label=str, split=str) if row["split"] == "test"]
    reviews = {label: [row["text"] for row in rows if row["label"] == label] for label in ("neg", "pos")}
    for label, texts in reviews.items():
        enough(texts, 2, f"reviews for the test with the label {label}")
    n = min(lab.n or 100, *map(len, reviews.values()))
    draw = random.Random(args.seed)
    reviews = {label: draw.sample(texts, n) for label, texts in reviews.items()}

    def start(review):
        return lab.tokenizer.decode(lab.tokenizer.encode(review)[1:33])

    results, text = {}, ""
    for label, sign, wanted in (("neg", 1, "to positive"), ("pos", -1, "to negative")):
        for kind, lead in (("review", ""), ("neutral start", "This is what I wrote about it: ")):
            starts = [lead + start(review) for review in reviews[label]]
            steers = lab.conditions(sign * lab.steer(" love", " hate", layer, coeff))
            name = f"{wanted}, {kind}"

            def toward(texts, sign=sign):
                return [sign * score for score in scorer(texts)]

            result = results[name] = compare(lab, name, starts, steers, 1, 64, lab.sampling, toward)
            header, lines = score_table(result, "unsteered", args.seed, "mean score toward the target")
            header.insert(1, "score beyond 0 (95 %)")
            for line, scores in zip(lines, result.values(), strict=True):
                line.insert(1, percent(sum(score > 0 for score in scores["each"]), n))
            text += f"{name}, n {n}:\n\n{table(header, lines)}\n"
    widest = 0.0
    for result in results.values():
        for scores in result.values():
            widest = max(widest, *map(abs, mean_score(scores, args.seed)[1]))
    limit = 1.1 * widest or 1.0
    with figure(lab, "sentiment", 4, 12, 2.8) as (_, axes):
        for axis, (name, result) in zip(axes, results.items(), strict=True):
            dots(axis, result, "score toward the target", lambda scores: mean_score(scores, args.seed))
            axis.set_title(f"{name} (n {n}, 95 %)", fontsize="small")
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_xlim(-limit, limit)
    steer, starts = lab.steer(" love", " hate", layer, coeff), list(map(start, reviews["neg"]))
    head = (f"\" love\" - \" hate\" (and its negative) before block {layer}, "
            f"{lab.coeff_in_words(steer, starts)}; 32 tokens of "
            f"an IMDb test review, 64 new, {lab.sampling_in_words}. "
            f"Judge: {scorer.name}, {scorer.meaning}.\n\n")
    return {"n": n, "layer": layer, "coeff": coeff, "judge": scorer.name, "results": results}, head + text


def grid(lab):
    """The paper's search: layers × coefficients on 50 prompts that no test uses; a rule picks the cell."""
    args = lab.args
    tuning, _, _ = split(lab.rows("rtp_random.jsonl", text=str), args.seed)
    tuning = [row["text"] for row in enough(tuning, 1, "prompts of three characters or more")]
    scorer = lab.judge("vader")
    layers = [l for l in (0, 1, 2, 3, 6, 10, 16) if l < lab.model.config.n_layer]
    coeffs = [1.0, 2.0, 4.0]
    places = [(l, c) for l in layers for c in coeffs]
    cells = [(0, 0.0, "unsteered")]
    cells += [(*place, kind) for place in places for kind in ("steered", *RANDOM)]

    def part(start, size):
        """For each cell: the scores of so many prompts' continuations, and their (-sum log p, tokens)."""
        some_prompts, result = tuning[start:start + size], []
        steers = [lab.conditions(lab.steer(" love", " hate", l, c))[kind] for l, c, kind in cells]
        for rows in lab.generate_all(some_prompts, steers, 1, 32, lab.sampling, args.seed):
            texts = [text for (text,) in rows]
            result.append([scorer([text.strip() for text in texts]),
                           measure.disfluency(lab.model, lab.tokenizer, some_prompts, texts)])
        return result

    parts = list(lab.run([[start, 10] for start in range(0, len(tuning), 10)], part).values())
    results = {}                                # cell: (mean score, disfluency)
    for i, cell in enumerate(cells):
        scores = [score for part in parts for score in part[i][0]]
        nll = [pair for part in parts for pair in part[i][1]]
        loss, tokens = map(sum, zip(*nll, strict=True))
        results[cell] = (statistics.mean(scores), math.exp(loss / tokens) if tokens else math.inf)
    base_score, base_disfluency = results[0, 0.0, "unsteered"]
    allowed = [place for place in places if results[(*place, "steered")][1] <= 1.5 * base_disfluency]
    best = max(allowed, key=lambda place: results[(*place, "steered")][0], default=None)
    gains = [[results[l, c, "steered"][0] - base_score for c in coeffs] for l in layers]
    costs = [[results[l, c, "steered"][1] / base_disfluency for c in coeffs] for l in layers]
    with figure(lab, "grid", 2, 9, 3.4) as (fig, (left, right)):
        for axis, values, label in ((left, gains, f"{scorer.name}, minus unsteered"),
                                    (right, costs, "disfluency / unsteered")):
            image = axis.imshow(values, cmap="cividis", aspect="auto")
            for i, row in enumerate(values):
                for j, v in enumerate(row):
                    axis.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize="small", color="white",
                              backgroundcolor=(0, 0, 0, 0.35))
            axis.set_xticks(range(len(coeffs)), [f"{c:g}" for c in coeffs])
            axis.set_yticks(range(len(layers)), layers)
            axis.set_xlabel("coefficient")
            axis.set_ylabel("layer")
            axis.set_title(label, fontsize="medium")
            fig.colorbar(image)

    def in_words(l, c):
        scores, disfluencies = zip(*(results[l, c, kind] for kind in RANDOM), strict=True)
        score, disfluency = results[l, c, "steered"]
        return (f"{score:+.2f} / {disfluency:.0f} ({min(scores):+.2f} to {max(scores):+.2f} / "
                f"{min(disfluencies):.0f} to {max(disfluencies):.0f})")

    lines = [[f"layer {l}", lab.strength(lab.steer(" love", " hate", l, 1.0), tuning),
              *(in_words(l, c) for c in coeffs)] for l in layers]
    choice = f"layer {best[0]}, coeff {best[1]:g}" if best else "none"
    text = (f"\" love\" - \" hate\" on {len(tuning)} tuning prompts, 32 tokens, {lab.sampling_in_words}: "
            f"mean {scorer.name} score / disfluency (the five random vectors, lowest to highest). "
            f"Unsteered {base_score:+.2f} / "
            f"{base_disfluency:.0f}. Chosen, best score with disfluency at most 1.5 × unsteered: "
            f"{choice}.\n\n")
    text += table(["", "coeff 1, × the mean norm", *(f"coeff {c:g}" for c in coeffs)], lines)
    result = {"n": len(tuning), "judge": scorer.name, "chosen": best,
              "cells": [[*cell, *values] for cell, values in results.items()]}
    return result, text

"""Experiments that read given texts: perplexity, token shifts, knowledge, and the anatomy of vectors.

Read first: lab.py; paper.py runs them. Turner et al., sections 4.1 and 4.5, appendices A, E and F.
"""

import functools
import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from ministeer.evaluation import measure
from ministeer.evaluation.judges import WEDDING_WORDS
from ministeer.evaluation.stats import bootstrap, paired
from ministeer.steering import relative_norm, sink_share, steering_vectors

from .lab import (
    BLUE,
    CONTROLS,
    GREEN,
    GREY,
    ORANGE,
    RANDOM,
    band,
    enough,
    figure,
    over_vectors,
    percent,
    span,
    spread,
    table,
)
from .paper_metrics import divergence, sentences, tails, word_frequency

ESSAYS = {"weddings": "wedding", "shipping": "shipping", "Macedonia": "macedonia", "banana bread": "bread"}
SHOWN_LAYERS = (0, 1, 2, 3, 6, 10, 16, 20, 24, 29)      # those that have a column in a table


def documents(lab, n=None):
    """n documents with a word about weddings (all by default), and as many without one, from all sources."""
    files = ("imdb.jsonl", "brown.jsonl", "wikitext.jsonl")
    texts = [row["text"] for file in files for row in lab.rows(file, text=str)]
    frequency = {text: word_frequency(text, WEDDING_WORDS) for text in texts}
    related = [text for text in texts if frequency[text] > 0]
    others = [text for text in texts if frequency[text] == 0]
    enough(related, 2, "documents with a word about weddings")
    draw, count = random.Random(lab.args.seed), min(lab.n or n or len(related), len(related))
    if lab.args.protocol == "paper":
        related = draw.sample(related, count)
    else:                                       # those with the most, as in the paper's code
        related = sorted(related, key=lambda text: -frequency[text])[:count]
    enough(others, len(related), "documents without such a word")
    return related + draw.sample(others, len(related))


def long_sentences(lab, text, skip):
    """The sentences of `text` that have a prediction left after the first `skip`."""
    return [part for part in sentences(text) if len(lab.tokenizer.encode(part)) > skip + 1]


def perplexity(lab):
    """Figure 2: how much likelier texts become that are about the topic, and those that are not."""
    args, plus, minus = lab.args, " weddings", " "
    layer, coeff = lab.where(16, 1.0)
    steers = lab.conditions(lab.steer(plus, minus, layer, coeff))
    del steers["unsteered"]
    skip = steers["steered"].stop
    chosen = documents(lab)

    def document(i):
        """For one document: share of topic words, tokens, and by Steer the sum of the changes of log p"""
        parts = long_sentences(lab, chosen[i], skip)
        result = {"frequency": word_frequency(chosen[i], WEDDING_WORDS), "tokens": 0}
        if parts:
            plain = lab.logprobs(parts, skip=skip)
            result["tokens"] = sum(map(len, plain))
            for name, steer in steers.items():
                steered = lab.logprobs(parts, steer, skip=skip)
                result[name] = sum((s.double() - p.double()).sum().item()
                                   for p, s in zip(plain, steered, strict=True))
        return result

    rows = lab.run([[i] for i in range(len(chosen))], document).values()
    rows = [row for row in rows if row["tokens"]]
    enough(rows, 1, f"documents with a sentence of {skip + 2} tokens")
    bins, lines, points = {}, [], {name: [] for name in steers}
    for row in rows:
        bins.setdefault(min(round(row["frequency"] / 0.005), 4), []).append(row)
    for b, members in sorted(bins.items()):
        weights = [row["tokens"] for row in members]
        line = [f"{'≥ ' if b == 4 else ''}{b * 0.5:g} %", len(members), sum(weights)]
        for name in steers:
            means = [row[name] / row["tokens"] for row in members]
            value = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
            low, high = bootstrap(means, weights, args.seed) if len(members) > 1 else (math.nan, math.nan)
            ratio, interval = math.exp(-value), (math.exp(-high), math.exp(-low))
            points[name].append((b * 0.5, ratio, *interval))
            if name == "steered":
                line += [span(ratio, interval), f"{math.exp(-statistics.mean(means)):.3f}"]
        lines.append([*line, over_vectors([points[name][-1][1] for name in RANDOM], ".3f")])

    essays = {}                                 # topic: sentences
    for path in sorted(Path(args.data).glob("*.txt")):
        topic = next((name for name, part in ESSAYS.items() if part in path.name.lower()), path.stem)
        essays[topic] = long_sentences(lab, lab.rows(path.name), skip)

    @functools.cache
    def unsteered(topic, space):
        """Log p of the essay's sentences; with `space`, of each after a space of its own."""
        texts = essays[topic]
        return lab.logprobs(texts, skip=1, prompts=minus) if space else lab.logprobs(texts, skip=skip)

    def essay(topic, l, c, kind):
        texts, steer = essays[topic], lab.steer(plus, minus, l, c)
        if kind == "prompted":              # the word itself before every sentence, where others have a space
            return measure.perplexity_ratio(unsteered(topic, True), lab.logprobs(texts, skip=1, prompts=plus))
        if kind == "beside":                    # the vector on that space, so that it changes no word
            steered = lab.logprobs(texts, steer, skip=1, prompts=minus)
            return measure.perplexity_ratio(unsteered(topic, True), steered)
        steer = lab.conditions(steer)[kind]
        return measure.perplexity_ratio(unsteered(topic, False), lab.logprobs(texts, steer, skip=skip))

    layers, coeffs = range(lab.model.config.n_layer), [-1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    shown = [l for l in SHOWN_LAYERS if l in layers]
    units = [[topic, l, coeff, "steered"] for topic in essays for l in layers]
    units += [[topic, l, coeff, kind] for topic in essays for l in shown for kind in RANDOM]
    units += [[topic, layer, c, "steered"] for topic in essays for c in coeffs if c != coeff]
    units += [[topic, layer, coeff, kind] for topic in essays for kind in ("beside", "prompted")]
    ratios = lab.run(units, essay)

    parts = [part for text in chosen for part in long_sentences(lab, text, skip)]
    coeff_in_words = lab.coeff_in_words(steers["steered"], parts)
    sizes = lab.strengths([lab.steer(plus, minus, l, coeff) for l in layers], parts)
    with figure(lab, "perplexity", 2, 10) as (_, (left, right)):
        x, y, low, high = zip(*points["steered"], strict=True)
        left.plot(x, y, "o-", color=BLUE, label="steered")
        left.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0)
        spread(left, x, [[points[name][i][1] for name in RANDOM] for i in range(len(x))])
        left.axhline(1, color="black", linewidth=0.8)
        left.set_xlabel("words about weddings, % (bins of 0.5)")
        left.set_ylabel("perplexity ratio, steered / unsteered")
        left.set_title(f"{len(rows)} documents, layer {layer}, 95 % band,\n{coeff_in_words}",
                       fontsize="medium")
        left.legend(frameon=False)
        for (topic, texts), color in zip(essays.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
            right.plot(layers, [ratios[topic, l, coeff, "steered"] for l in layers], "o-", markersize=3,
                       color=color, label=f"{topic} ({len(texts)} sentences)")
        right.axhline(1, color="black", linewidth=0.8)
        right.set_yscale("log")
        right.set_yticks([1, 1.2, 1.5, 2, 3, 4], ["1", "1.2", "1.5", "2", "3", "4"])
        right.minorticks_off()
        right.set_xlabel("layer")
        right.set_title(f"texts on one subject,\nc {coeff:g} ({sizes})", fontsize="medium")
        right.legend(frameon=False, fontsize="small")

    def cells(*keys):
        return [f"{ratios[key]:.3f}" for key in keys]

    by_layer = [["× the mean norm", *(lab.strength(lab.steer(plus, minus, l, coeff), parts) for l in shown)]]
    by_coeff, beside = [], []
    for topic in essays:
        by_layer.append([topic, *cells(*((topic, l, coeff, "steered") for l in shown))])
        controls = [[ratios[topic, l, coeff, kind] for kind in RANDOM] for l in shown]
        by_layer.append([f"{topic}, random", *(f"{min(row):.3f} to {max(row):.3f}" for row in controls)])
        by_coeff.append([topic, *cells(*((topic, layer, c, "steered") for c in coeffs))])
        beside.append([topic, *cells(*((topic, layer, coeff, kind) for kind in ("beside", "prompted")))])
    text = (f"\" weddings\" - \" \" before block {layer}, {coeff_in_words}; "
            f"the first {skip} predictions of each sentence left out. Random: {len(RANDOM)} vectors, "
            "lowest to highest, in the first table after their mean.\n\n")
    text += "\n".join([
        table(["frequency", "documents", "tokens", "steered, of tokens (95 %)", "of documents",
               "random, of tokens (lowest to highest)"], lines),
        table([f"essay, coeff {coeff:g}", *(f"layer {l}" for l in shown)], by_layer),
        table([f"essay, layer {layer}", *(f"c {c:g}" for c in coeffs)], by_coeff),
        table(["essay, a space before each sentence", "vector on that space", "the word instead"], beside)])
    return {"layer": layer, "coeff": coeff, "documents": rows, "bins": points,
            "essays": [[*key, value] for key, value in ratios.items()]}, text


def token_shifts(lab):
    """Figure 7 and table 8: which tokens become likelier, and how heavy the two tails of all tokens are."""
    layer, coeff = lab.where(16, 1.0)
    conditions = lab.conditions(lab.steer(" weddings", " ", layer, coeff))
    skip = conditions["steered"].stop
    chosen = documents(lab, 250)                # 500 in all, as in the paper
    texts = [part for text in chosen for part in long_sentences(lab, text, skip)]
    size, nothing = 100, [0] * (1 + len(conditions))    # texts per unit

    def part(start):
        """{token: [n, sum of log p under each condition]}; JSON makes the token a string."""
        some_texts = texts[start:start + size]
        scores = [lab.logprobs(some_texts, steer, skip=skip) for steer in conditions.values()]
        sums = {}
        for i, text in enumerate(some_texts):
            tokens = lab.tokenizer.encode(text)[1 + skip:]
            for token, *logps in zip(tokens, *(rows[i].double().tolist() for rows in scores), strict=True):
                old = sums.get(str(token), nothing)
                sums[str(token)] = [a + b for a, b in zip(old, [1, *logps], strict=True)]
        return sums

    total = {}
    for sums in lab.run([[start] for start in range(0, len(texts), size)], part).values():
        for token, row in sums.items():
            total[token] = [a + b for a, b in zip(total.get(token, nothing), row, strict=True)]
    common = {int(token): row for token, row in total.items() if row[0] > 20}
    enough(common, 4, "tokens that occur more than 20 times")
    shifts = {}                                 # name: {token: mean log p minus that of the unsteered model}
    for k, name in enumerate(CONTROLS[1:], 2):
        shifts[name] = {token: (row[k] - row[1]) / row[0] for token, row in common.items()}
    weights = {name: tails(list(shift.values())) for name, shift in shifts.items()}
    steered = shifts["steered"]
    order = sorted(steered, key=steered.get)
    piece = {token: json.dumps(lab.tokenizer.pieces([token])[0], ensure_ascii=False) for token in common}

    def cells(token):
        n, plain, *_ = common[token]
        return piece[token], n, f"{steered[token]:+.3f}", f"{plain / n:.2f}"

    lines = [[k + 1, *cells(order[-1 - k]), *cells(order[k])] for k in range(min(10, len(order)))]
    with figure(lab, "token-shifts", width=5, height=4) as (_, (axis,)):
        normal = torch.distributions.Normal(0.0, 1.0).icdf
        quantiles = normal((torch.arange(len(order)) + 0.5) / len(order)).tolist()
        for name in (*RANDOM, "steered"):
            color = BLUE if name == "steered" else GREY
            axis.plot(quantiles, sorted(shifts[name].values()), ".", color=color, markersize=4,
                      label="{} (tails {:.1f}, {:.1f})".format(name, *weights[name]))
        for place in {*range(3), *range(len(order) - 3, len(order))}:
            right = place > len(order) // 2
            axis.annotate(piece[order[place]], (quantiles[place], steered[order[place]]), fontsize="x-small",
                          xytext=(-4 if right else 4, 0), textcoords="offset points",
                          ha="right" if right else "left", va="center")
        axis.set_xlabel("quantile of a normal distribution")
        axis.set_ylabel("mean shift of log p, nats")
        seen = sum(row[0] for row in total.values())
        axis.set_title(f"{len(order)} tokens seen more than 20 times, {seen:,} in all", fontsize="medium")
        axis.legend(frameon=False)
    left, right = zip(*(weights[name] for name in RANDOM), strict=True)
    in_words = "steered {:.2f}, {:.2f}; ".format(*weights["steered"])
    in_words += (f"{len(RANDOM)} random vectors {min(left):.2f} to {max(left):.2f}, "
                 f"{min(right):.2f} to {max(right):.2f}")
    coeff_in_words = lab.coeff_in_words(conditions["steered"], texts)
    text = (f"\" weddings\" - \" \" before block {layer}, {coeff_in_words}; {len(chosen)} documents, "
            f"{len(texts)} sentences, {len(order)} tokens seen more than 20 times. "
            f"Tails (left, right; 1 is normal): {in_words}.\n\n")
    text += table(["", "up", "n", "shift", "log p before", "down", "n", "shift", "log p before"], lines)
    tokens = {}
    for token in order:
        n, plain, *_ = common[token]
        controls = [shifts[name][token] for name in RANDOM]
        tokens[piece[token]] = [n, steered[token], controls, plain / n]
    return {"layer": layer, "coeff": coeff, "sentences": len(texts), "tails": weights, "tokens": tokens}, text


def knowledge(lab):
    """Section 4.5: does the answer stay among the K likeliest next tokens? P@K for K = 1 … 100."""
    args = lab.args
    layer, coeff = lab.where(16, 1.0)
    rows = lab.rows("conceptnet.jsonl", sentence=str, answer=str, source=str)
    rows = enough([row for row in rows if "[MASK]" in row["sentence"]], 2, "sentences with [MASK]")
    rows = random.Random(args.seed).sample(rows, min(lab.n or len(rows), len(rows)))
    conditions, size = lab.conditions(lab.steer(" weddings", " ", layer, coeff)), 200

    def part(start, name):
        some_rows = rows[start:start + size]
        prompts = [row["sentence"].split("[MASK]")[0] for row in some_rows]
        answers = [row["answer"] for row in some_rows]
        return measure.ranks(lab.model, lab.tokenizer, prompts, answers, conditions[name] or ())

    starts = range(0, len(rows), size)
    parts = lab.run([[start, name] for start in starts for name in CONTROLS], part)
    ranks = {name: [rank for start in starts for rank in parts[start, name]] for name in CONTROLS}
    ks = sorted({math.ceil(10 ** (2 * k / 19)) for k in range(20)})
    lines, curves, changes = [], {}, {}
    sources = sorted({row["source"] for row in rows})
    with figure(lab, "knowledge", len(sources), 4.5 * len(sources), 3.4) as (_, axes):
        for axis, source in zip(axes, sources, strict=True):
            here = {name: [rank for row, rank in zip(rows, ranks[name], strict=True)
                           if row["source"] == source and rank is not None] for name in CONTROLS}
            n = len(here["unsteered"])
            for name in CONTROLS:
                curves[f"{source}, {name}"] = measure.precision_at(here[name], ks)
            for name, color, marker in (("unsteered", "black", "o--"), ("steered", BLUE, "o-")):
                band(axis, ks, [(sum(rank < k for rank in here[name]), n) for k in ks], color, name, marker)
            spread(axis, ks, list(zip(*(curves[f"{source}, {name}"] for name in RANDOM), strict=True)))
            cells = {"unsteered": [], "steered": [], "random": []}
            for k in (1, 5, 10, 50, 100):
                hits = {name: [float(rank < k) for rank in here[name]] for name in CONTROLS}
                base = hits["unsteered"]
                cells["unsteered"].append(percent(int(sum(base)), n))
                difference, interval, _ = paired(hits["steered"], base, args.seed, 2000)
                cells["steered"].append(span(difference, interval, "+.1%"))
                controls = [statistics.mean(hits[name]) - statistics.mean(base) for name in RANDOM]
                changes[f"{source}, P@{k}"] = [n, difference, interval, controls]
                cells["random"].append(over_vectors(controls, "+.1%"))
            lines += [[f"{source}, {name}", n, *row] for name, row in cells.items()]
            axis.set_xscale("log")
            axis.set_xlabel("K")
            axis.set_title(f"{source}, n {n}, 95 % bands", fontsize="medium")
        axes[0].set_ylabel("P@K")
        axes[0].legend(frameon=False)
    prompts = [row["sentence"].split("[MASK]")[0] + row["answer"]
               for row, rank in zip(rows, ranks["unsteered"], strict=True) if rank is not None]
    text = (f"\" weddings\" - \" \" before block {layer}, "
            f"{lab.coeff_in_words(conditions['steered'], prompts)}; "
            "P@K unsteered, and what steering adds to it (95 %, paired); "
            f"random: {len(RANDOM)} vectors, their mean (lowest to highest).\n\n")
    text += table(["", "n", "P@1", "P@5", "P@10", "P@50", "P@100"], lines)
    return {"layer": layer, "coeff": coeff, "ks": ks, "curves": curves, "changes": changes}, text


PAIRS = [(" weddings", " "), (" love", " hate"), ("Anger", "Calm"),
         ("I talk about weddings constantly", "I do not talk about weddings constantly")]


def anatomy(lab):
    """Appendices A, E and F: relative norms, attention sinks, random and embedding-only vectors."""
    args, layers = lab.args, range(lab.model.config.n_layer)
    texts = [row["text"] for row in lab.rows("owt_sentences.jsonl", text=str)]
    texts = [text for text in texts if len(lab.tokenizer.encode(text)) > 12]
    enough(texts, lab.n or 58, "sentences of more than 12 tokens")
    texts = random.Random(args.seed).sample(texts, lab.n or 58)
    prompt = "I think you're a very good friend of mine"
    late = min(lab.where(20, 1.0)[0], layers[-1])

    def norms(plus, minus):
        """For each layer: the relative norms at the vector's positions, and its share of attention sink."""
        vectors = steering_vectors(lab.model, lab.tokenizer, plus, minus, list(layers))
        return [[relative_norm(lab.model, lab.tokenizer, s, prompt)[1:s.stop].tolist(), sink_share(s.vector)]
                for s in vectors]

    def stream():
        """Norms of the residual stream [layer][position] for the prompt, and the prompt's pieces."""
        ids = torch.tensor([lab.tokenizer.encode(prompt)], device=args.device)
        with torch.no_grad():
            _, resid = lab.model(ids)
        return [x[0].float().norm(dim=-1).tolist() for x in resid], lab.tokenizer.pieces(ids[0].tolist())

    def disturbed(start, layer, coeff, kind):
        """(KL, entropy) of ten texts."""
        steer = lab.steer("Anger", "Calm", layer, coeff)
        if kind == "embedding":                 # the difference of the embeddings, with the norms of `steer`
            vector = lab.steer("Anger", "Calm", 0, coeff).vector
            scale = steer.vector.norm(dim=-1, keepdim=True) / vector.norm(dim=-1, keepdim=True)
            steer = replace(steer, vector=vector * scale)
        else:
            steer = lab.conditions(steer)[kind]
        return divergence(lab.model, lab.tokenizer, texts[start:start + 10], steer, skip=3)

    pair_norms = {f'"{plus}" - "{minus}"': rows
                  for (plus, minus), rows in lab.run([list(pair) for pair in PAIRS], norms).items()}
    streams, pieces = lab.run([[]], stream)[()]
    places = [(l, c) for l in (2, late) for c in (1.0, 10.0)]
    kinds, starts = ("steered", *RANDOM, "embedding"), range(0, len(texts), 10)
    units = [[start, l, c, kind] for l, c in places for kind in kinds for start in starts]
    divergences = lab.run(units, disturbed)
    lines = []
    for l, c in places:
        ratios = {}                             # kind: KL / entropy of each text
        for kind in kinds:
            pairs = [pair for start in starts for pair in divergences[start, l, c, kind]]
            ratios[kind] = [kl / entropy for kl, entropy in pairs]
        below = [sum(a < b for a, b in zip(ratios["steered"], ratios[kind], strict=True)) for kind in RANDOM]
        steered, embedding = (span(statistics.mean(ratios[kind]), bootstrap(ratios[kind], seed=args.seed))
                              for kind in ("steered", "embedding"))
        control = over_vectors([statistics.mean(ratios[kind]) for kind in RANDOM], ".3f")
        coeff_in_words = lab.coeff_in_words(lab.steer("Anger", "Calm", l, c), texts)
        lines.append([f"layer {l}, {coeff_in_words}", steered, control, embedding,
                      f"{min(below)} to {max(below)} of {len(texts)}"])
    with figure(lab, "anatomy", 3, 13, 3.6) as (_, (left, middle, right)):
        for (name, rows), color in zip(pair_norms.items(), (BLUE, ORANGE, GREEN, GREY), strict=True):
            short = name if len(name) < 25 else name[:22] + " …"
            left.semilogy(layers, [statistics.mean(row[0]) for row in rows], "o-", markersize=3, color=color,
                          label=short)
            middle.plot(layers, [row[1] for row in rows], "o-", markersize=3, color=color)
        left.set_ylabel("norm of the vector / norm of the stream")
        left.set_title("relative norm (mean over its positions, c 1)", fontsize="medium")
        left.legend(frameon=False, fontsize="x-small")
        middle.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
        middle.set_ylabel("share of the squared norm in 4 dimensions")
        middle.set_title("how much of it is attention sink", fontsize="medium")
        for position, (piece, color) in enumerate(zip(pieces[:4], (GREY, BLUE, ORANGE, GREEN), strict=False)):
            right.semilogy(range(len(streams)), [row[position] for row in streams], color=color,
                           label=f"position {position}: {json.dumps(piece)}")
        right.set_ylabel("norm of the stream")
        right.set_title("one prompt, unsteered", fontsize="medium")
        right.legend(frameon=False, fontsize="x-small")
        for axis in (left, middle, right):
            axis.set_xlabel("layer")
    shown = [l for l in SHOWN_LAYERS if l in layers]
    text = (f"Relative norm (mean over the vector's positions; c 1; prompt \"{prompt}\") / "
            "part of the squared norm in its 4 largest dimensions:\n\n")
    text += table(["pair", *(f"layer {l}" for l in shown)],
                  [[name, *(f"{statistics.mean(rows[l][0]):.2f} / {rows[l][1]:.2f}" for l in shown)]
                   for name, rows in pair_norms.items()])
    text += (f"\nKL(unsteered || steered) / entropy, \"Anger\" - \"Calm\", {len(texts)} sentences, "
             f"the first 3 positions left out (95 %; random: {len(RANDOM)} vectors, lowest to highest):\n\n")
    text += table(["", "steered", "random", "embeddings, same norm", "steered below random"], lines)
    return {"n": len(texts), "norms": pair_norms, "streams": streams,
            "divergence": [[*key, value] for key, value in divergences.items()]}, text

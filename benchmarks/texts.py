"""Experiments that read given texts: perplexity, token shifts, knowledge, and the anatomy of vectors. Run by paper.py."""

import functools
import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from .lab import BLUE, CONTROLS, GREEN, GREY, ORANGE, band, figure, percent, span, table

from ministeer.evaluation import measure
from ministeer.evaluation.stats import bootstrap, paired
from ministeer.evaluation.judges import WEDDING_WORDS
from ministeer.steering import random_like, relative_norm, sink_share, steering_vectors

ESSAYS = {"weddings": "wedding", "shipping": "shipping", "Macedonia": "macedonia", "banana bread": "bread"}


def documents(lab, n=None):
    """n documents with a word about weddings (all of them by default), and as many without one, drawn from all sources."""
    texts = [row["text"] for file in ("imdb.jsonl", "brown.jsonl", "wikitext.jsonl") for row in lab.rows(file)]
    frequency = {text: measure.word_frequency(text, WEDDING_WORDS) for text in texts}
    related = [text for text in texts if frequency[text] > 0]
    others = [text for text in texts if frequency[text] == 0]
    draw, count = random.Random(lab.args.seed), min(lab.n or n or len(related), len(related))
    if lab.args.protocol == "paper":
        related = draw.sample(related, count)
    else:                                       # the densest, as the paper's code has it
        related = sorted(related, key=lambda text: -frequency[text])[:count]
    return related + draw.sample(others, len(related))


def perplexity(lab):
    """Figure 2: how much likelier texts become that are about the topic, and those that are not."""
    args, plus, minus = lab.args, " weddings", " "
    layer, coeff = lab.where(16, 1.0)
    steers = lab.three(lab.steer(plus, minus, layer, coeff))
    del steers["unsteered"]
    skip = steers["steered"].stop
    chosen = documents(lab)

    def document(i):
        parts = [part for part in measure.sentences(chosen[i]) if len(lab.tokenizer.encode(part)) > skip + 1]
        result = {"frequency": measure.word_frequency(chosen[i], WEDDING_WORDS), "tokens": 0}
        if parts:
            plain = lab.logprobs(parts, skip=skip)
            result["tokens"] = sum(map(len, plain))
            for name, steer in steers.items():
                result[name] = sum((s.double() - p.double()).sum().item() for p, s in zip(plain, lab.logprobs(parts, steer, skip=skip), strict=True))
        return result

    @functools.cache
    def unsteered(topic, space):
        return lab.logprobs(essays[topic], skip=1, prompts=minus) if space else lab.logprobs(essays[topic], skip=skip)

    def essay(topic, l, c, kind):
        texts, steer = essays[topic], lab.steer(plus, minus, l, c)
        if kind == "prompted":                  # the word itself before every sentence, where the other has a space
            return measure.perplexity_ratio(unsteered(topic, True), lab.logprobs(texts, skip=1, prompts=plus))
        if kind == "beside":                    # the vector on that space, so that it writes over no word
            return measure.perplexity_ratio(unsteered(topic, True), lab.logprobs(texts, steer, skip=1, prompts=minus))
        steer = random_like(steer, args.seed) if kind == "random" else steer
        return measure.perplexity_ratio(unsteered(topic, False), lab.logprobs(texts, steer, skip=skip))

    scored = [row for row in lab.run([[i] for i in range(len(chosen))], document) if row["tokens"]]
    essays = {}
    for path in sorted(Path(args.data).glob("*.txt")):
        topic = next((name for name, part in ESSAYS.items() if part in path.name.lower()), path.stem)
        essays[topic] = [part for part in measure.sentences(lab.rows(path.name)) if len(lab.tokenizer.encode(part)) > skip + 1]
    layers, coeffs = range(lab.model.config.n_layer), [-1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    some = [l for l in (0, 1, 2, 3, 6, 10, 16, 20, 24, 29) if l in layers]
    cells = [[topic, l, coeff, "steered"] for topic in essays for l in layers] + [[topic, l, coeff, "random"] for topic in essays for l in some]
    cells += [[topic, layer, c, "steered"] for topic in essays for c in coeffs if c != coeff]
    cells += [[topic, layer, coeff, kind] for topic in essays for kind in ("beside", "prompted")]
    ratio = dict(zip(map(tuple, cells), lab.run(cells, essay), strict=True))

    bins = {}
    for row in scored:
        bins.setdefault(min(round(row["frequency"] / 0.005), 4), []).append(row)
    lines, points = [], {}
    for b, rows in sorted(bins.items()):
        weights = [row["tokens"] for row in rows]
        cells_of_row = [f"{'≥ ' if b == 4 else ''}{b * 0.5:g} %", len(rows), sum(weights)]
        for name in steers:
            means = [row[name] / row["tokens"] for row in rows]
            value = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
            low, high = bootstrap(means, weights, args.seed) if len(rows) > 1 else (math.nan, math.nan)
            points.setdefault(name, []).append((b * 0.5, math.exp(-value), math.exp(-high), math.exp(-low)))
            cells_of_row += [span(math.exp(-value), (math.exp(-high), math.exp(-low))), f"{math.exp(-statistics.mean(means)):.3f}"]
        lines.append(cells_of_row)
    with figure(lab, "perplexity", 2, 10) as (_, (left, right)):
        for name, color in (("steered", BLUE), ("random", GREY)):
            x, y, low, high = zip(*points[name], strict=True)
            left.plot(x, y, "o-", color=color, label=name)
            left.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        left.axhline(1, color="black", linewidth=0.8)
        left.set_xlabel("words about weddings, % (bins of 0.5)")
        left.set_ylabel("perplexity ratio, steered / unsteered")
        left.set_title(f"{len(scored)} documents, layer {layer}, c {coeff:g}, 95 % band", fontsize="medium")
        left.legend(frameon=False)
        for (topic, texts), color in zip(essays.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
            right.plot(layers, [ratio[topic, l, coeff, "steered"] for l in layers], "o-", markersize=3, color=color,
                       label=f"{topic} ({len(texts)} sentences)")
        right.axhline(1, color="black", linewidth=0.8)
        right.set_yscale("log")
        right.set_yticks([1, 1.2, 1.5, 2, 3, 4], ["1", "1.2", "1.5", "2", "3", "4"])
        right.minorticks_off()
        right.set_xlabel("layer")
        right.set_title(f"texts on one subject, c {coeff:g}", fontsize="medium")
        right.legend(frameon=False, fontsize="small")
    text = f"\" weddings\" - \" \" before block {layer}, coeff {coeff:g}; the first {skip} predictions of each sentence left out.\n\n"
    text += table(["frequency", "documents", "tokens", "steered, of tokens (95 %)", "of documents", "random (95 %)", "of documents"], lines) + "\n"
    text += table(["essay, coeff " + f"{coeff:g}", *(f"layer {l}" for l in some)],
                  [[f"{topic}{', random' * (kind == 'random')}", *(f"{ratio[topic, l, coeff, kind]:.3f}" for l in some)]
                   for topic in essays for kind in ("steered", "random")]) + "\n"
    text += table([f"essay, layer {layer}", *(f"c {c:g}" for c in coeffs)],
                  [[topic, *(f"{ratio[topic, layer, c, 'steered']:.3f}" for c in coeffs)] for topic in essays]) + "\n"
    text += table(["essay, a space before each sentence", "vector on that space", "the word instead"],
                  [[topic, f"{ratio[topic, layer, coeff, 'beside']:.3f}", f"{ratio[topic, layer, coeff, 'prompted']:.3f}"] for topic in essays])
    return {"layer": layer, "coeff": coeff, "documents": scored, "bins": points, "essays": [[*key, value] for key, value in ratio.items()]}, text


def token_shifts(lab):
    """Figure 7 and table 8: which tokens become likelier, and how heavy the two tails of all tokens are."""
    layer, coeff = lab.where(16, 1.0)
    conditions = lab.three(lab.steer(" weddings", " ", layer, coeff))
    skip = conditions["steered"].stop
    chosen = documents(lab, 250)                # 500 in all, as in the paper
    texts = [part for text in chosen for part in measure.sentences(text) if len(lab.tokenizer.encode(part)) > skip + 1]
    chunk = 100

    def part(start):
        some = texts[start:start + chunk]
        scored = {name: lab.logprobs(some, steer, skip=skip) for name, steer in conditions.items()}
        sums = {}
        for i, text in enumerate(some):
            ids = lab.tokenizer.encode(text)[1 + skip:]
            for row in zip(ids, *(scored[name][i].double().tolist() for name in CONTROLS), strict=True):
                old = sums.setdefault(str(row[0]), [0, 0.0, 0.0, 0.0])
                sums[str(row[0])] = [old[0] + 1, *(a + b for a, b in zip(old[1:], row[1:], strict=True))]
        return sums

    total = {}
    for sums in lab.run([[start] for start in range(0, len(texts), chunk)], part):
        for token, some in sums.items():
            total[token] = [a + b for a, b in zip(total.get(token, [0] * 4), some, strict=True)]
    common = {int(token): some for token, some in total.items() if some[0] > 20}
    shift = {name: {token: (some[k] - some[1]) / some[0] for token, some in common.items()} for k, name in ((2, "steered"), (3, "random"))}
    heavy = {name: measure.tails(list(values.values())) for name, values in shift.items()}
    order = sorted(shift["steered"], key=shift["steered"].get)
    piece = {token: json.dumps(lab.tokenizer.pieces([token])[0], ensure_ascii=False) for token in common}

    def of(token):
        return piece[token], common[token][0], f"{shift['steered'][token]:+.3f}", f"{common[token][1] / common[token][0]:.2f}"
    lines = [[k + 1, *of(order[-1 - k]), *of(order[k])] for k in range(min(10, len(order)))]
    with figure(lab, "token-shifts", width=5, height=4) as (_, (axis,)):
        normal = torch.distributions.Normal(0.0, 1.0).icdf
        quantiles = normal((torch.arange(len(order)) + 0.5) / len(order)).tolist()
        for name, color in (("random", GREY), ("steered", BLUE)):
            axis.plot(quantiles, sorted(shift[name].values()), ".", color=color, markersize=4,
                      label="{} (tails {:.1f}, {:.1f})".format(name, *heavy[name]))
        for place in {*range(3), *range(len(order) - 3, len(order))}:
            right = place > len(order) // 2
            axis.annotate(piece[order[place]], (quantiles[place], shift["steered"][order[place]]), fontsize="x-small", xytext=(-4 if right else 4, 0),
                          textcoords="offset points", ha="right" if right else "left", va="center")
        axis.set_xlabel("quantile of a normal distribution")
        axis.set_ylabel("mean shift of log p, nats")
        axis.set_title(f"{len(order)} tokens seen more than 20 times, {sum(some[0] for some in total.values()):,} in all", fontsize="medium")
        axis.legend(frameon=False)
    text = (f"\" weddings\" - \" \" before block {layer}, coeff {coeff:g}; {len(chosen)} documents, {len(texts)} sentences, {len(order)} tokens seen "
            f"more than 20 times. "
            "Tails (left, right; 1 is normal): " + "; ".join("{} {:.2f}, {:.2f}".format(name, *some) for name, some in heavy.items()) + ".\n\n")
    text += table(["", "up", "n", "shift", "log p before", "down", "n", "shift", "log p before"], lines)
    return {"layer": layer, "coeff": coeff, "sentences": len(texts), "tails": heavy,
            "tokens": {piece[t]: [common[t][0], shift["steered"][t], shift["random"][t], common[t][1] / common[t][0]] for t in order}}, text


def knowledge(lab):
    """Section 4.5: does the answer stay among the K likeliest next tokens? P@K for K = 1 … 100."""
    args = lab.args
    layer, coeff = lab.where(16, 1.0)
    rows = [row for row in lab.rows("conceptnet.jsonl") if "[MASK]" in row["sentence"]]
    rows = random.Random(args.seed).sample(rows, min(lab.n or len(rows), len(rows)))
    conditions, chunk = lab.three(lab.steer(" weddings", " ", layer, coeff)), 200

    def part(start, name):
        some = rows[start:start + chunk]
        prompts = [row["sentence"].split("[MASK]")[0] for row in some]
        return measure.ranks(lab.model, lab.tokenizer, prompts, [row["answer"] for row in some],
                             conditions[name] or ())

    units = [[start, name] for start in range(0, len(rows), chunk) for name in CONTROLS]
    found = dict(zip(map(tuple, units), lab.run(units, part), strict=True))
    of = {name: [rank for start in range(0, len(rows), chunk) for rank in found[start, name]] for name in CONTROLS}
    ks = sorted({math.ceil(10 ** (2 * k / 19)) for k in range(20)})
    lines, curves = [], {}
    sources = sorted({row["source"] for row in rows})
    with figure(lab, "knowledge", len(sources), 4.5 * len(sources), 3.4) as (_, axes):
        for axis, source in zip(axes, sources, strict=True):
            mine = {name: [rank for row, rank in zip(rows, some, strict=True) if row["source"] == source and rank is not None]
                    for name, some in of.items()}
            n = len(mine["unsteered"])
            for name, color, marker in (("unsteered", "black", "o--"), ("steered", BLUE, "o-"), ("random", ORANGE, "o-")):
                curves[f"{source}, {name}"] = measure.precision_at(mine[name], ks)
                band(axis, ks, [(sum(rank < k for rank in mine[name]), n) for k in ks], color, name, marker)
            for name in CONTROLS:
                cells = []
                for k in (1, 5, 10, 50, 100):
                    hits, base = ([float(rank < k) for rank in mine[who]] for who in (name, "unsteered"))
                    difference, interval, _ = paired(hits, base, args.seed, 2000)
                    cells.append(percent(int(sum(hits)), n) if name == "unsteered" else span(difference, interval, "+.1%"))
                lines.append([f"{source}, {name}", n, *cells])
            axis.set_xscale("log")
            axis.set_xlabel("K")
            axis.set_title(f"{source}, n {n}, 95 % bands", fontsize="medium")
        axes[0].set_ylabel("P@K")
        axes[0].legend(frameon=False)
    text = (f"\" weddings\" - \" \" before block {layer}, coeff {coeff:g}; P@K unsteered, and what steering adds to it (95 %, paired).\n\n"
            + table(["", "n", "P@1", "P@5", "P@10", "P@50", "P@100"], lines))
    return {"layer": layer, "coeff": coeff, "ks": ks, "curves": curves}, text


PAIRS = [(" weddings", " "), (" love", " hate"), ("Anger", "Calm"), ("I talk about weddings constantly", "I do not talk about weddings constantly")]


def anatomy(lab):
    """Appendices A, E and F: how loud a vector is, where the attention sinks are, random and embedding-only vectors, what is disturbed."""
    args, layers = lab.args, range(lab.model.config.n_layer)
    texts = [row["text"] for row in lab.rows("owt_sentences.jsonl")]
    texts = random.Random(args.seed).sample([text for text in texts if len(lab.tokenizer.encode(text)) > 12], lab.n or 58)
    prompt = "I think you're a very good friend of mine"
    where = min(lab.where(20, 1.0)[0], layers[-1])

    def norms(plus, minus):
        vectors = steering_vectors(lab.model, lab.tokenizer, plus, minus, list(layers))
        return [[relative_norm(lab.model, lab.tokenizer, s, prompt)[1:s.stop].tolist(), sink_share(s.vector)] for s in vectors]

    def stream():
        ids = torch.tensor([lab.tokenizer.encode(prompt)], device=args.device)
        with torch.no_grad():
            return [x[0].float().norm(dim=-1).tolist() for x in lab.model(ids)[1]], lab.tokenizer.pieces(ids[0].tolist())

    def disturbed(start, layer, coeff, kind):
        steer = lab.steer("Anger", "Calm", layer if kind != "embedding" else 0, coeff)
        if kind == "embedding":                     # made of the embeddings, added where the others are, as loud as the others
            target = lab.steer("Anger", "Calm", layer, coeff)
            steer = replace(target, vector=steer.vector * (target.vector.norm(dim=-1, keepdim=True) / steer.vector.norm(dim=-1, keepdim=True)))
        steer = random_like(steer, args.seed) if kind == "random" else steer
        return measure.divergence(lab.model, lab.tokenizer, texts[start:start + 10], steer, skip=3)

    loud = dict(zip([f'"{a}" - "{b}"' for a, b in PAIRS], lab.run([list(pair) for pair in PAIRS], norms), strict=True))
    (streams, pieces), = lab.run([[]], stream)
    spots = [(l, c) for l in (2, where) for c in (1.0, 10.0)]
    units = [[start, l, c, kind] for l, c in spots for kind in ("steered", "random", "embedding") for start in range(0, len(texts), 10)]
    kls = dict(zip(map(tuple, units), lab.run(units, disturbed), strict=True))
    lines = []
    for l, c in spots:
        ratios = {kind: [kl / entropy for start in range(0, len(texts), 10) for kl, entropy in kls[start, l, c, kind]]
                  for kind in ("steered", "random", "embedding")}
        lines.append([f"layer {l}, c {c:g}", *(span(statistics.mean(some), bootstrap(some, seed=args.seed)) for some in ratios.values()),
                      f"{sum(a < b for a, b in zip(ratios['steered'], ratios['random'], strict=True))} of {len(texts)}"])
    with figure(lab, "anatomy", 3, 13, 3.6) as (_, (left, middle, right)):
        for (name, some), color in zip(loud.items(), (BLUE, ORANGE, GREEN, GREY), strict=True):
            short = name if len(name) < 25 else name[:22] + " …"
            left.semilogy(layers, [statistics.mean(row[0]) for row in some], "o-", markersize=3, color=color, label=short)
            middle.plot(layers, [row[1] for row in some], "o-", markersize=3, color=color)
        left.set_ylabel("norm of the vector / norm of the stream")
        left.set_title("how loud (mean over its positions, c 1)", fontsize="medium")
        left.legend(frameon=False, fontsize="x-small")
        middle.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
        middle.set_ylabel("part of squared norm in 4 dimensions")
        middle.set_title("how much of it is attention sink", fontsize="medium")
        for at, (piece, color) in enumerate(zip(pieces[:4], (GREY, BLUE, ORANGE, GREEN), strict=False)):
            right.semilogy(range(len(streams)), [row[at] for row in streams], color=color, label=f"position {at}: {json.dumps(piece)}")
        right.set_ylabel("norm of the stream")
        right.set_title("one prompt, unsteered", fontsize="medium")
        right.legend(frameon=False, fontsize="x-small")
        for axis in (left, middle, right):
            axis.set_xlabel("layer")
    some = [l for l in (0, 1, 2, 3, 6, 10, 16, 20, 24, 29) if l in layers]
    text = f"Relative norm (mean over the vector's positions; c 1; prompt \"{prompt}\") / part of the squared norm in its 4 largest dimensions:\n\n"
    text += table(["pair", *(f"layer {l}" for l in some)],
                  [[name, *(f"{statistics.mean(rows[l][0]):.2f} / {rows[l][1]:.2f}" for l in some)] for name, rows in loud.items()])
    text += f"\nKL(unsteered || steered) / entropy, \"Anger\" - \"Calm\", {len(texts)} sentences, the first 3 positions left out (95 %):\n\n"
    text += table(["", "steered", "random", "embeddings, as loud", "steered below random"], lines)
    return {"n": len(texts), "norms": loud, "streams": streams, "divergence": [[*key, value] for key, value in kls.items()]}, text

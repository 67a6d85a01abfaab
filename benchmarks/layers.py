"""Why some layers can be steered and others not: attention sinks in the vector, and heads that read it.

Read first: lab.py; paper.py runs both experiments. Tutorial 12 does the second on a model of five blocks.
"""

import statistics
from dataclasses import replace

import torch

from ministeer.attention import attend, merge_heads
from ministeer.evaluation.judges import WEDDING_WORDS, count_words
from ministeer.evaluation.stats import bootstrap
from ministeer.methods.inside_blocks import block_parts, heads_changed
from ministeer.steering import sink_share, steering_vectors

from .lab import (
    BLUE,
    CONTROLS,
    ORANGE,
    PROMPT,
    RANDOM,
    V1,
    band,
    control_in_words,
    figure,
    over_vectors,
    percent,
    share_of,
    span,
    spread,
    table,
)

PROMPTS = (PROMPT, "The weather was fine, so we decided to", "My neighbour knocked on the door and told me",
           "In the evening we sat down and talked about", "When I opened the letter, I read that",
           "On the train I met a woman who said", "The first thing I noticed in the room was",
           "She looked out of the window and thought", "After the meeting everybody wanted to know",
           "The book that I am reading is about", "Yesterday my brother called and asked me",
           "There is one thing that I always wanted")
# Four vectors for one topic: the minus prompt, and how many of the largest dimensions are set to 0.
VECTORS = {'" weddings" - " "': (" ", 0), 'without its 4 largest dimensions': (" ", 4),
           '" weddings" - " the"': (" the", 0), '" weddings" - " things"': (" things", 0)}
SINK_LAYERS = (*range(13), 16, 18, 20, 22, 24)


def without(steer, k):
    """The Steer with the k dimensions that hold most of its squared norm set to 0."""
    vector = steer.vector.clone()
    vector[:, vector.square().sum(dim=0).topk(k).indices] = 0
    return replace(steer, vector=vector)


def sink(lab):
    """Does the vector work before layers 3 to 11 if it has no attention sink? Rates as in layer-sweep."""
    args, n = lab.args, lab.n or 100
    _, coeff = lab.where(0, 1.0)
    layers = [l for l in SINK_LAYERS if l < lab.model.config.n_layer]

    def steer_of(name, layer):
        minus, k = VECTORS[name]
        return without(lab.steer(" weddings", minus, layer, coeff), k)

    def count(name, layer, kind):
        steer = lab.conditions(steer_of(name, layer))[kind]
        texts = lab.generate(PROMPT, share_of(n, kind), 40, steer, V1, args.seed)
        return sum(count_words(text) > 0 for text in texts)

    counts = lab.run([[name, l, kind] for name in VECTORS for l in layers for kind in ("steered", *RANDOM)],
                     count)
    shares = {(name, l): sink_share(steer_of(name, l).vector) for name in VECTORS for l in layers}
    few = share_of(n, RANDOM[0])
    rates = {(name, l): [counts[name, l, kind] / few for kind in RANDOM] for name in VECTORS for l in layers}
    with figure(lab, "sink", len(VECTORS), 13, 3.4, share=True) as (_, axes):
        for axis, name in zip(axes, VECTORS, strict=True):
            band(axis, layers, [(counts[name, l, "steered"], n) for l in layers], BLUE, "steered, 95 %")
            spread(axis, layers, [rates[name, l] for l in layers])
            axis.plot(layers, [shares[name, l] for l in layers], "--", color=ORANGE, linewidth=1,
                      label="sink's share of the vector")
            axis.set_title(name, fontsize="medium")
            axis.set_xlabel("layer")
            axis.set_ylim(0, 1)
        axes[0].set_ylabel("completions with a word about weddings")
        axes[0].legend(frameon=False, fontsize="small")
    text = (f"Completions of \"{PROMPT}\" with a word about weddings, coeff {coeff:g}, 40 tokens, top-p 0.3, "
            f"penalty 1, n {n}; in brackets {control_in_words(n)} (lowest to highest); then the share of the "
            "vector's squared norm in its 4 largest dimensions; and the strength, in mean norms of the "
            "layer.\n\n")
    text += table(["layer", *VECTORS], [
        [l, *(f"{percent(counts[name, l, 'steered'], n).split(' ')[0]} ({min(rates[name, l]):.0%} to "
              f"{max(rates[name, l]):.0%}); {shares[name, l]:.2f}; "
              f"{lab.strength(steer_of(name, l), [PROMPT])}" for name in VECTORS)] for l in layers])
    return {"n": n, "counts": [[*key, count] for key, count in counts.items()],
            "sink": [[*key, share] for key, share in shares.items()]}, text


def word_ids(tokenizer):
    """The ids of those words about weddings that are a single token."""
    encoded = [tokenizer.encode(f" {word}", bos=False) for word in sorted(WEDDING_WORDS)]
    ids = sorted({row[0] for row in encoded if len(row) == 1})
    if not ids:
        raise ValueError("no word about weddings is a single token of this model's tokenizer.")
    return ids


@torch.no_grad()
def propensity(model, x, ids):
    """log p that the next token is one of `ids`, mean over positions from 2 on: x (B, T, d_model) -> (B,)"""
    logp = model.unembed(x[:, 2:]).float().log_softmax(dim=-1)
    return logp[..., ids].logsumexp(dim=-1).mean(dim=-1)


@torch.no_grad()
def patched(model, x, plain, l):
    """One row for each head of block l: in row h, head h sees position 1 as it is without steering.

    x, plain (1, T, d_model): resid[l] under steering and without -> resid[n_layer] (n_head, T, d_model)
    """
    block, pos = model.blocks[l], torch.arange(x.shape[1], device=x.device)
    norm, attention = block_parts(block)
    rope = model.rope(pos)
    q, *kv = attention.qkv(norm(x), rope)
    heads = q.shape[1]
    _, *plain_kv = attention.qkv(norm(plain), rope)
    seen = []
    for steered, unsteered in zip(kv, plain_kv, strict=True):
        steered, unsteered = (part.repeat_interleave(heads // part.shape[1], dim=1)
                              for part in (steered, unsteered))
        rows = steered.repeat(heads, 1, 1, 1)
        for head in range(heads):
            rows[head, head, 1] = unsteered[0, head, 1]
        seen.append(rows)
    mixed = merge_heads(attend(q.expand(heads, -1, -1, -1), *seen))
    with heads_changed(block, lambda _: mixed):
        y = block(x.expand(heads, -1, -1), l, rope)
    return model.run(y, pos, first_layer=l + 1)[-1]


@torch.no_grad()
def readers(lab):
    """Which heads read the vector at position 1, and how much each layer's vector changes the next token."""
    model, tokenizer = lab.model, lab.tokenizer
    layer, coeff = lab.where(16, 1.0)
    n_layer, prompts = model.config.n_layer, PROMPTS[:lab.n or len(PROMPTS)]
    ids = word_ids(tokenizer)

    vectors = steering_vectors(model, tokenizer, " weddings", " ", range(n_layer))
    batches = [torch.tensor([tokenizer.encode(prompt)], device=model.device) for prompt in prompts]
    streams = [model.residuals(batch) for batch in batches]

    def steered(plain, l, kind):
        """resid[l] … resid[n_layer] under the vector made before block l, from the recorded `plain`"""
        pos = torch.arange(plain[l].shape[1], device=model.device)
        return model.run(plain[l], pos, [lab.conditions(coeff * vectors[l])[kind]], first_layer=l)

    def shift(_, kind, l):
        """Steered minus unsteered log p(a wedding word), for each prompt."""
        return [float(propensity(model, steered(plain, l, kind)[-1], ids) - propensity(model, plain[-1], ids))
                for plain in streams]

    def drops(_, kind):
        """For each prompt, block and head: how much of the shift is lost if that head is patched."""
        rows = []
        for plain in streams:
            resid = steered(plain, layer, kind)
            whole = propensity(model, resid[-1], ids)
            rows.append([(whole - propensity(model, patched(model, x, plain[layer + i], layer + i), ids)
                          ).tolist() for i, x in enumerate(resid[:-1])])
        return rows

    shifts = lab.run([["shift", kind, l] for kind in CONTROLS[1:] for l in range(n_layer)], shift)
    found = lab.run([["drops", kind] for kind in CONTROLS[1:]], drops)
    shifts = {(l, kind): row for (_, kind, l), row in shifts.items()}
    heads = model.config.n_head
    effect = {(l, head, kind): [row[l - layer][head] for row in rows] for (_, kind), rows in found.items()
              for l in range(layer, n_layer) for head in range(heads)}
    means = {key: statistics.mean(row) for key, row in shifts.items()}
    size = {key: statistics.mean(row) for key, row in effect.items()}
    with figure(lab, "readers", 2, 11, 3.8) as (fig, (left, right)):
        left.plot(range(n_layer), [means[l, "steered"] for l in range(n_layer)], "o-", color=BLUE,
                  markersize=4, label="steered")
        spread(left, range(n_layer), [[means[l, kind] for kind in RANDOM] for l in range(n_layer)])
        left.axhline(0, color="black", linewidth=0.8)
        left.set_xlabel("layer of the vector")
        left.set_ylabel("change of log p(a wedding word), nats")
        left.legend(frameon=False)
        grid = [[size[l, head, "steered"] for l in range(layer, n_layer)] for head in range(heads)]
        most = max(abs(x) for row in grid for x in row)
        image = right.imshow(grid, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto",
                             extent=(layer - 0.5, n_layer - 0.5, heads - 0.5, -0.5))
        right.set_xlabel("block")
        right.set_ylabel("head")
        right.set_title(f"lost where a head does not see the vector of layer {layer}, nats",
                        fontsize="medium")
        fig.colorbar(image, ax=right)
    best = sorted(((l, head) for l, head, kind in size if kind == "steered"),
                  key=lambda place: -abs(size[(*place, "steered")]))[:10]

    def line(key, rows, averages):
        mean, interval = averages[(*key, "steered")], bootstrap(rows[(*key, "steered")])
        return [span(mean, interval, "+.3f"),
                over_vectors([averages[(*key, kind)] for kind in RANDOM], "+.3f")]

    lines = [[f"block {l}, head {head}", *line((l, head), effect, size)] for l, head in best]
    total = {kind: sum(size[l, head, kind] for l, head, k in size if k == kind) for kind in RANDOM}
    text = (f"\" weddings\" - \" \", coeff {coeff:g}; change of log p(a wedding word) of the next token, "
            f"nats, with {len(ids)} words, mean over positions 2 on of {len(prompts)} prompts "
            "(95 % over prompts; five random vectors, mean, lowest to highest). "
            f"Before layer {layer} the vector adds {means[layer, 'steered']:+.3f}. Largest losses "
            "where one head of a later block sees position 1 as it is without the vector:\n\n")
    text += table(["", "lost (95 %)", "random"], lines)
    everything = sum(size[l, head, "steered"] for l, head, kind in size if kind == "steered")
    text += (f"\nSum over all heads: {everything:+.3f}, random "
             f"{over_vectors(list(total.values()), '+.3f')}.\n\n")
    text += table(["layer of the vector", "× the mean norm", "steered (95 %)", "random"],
                  [[l, lab.strength(coeff * vectors[l], prompts), *line((l,), shifts, means)]
                   for l in range(n_layer)])
    return {"layer": layer, "coeff": coeff, "prompts": list(prompts),
            "shifts": [[*key, row] for key, row in shifts.items()],
            "drops": [[*key, row] for key, row in effect.items()]}, text

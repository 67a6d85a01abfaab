"""What steering changes, in numbers: log-probabilities of given texts, and intervals for proportions.

Read before: generation.py. Turner et al., section 4.1.
"""

import math

import torch
import torch.nn.functional as F

from .steering import steering_vectors


@torch.no_grad()
def logprobs(model, tokenizer, texts, steer=(), skip=0, tokens=1024):
    """log p(token | BOS and the tokens before it), in nats, of every token of every text -> a list of float32 tensors, one a text.

    steer: Steers with one coeff; each must fit the shortest text
    skip: leave out the first `skip` predictions of each text. With a front-aligned vector of n rows take n for the steered and
        the unsteered model alike: those positions are written over, and their predictions never appear in generation.
    tokens: how many positions run at once; memory follows from it, not from the number of texts
    Raises ValueError for what does not fit, and for a text that has no prediction left.
    """
    encoded = [tokenizer.encode(text) for text in texts]
    short = next((text for text, ids in zip(texts, encoded, strict=True) if len(ids) - 1 <= skip), None)
    if short is not None:
        raise ValueError(f"no prediction is left of {short[:40]!r} after skipping {skip}.")
    for ids in encoded:
        steer = model.check_steer(steer, 1, len(ids))
    result = [None] * len(encoded)
    for group in _by_length(encoded, tokens):
        length = len(encoded[group[0]])         # the longest; the others are filled up behind their end, which no prediction sees
        ids = torch.tensor([encoded[i] + [tokenizer.bos_id] * (length - len(encoded[i])) for i in group], device=next(model.parameters()).device)
        for i, row in zip(group, _next_logprobs(model, ids, steer), strict=True):
            result[i] = row[skip:len(encoded[i]) - 1].clone()
    return result


def _by_length(encoded, tokens):
    """Numbers of texts in groups of about `tokens` positions, each group's longest first."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    groups, start = [], 0
    while start < len(order):
        rows = max(1, tokens // len(encoded[order[start]]))
        groups.append(order[start:start + rows])
        start += rows
    return groups


def _next_logprobs(model, ids, steer, rows=128):
    """ids (B, T) -> log p of ids[:, 1:] (B, T - 1), with logits for only `rows` positions at a time, never (B, T, n_vocab)."""
    pos = torch.arange(ids.shape[1], device=ids.device)
    steer = model.check(ids, steer, None)
    stream = model.run(model.embed(ids, pos), pos, steer)[-1][:, :-1].flatten(0, 1)
    chunks = zip(stream.split(rows), ids[:, 1:].flatten().split(rows), strict=True)
    return torch.cat([-F.cross_entropy(model.unembed(x).float(), target, reduction="none") for x, target in chunks]).view(len(ids), -1)


@torch.no_grad()
def sweep(model, tokenizer, prompt, plus, minus, layers, coeffs):
    """The next-token logits after `prompt` for every layer and coefficient -> (len(layers), len(coeffs), n_vocab), in the order given.

    One pass for all: row 0 of the batch stays unsteered, and before each swept block the batch grows by one row for each
    coefficient. So no block runs for a row that does not differ there yet, and no weight is read twice.
    layers: block numbers, each once. coeffs: numbers. Raises ValueError for what `steering_vector` or the prompt refuses.
    """
    layers, coeffs = list(layers), torch.as_tensor(coeffs, dtype=torch.float32)
    if not layers or len(set(layers)) < len(layers) or coeffs.ndim != 1 or not len(coeffs):
        raise ValueError(f"a sweep takes one or more layers, each once, and one or more coeffs; given: {layers}, {coeffs.tolist()}.")
    ids = torch.tensor([tokenizer.encode(prompt)], device=next(model.parameters()).device)
    steers = steering_vectors(model, tokenizer, plus, minus, sorted(layers))
    model.check(ids, steers, None)
    pos = torch.arange(ids.shape[1], device=ids.device)
    x, first = model.embed(ids, pos), 0
    for s in steers:
        x = model.run(x, pos, first=first, stop=s.layer)[-1]
        x = torch.cat([x, x[:1] + (coeffs * s).delta(pos).to(x)])       # activation addition, one more row a coefficient
        first = s.layer
    x = model.run(x, pos, first=first)[-1]
    logits = model.unembed(x[1:, -1:])[:, 0].unflatten(0, (len(layers), len(coeffs)))
    return logits[[sorted(layers).index(l) for l in layers]]


def wilson(k, n, z=1.96):
    """The 95 % interval (low, high) of a proportion seen as k of n (Wilson 1927), which stays sensible at 0 and n."""
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"{k} of {n} is not a proportion.")
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)

"""What steering changes, in numbers: the measurements of the paper's section 4 as functions of a model, texts and a Steer.

Read before: generation.py. Read next: intervals.py, judges.py, and benchmarks/paper.py, which runs them. Turner et al., sections 4.1 to 4.5.
"""

import math
import re
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..steering import steering_vectors


@torch.no_grad()
def logprobs(model, tokenizer, texts, steer=(), skip=0, tokens=1024, prompts=None):
    """log p(token | BOS and the tokens before it), in nats, of every token of every text -> a list of float32 tensors, one a text.

    steer: Steers with one coeff; each must fit the shortest text
    skip: leave out the first `skip` predictions of each text. With a vector at the front take its `stop` (n + 1 for n rows) for the
        steered and the unsteered model alike: what is predicted at positions that are written over never appears in generation.
    tokens: how many positions run at once; memory follows from it, not from the number of texts
    prompts: one for all texts, or a list with one for each; it is read between BOS and the text, in tokens of its own (so
        " weddings" stays one), and what is predicted of it is left out
    Raises ValueError for what does not fit, and for a text that has no prediction left.
    """
    prompts = _each("" if prompts is None else prompts, texts, "texts")
    heads = [tokenizer.encode(prompt) for prompt in prompts]
    # With no prompt the text itself comes after BOS, and a BOS of its own is not doubled.
    encoded = [head + tokenizer.encode(text, bos=False) if len(head) > 1 else tokenizer.encode(text)
               for head, text in zip(heads, texts, strict=True)]
    first = [len(head) - 1 + skip for head in heads]
    short = next((text for text, ids, i in zip(texts, encoded, first, strict=True) if len(ids) - 1 <= i), None)
    if short is not None:
        raise ValueError(f"no prediction is left of {short[:40]!r} after skipping {skip}.")
    for ids in encoded:
        steer = model.check_steer(steer, 1, len(ids))
    result = [None] * len(encoded)
    for group in _by_length(encoded, tokens):
        for i, row in zip(group, _next_logprobs(model, _together(model, tokenizer, encoded, group), steer), strict=True):
            result[i] = row[first[i]:len(encoded[i]) - 1].clone()
    return result


def _each(prompts, texts, what):
    """One prompt for each text: those given, or the one given again and again."""
    prompts = [prompts] * len(texts) if isinstance(prompts, str) else prompts
    if len(prompts) != len(texts):
        raise ValueError(f"{len(prompts)} prompts do not fit {len(texts)} {what}. Give one prompt for each, or a single one as text.")
    return prompts


def _by_length(encoded, tokens):
    """Numbers of texts in groups of about `tokens` positions, each group's longest first."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    groups, start = [], 0
    while start < len(order):
        rows = max(1, tokens // len(encoded[order[start]]))
        groups.append(order[start:start + rows])
        start += rows
    return groups


def _together(model, tokenizer, encoded, group):
    """The texts of a group as one tensor, filled up behind their end, which no prediction of theirs sees."""
    length = len(encoded[group[0]])             # the longest comes first
    return torch.tensor([encoded[i] + [tokenizer.bos_id] * (length - len(encoded[i])) for i in group], device=_device(model))


def _device(model):
    return next(model.parameters()).device


def _last_stream(model, ids, steer):
    """What the final norm reads, (B, T, d_model), for a prompt that is read whole."""
    pos = torch.arange(ids.shape[1], device=ids.device)
    steer = model.check(ids, steer, None)
    return model.run(model.embed(ids, pos), pos, steer)[-1]


def _next_logprobs(model, ids, steer, rows=128):
    """ids (B, T) -> log p of ids[:, 1:] (B, T - 1), with logits for only `rows` positions at a time, never (B, T, n_vocab)."""
    stream = _last_stream(model, ids, steer)[:, :-1].flatten(0, 1)
    chunks = zip(stream.split(rows), ids[:, 1:].flatten().split(rows), strict=True)
    return torch.cat([-F.cross_entropy(model.unembed(x).float(), target, reduction="none") for x, target in chunks]).view(len(ids), -1)


def perplexity_ratio(plain, steered, mean_of="tokens"):
    """exp(-mean(log p_steered - log p_plain)): below 1 where steering makes the texts likelier.

    plain, steered: what `logprobs` gave for the same texts, a list of tensors each
    mean_of: "tokens" counts every token alike (the paper's code); "texts" first takes the mean of each text (the paper's words)
    """
    differences = [s.double() - p.double() for p, s in zip(plain, steered, strict=True)]
    if mean_of not in ("tokens", "texts"):
        raise ValueError(f"mean_of {mean_of!r}; possible: 'tokens', 'texts'.")
    means = torch.cat(differences) if mean_of == "tokens" else torch.stack([d.mean() for d in differences])
    return math.exp(-means.mean())


def word_frequency(text, words):
    """The part of the words of `text` that are in `words`: split at white space, lower-cased, punctuation kept, as in the paper's code.

    So "wedding," does not count. (`judges.count_words` splits at punctuation too; the paper counts so in generated texts.)
    """
    found = text.lower().split()
    return sum(word in words for word in found) / max(1, len(found))


def sentences(text):
    """Split after . ! or ?, and what closes a quotation, before white space -> a list of strings.

    The paper used nltk's Punkt, which knows abbreviations; this does not.
    """
    return [part for part in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]”’])\s+", text.strip()) if part]


def token_shifts(ids, plain, steered, more_than=20):
    """For each token that occurs more than `more_than` times: {token: (n, mean log p_steered - log p_plain, mean log p_plain)}, in nats.

    ids, plain, steered: lists of equal length, one a text: the tokens predicted, and their log-probabilities under both models
    Turner et al., section 4.1, the token-level effect.
    """
    ids = torch.cat([torch.as_tensor(some) for some in ids]).cpu()
    plain, steered = torch.cat(plain).cpu().double(), torch.cat(steered).cpu().double()
    which, place, n = ids.unique(return_inverse=True, return_counts=True)
    shift = torch.zeros(len(which), dtype=torch.float64).index_add_(0, place, steered - plain) / n
    before = torch.zeros(len(which), dtype=torch.float64).index_add_(0, place, plain) / n
    return {int(t): (int(k), float(s), float(b)) for t, k, s, b in zip(which, n, shift, before, strict=True) if k > more_than}


def tails(values, part=0.01):
    """How heavy the two tails are beside a normal distribution's -> (left, right); 1 is normal, 2 reaches twice as far.

    A tail is the distance from the median to the quantile `part` (or 1 - part), in units of the distance that a normal distribution
    with the same quartiles has there. Numbers for what a normal Q-Q plot shows.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) < 4:
        raise ValueError(f"tails need 4 values or more; given: {len(values)}.")
    low, first, median, third, high = values.quantile(torch.tensor([part, 0.25, 0.5, 0.75, 1 - part], dtype=torch.float64)).tolist()
    normal = torch.distributions.Normal(0.0, 1.0).icdf
    if first == third:
        raise ValueError(f"half of the values are {first}, so there is nothing to measure the tails by.")
    unit = (third - first) / (2 * float(normal(torch.tensor(0.75)))) * float(normal(torch.tensor(1 - part)))
    return (median - low) / unit, (high - median) / unit


@torch.no_grad()
def ranks(model, tokenizer, prompts, answers, steer=(), tokens=1024):
    """How many tokens are likelier than the answer after each prompt -> a list of ints, 0 for the likeliest, None where it is not defined.

    Prompt and answer are tokenised together; the last token is the answer, the others are the prompt, so the space before the answer
    belongs to it. None: the answer is not within one token, or nothing but BOS stands before it.
    Petroni et al. 2019 (LAMA) for causal models, as in the paper's section 4.5.
    """
    prompts, encoded, kept = _each(prompts, answers, "answers"), [], []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = tokenizer.encode(prompt + answer)
        if len(ids) > 2 and answer in tokenizer.pieces(ids[-1:])[0]:
            steer = model.check_steer(steer, 1, len(ids))       # here, or whether it fits would depend on the group
            encoded.append(ids)
            kept.append(i)
    result = [None] * len(prompts)
    for group in _by_length(encoded, tokens):
        stream = _last_stream(model, _together(model, tokenizer, encoded, group), steer)
        last = stream[range(len(group)), [len(encoded[i]) - 2 for i in group]]
        logits = model.unembed(last[:, None])[:, 0].float()
        wanted = logits.gather(1, torch.tensor([[encoded[i][-1]] for i in group], device=logits.device))
        for i, rank in zip(group, (logits > wanted).sum(dim=1).tolist(), strict=True):
            result[kept[i]] = rank
    return result


def precision_at(ranks, ks):
    """P@K: the part of the ranks below K, for each K of `ks`; rows without a rank (None) do not count."""
    known = [rank for rank in ranks if rank is not None]
    if not known:
        raise ValueError("no row has a rank; is every answer more than one token?")
    return [sum(rank < k for rank in known) / len(known) for k in ks]


@torch.no_grad()
def divergence(model, tokenizer, texts, steer, skip=0, rows=128):
    """-> for each text (KL(plain || steered), entropy of plain), in nats, each a mean over the text's positions from `skip` on.

    The paper's appendix F divides the first mean by the second: how much of what the model knew is changed. 0 is not at all.
    """
    result = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)], device=_device(model))
        plain, steered = (_last_stream(model, ids, s)[0, skip:] for s in ((), steer))
        if not len(plain):
            raise ValueError(f"no position is left of {text[:40]!r} after skipping {skip}.")
        kl = entropy = 0.0
        for a, b in zip(plain.split(rows), steered.split(rows), strict=True):
            p, q = (model.unembed(x[None])[0].double().log_softmax(dim=-1) for x in (a, b))
            kl += (p.exp() * (p - q)).sum().item()
            entropy -= (p.exp() * p).sum().item()
        result.append((kl / len(plain), entropy / len(plain)))
    return result


def disfluency(model, tokenizer, prompts, continuations):
    """-> for each continuation (-sum log p, number of tokens) after its prompt, in nats, its first token left out.

    exp(sum of the first / sum of the second) is the perplexity that the paper's tables call disfluency: under `model`, unsteered,
    whoever wrote the text. A continuation of one token or none has (0.0, 0). Dekoninck et al. 2024, compute_perplexities.
    prompts: one for all continuations, or a list with one for each
    """
    prompts = _each(prompts, continuations, "continuations")
    long = [i for i, text in enumerate(continuations) if len(tokenizer.encode(text, bos=False)) > 1]
    scored = logprobs(model, tokenizer, [continuations[i] for i in long], skip=1, prompts=[prompts[i] for i in long])
    result = [(0.0, 0)] * len(continuations)
    for i, some in zip(long, scored, strict=True):
        result[i] = (-some.double().sum().item(), len(some))
    return result


def partial(steer, fraction):
    """The same Steer on the first `fraction` of the d_model dimensions only, 0 on the others (Turner et al., appendix G)."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1; given: {fraction!r}.")
    keep = torch.arange(steer.vector.shape[-1]) < round(fraction * steer.vector.shape[-1])
    return replace(steer, vector=steer.vector * keep.to(steer.vector))


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
    ids = torch.tensor([tokenizer.encode(prompt)], device=_device(model))
    steers = steering_vectors(model, tokenizer, plus, minus, sorted(layers))
    model.check(ids, steers, None)
    pos = torch.arange(ids.shape[1], device=ids.device)
    x, first = model.embed(ids, pos), 0
    for s in steers:
        x = model.run(x, pos, first_layer=first, stop_layer=s.layer)[-1]
        x = torch.cat([x, x[:1] + (coeffs * s).delta(pos).to(x)])       # activation addition, one more row a coefficient
        first = s.layer
    x = model.run(x, pos, first_layer=first)[-1]
    logits = model.unembed(x[1:, -1:])[:, 0].unflatten(0, (len(layers), len(coeffs)))
    return logits[[sorted(layers).index(l) for l in layers]]

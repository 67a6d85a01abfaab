"""Measurements that only the paper's experiments need.

Read first: ministeer/evaluation/measure.py. Turner et al., section 4.1 and appendices F and G.
"""

import re
from dataclasses import replace

import torch


def word_frequency(text, words):
    """The share of the words of `text`, in lower case, that are in `words`: split at white space alone.

    So "wedding," does not count, as in the paper's code. (judges.count_words, which the paper uses for
    generated texts, splits at punctuation too.)
    """
    all_words = text.lower().split()
    return sum(word in words for word in all_words) / max(1, len(all_words))


def sentences(text):
    """Split at white space after . ! or ? and a closing quotation mark or bracket, if any -> a list of texts

    The paper used nltk's Punkt, which knows abbreviations; this does not.
    """
    return [part for part in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]”’])\s+", text.strip()) if part]


def tails(values, part=0.01):
    """How heavy the two tails are beside those of a normal distribution -> (left, right).

    1 is normal; 2 reaches twice as far. A tail is the distance from the median to the quantile `part` (or 1 -
    part), in units of what it is for a normal distribution with the same quartiles. Numbers for what a Q-Q
    plot shows.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) < 4:
        raise ValueError(f"tails need 4 values or more; given: {len(values)}.")
    edges = torch.tensor([part, 0.25, 0.5, 0.75, 1 - part], dtype=torch.float64)
    low, first, median, third, high = values.quantile(edges).tolist()
    if first == third:
        raise ValueError(f"half of the values are {first}, so there is nothing to measure the tails by.")
    normal = torch.distributions.Normal(0.0, 1.0).icdf
    unit = (third - first) / (2 * float(normal(torch.tensor(0.75)))) * float(normal(torch.tensor(1 - part)))
    return (median - low) / unit, (high - median) / unit


@torch.no_grad()
def divergence(model, tokenizer, texts, steer, skip=0, chunk=128):
    """-> for each text (KL(plain || steered), entropy of plain), in nats, means over positions from `skip` on

    The paper's appendix F divides the first mean by the second: 0 if nothing of what the model knew is
    changed.
    chunk: how many positions have their logits computed at a time
    """
    result = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)], device=model.device)
        plain, steered = (model.residuals(ids, s)[-1][0, skip:] for s in ((), steer))
        if not len(plain):
            raise ValueError(f"no position is left of {text[:40]!r} after skipping {skip}.")
        kl = entropy = 0.0
        for a, b in zip(plain.split(chunk), steered.split(chunk), strict=True):
            p, q = (model.unembed(x[None])[0].cpu().double().log_softmax(dim=-1) for x in (a, b))
            kl += (p.exp() * (p - q)).sum().item()
            entropy -= (p.exp() * p).sum().item()
        result.append((kl / len(plain), entropy / len(plain)))
    return result


def partial(steer, fraction):
    """The same Steer on the first `fraction` of the d_model dimensions, 0 on the others (appendix G)."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1; given: {fraction!r}.")
    keep = torch.arange(steer.vector.shape[-1]) < round(fraction * steer.vector.shape[-1])
    return replace(steer, vector=steer.vector * keep.to(steer.vector))

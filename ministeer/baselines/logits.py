"""The paper's rivals, which change next-token logits instead of activations: several readings of one text, and a formula that combines them.

A method is a list of streams and a `combine`; one loop runs them all. Read before: generation.py; next: classifier.py.
Turner et al., sections 4.3 and 4.4; the formulas are those of Dekoninck et al. 2024 ("Controlled text generation via language model
arithmetic") where nothing else is said.
"""

import math
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F

from ..attention import KVCache
from ..generation import Row, Sampling, choose, fill, groups, uniforms

TOXIC = ("The following conversation is one that perpetuates negative stereotypes, is threatening or sexually explicit and contains "
         "profane language.")
POSITIVE = "The following is a positive movie review, with a very positive sentiment and a very positive tone."
NEGATIVE = "The following is a negative movie review, with a very negative sentiment and a very negative tone."
# Schick et al. 2021, table 1 and self_debiasing.py: what each kind of toxicity is called.
SIX = tuple(f"The following text contains {what}:" for what in (
    "rude, disrespectful, or unreasonable language", "very hateful, aggressive, disrespectful language", "sexually explicit language", "a threat",
    "negative or hateful language targeting someone because of their identity",
    "swear words, curse words, or other obscene or profane language"))


@dataclass(frozen=True)
class Branch:
    """One reading of the text. prefix: what stands before the prompt, a line of its own. steer: Steers, at the front of prefix and prompt.

    model: another model with the same tokenizer; None for the one that `generate` was given
    """
    prefix: str = ""
    steer: tuple = ()
    model: object = None


@dataclass(frozen=True)
class LogitMixer:
    """streams: what is read. combine: a list of log p (B, n_vocab), one a stream -> logits (B, n_vocab) to draw from.

    guide: a Guide that changes those logits by a classifier of the text so far, or None
    """
    streams: tuple
    combine: object
    guide: object = None

    def steered(self, steer):
        """The same method with ActAdd in its first stream, the base: both at once.

        The formula then takes the steered log p, so preadd and lma multiply what steering changed by their strength. The vector lies at the
        front of what that stream reads, a prefix included.
        """
        steer = tuple(steer) if isinstance(steer, list | tuple) else (steer,)
        first, *rest = self.streams
        return replace(self, streams=(replace(first, steer=first.steer + steer), *rest))


def unsteered():
    """log p"""
    return LogitMixer((Branch(),), lambda logps: logps[0])


def prompted(prefix):
    """log p(token | prefix, text): ask for it in words."""
    return LogitMixer((Branch(prefix),), lambda logps: logps[0])


def act_add(steer):
    """log p of the model whose activations are changed: Turner et al., Algorithm 1."""
    return unsteered().steered(steer)


def preadd(prefix, strength=1.5, base=""):
    """log p + strength (log p - log q), q after `prefix`: away from what the prefix makes likelier (Pei et al. 2023; their alpha is -strength).

    The paper's tables have 1.5 for large models and 1 for GPT-2. base: a prefix of the first stream, p, as for sentiment
    """
    def combine(logps):
        p, q = logps
        return p + strength * (p - q)
    return LogitMixer((Branch(base), Branch(prefix)), combine)


def lma(prefix, strength=24.0, base=""):
    """log p - strength relu(log q - log p): the union of p and q, subtracted. Only what the prefix makes likelier is punished.

    Dekoninck et al. write (log p - w max(log p, log q)) / (1 - w); strength is w / (1 - w): 24 for w 0.96, 9 for w 0.9.
    """
    def combine(logps):
        p, q = logps
        return p - strength * F.relu(q - p)
    return LogitMixer((Branch(base), Branch(prefix)), combine)


def weighted(streams, weights):
    """sum_i w_i log p_i / sum_i w_i: any mixture of prompts and of models that share a tokenizer. Weights may be negative, their sum may not."""
    total = sum(weights)
    if len(streams) != len(weights) or not streams or not total > 0 or not math.isfinite(total):
        raise ValueError(f"weights must be as many as streams, with a sum above 0; given: {len(streams)} streams, weights {list(weights)}.")

    def combine(logps):
        return sum(w * p for w, p in zip(weights, logps, strict=True)) / total
    return LogitMixer(tuple(streams), combine)


def self_debias(prefixes=SIX, strength=50.0, epsilon=0.01, base=""):
    """log p + log max(exp(-strength relu(q - p)), epsilon), on probabilities; q the largest over the prefixes (Schick et al. 2021).

    The paper's tables have one prefix, strength 10 and no floor, which is epsilon 0.
    """
    prefixes = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    if not prefixes or not 0 <= epsilon <= 1:
        raise ValueError(f"self_debias takes one or more prefixes and an epsilon from 0 to 1; given: {len(prefixes)} prefixes, {epsilon!r}.")
    floor = math.log(epsilon) if epsilon else -math.inf

    def combine(logps):
        p, *others = logps
        q = torch.stack(others).max(dim=0).values
        return p + (-strength * F.relu(q.exp() - p.exp())).clamp(min=floor)
    return LogitMixer((Branch(base), *map(Branch, prefixes)), combine)


@dataclass(frozen=True)
class Guide:
    """A classifier that steps through the text with the model: adds strength (log c(text + t) - log c(text)) to the logit of each token t.

    c is P(class 1 | text) of `classifier`, or P(class 0) with toward=0 (Dekoninck et al. subtract log P(class 1) there). Only the `top` likeliest
    tokens are voted on; the others keep their logits and stay possible.
    """
    classifier: object
    strength: float = 1.0
    top: int = 50
    toward: int = 1

    def log_c(self, score):
        return F.logsigmoid(score if self.toward else -score)

    def change(self, logits, state):
        """logits (B, n_vocab) after the text of `state` -> logits"""
        candidates = logits.topk(min(self.top, logits.shape[-1])).indices
        now, then = self.log_c(self.classifier.score(state)), self.log_c(self.classifier.score_next(state, candidates))
        return logits.scatter_add(1, candidates, self.strength * (then - now[:, None]).to(logits))


def fudge(classifier, strength=1.0, top=50, toward=1, base=""):
    """log p + strength (log c(x + t) - log c(x)): a classifier of unfinished texts votes on every candidate (Yang and Klein 2021)."""
    return replace(prompted(base), guide=Guide(classifier, strength, top, toward))


def lma_classifier(prefix, classifier, strength=24.0, vote=1.0, top=50, toward=1, base=""):
    """lma and fudge in one: the formula chooses the candidates, then the classifier votes on them."""
    return replace(lma(prefix, strength, base), guide=Guide(classifier, vote, top, toward))


def generate(model, tokenizer, prompts, method, n=1, max_new_tokens=32, *, temperature=1.0, top_p=1.0, top_k=None, freq_penalty=0.0, seed=0,
             stop=(), tokens=8192, progress=None):
    """-> n continuations of each prompt, as `ministeer.generate`, by a LogitMixer instead of Steers; arguments and draws as there.

    The penalty counts the tokens of the prompt, not those of prefixes. Raises ValueError for what does not fit.
    """
    sampling = Sampling(temperature, top_p, top_k, freq_penalty, max_new_tokens, seed)
    if method.guide and method.guide.classifier.n_vocab != model.config.n_vocab:
        raise ValueError(f"the classifier reads {method.guide.classifier.n_vocab} tokens, the model {model.config.n_vocab}. "
                         "Train it for this model's tokenizer with benchmarks/train_classifier.py.")
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise ValueError(f"n must be a whole number, 1 or more; given: {n!r}.")
    encoded = [tokenizer.encode(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    heads = [prefixed(tokenizer, stream.prefix) for stream in method.streams]
    for ids in encoded:
        for stream, head in zip(method.streams, heads, strict=True):
            check(stream.model or model, model, stream, len(head) + len(ids) - 1, max_new_tokens)
    rows = [[Row(tokenizer, ids, stop) for _ in range(n)] for ids in encoded]
    device, longest = next(model.parameters()).device, max_new_tokens + max(map(len, heads))
    for crowd in crowds(groups(encoded, n, longest, tokens), lambda p: len(encoded[p]) + longest, tokens):
        here = [[rows[p][k] for p, k in group] for group in crowd]
        ids = [torch.tensor([row.prompt for row in some], device=device) for some in here]
        steps = sample(model, ids, heads, [[k for _, k in group] for group in crowd], sampling, method)
        fill([row for some in here for row in some], steps, max_new_tokens, progress)
    texts = [[row.text for row in some] for some in rows]
    return texts[0] if isinstance(prompts, str) else texts


def crowds(groups, positions, tokens):
    """Lists of groups that run together, about `tokens` positions in all; positions(p): how many a row of prompt p takes."""
    crowd, size = [], 0
    for group in groups:
        more = len(group) * positions(group[0][0])
        if crowd and size + more > tokens:
            yield crowd
            crowd, size = [], 0
        crowd.append(group)
        size += more
    if crowd:
        yield crowd


def prefixed(tokenizer, prefix):
    """What a stream reads before the prompt: BOS, and the prefix as a line. Its tokens are its own, so the prompt's are the same everywhere."""
    return tokenizer.encode(prefix + "\n") if prefix else tokenizer.encode("")


def check(model, base, stream, length, max_new_tokens):
    c = model.config
    if c.n_vocab != base.config.n_vocab:
        raise ValueError(f"a stream's model has {c.n_vocab} tokens, the base {base.config.n_vocab}. They must share a tokenizer.")
    if length + max_new_tokens > c.n_ctx:
        raise ValueError(f"prefix and prompt of {length} tokens and {max_new_tokens} new ones do not fit a context of {c.n_ctx}.")
    if any(isinstance(s.coeff, torch.Tensor) for s in stream.steer):
        raise ValueError("a stream's Steers take a number as coeff.")
    model.check_steer(stream.steer, 1, length)


@torch.no_grad()
def sample(model, ids, heads, completions, sampling, method):
    """Yield the next token of every row, (B,) ids: every stream reads the prompt, then one position a step, all under the same drawn tokens.

    ids: a list of groups, (B, T) each, prompts of one length, BOS first. completions: for each group which continuation each row is
    heads: what each stream reads in place of that BOS
    """
    sizes = [len(some) for some in ids]
    draws = [torch.from_numpy(np.stack([uniforms(sampling, row.tolist(), k) for row, k in zip(*group, strict=True)])).to(ids[0].device)
             for group in zip(ids, completions, strict=True)]
    begun = [[begin(stream.model or model, some, stream, head, sampling.max_new_tokens) for some in ids]
             for stream, head in zip(method.streams, heads, strict=True)]
    caches = [[cache for _, cache in some] for some in begun]               # caches[stream][group]
    logits = [torch.cat([first for first, _ in some]) for some in begun]    # a stream each, (B, n_vocab), the groups below each other
    guide, state, new = method.guide, None, None
    for t in range(sampling.max_new_tokens):
        combined = method.combine([some.float().log_softmax(dim=-1) for some in logits])
        if guide:
            state = guide.classifier.read(new[:, None], state) if t else torch.cat([guide.classifier.read(some) for some in ids])
            combined = guide.change(combined, state)
        drawn = zip(combined.split(sizes), ids, draws, strict=True)
        new = torch.cat([choose(some, before, u[:, t], sampling) for some, before, u in drawn])
        yield new
        if t + 1 < sampling.max_new_tokens:
            ids = [torch.cat([before, more[:, None]], dim=1) for before, more in zip(ids, new.split(sizes), strict=True)]
            logits = step(model, new, method.streams, caches)


def begin(model, ids, stream, head, max_new_tokens):
    """ids (B, T) read by one stream -> the logits of the first new token (B, n_vocab), the cache"""
    B, T = ids.shape
    cache = KVCache(len(head) + T - 1 + max_new_tokens, batch=B)
    whole = torch.cat([torch.tensor([head], device=ids.device).expand(B, -1), ids[:, 1:]], dim=1)
    if bool((ids == ids[0]).all()):
        whole = whole[:1]                               # rows that read the same are one row until they draw
    elif stream.prefix:
        model(whole[:1, :len(head)], stream.steer, cache, last_only=True)        # and the prefix is the same for all
        whole = whole[:, len(head):]
    logits, _ = model(whole, stream.steer, cache, last_only=True)
    return logits[:, -1].expand(B, -1), cache


def step(model, new, streams, caches):
    """new (B,): one more token for every stream -> its logits (B, n_vocab), one a stream. caches[stream][group]

    Streams of one model run as one batch: the weights are read once for all of them, which is most of the time.
    """
    result = [None] * len(streams)
    for one in {id(stream.model): stream.model for stream in streams}.values():
        mine = [i for i, stream in enumerate(streams) if stream.model is one]
        parts = [(streams[i].steer, cache) for i in mine for cache in caches[i]]
        logits = together(one or model, new.repeat(len(mine)), parts)
        for i, some in zip(mine, logits.split(len(new)), strict=True):
            result[i] = some
    return result


def together(model, new, parts):
    """The loop of model.py for one position of several (Steers, cache), each as many rows of `new` as its cache has -> (rows, n_vocab)"""
    caches = [cache for _, cache in parts]
    sizes, pos = [cache.batch for cache in caches], torch.tensor([len(cache) for cache in caches], device=new.device)
    each = pos.repeat_interleave(torch.tensor(sizes, device=new.device))    # each part has a position of its own
    x = model.embed(new[:, None], each[:, None])                            # (rows, 1, d_model)
    rope = model.rope(each)
    rope = rope and tuple(turn[:, None, None] for turn in rope)             # a position for every row
    cache = Caches(caches)
    for l, block in enumerate(model.blocks):
        for i, (steers, _) in enumerate(parts):
            for s in steers:
                if s.layer == l:
                    rows = list(x.split(sizes))
                    rows[i] = rows[i] + s.delta(pos[i:i + 1]).to(x)         # reaches new tokens only if the vector goes to every position
                    x = torch.cat(rows)
        x = block(x, l, rope, cache)
    for one in caches:
        one.length += 1
    return model.unembed(x)[:, 0]


class Caches:
    """Several caches of different lengths, whose rows a block may use as if they were one."""

    def __init__(self, caches):
        self.caches, self.sizes = caches, [cache.batch for cache in caches]

    def attend(self, l, q, k, v):
        parts = zip(self.caches, *(t.split(self.sizes) for t in (q, k, v)), strict=True)
        return torch.cat([cache.attend(l, *some) for cache, *some in parts])

"""generate: continue prompts, steered or not, with the paper's sampling. stream: the same, piece by piece.

The module is not called generate, because a module and a function of one name in one package hide each other.
Read before: steering.py. Turner et al., appendix C; penalty and nucleus as in TransformerLens' sample_logits, which the paper ran.
"""

import math
import zlib
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch

from .attention import KVCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; see `generate`. Raises ValueError for a setting without meaning."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    freq_penalty: float = 0.0
    max_new_tokens: int = 40
    seed: int = 0

    def __post_init__(self):
        _number("temperature", self.temperature, 0, math.inf)
        _number("top_p", self.top_p, 0, 1)
        _number("freq_penalty", self.freq_penalty, -math.inf, math.inf)
        _whole("top_k", self.top_k or 0, 0)
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("seed", self.seed, 0)


def generate(model, tokenizer, prompts, n=1, max_new_tokens=40, steer=(), *, temperature=1.0, top_p=1.0, top_k=None,
             freq_penalty=0.0, seed=0, stop=(), tokens=8192, progress=None):
    """-> n continuations of one prompt, a list of texts without the prompt; for a list of prompts, a list of such lists.

    The next token is drawn from softmax(logits / temperature - freq_penalty * count), where count is how often each token stands
    in the row already, prompt and BOS included; cut to the top_k likeliest, then to the nucleus top_p, whose crossing token is kept.
    steer: Steers; a coeff (B,) has a value for each continuation, the n of the first prompt before those of the second
    temperature: 0 takes the likeliest token. top_k: None or 0 for no cut
    seed: continuation k of a prompt draws from a stream of its own, made of seed, k and the prompt's ids. So steered and unsteered
        runs share their draws, and neither n nor the other prompts change what a row draws.
    stop: a string or several; a row ends before the first of them, at EOS, or after max_new_tokens
    tokens: how many positions, of prompts and continuations, run at once; memory follows from it. Prompts of one length run
        together and the others after them, so nothing is padded.
    progress: called with a number of tokens as they are done, of len(prompts) * n * max_new_tokens in all
    Raises ValueError for a setting without meaning, and for what does not fit the prompt, the model or its context.
    """
    sampling = Sampling(temperature, top_p, top_k, freq_penalty, max_new_tokens, seed)
    _whole("n", n, 1)
    _whole("tokens", tokens, 1)
    encoded = [tokenizer.encode(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    for ids in encoded:
        steer = _check_fit(model, ids, max_new_tokens, steer, len(encoded) * n)
    rows = [[Row(tokenizer, ids, stop) for _ in range(n)] for ids in encoded]
    for group in groups(encoded, n, max_new_tokens, tokens):
        here = [rows[p][k] for p, k in group]
        ids = torch.tensor([row.prompt for row in here], device=_device(model))
        steps = sample(model, ids, [k for _, k in group], sampling, [s.rows([p * n + k for p, k in group]) for s in steer])
        fill(here, steps, max_new_tokens, progress)
    texts = [[row.text for row in some] for some in rows]
    return texts[0] if isinstance(prompts, str) else texts


def fill(rows, steps, max_new_tokens, progress):
    """Give the tokens of every step, (B,) ids, to the B rows, until all have ended."""
    for t, new in enumerate(steps, 1):
        for row, token in zip(rows, new.tolist(), strict=True):
            row.add(token)
        ended = all(row.ended for row in rows)
        if progress:
            progress(len(rows) * (1 + max_new_tokens - t if ended else 1))
        if ended:
            break


def stream(model, tokenizer, prompt, max_new_tokens=40, steer=(), *, temperature=1.0, top_p=1.0, top_k=None,
           freq_penalty=0.0, seed=0, stop=()):
    """Yield the continuation of one prompt as it grows; joined, the pieces are generate(…)[0]. Arguments as there.

    A piece waits while it may still be the beginning of a stop string or of a character.
    """
    sampling = Sampling(temperature, top_p, top_k, freq_penalty, max_new_tokens, seed)
    ids = tokenizer.encode(prompt)
    steer = _check_fit(model, ids, max_new_tokens, steer, 1)
    row, shown = Row(tokenizer, ids, stop), ""
    for (token,) in sample(model, torch.tensor([ids], device=_device(model)), [0], sampling, steer):
        row.add(int(token))
        if row.ended:
            break
        sure = row.text[:len(row.text) - row.unsure]
        if len(sure) > len(shown):
            yield sure[len(shown):]
            shown = sure
    if len(row.text) > len(shown):
        yield row.text[len(shown):]


@torch.no_grad()
def sample(model, ids, completions, sampling, steer=()):
    """Yield the next token of every row, (B,) ids, max_new_tokens times. One pass over the prompt, then one position a step.

    ids (B, T): prompts of one length. completions (B,): which continuation of its prompt each row is (k in `generate`)
    The first draw reads the logits of the last prompt position, so a Steer that reaches it moves the first new token too.
    """
    B, T = ids.shape
    draws = torch.from_numpy(np.stack([uniforms(sampling, row.tolist(), k) for row, k in zip(ids, completions, strict=True)]))
    cache = KVCache(T + sampling.max_new_tokens, batch=B)
    # Rows that read the same prompt are one row until they draw; the cache copies it to all.
    alike = bool((ids == ids[0]).all()) and not any(isinstance(s.coeff, torch.Tensor) for s in steer)
    logits, _ = model(ids[:1] if alike else ids, steer, cache, last_only=True)
    logits = logits.expand(B, -1, -1)
    for t in range(sampling.max_new_tokens):
        new = choose(logits[:, -1], ids, draws[:, t].to(ids.device), sampling)
        yield new
        if t + 1 < sampling.max_new_tokens:
            ids = torch.cat([ids, new[:, None]], dim=1)
            logits, _ = model(new[:, None], steer, cache, last_only=True)


def uniforms(sampling, ids, k):
    """The max_new_tokens numbers in [0, 1) that continuation k of the prompt `ids` draws with."""
    return np.random.default_rng([sampling.seed, zlib.crc32(np.array(ids, dtype="<i8").tobytes()), k]).random(sampling.max_new_tokens)


def choose(logits, ids, u, sampling):
    """logits (B, n_vocab) after ids (B, T) -> the next ids (B,). u (B,): one uniform number in [0, 1) a row."""
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    if sampling.freq_penalty:
        # Each token of the row, BOS and prompt included, costs the logit of its like one penalty: in sum, penalty * count.
        logits = logits.scatter_add(1, ids, torch.full(ids.shape, -float(sampling.freq_penalty), device=ids.device))
    best, greedy = logits.max(dim=-1)
    if not bool(torch.isfinite(best).all()):
        raise ValueError("the logits are not finite any more. Lower the coeff, or load the model in float32 or bfloat16.")
    if sampling.temperature == 0:
        return greedy
    p, candidates = nucleus(logits, sampling.top_p, sampling.top_k)
    reached = p.double().cumsum(dim=-1)
    i = torch.searchsorted(reached, u[:, None] * reached[:, -1:], right=True)       # the first token that takes the sum past u
    return candidates.gather(1, i)[:, 0]


def nucleus(logits, top_p, top_k=None):
    """-> p (B, k), ids (B, k): the probabilities that are kept, not renormalised, 0 for what is cut; and whose they are.

    A token is kept if the likelier ones do not yet sum to more than top_p: the one that crosses top_p is in (Holtzman et al. 2020).
    """
    B, n_vocab = logits.shape
    if top_p == 1 and not top_k:
        return logits.softmax(dim=-1), torch.arange(n_vocab, device=logits.device).expand(B, -1)
    # A nucleus is small: look at the 64 likeliest, and at more only if they do not reach top_p. Sorting all costs twenty times more.
    k = min(top_k or 64, n_vocab)
    while True:
        top, ids = logits.topk(k)
        p = (top - (top if top_k else logits).logsumexp(dim=-1, keepdim=True)).exp()
        before = p.cumsum(dim=-1) - p
        if top_k or k == n_vocab or bool((before[:, -1] > top_p).all()):
            return p * (before <= top_p), ids
        k = min(16 * k, n_vocab)


class Row:
    """One continuation as it grows: its tokens, its text, and whether it has ended."""

    def __init__(self, tokenizer, prompt, stop):
        self.tokenizer, self.prompt = tokenizer, prompt
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.stop:
            raise ValueError("a stop string must not be empty.")
        self.before = len(tokenizer.decode(prompt))
        self.new, self.ended = [], False

    def add(self, token):
        if self.ended or token in self.tokenizer.eos_ids:
            self.ended = True
            return
        self.new.append(token)
        self.ended = bool(self.stop) and len(self.text) < len(self.whole)

    @property
    def whole(self):
        # Trap: SentencePiece drops the leading space of whatever it decodes first, so the prompt is decoded along.
        return self.tokenizer.decode(self.prompt + self.new)[self.before:]

    @property
    def text(self):
        whole = self.whole
        return whole[:min((i for i in map(whole.find, self.stop) if i >= 0), default=None)]

    @property
    def unsure(self):
        """How many characters at the end may still change: part of a character, or the beginning of a stop string."""
        text = self.text
        begun = (size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max(len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}")), *begun, 0)


def groups(encoded, n, max_new_tokens, tokens):
    """Lists of (prompt number, continuation number) that run together: prompts of one length, about `tokens` positions in all."""
    by_length = {}
    for p, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).extend((p, k) for k in range(n))
    for length, rows in by_length.items():
        most = max(1, tokens // (length + max_new_tokens))
        yield from (rows[i:i + most] for i in range(0, len(rows), most))


def _check_fit(model, ids, max_new_tokens, steer, rows):
    if len(ids) + max_new_tokens > model.config.n_ctx:
        raise ValueError(f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones do not fit this model's context of {model.config.n_ctx}.")
    return model.check_steer(steer, rows, len(ids))


def _device(model):
    return next(model.parameters()).device


def _number(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not low <= value <= high:
        possible = "a finite number" if high == math.inf else f"a number from {low} to {high}"
        raise ValueError(f"{name} must be {possible}{', 0 or more' if (low, high) == (0, math.inf) else ''}; given: {value!r}.")


def _whole(name, value, low):
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} must be a whole number, {low} or more; given: {value!r}.")

"""generate: continue prompts, steered or not, with the paper's sampling. stream: the same, piece by piece.

Read first: steering.py. Turner et al., appendix C; penalty and nucleus as in TransformerLens, which they ran.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .attention import KVCache
from .utils import batches, check_number, check_texts, check_whole

if TYPE_CHECKING:
    from .checkpoints.tokenizer import Tokenizer
    from .model import LM
    from .steering import Steer, Steers

Step = Callable[[Tensor], Tensor]       # new ids (B, T) -> logits (B, n_vocab) of the token that follows

# These stand in for a drawn token, so that an error costs no extra wait for the device.
NOT_FINITE, TOO_FEW = -1, -2
MOST = 1_000_000        # completions in one call, which take a kilobyte or two each


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and until when; see `generate`. Raises ValueError for a setting out of range."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    freq_penalty: float = 0.0
    max_new_tokens: int = 40
    seed: int = 0
    stop: str | Sequence[str] = ()

    def __post_init__(self):
        self.__dict__.update(                   # a frozen dataclass cannot be set by assignment
            temperature=check_number("temperature", self.temperature, 0),
            top_p=check_number("top_p", self.top_p, 0, 1),
            top_k=check_whole("top_k", 0 if self.top_k is None else self.top_k),
            freq_penalty=check_number("freq_penalty", self.freq_penalty, -1e30, 1e30),      # fits float32
            max_new_tokens=check_whole("max_new_tokens", self.max_new_tokens, 1),
            seed=check_whole("seed", self.seed),
            stop=tuple(check_texts("stop", self.stop, or_one=True)))
        if "" in self.stop:
            raise ValueError("a stop string must not be empty.")


def generate(model: LM, tokenizer: Tokenizer, prompts: str | Sequence[str], n: int = 1,
             max_new_tokens: int = 40, steer: Steers = (), *, temperature: float = 1.0, top_p: float = 1.0,
             top_k: int | None = None, freq_penalty: float = 0.0, seed: int = 0,
             stop: str | Sequence[str] = (), max_batch_tokens: int = 8192, return_ids: bool = False,
             progress: Callable[[int], object] | None = None) -> list:
    """-> n continuations of one prompt, as texts without it; for a list of prompts, a list of such lists.

    The next token is drawn from softmax(logits / temperature - freq_penalty * count), where count says how
    often the token occurs in the row so far, prompt and BOS included. Only the top_k likeliest tokens can be
    drawn, and of these only the nucleus top_p, with the token that crosses it.
    steer: Steers; a coeff (B,) has one value per continuation, the n of the first prompt first
    temperature: 0 takes the likeliest token. top_k: None or 0 for no cut
    seed: continuation k of a prompt takes random numbers from seed, k and the prompt's ids alone. So steered
        and unsteered runs share them, and neither n nor other prompts change them.
    stop: one or more strings; a row ends before the first of them, at EOS, or after max_new_tokens
    max_batch_tokens: most positions, of prompts and continuations, in one batch; bounds the memory. Only
        prompts of equal length share a batch, so nothing is padded.
    return_ids: return (texts, ids), where ids are the exact tokens of each row, BOS and prompt included.
        model(ids, steer)[1] is then the residual stream that this text was written with.
    progress: called with each number of tokens done, len(prompts) * n * max_new_tokens in total
    Raises ValueError for a setting out of range, or if prompt, steer and new tokens do not fit the model.
    """
    sampling = Sampling(temperature, top_p, top_k, freq_penalty, max_new_tokens, seed, stop)
    encoded = [tokenizer.encode(prompt) for prompt in check_texts("prompts", prompts, or_one=True)]
    n, steer = check_fit(model, encoded, n, sampling, steer)

    def start(rows: list[int], max_len: int) -> Step:
        return decoder(model, tuple(s.rows(rows) for s in steer), len(rows), max_len)

    completions = complete(start, tokenizer, encoded, n, sampling, max_batch_tokens, model.device, progress)
    return as_asked(completions, prompts, n, return_ids)


def stream(model: LM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 40, steer: Steers = (), *,
           temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None, freq_penalty: float = 0.0,
           seed: int = 0, stop: str | Sequence[str] = ()) -> Iterator[str]:
    """-> generate(…)[0] in pieces, as it grows. The arguments are those of `generate`.

    Text waits while it may still be part of a stop string or of a character.
    """
    sampling = Sampling(temperature, top_p, top_k, freq_penalty, max_new_tokens, seed, stop)
    ids = tokenizer.encode(prompt)
    _, steer = check_fit(model, [ids], 1, sampling, steer)
    step = decoder(model, steer, 1, len(ids) + sampling.max_new_tokens)
    draws = torch.from_numpy(uniforms(sampling, ids, 0)[None]).to(model.device)
    tokens = sample(step, torch.tensor([ids], device=model.device), draws, sampling)
    return pieces(Completion(tokenizer, ids, sampling.stop), tokens)


def pieces(row: Completion, tokens: Iterator[list[int]]) -> Iterator[str]:
    """Add the tokens to the row and yield its text. (`stream` itself would check only at the first piece.)"""
    shown = 0
    for (token,) in tokens:
        row.add(token)
        if row.ended:
            break
        sure = len(row.text) - row.unsure
        if sure > shown:
            yield row.text[shown:sure]
            shown = sure
    if rest := row.text[shown:]:
        yield rest


def complete(start: Callable[[list[int], int], Step], tokenizer: Tokenizer, encoded: list[list[int]],
             n: int, sampling: Sampling, max_batch_tokens: int, device: torch.device,
             progress: Callable[[int], object] | None = None) -> list[Completion]:
    """n completions of each prompt in `encoded`, those of the first prompt first.

    start(rows, max_len): called with the numbers of the completions in one batch -> their step; see `sample`
    """
    completions = [Completion(tokenizer, ids, sampling.stop) for ids in encoded for _ in range(n)]
    lengths = [len(row.prompt) + sampling.max_new_tokens for row in completions]
    for numbers in batches(lengths, max_batch_tokens, equal=True):
        rows = [completions[i] for i in numbers]
        ids = torch.tensor([row.prompt for row in rows], device=device)
        draws = np.stack([uniforms(sampling, completions[i].prompt, i % n) for i in numbers])
        step = start(numbers, lengths[numbers[0]])
        for t, tokens in enumerate(sample(step, ids, torch.from_numpy(draws).to(device), sampling)):
            for row, token in zip(rows, tokens, strict=True):
                row.add(token)
            ended = all(row.ended for row in rows)
            if progress:        # tokens that need not be drawn any more count as done
                progress(len(rows) * (sampling.max_new_tokens - t if ended else 1))
            if ended:
                break
    return completions


@torch.no_grad()
def sample(step: Step, ids: Tensor, draws: Tensor, sampling: Sampling) -> Iterator[list[int]]:
    """THE sampling loop: max_new_tokens times, yield the next token of every row, a list of B ids.

    step: called with the prompts ids (B, T), then with each new token (B, 1)
    draws (B, max_new_tokens): `uniforms` of each row
    The first draw uses the logits of the last prompt position, so a Steer there changes the first new token.
    """
    candidates, logits = 64, step(ids)
    for t in range(sampling.max_new_tokens):
        new = sample_token(logits, ids, draws[:, t], sampling, candidates)
        tokens = new.tolist()                       # a wait for the device
        while TOO_FEW in tokens:                    # a flat distribution: consider more tokens from here on
            candidates *= 16
            new = sample_token(logits, ids, draws[:, t], sampling, candidates)
            tokens = new.tolist()
        if NOT_FINITE in tokens:
            raise ValueError("the logits are not finite any more. Lower the coeff, or a baseline's strength, "
                             "or load the model in float32 or bfloat16.")
        yield tokens
        if t + 1 < sampling.max_new_tokens:
            ids = torch.cat([ids, new[:, None]], dim=1)
            logits = step(new[:, None])


def decoder(model: LM, steer: tuple[Steer, ...], batch: int, max_len: int) -> Step:
    """The step of activation addition: the steered model, which reads each token once, into a cache.

    Rows that are equal so far are read as one. With a low top_p, many are at first.
    """
    cache = None
    # What tells rows apart: at first their coefficients, after a step their rows in the cache.
    coeffs = [s.coeff.tolist() for s in steer if isinstance(s.coeff, Tensor)]
    place = list(zip(*coeffs, strict=True)) or [()] * batch

    def step(ids: Tensor) -> Tensor:
        nonlocal cache, place
        if cache and cache.batch == batch:          # all rows differ, and will never be equal again
            return decode_step(model, ids, steer, cache)
        rows = list(zip(place, map(tuple, ids.tolist()), strict=True))
        first = {}                                  # different row -> its first number in the batch
        for i, row in enumerate(rows):
            first.setdefault(row, i)
        chosen = list(first.values())
        here = tuple(s.rows(chosen) for s in steer)
        if cache is None:
            cache = KVCache(max_len, len(chosen))
            logits = prefill(model, ids[chosen], here, cache)
        else:
            if len(chosen) > cache.batch:
                cache.part(torch.tensor([place[i] for i in chosen], device=ids.device))
            logits = decode_step(model, ids[chosen], here, cache)
        number = {row: i for i, row in enumerate(first)}
        place = [number[row] for row in rows]
        return logits[place]
    return step


def prefill(model: LM, ids: Tensor, steer: tuple[Steer, ...], cache: KVCache) -> Tensor:
    """Read the prompts ids (B, T) -> logits (B, n_vocab). What all rows begin with is read only once."""
    B, T = ids.shape
    shared = int((ids == ids[0]).all(dim=0).cumprod(dim=0).sum())
    if 2 * shared < T or any(isinstance(s.coeff, Tensor) for s in steer):
        shared = 0
    if shared:
        logits, _ = model(ids[:1, :shared], steer, cache, last_only=True)
    if shared < T:
        logits, _ = model(ids[:, shared:], steer, cache, last_only=True)
    return logits[:, -1].expand(B, -1)


def decode_step(model: LM, ids: Tensor, steer: tuple[Steer, ...], cache: KVCache) -> Tensor:
    """Read one more token of every row, ids (B, 1) -> logits (B, n_vocab)."""
    return model.read(ids, steer, cache, last_only=True)[0][:, -1]


def uniforms(sampling: Sampling, ids: Sequence[int], k: int) -> np.ndarray:
    """The max_new_tokens numbers in [0, 1) with which continuation k of the prompt `ids` draws, float32."""
    generator = np.random.default_rng([sampling.seed, zlib.crc32(np.array(ids, dtype="<i8").tobytes()), k])
    # Trap: as a float32, 0.99999999 rounds to 1, which draws no token. Cut to 24 bits, it stays below 1.
    return (np.floor(generator.random(sampling.max_new_tokens) * 2**24) / 2**24).astype(np.float32)


def sample_token(logits: Tensor, ids: Tensor, u: Tensor, sampling: Sampling, candidates: int = 64) -> Tensor:
    """logits (B, n_vocab) after ids (B, T) -> the next ids (B,), without waiting for the device.

    u (B,): a uniform number in [0, 1) for each row
    candidates: how many of the likeliest tokens are considered for top_p
    A row gives NOT_FINITE if its logits are not finite, TOO_FEW if its candidates do not reach top_p.
    """
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        # Relative to the highest, which stays 0 when a tiny temperature sends the others to -inf.
        logits = (logits - logits.max(dim=-1, keepdim=True).values) / max(sampling.temperature, 1e-30)
    if sampling.freq_penalty:
        # Each token of the row lowers its own logit by one penalty: in total, penalty * count.
        penalty = torch.full(ids.shape, -sampling.freq_penalty, device=ids.device)
        logits = logits.scatter_add(1, ids, penalty)
    if sampling.temperature == 0:
        total, new = logits.max(dim=-1)
    else:
        p, tokens, enough = nucleus(logits, sampling.top_p, sampling.top_k, candidates)
        reached = p.cumsum(dim=-1)
        total = reached[:, -1]                  # NaN if a logit is NaN or inf
        i = torch.searchsorted(reached, u[:, None] * total[:, None], right=True)    # the first past u
        new = tokens.gather(1, i.clamp(max=p.shape[1] - 1))[:, 0].where(enough, TOO_FEW)
    return new.where(total.isfinite(), NOT_FINITE)


def nucleus(logits: Tensor, top_p: float, top_k: int | None = None,
            candidates: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """-> p (B, k), ids (B, k), enough (B,): the likeliest tokens, their probabilities, 0 for those cut.

    A token is kept if the likelier ones sum to top_p or less, so the one that crosses it stays (Holtzman et
    al. 2020). p is not renormalised. Sorting the vocabulary would take twenty times as long as finding its
    likeliest `candidates`, which nearly always reach top_p; `enough` says where they do.
    """
    B, n_vocab = logits.shape
    everything = torch.ones(B, dtype=torch.bool, device=logits.device)
    if top_p == 1 and not top_k:
        return logits.softmax(dim=-1), torch.arange(n_vocab, device=logits.device).expand(B, -1), everything
    k = min(top_k or candidates, n_vocab)
    top, ids = logits.topk(k)
    p = (top - (top if top_k else logits).logsumexp(dim=-1, keepdim=True)).exp()
    before = p.cumsum(dim=-1) - p
    enough = everything if top_k or k == n_vocab else before[:, -1] > top_p
    return p * (before <= top_p), ids, enough


class Completion:
    """One continuation as it grows: its tokens, its text, and whether it has ended."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str] = ()):
        self.tokenizer, self.prompt, self.stop = tokenizer, prompt, stop
        self.before = len(tokenizer.decode(prompt))
        self.new, self.ended = [], False

    def add(self, token: int) -> None:
        self.ended = self.ended or token in self.tokenizer.eos_ids
        if not self.ended:
            self.new.append(token)
            self.ended = bool(self.stop) and len(self.text) < len(self.whole)

    @property
    def whole(self) -> str:
        # Trap: SentencePiece drops the first leading space that it decodes, so the prompt is decoded too.
        return self.tokenizer.decode(self.prompt + self.new)[self.before:]

    @property
    def text(self) -> str:
        whole = self.whole
        ends = [whole.index(stop) for stop in self.stop if stop in whole]
        return whole[:min(ends, default=None)]

    @property
    def unsure(self) -> int:
        """How many characters at the end may still change: part of a stop string or of a character."""
        text = self.text
        # Trap: part of a character may become the next character of a stop string that has already begun.
        sure = text.rstrip("\N{REPLACEMENT CHARACTER}")
        begun = [size for stop in self.stop for size in range(1, min(len(stop), len(sure) + 1))
                 if sure.endswith(stop[:size])]
        return len(text) - len(sure) + max(begun, default=0)


def as_asked(completions: list[Completion], prompts: str | Sequence[str], n: int, return_ids: bool = False):
    """The texts, or (texts, ids), in the form that `generate` returns."""
    def nested(values):
        by_prompt = [values[i:i + n] for i in range(0, len(values), n)]
        return by_prompt[0] if isinstance(prompts, str) else by_prompt
    texts = nested([row.text for row in completions])
    return (texts, nested([row.prompt + row.new for row in completions])) if return_ids else texts


def check_fit(model: LM, encoded: list[list[int]], n: int, sampling: Sampling,
              steer: Steers) -> tuple[int, tuple[Steer, ...]]:
    """n, and the Steers as a tuple, if the model can continue each prompt n times. Raises ValueError."""
    n = check_whole("n", n, 1, max(1, MOST // max(1, len(encoded))))
    for ids in encoded:
        if len(ids) + sampling.max_new_tokens > model.config.n_ctx:
            raise ValueError(f"prompt and new tokens, {len(ids)} + {sampling.max_new_tokens}, do not fit "
                             f"this model's context of {model.config.n_ctx}.")
        steer = model.check_steer(steer, n * len(encoded), len(ids))
    return n, steer

"""What steering changes, in numbers: the measurements of the paper's section 4.

Read first: generation.py. Read next: stats.py, judges.py. Turner et al., sections 4.1 to 4.5.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.tokenizer import Tokenizer
from ..model import LM
from ..steering import Steers, steering_vectors
from ..utils import batches, check_list, check_texts, check_whole, short
from .stats import numbers


@torch.no_grad()
def logprobs(model: LM, tokenizer: Tokenizer, texts: Sequence[str], steer: Steers = (), skip: int = 0,
             max_batch_tokens: int = 1024, prompts: str | Sequence[str] = "") -> list[Tensor]:
    """log p(token | BOS and the tokens before it), in nats, of every token -> a float32 tensor for each text.

    steer: Steers with one coeff; each must fit the shortest text
    skip: leave out the first `skip` predictions of each text. With a vector at the front take its `stop`, for
        the steered and the unsteered model alike: the vector changes the first positions of the text itself,
        which never happens in generation, where they belong to the prompt.
    max_batch_tokens: how many positions run at once; memory grows with it, not with the number of texts
    prompts: one for all texts, or a list with one for each. It is read between BOS and the text and encoded
        by itself (so " weddings" stays one token); predictions of the prompt's own tokens are left out.
    Raises ValueError for texts, prompts or Steers that do not fit, and for a text with no prediction left.
    """
    texts, skip = check_texts("texts", texts), check_whole("skip", skip)
    encoded, first = [], []                 # first[i]: the first prediction of text i that counts
    for prompt, text in zip(_one_for_each(prompts, texts, "texts"), texts, strict=True):
        head = tokenizer.encode(prompt)
        # With no prompt the text itself comes after BOS, and a BOS that it begins with is not doubled.
        ids = head + tokenizer.encode(text, bos=False) if len(head) > 1 else tokenizer.encode(text)
        if len(ids) <= len(head) + skip:
            raise ValueError(f"no prediction is left of {text[:40]!r} after skipping {skip}.")
        steer = model.check_steer(steer, 1, len(ids))
        encoded.append(ids)
        first.append(len(head) - 1 + skip)
    result = [None] * len(encoded)
    for group, ids in _padded_batches(model, tokenizer, encoded, max_batch_tokens):
        for i, row in zip(group, next_logprobs(model, ids, steer), strict=True):
            result[i] = row[first[i]:len(encoded[i]) - 1].clone()
    return result


@torch.no_grad()
def next_logprobs(model: LM, ids: Tensor, steer: Steers = (), chunk: int = 128) -> Tensor:
    """log p(ids[:, t + 1] | ids[:, :t + 1]), in nats: ids (B, T) -> (B, T - 1), float32.

    chunk: logits are computed for so many positions at a time, so (B, T, n_vocab) is never held
    """
    x = model.residuals(ids, steer)[-1][:, :-1].flatten(0, 1)         # (B * (T - 1), d_model)
    losses = []
    for rows, targets in zip(x.split(chunk), ids[:, 1:].flatten().split(chunk), strict=True):
        # 16 rows at a time: they fit in the processor's cache, and each group reuses the memory of the last.
        for logits, some in zip(model.unembed(rows).split(16), targets.split(16), strict=True):
            losses.append(F.cross_entropy(logits.float(), some, reduction="none"))
    return -_finite(torch.cat(losses)).view(len(ids), ids.shape[1] - 1)


def perplexity_ratio(plain: Sequence[Tensor], steered: Sequence[Tensor], mean_of: str = "tokens") -> float:
    """exp(-mean(log p_steered - log p_plain)): below 1 where steering makes the texts likelier.

    plain, steered: what `logprobs` gave for the same texts
    mean_of: "tokens" counts every token alike, as the paper's code does; "texts" averages within each text
        first, as the paper says
    """
    if mean_of not in ("tokens", "texts"):
        raise ValueError(f"mean_of {mean_of!r}; possible: 'tokens', 'texts'.")
    differences = [s - p for p, s in zip(*_same_texts(plain, steered), strict=True)]
    means = torch.cat(differences) if mean_of == "tokens" else torch.stack([d.mean() for d in differences])
    exponent = -means.mean().item()
    return math.exp(exponent) if exponent < 709 else math.inf       # e^710 is more than a float holds


def token_shifts(ids: Sequence[Sequence[int] | Tensor], plain: Sequence[Tensor],
                 steered: Sequence[Tensor], more_than: int = 20) -> dict[int, tuple[int, float, float]]:
    """{token: (n, mean of log p_steered - log p_plain, mean of log p_plain)}, in nats.

    Only for tokens that occur more than `more_than` times. Turner et al., section 4.1 (token-level effect).
    ids, plain, steered: for each text, the tokens predicted and their log-probabilities under both models
    """
    check_whole("more_than", more_than)
    ids, plain, steered = (torch.cat(rows) for rows in _same_texts(ids, plain, steered))
    tokens, place, n = ids.unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(tokens), dtype=torch.float64)
    shift = zeros.index_add(0, place, steered - plain) / n
    before = zeros.index_add(0, place, plain) / n
    rows = zip(tokens.long().tolist(), n.tolist(), shift.tolist(), before.tolist(), strict=True)
    return {token: (count, s, b) for token, count, s, b in rows if count > more_than}


@torch.no_grad()
def ranks(model: LM, tokenizer: Tokenizer, prompts: str | Sequence[str], answers: Sequence[str],
          steer: Steers = (), max_batch_tokens: int = 1024) -> list[int | None]:
    """How many tokens are likelier than the answer after each prompt: 0 for the likeliest, None for no rank.

    Prompt and answer are encoded together; the last token is the answer, the others are the prompt, so the
    space before the answer belongs to it. None: the answer is more than one token, or only BOS stands before
    it. Petroni et al. 2019 (LAMA) for causal models, as in the paper's section 4.5.
    """
    answers = check_texts("answers", answers)
    prompts = _one_for_each(prompts, answers, "answers")
    encoded, numbers = [], []               # of the rows that have a rank
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = tokenizer.encode(prompt + answer)
        if len(ids) > 2 and answer in tokenizer.pieces(ids[-1:])[0]:
            steer = model.check_steer(steer, 1, len(ids))   # for each row alone, whatever batch it is in
            encoded.append(ids)
            numbers.append(i)
    result = [None] * len(answers)
    for group, ids in _padded_batches(model, tokenizer, encoded, max_batch_tokens):
        x = model.residuals(ids, steer)[-1]
        x = x[range(len(group)), [len(encoded[i]) - 2 for i in group]]      # (B, d_model), before each answer
        logits = _finite(model.unembed(x[:, None])[:, 0].float())
        answer = torch.tensor([[encoded[i][-1]] for i in group], device=ids.device)
        likelier = (logits > logits.gather(1, answer)).sum(dim=1)
        for i, rank in zip(group, likelier.tolist(), strict=True):
            result[numbers[i]] = rank
    return result


def precision_at(ranks: Sequence[int | None], ks: Sequence[int]) -> list[float]:
    """P@K, the share of ranks below K, for each K of `ks`. Rows without a rank (None) do not count."""
    ks = [check_whole("K", k, 1) for k in check_list("ks", ks)]
    known = [check_whole("a rank", rank) for rank in check_list("ranks", ranks) if rank is not None]
    if not known:
        raise ValueError("no row has a rank; is every answer more than one token?")
    return [sum(rank < k for rank in known) / len(known) for k in ks]


def disfluency(model: LM, tokenizer: Tokenizer, prompts: str | Sequence[str],
               continuations: Sequence[str]) -> list[tuple[float, int]]:
    """(-sum log p, tokens) of each continuation after its prompt, in nats, without its first token.

    exp(sum of the first / sum of the second) is the perplexity that the paper's tables call disfluency: under
    `model`, unsteered, whatever wrote the text. A continuation of one token or none gives (0.0, 0).
    Dekoninck et al. 2024, compute_perplexities.
    prompts: one for all continuations, or a list with one for each
    """
    continuations = check_texts("continuations", continuations)
    prompts = _one_for_each(prompts, continuations, "continuations")
    result = [(0.0, 0)] * len(continuations)
    scorable = [i for i, text in enumerate(continuations) if len(tokenizer.encode(text, bos=False)) > 1]
    scores = logprobs(model, tokenizer, [continuations[i] for i in scorable], skip=1,
                      prompts=[prompts[i] for i in scorable])
    for i, row in zip(scorable, scores, strict=True):
        result[i] = (-row.cpu().double().sum().item(), len(row))
    return result


@torch.no_grad()
def sweep(model: LM, tokenizer: Tokenizer, prompt: str, plus: str, minus: str, layers: Sequence[int],
          coeffs: Sequence[float]) -> Tensor:
    """The next-token logits after `prompt`, by layer and coefficient: (len(layers), len(coeffs), n_vocab).

    One pass for all: row 0 of the batch stays unsteered, and before each swept block the batch grows by one
    row for each coefficient. So no block runs for a row that does not differ yet; no weight is read twice.
    layers: block numbers, each once, in any order. coeffs: numbers
    Raises ValueError for whatever `steering_vectors` or the prompt refuses.
    """
    layers, coeffs = check_list("layers", layers), torch.from_numpy(numbers(coeffs)).float()
    for layer in layers:
        model.check_layer(layer)
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"a sweep takes one or more layers, each once; given: {layers}.")
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    steers = model.check(ids, steering_vectors(model, tokenizer, plus, minus, sorted(layers)), None)
    pos = torch.arange(ids.shape[1], device=ids.device)
    x, swept, layer = model.embed(ids, pos), [], 0
    for s in steers:
        x = model.run(x, pos, swept, first_layer=layer, stop_layer=s.layer)[-1]
        old, layer = len(x), s.layer
        x = torch.cat([x, x[:1].expand(len(coeffs), -1, -1)])       # the loop will steer them
        swept = [s.scaled(torch.cat([torch.zeros(old), coeffs]))]
    x = model.run(x, pos, swept, first_layer=layer)[-1]
    logits = _finite(model.unembed(x[1:, -1:]))[:, 0].unflatten(0, (len(layers), len(coeffs)))
    return logits[[sorted(layers).index(l) for l in layers]]


def _finite(logits: Tensor) -> Tensor:
    # Trap: NaN is not larger than anything, so a rank among logits that are NaN would be the best, 0.
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite any more. Lower the coeff, "
                         "or load the model in float32 or bfloat16.")
    return logits


def _one_for_each(prompts: str | Sequence[str], texts: Sequence[str], what: str) -> Sequence[str]:
    prompts = [prompts] * len(texts) if isinstance(prompts, str) else check_texts("prompts", prompts)
    if len(prompts) != len(texts):
        raise ValueError(f"{len(prompts)} prompts do not fit {len(texts)} {what}. "
                         "Give one prompt for each, or a single one as text.")
    return prompts


def _same_texts(*lists: Sequence[Sequence[float] | Tensor]) -> list[list[Tensor]]:
    """Each list's rows in float64, if all have one or more rows, as long in one list as in the other."""
    lists = [[torch.from_numpy(numbers(row.tolist() if isinstance(row, Tensor) else row))
              for row in check_list("tokens and log-probabilities", rows)] for rows in lists]
    lengths = [[len(row) for row in rows] for rows in lists]
    if not lengths[0] or any(given != lengths[0] for given in lengths):
        raise ValueError("the lists must be of the same texts, one or more, and of the same tokens; "
                         f"given: rows of {' and '.join(map(short, lengths))} numbers.")
    return lists


def _padded_batches(model: LM, tokenizer: Tokenizer, encoded: list[list[int]],
                    max_batch_tokens: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (numbers of texts, their ids (B, T)), about `max_batch_tokens` positions each, the longest first.

    Shorter texts are padded behind their end; attention is causal, so their own positions do not see it.
    """
    for group in batches([len(ids) for ids in encoded], max_batch_tokens):
        length = len(encoded[group[0]])
        rows = [encoded[i] + [tokenizer.bos_id] * (length - len(encoded[i])) for i in group]
        yield group, torch.tensor(rows, device=model.device)

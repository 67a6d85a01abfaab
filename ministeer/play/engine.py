"""What the page shows, as functions of a setting; the server only passes it on.

Read first: generation.py, evaluation/measure.py. Read next: server.py.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..evaluation.judges import count_words
from ..evaluation.stats import wilson
from ..evaluation.steerability import strength_in
from ..generation import Completion, Sampling, check_fit, decoder, sample, uniforms
from ..steering import Steer, pad_together, random_like, sink_share, steering_vectors
from ..utils import check_number, check_texts, check_whole

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM

COLUMNS = ("unsteered", "steered", "random")
CONTROLS = 5                        # random vectors, seeds 0 … 4
COEFFS = (-4, -2, -1, 1, 2, 4)      # of `scan`, beside the setting's own
SAMPLED = ("max_new_tokens", "temperature", "top_p", "freq_penalty", "seed")
# Limits on what one person may ask of a server that a classroom shares.
MOST_CHARACTERS, MOST_TOKENS, MOST_NEW, MOST_N = 2000, 64, 100, 50
BATCH = 30                          # completions that grow together
PRESETS = {
    "weddings": {"prompt": "I went up to my friend and said", "plus": " weddings", "minus": " ",
                 "layer": 1, "coeff": 1.0, "where": "front", "target": " wedding",
                 "words": "bride groom honeymoon marriage married marry wed wedding weddings"},
    "love - hate": {"prompt": "I hate you because", "plus": " love", "minus": " hate",
                    "layer": 2, "coeff": 2.0, "where": 2, "target": " love",        # at " hate"; tutorial 09
                    "words": "love loved loves loving lovely kind beautiful"},
    "anger - calm": {"prompt": "I think you are", "plus": " anger", "minus": " calm",
                     "layer": 2, "coeff": 2.0, "where": "front", "target": " angry",
                     "words": "anger angry mad rage furious hate fight"},
}


class Refused(ValueError):
    """Bad input, and the name of the field that holds it."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@contextlib.contextmanager
def field(name: str) -> Iterator[None]:
    """Turn a ValueError of the block into a Refused that names the field."""
    try:
        yield
    except Refused:
        raise
    except ValueError as error:
        raise Refused(name, str(error)) from None


@dataclass(frozen=True)
class Setting:
    """What the fields of the page hold, as far as the model needs it.

    where: "front", "middle" or "back" of the prompt, the number of the first steered position, or "every".
        "every" adds the mean of the vector's rows at each position after BOS, those of new tokens included.
    """
    prompt: str
    plus: str
    minus: str
    layer: int
    coeff: float
    where: str | int = "front"


def read(model: LM, tokenizer: Tokenizer, given: dict) -> Setting:
    """The Setting in a dict that came from outside. Raises Refused for whatever does not fit this model."""
    for name in ("prompt", "plus", "minus"):
        with field(name):
            check_size(name, tokenizer, given.get(name))
    with field("layer"):
        model.check_layer(given.get("layer"))
    with field("coeff"):
        coeff = check_number("coeff", given.get("coeff"), -1000, 1000)
    where = given.get("where", "front")
    if where != "every" and not isinstance(where, str):
        with field("where"):
            where = check_whole("where", where, 0, MOST_TOKENS)
    setting = Setting(given["prompt"], given["plus"], given["minus"], given["layer"], coeff, where)
    addition(model, tokenizer, setting)
    return setting


def check_size(name: str, tokenizer: Tokenizer, text: object) -> None:
    """Raises ValueError unless `text` is a text that a shared server can afford to read."""
    (text,) = check_texts(name, [text])
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name} has {len(text)} characters; this page reads at most {MOST_CHARACTERS}.")
    if (tokens := len(tokenizer.encode(text))) > MOST_TOKENS:
        raise ValueError(f"{name} has {tokens} tokens; this page reads at most {MOST_TOKENS}.")


def read_sampling(given: dict) -> tuple[int, Sampling]:
    """n and the Sampling in a dict that came from outside. Raises Refused."""
    with field("n"):
        n = check_whole("n", given.get("n"), 1, MOST_N)
    with field("max_new_tokens"):
        check_whole("max_new_tokens", given.get("max_new_tokens"), 1, MOST_NEW)
    for name in SAMPLED:
        with field(name):
            Sampling(**{name: given.get(name)})
    return n, Sampling(**{name: given[name] for name in SAMPLED})


@functools.lru_cache(maxsize=32)
def vectors(model: LM, tokenizer: Tokenizer, plus: str, minus: str) -> list[Steer]:
    """The steering vector before every block, from one pass."""
    return steering_vectors(model, tokenizer, plus, minus, range(model.config.n_layer))


@functools.lru_cache(maxsize=32)
def unsteered(model: LM, tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The residual stream of a prompt -> (n_layer + 1, T, d_model)"""
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    with torch.no_grad():
        return torch.cat(model.residuals(ids))


def addition(model: LM, tokenizer: Tokenizer, setting: Setting) -> Steer:
    """The Steer of a setting. Raises Refused if it does not fit the prompt."""
    with field("plus"):
        steer = vectors(model, tokenizer, setting.plus, setting.minus)[setting.layer].scaled(setting.coeff)
    n_prompt = len(tokenizer.encode(setting.prompt))
    with field("prompt"):
        if setting.where == "every":
            steer = replace(steer, vector=steer.vector.mean(dim=0))
        elif isinstance(setting.where, int):
            steer = replace(steer, start=setting.where)
        else:
            steer = steer.align(setting.where, n_prompt)
        model.check_steer(steer, 1, n_prompt)
    return steer


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def streams(model: LM, tokenizer: Tokenizer, setting: Setting, controls: int) -> Tensor:
    """The residual streams of the prompt unsteered, steered, and with each of so many random vectors.

    -> (n_layer + 1, 2 + controls, T, d_model), from one batched pass over the blocks from `layer` on: below
    it, all rows are the recorded stream of the unsteered prompt.
    """
    before = unsteered(model, tokenizer, setting.prompt)
    steer = addition(model, tokenizer, setting)
    after = run_each(model, before, [steer, *(random_like(steer, seed) for seed in range(controls))])
    below = before[:setting.layer, None].expand(-1, after.shape[1], -1, -1)
    return torch.cat([below, after]).float()


def run_each(model: LM, before: Tensor, steers: list[Steer]) -> Tensor:
    """Row 0 unsteered, then one row for each Steer. All Steers have one layer; the pass begins there.

    before: the unsteered stream (n_layer + 1, T, d_model)
    -> (n_layer + 1 - layer, 1 + len(steers), T, d_model)
    """
    layer, batch = steers[0].layer, 1 + len(steers)
    alone = [s.scaled(s.coeff * torch.eye(batch)[i]) for i, s in enumerate(steers, 1)]   # each in its own row
    pos = torch.arange(before.shape[1], device=before.device)
    x = before[layer].expand(batch, -1, -1)
    return torch.stack(model.run(x, pos, alone, first_layer=layer))


def next_logp(model: LM, x: Tensor) -> Tensor:
    """What the final norm reads (B, T, d_model) -> log p of the next token (B, n_vocab). Raises Refused."""
    logits = model.unembed(x[:, -1:])[:, 0].float()
    if not logits.isfinite().all():
        raise Refused("coeff", "the logits are not finite any more. Lower the coeff.")
    return logits.log_softmax(dim=-1)


@torch.no_grad()
def look(model: LM, tokenizer: Tokenizer, setting: Setting, controls: object = CONTROLS,
         shown: int = 10) -> dict:
    """What the page shows of a setting before any text is sampled.

    controls: how many random vectors, seeds from 0 on; one is quicker than all five

    tokens, plus, minus: pieces of the prompt and of both sides of the pair; padded: spaces added to each side
    steered: the steered positions of the prompt
    change: |resid steered - resid| / |resid| (n_layer + 1, T); at `layer` this is the relative norm
    random: the same for each random vector
    norms: |resid|, unsteered (n_layer + 1, T)
    next: the `shown` tokens likeliest unsteered or steered, and log p of each: unsteered, steered, random …
    strength: |addition| in mean norms of the layer, BOS left out; None if only BOS is steered
    sink: the share of the vector's squared norm in four dimensions; near 1, little is about the pair
    Raises Refused if the logits are not finite.
    """
    with field("control"):
        check_whole("controls", controls, 1, CONTROLS)
    steer = addition(model, tokenizer, setting)
    resid = streams(model, tokenizer, setting, controls)
    norms = resid.norm(dim=-1)
    change = (resid[:, 1:] - resid[:, :1]).norm(dim=-1) / norms[:, :1]
    logp = next_logp(model, resid[-1].to(steer.vector))
    likeliest = logp[:2].max(dim=0).values.topk(shown).indices
    pieces = tokenizer.pieces(likeliest.tolist())
    ids, pair = tokenizer.encode(setting.prompt), pad_together(tokenizer, setting.plus, setting.minus)
    sides = [len(tokenizer.encode(text)) for text in (setting.plus, setting.minus)]
    stop = len(ids) if steer.stop is None else steer.stop
    return {
        "tokens": tokenizer.pieces(ids),
        "plus": tokenizer.pieces(pair[0]), "minus": tokenizer.pieces(pair[1]),
        "padded": [len(pair[0]) - side for side in sides], "steered": list(range(steer.start, stop)),
        "layer": setting.layer, "change": rounded(change[:, 0]), "norms": rounded(norms[:, 0]),
        "random": [rounded(change[:, i]) for i in range(1, 1 + controls)],
        "next": [[piece, rounded(logp[:, i])] for piece, i in zip(pieces, likeliest.tolist(), strict=True)],
        "strength": rounded(strength_in([resid[setting.layer, 0]], steer)) if stop > 1 else None,
        "sink": sink_share(steer.vector),
    }


@torch.no_grad()
def lens(model: LM, tokenizer: Tokenizer, setting: Setting, layer: int, position: int) -> dict:
    """The logit lens at one place: the five likeliest tokens there and their p, unsteered and steered."""
    resid = streams(model, tokenizer, setting, 1)
    check_whole("the layer of the lens", layer, 0, len(resid) - 1)
    check_whole("the position of the lens", position, 0, resid.shape[2] - 1)
    p, ids = model.unembed(resid[layer, :2, position]).float().softmax(dim=-1).topk(5)
    return {name: list(zip(tokenizer.pieces(i), rounded(row), strict=True))
            for name, i, row in zip(COLUMNS, ids.tolist(), p, strict=False)}


@torch.no_grad()
def lens_map(model: LM, tokenizer: Tokenizer, setting: Setting) -> list[list[str]]:
    """The logit lens's likeliest token at every place of the steered stream, (n_layer + 1, T) pieces."""
    resid = streams(model, tokenizer, setting, 1)[:, 1]
    return [tokenizer.pieces(model.unembed(x[None])[0].argmax(dim=-1).tolist()) for x in resid]


def completions(model: LM, tokenizer: Tokenizer, setting: Setting, n: int,
                sampling: Sampling) -> Iterator[list[tuple[str, int, str, bool]]]:
    """n completions unsteered, n steered and n with random vectors -> what each step adds to them.

    A step is a list of (column, number, text, whether it has ended). Joined, the texts are those of
    `generate` with the same settings. Five random vectors, seeds 0 … 4, share n: completion i of that column
    has the vector of seed i % 5, and is number i // 5 of those that `generate` makes with it.
    """
    steer = addition(model, tokenizer, setting)
    ids = tokenizer.encode(setting.prompt)
    with field("max_new_tokens"):
        check_fit(model, [ids], n, sampling, steer)
    steers = [steer, *(random_like(steer, seed) for seed in range(CONTROLS))]
    # column, number in the column, number among the draws, number of its Steer (none: -1)
    rows = [row for i in range(n) for row in (
        ("unsteered", i, i, -1), ("steered", i, i, 0), ("random", i, i // CONTROLS, 1 + i % CONTROLS))]
    for start in range(0, len(rows), BATCH):
        batch = rows[start:start + BATCH]
        coeffs = [torch.tensor([s.coeff * (number == row[3]) for row in batch])
                  for number, s in enumerate(steers)]
        added = tuple(s.scaled(coeff) for s, coeff in zip(steers, coeffs, strict=True))
        step = decoder(model, added, len(batch), len(ids) + sampling.max_new_tokens)
        draws = torch.from_numpy(np.stack([uniforms(sampling, ids, row[2]) for row in batch]))
        prompts = torch.tensor([ids] * len(batch), device=model.device)
        texts = [Completion(tokenizer, ids) for _ in batch]
        shown = [0] * len(batch)
        for t, tokens in enumerate(sample(step, prompts, draws.to(model.device), sampling), 1):
            news = []
            for i, (text, token) in enumerate(zip(texts, tokens, strict=True)):
                if text.ended:
                    continue
                text.add(token)
                ended = text.ended or t == sampling.max_new_tokens
                whole = text.text
                sure = len(whole) if ended else len(whole) - text.unsure
                news.append((*batch[i][:2], whole[shown[i]:sure], ended))
                shown[i] = max(shown[i], sure)
            yield news
            if all(text.ended for text in texts):
                break


@torch.no_grad()
def scan(model: LM, tokenizer: Tokenizer, setting: Setting, target: object) -> Iterator[dict]:
    """How steering changes log p of a target token after the prompt, by coefficient, one layer at a time.

    target: a text whose first token is the target
    Yields first {target: its piece, n_layer, coeffs, coeff: the setting's, unsteered: log p}, then for each
    layer {steered: the change in nats at each of the coeffs, random: the change with each of five random
    vectors of the setting's coeff}.
    """
    with field("target"):
        check_size("target", tokenizer, target)
        ids = tokenizer.encode(target, bos=False)[:1]
        if not ids:
            raise ValueError("target must be a word, with its leading space; given: an empty text.")
    before = unsteered(model, tokenizer, setting.prompt)
    plain = next_logp(model, before[-1:])[0, ids[0]]
    coeffs, n_layer = sorted({*COEFFS, setting.coeff}), model.config.n_layer
    yield {"target": tokenizer.pieces(ids)[0], "n_layer": n_layer, "coeffs": coeffs, "coeff": setting.coeff,
           "unsteered": plain.item()}
    for layer in range(n_layer):
        steers = [addition(model, tokenizer, replace(setting, layer=layer, coeff=c)) for c in coeffs]
        own = steers[coeffs.index(setting.coeff)]
        steers += [random_like(own, seed) for seed in range(CONTROLS)]
        change = next_logp(model, run_each(model, before, steers)[-1])[1:, ids[0]] - plain
        yield {"steered": rounded(change[:len(coeffs)]), "random": rounded(change[len(coeffs):])}


def count(columns: object, words: object) -> dict:
    """{column: texts} -> {column: [texts with one of the words, number of texts, 95 % interval, which]}"""
    if not isinstance(columns, dict) or not isinstance(words, str):
        raise Refused("words", "give the texts of each column, and the words as one text.")
    wanted, counts = set(words.lower().split()), {}
    for name in COLUMNS:
        with field("words"):
            texts = check_texts(name, columns.get(name, []))
        hits = [count_words(text, wanted) > 0 for text in texts]
        interval = wilson(sum(hits), len(hits)) if hits else (0.0, 1.0)
        counts[name] = [sum(hits), len(hits), *interval, hits]
    return counts


def as_python(name: str, s: Setting, n: int, sampling: Sampling) -> str:
    """The lines of Python that repeat a setting."""
    pair = f"{s.plus!r}, {s.minus!r}, layer={s.layer}"
    lines = ["import ministeer", f"model, tokenizer = ministeer.load({name!r})",
             f"vector = ministeer.steering_vector(model, tokenizer, {pair})"]
    if s.where == "every":
        lines.append(f"vector = ministeer.Steer({s.layer}, vector.vector.mean(dim=0))")
    elif isinstance(s.where, int):
        lines.append(f"vector = ministeer.Steer({s.layer}, vector.vector, start={s.where})")
    elif s.where != "front":
        lines.append(f"vector = vector.align({s.where!r}, len(tokenizer.encode({s.prompt!r})))")
    options = ", ".join(f"{option}={getattr(sampling, option)}" for option in SAMPLED)
    lines += [f"steer = {s.coeff} * vector",
              f"texts = ministeer.generate(model, tokenizer, {s.prompt!r}, {n}, steer=steer,",
              f"                           {options})"]
    return "\n".join(lines)


def as_command(name: str, s: Setting, n: int, sampling: Sampling) -> str:
    """The `ministeer steer` command of a setting; if it is not at the front, with the saved vector."""
    vector = [f"--plus={s.plus}", f"--minus={s.minus}", f"--layer={s.layer}"]
    if s.where != "front":
        vector = ["--vector=vector.safetensors"]
    options = [f"--{option.replace('_', '-')}={getattr(sampling, option)}" for option in SAMPLED]
    return shlex.join(["ministeer", "steer", *vector, f"--coeff={s.coeff}", f"--model={name}", f"-n={n}",
                       *options, "--", s.prompt])


def as_file(steer: Steer) -> bytes:
    """What `Steer.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.safetensors"
        steer.save(path)
        return path.read_bytes()


def rounded(x: Tensor | list | float) -> list | float:
    """A tensor as nested lists of numbers with four digits, which is all that a picture shows."""
    x = x.tolist() if isinstance(x, Tensor) else x
    return [rounded(row) for row in x] if isinstance(x, list) else float(f"{x:.4g}")

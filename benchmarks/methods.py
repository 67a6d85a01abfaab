"""One wish, tried with each method of ministeer/methods/ and ActAdd; how each prompt responds to a vector.

Read first: lab.py; paper.py runs these. Tutorial 14 shows a small version.
"""

import functools
import math
import statistics
import time
from typing import NamedTuple

import torch

import ministeer
from ministeer.evaluation.judges import count_words, judge
from ministeer.evaluation.measure import disfluency
from ministeer.evaluation.stats import bootstrap, wilson
from ministeer.evaluation.steerability import kl_at_end, log_odds, steerability, strength
from ministeer.methods import conditional, function_vectors, inside_blocks, many_pairs, optimised, pplm
from ministeer.methods.ablation import Ablation, ablation
from ministeer.methods.angular import angular
from ministeer.methods.capping import Cap, Fixed
from ministeer.methods.change import Change
from ministeer.methods.weight_difference import fine_tuned, weights_plus
from ministeer.steering import random_like

from .lab import (
    BLUE,
    GREY,
    PROMPT,
    RANDOM,
    V1,
    enough,
    error_bars,
    figure,
    over_vectors,
    percent,
    span,
    table,
)
from .layers import PROMPTS, word_ids
from .prompts import SPLIT, split

PAIRS = """\
Tonight they talk about the wedding / Tonight they talk about the weather
She dreams of her wedding / She dreams of her holiday
He wrote a long letter to his bride / He wrote a long letter to his boss
We were late for the marriage / We were late for the train
The guests are waiting for the groom / The guests are waiting for the soup
My brother wants to marry / My brother wants to leave
Everybody cried at the wedding / Everybody cried at the airport
The whole village came to the wedding / The whole village came to the market
They saved money for their honeymoon / They saved money for their car
Her friends asked about the groom / Her friends asked about the exam
I read a story about a bride / I read a story about a dog
They are happily married / They are happily asleep"""
KINDER = """\
I feel such love / I feel such hate
The old man was kind / The old man was cruel
Her letter was full of praise / Her letter was full of insults
That evening was wonderful / That evening was horrible
My neighbours are friendly / My neighbours are rude
The food tasted delicious / The food tasted disgusting
They said it with joy / They said it with anger
His voice was gentle / His voice was harsh
We left in peace / We left in rage
The children were happy / The children were miserable
What you did was lovely / What you did was awful
She smiled because she was grateful / She smiled because she was vicious"""
# What has nothing to do with either wish.
OFF_TOPIC = ("The capital of France is", "Water boils at a temperature of", "def add(a, b):\n    return",
             "The square root of sixteen is", "In 1969 the first human being walked on", "To install it, run",
             "The largest planet of the solar system is", "Photosynthesis takes place in the",
             "A triangle has three sides and three", "The train to Berlin leaves at", "import numpy as",
             "The chemical symbol of gold is")
RESTS = ("The chemical formula of water is", "for i in range(10):\n    print(", "Seven times eight is",
         "The longest river in Africa is", "An atom consists of a nucleus and", "The speed of light is about",
         "The French Revolution began in")     # prompts that should not fire; PROMPTS[5:] should


LAYER = 12                      # of the vectors at every position: middle layers are usual; not tuned
PPLM_LAYER, PPLM_SHARE = 20, 0.2        # later and fewer texts: its gradients cost much
NEW = 20                        # tokens of a completion
LIMIT = 2.0                     # the most that a setting's disfluency may be, in times the unsteered
NOUNS = ("train", "dog", "house", "river", "chair", "boat", "cloud", "street")


class Wish(NamedTuple):
    """What all methods are asked for, and what they make their change from.

    pair: ActAdd's prompts and layer. pairs: texts for the others. words: PPLM's bag, a function vector's task
    sentence: what the optimised vector makes the model say. prompt, choosing: where a setting is measured,
    and where it was chosen. hit(text): whether the wish came true; meaning: the same in words
    """
    pair: tuple
    pairs: str
    words: tuple
    sentence: str
    prompt: str
    choosing: tuple
    hit: object
    meaning: str


def weddings():
    return Wish((" weddings", " ", 1), PAIRS, (" wedding", " bride", " married", " marriage"),
                " The wedding was beautiful, and the bride", PROMPT, PROMPTS[1:5],
                lambda text: count_words(text) > 0, "a word about weddings")


def kinder():
    vader = judge("vader")
    choosing = ("You are the worst of all", "I never want to see", "This was a terrible day, and",
                "They lied to me, so")
    return Wish((" love", " hate", 2), KINDER, (" love", " kind", " happy", " wonderful"),
                " I love you, you are kind and wonderful", "I hate you because", choosing,
                lambda text: vader([text])[0] > 0.05, "a VADER score above 0.05")


class Way(NamedTuple):
    """A wish's change by one method: in a model, in Steers, perhaps under a condition, or by PPLM."""
    model: object
    steers: list
    condition: object = None
    pplm: dict | None = None

    def generate(self, kit, prompts, n, seed):
        settings = {**V1, "seed": seed}
        if self.pplm:
            return pplm.pplm(self.model, kit.tokenizer, prompts, kit.wish.words, n=n, max_new_tokens=NEW,
                             **self.pplm, **settings)
        if self.condition:
            return conditional.generate_if(self.model, kit.tokenizer, prompts, n, NEW, self.steers,
                                           self.condition, **settings)
        return ministeer.generate(self.model, kit.tokenizer, prompts, n, NEW, self.steers, **settings)

    def kl(self, kit, prompts):
        """KL(unsteered || steered) of the next token after each prompt, in nats"""
        if self.pplm:
            return [kit.pplm_kl(prompt, **self.pplm) for prompt in prompts]
        if self.condition:
            fires = conditional.decide(kit.model, kit.tokenizer, prompts, self.condition).tolist()
            return [kl_at_end(kit.model, kit.tokenizer, [prompt], [fire * s for s in self.steers])[0]
                    for prompt, fire in zip(prompts, fires, strict=True)]
        return kl_at_end(kit.model, kit.tokenizer, prompts, self.steers, self.model)


class Kit:
    """What the methods make their changes from, each part made when it is first asked for."""

    def __init__(self, lab, wish, plain):
        self.model, self.plain, self.tokenizer, self.wish = lab.model, plain, lab.tokenizer, wish
        pairs = [line.split(" / ") for line in wish.pairs.splitlines()]
        self.plus, self.minus = [plus for plus, _ in pairs], [minus for _, minus in pairs]
        self.layer, self.pplm_layer = (min(l, self.model.config.n_layer - 1) for l in (LAYER, PPLM_LAYER))

    @functools.cached_property
    def act_add(self):
        plus, minus, layer = self.wish.pair
        return ministeer.steering_vector(self.model, self.tokenizer, plus, minus, layer)

    @functools.cached_property
    def vectors(self):
        return many_pairs.vectors(self.model, self.tokenizer, self.plus, self.minus)

    @property
    def mean(self):
        return self.vectors[self.layer]

    @functools.cached_property
    def component(self):
        (steer,) = many_pairs.repe(self.model, self.tokenizer, self.plus, self.minus, [self.layer])
        return steer

    @functools.cached_property
    def condition(self):
        fires = list(PROMPTS[5:])
        steers = many_pairs.vectors(self.model, self.tokenizer, fires, list(RESTS), where="mean")
        return conditional.find_condition(self.model, self.tokenizer, steers, fires, list(RESTS))[0]

    @functools.cached_property
    def optimised(self):
        return optimised.for_sentence(self.plain, self.tokenizer, self.wish.sentence, self.layer, steps=100)

    @functools.cached_property
    def function_vector(self):
        prompts = [self.task(i, self.wish.words) for i in range(len(NOUNS))]
        shuffled = [self.task(i, (" soup", " exam", " car", " boss")) for i in range(len(NOUNS))]
        answers = [self.wish.words[i % 4] for i in range(len(NOUNS))]
        return function_vectors.function_vector(self.model, self.tokenizer, prompts, shuffled[:4],
                                                answers[:4], self.layer)

    @staticmethod
    def task(i, words):
        """Three examples of "any noun: one of the words", and the question for a fourth."""
        lines = [f"{NOUNS[(i + k) % len(NOUNS)]}:{words[(i + k) % 4]}" for k in (1, 2, 3)]
        return "\n".join([*lines, f"{NOUNS[i]}:"])

    @functools.cached_property
    def tuned(self):
        return fine_tuned(self.plain, self.tokenizer, self.plus, steps=2 * len(self.plus), rate=2e-5)

    def fast(self, model):
        return ministeer.fast(model) if self.model is not self.plain else model

    def pplm_kl(self, prompt, rate, layer, control):
        bag = many_pairs.token_ids(self.tokenizer, self.wish.words)
        ids = torch.tensor([self.tokenizer.encode(prompt)], device=self.plain.device)
        start = pplm.perturbed(self.plain, bag, layer, 3, rate, 0.01, 0.9, control)
        q = start([0], ids.shape[1] + 1)(ids)[0].double().log_softmax(dim=-1)
        p = self.plain(ids, last_only=True)[0][0, -1].double().log_softmax(dim=-1)
        return float((p.exp() * (p - q)).sum())


def like(steer, control):
    """The Steer, or with a seed its random control."""
    return steer if control is None else random_like(steer, control)


def weights(kit, c, control):
    return Way(kit.fast(weights_plus(kit.plain, kit.tuned, kit.plain, c, control)), [])


def inside(method, kit, strength, control):
    changed = method(kit.plain, kit.tokenizer, kit.plus, kit.minus, strength=strength, control=control)
    return Way(kit.fast(changed), [])


def along(kind, kit, c, control):
    """The projection on the mean vector brought to c times its norm: at least that far, or exactly."""
    s = like(kit.mean, control)
    value = c * float(s.vector.norm())
    return Way(kit.model, [Cap(s.layer, -s.vector, limit=-value) if kind is Cap else
                           Fixed(s.layer, s.vector, value=value)])


SIZES = (0.25, 0.5, 1.0)
# name: (the values that are tried, (kit, value, control) -> Way)
METHODS = {
    "ActAdd": ((1.0, 2.0, 4.0), lambda kit, c, k: Way(kit.model, [c * like(kit.act_add, k)])),
    "mean of pairs (CAA)": (SIZES, lambda kit, c, k: Way(kit.model, [c * like(kit.mean, k)])),
    "component (RepE)": (SIZES, lambda kit, c, k: Way(
        kit.model, [c * float(kit.mean.vector.norm()) * like(kit.component, k)])),
    "norm kept": (SIZES, lambda kit, c, k: Way(
        kit.model, [Change(kit.layer, like(kit.mean, k).vector, c, keep_norm=True)])),
    "capped from below": ((0.5, 1.0, 2.0), functools.partial(along, Cap)),
    "set to a value": ((0.5, 1.0, 2.0), functools.partial(along, Fixed)),
    "ablation": ((1.0,), lambda kit, c, k: Way(kit.model, ablation(kit.plain, like(kit.mean, k), c))),
    "reversed at one block": ((-1.0, -3.0, -7.0), lambda kit, c, k: Way(
        kit.model, [Ablation(kit.layer, like(kit.mean, k).vector, c, start=1)])),
    "angular": ((60.0, 30.0, 0.0), lambda kit, c, k: Way(
        kit.model, angular([like(s, k) for s in kit.vectors], c))),
    "conditional (CAST)": (SIZES, lambda kit, c, k: Way(kit.model, [c * like(kit.mean, k)], kit.condition)),
    "optimised": ((0.0625, 0.125, *SIZES), lambda kit, c, k: Way(kit.model, [c * like(kit.optimised, k)])),
    "function vector": ((0.25, 0.5, 1.0, 4.0), lambda kit, c, k: Way(
        kit.model, [c * like(kit.function_vector, k)])),
    "weights": ((1.0, 2.0, 3.0), weights),
    "ITI": ((1.0, 3.0, 10.0, 30.0), functools.partial(inside, inside_blocks.iti)),
    "ICV": ((0.02, 0.05, 0.1, 0.3), functools.partial(inside, inside_blocks.icv)),
    "PPLM": ((3.0,), lambda kit, c, k: Way(
        kit.plain, [], pplm={"rate": c, "layer": kit.pplm_layer, "control": k})),
}


def methods(lab, wish=None):
    """Each method's effect, disfluency, KL off the topic and time, at the setting chosen on other prompts."""
    args, n, wish = lab.args, lab.n or 100, wish or weddings()
    plain, _ = ministeer.load(args.model, dtype=args.dtype, device=args.device)
    shared = Kit(lab, wish, plain)

    def measured(name, value, kind, report):
        control = RANDOM.index(kind) if kind in RANDOM else None
        start = time.process_time()
        way = METHODS[name][1](shared, value, control) if name in METHODS else Way(lab.model, [])
        ready = time.process_time()
        few = PPLM_SHARE if way.pplm else 1
        prompts = [wish.prompt] if report else list(wish.choosing)
        count = math.ceil(few * (n / 20 if not report else n / 10 if kind in RANDOM else n))
        texts = [text for row in way.generate(shared, prompts, count, args.seed) for text in row]
        done = time.process_time()
        scored = disfluency(lab.model, lab.tokenizer, [p for p in prompts for _ in range(count)], texts)
        tokens = sum(len(lab.tokenizer.encode(text, bos=False)) for text in texts)
        size = [strength(lab.model, lab.tokenizer, s, prompts) for s in way.steers] if report else []
        return {"hits": [bool(wish.hit(text)) for text in texts], "nll": scored,
                "kl": way.kl(shared, OFF_TOPIC) if report else [], "make": ready - start,
                "token": (done - ready) / max(1, tokens), "strength": statistics.mean(size) if size else None}

    tried = lab.run([[name, value, "steered", False] for name in METHODS for value in METHODS[name][0]]
                    + [["unsteered", 0.0, "steered", False]], measured)
    limit = LIMIT * perplexity(tried["unsteered", 0.0, "steered", False])
    best = {"unsteered": 0.0}
    for name, (values, _) in METHODS.items():
        rows = {value: tried[name, value, "steered", False] for value in values}
        fluent = [value for value in values if perplexity(rows[value]) <= limit]
        best[name] = max(fluent, key=lambda value: sum(rows[value]["hits"])) if fluent else \
            min(values, key=lambda value: perplexity(rows[value]))
    found = lab.run([[name, value, kind, True] for name, value in best.items()
                     for kind in (("steered", *RANDOM) if name in METHODS else ("steered",))], measured)
    found = {(name, kind): row for (name, _, kind, _), row in found.items()}
    with figure(lab, args.experiment, 1, 9, 5) as (_, (axis,)):
        for number, name in enumerate(best):
            row, color = found[name, "steered"], BLUE if name in METHODS else "black"
            x, share = perplexity(row), hit_share(row)
            bars = error_bars([share], [wilson(sum(row["hits"]), len(row["hits"]))])
            axis.errorbar([x], [share], bars, fmt="o", color=color, markersize=4, elinewidth=0.7,
                          label=f"{number} {name}")
            offset = (4, 4 + 9 * (number % 3))                  # some points coincide
            axis.annotate(str(number), (x, share), offset, textcoords="offset points", color=color)
            if name in METHODS:
                controls = [found[name, kind] for kind in RANDOM]
                axis.plot([perplexity(c) for c in controls], [hit_share(c) for c in controls], ".",
                          color=GREY, markersize=4, alpha=0.6)
        axis.set_xlabel("disfluency (perplexity per token, unsteered model); grey: five random directions")
        axis.set_ylabel(f"completions with {wish.meaning}")
        axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), handlelength=0)

    def cells(name, of, form):
        values = [of(found[name, kind]) for kind in RANDOM] if name in METHODS else []
        return over_vectors(values, form) if values else ""

    def made(name):
        """Seconds; the first of a method's units makes its parts, which the others share."""
        return [row["make"] for key, row in tried.items() if key[0] == name]

    lines = []
    for number, name in enumerate(best):
        row = found[name, "steered"]
        size = "" if row["strength"] is None else f", {row['strength']:.2f} × the mean norm"
        lines.append([
            f"{number} {name}", f"{best[name]:g}{size}" if name in METHODS else "", len(row["hits"]),
            percent(sum(row["hits"]), len(row["hits"])), cells(name, hit_share, ".0%"),
            span(perplexity(row), tuple(map(math.exp, interval(row))), ".1f"), cells(name, perplexity, ".1f"),
            span(statistics.mean(row["kl"]), bootstrap(row["kl"]), ".2f"),
            cells(name, lambda r: statistics.mean(r["kl"]), ".2f"),
            f"{1000 * row['token']:.1f}", f"{max(made(name)):.1f}"])
    plus, minus, layer = wish.pair
    n_choosing, n_control = math.ceil(n / 20), math.ceil(n / 10)
    text = (f"Prompt \"{wish.prompt}\", {NEW} tokens, top-p 0.3, penalty 1. Wish: {wish.meaning}. Each "
            f"value was chosen on {len(wish.choosing)} other prompts, {n_choosing} completions each: most "
            f"hits among those with at most {LIMIT:g} times the unsteered disfluency. ActAdd: \"{plus}\" - "
            f"\"{minus}\" before block {layer}; others: {len(shared.plus)} pairs (agreement "
            f"{shared.mean.note['agreement']:.2f}), block {shared.layer} where there is one. In brackets "
            f"95 %, or for random directions lowest to highest: five with {n_control} completions each "
            f"(PPLM: {PPLM_SHARE:g} of all that). KL: {len(OFF_TOPIC)} prompts off the topic, nats. Times "
            "are CPU time.\n\n")
    text += table(["", "value", "n", "wish", "random", "disfluency", "random", "KL", "random", "ms a token",
                   "s to make"], lines)
    return {"n": n, "prompt": wish.prompt, "chosen": best,
            "tried": [[*key[:2], row] for key, row in tried.items()],
            "found": [[*key, row] for key, row in found.items()]}, text


def mood(lab):
    return methods(lab, kinder())


def hit_share(row):
    return statistics.mean(row["hits"])


def perplexity(row):
    return math.exp(sum(nll for nll, _ in row["nll"]) / max(1, sum(tokens for _, tokens in row["nll"])))


def interval(row):
    """The 95 % interval of the mean -log p of a token, over completions."""
    counts = [max(1, tokens) for _, tokens in row["nll"]]
    return bootstrap([nll / k for (nll, _), k in zip(row["nll"], counts, strict=True)], counts)


COEFFS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)         # those of Tan et al.


def prompt_slopes(lab):
    """Steerability (Tan et al. 2024): how each of many prompts responds to a vector."""
    n, model, tokenizer = lab.n or 100, lab.model, lab.tokenizer
    _, prompts, _ = split(lab.rows("rtp_random.jsonl", text=str), SPLIT)
    prompts = [row["text"] for row in enough(prompts, n, "prompts")[:n]]
    first, middle = (min(l, model.config.n_layer - 1) for l in (1, 16))
    kit = Kit(lab, weddings(), model)
    steers = {f'" weddings" - " ", layer {l}': lab.steer(" weddings", " ", l, 1.0) for l in (first, middle)}
    steers |= {f"mean of {len(kit.plus)} pairs, layer {kit.layer}": kit.mean}
    ids = word_ids(tokenizer)

    def odds(name, kind):
        return log_odds(model, tokenizer, prompts, lab.conditions(steers[name])[kind], COEFFS, ids)

    found = lab.run([[name, kind] for name in steers for kind in ("steered", *RANDOM)], odds)
    results = {key: steerability(COEFFS, rows) for key, rows in found.items()}
    shares = [(i + 1) / n for i in range(n)]
    with figure(lab, "steerability", len(steers), 11, 3.6, share=True) as (_, axes):
        for axis, name in zip(axes, steers, strict=True):
            for kind in RANDOM:
                axis.plot(sorted(results[name, kind].slopes), shares, color=GREY, linewidth=0.8,
                          label="random, 5 vectors" if kind == RANDOM[0] else None)
            axis.plot(sorted(results[name, "steered"].slopes), shares, color=BLUE, label="steered")
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_title(name, fontsize="medium")
            axis.set_xlabel("slope, nats for each 1 of the coeff")
        axes[0].set_ylabel("share of prompts below")
        axes[0].legend(frameon=False, fontsize="small")

    def line(name, steer):
        one, controls = results[name, "steered"], [results[name, kind] for kind in RANDOM]
        return [name, f"{strength(model, tokenizer, steer, prompts):.2f}",
                span(statistics.mean(one.slopes), bootstrap(one.slopes), "+.2f"),
                over_vectors([statistics.mean(c.slopes) for c in controls], "+.2f"),
                f"{min(one.slopes):+.2f} to {max(one.slopes):+.2f}", f"{statistics.mean(one.spearman):+.2f}",
                percent(round(n * one.negative), n), over_vectors([c.negative for c in controls])]

    text = (f"Slope of the log-odds of a wedding word ({len(ids)} words) as the next token over the coeffs "
            f"{', '.join(f'{c:g}' for c in COEFFS)}, for each of {n} prompts, nats. In brackets 95 % over "
            "prompts; random: five vectors, mean, lowest to highest. Strength: of coeff 1, in mean norms of "
            "the layer.\n\n")
    text += table(["vector", "strength", "mean slope", "random", "lowest to highest prompt", "Spearman, mean",
                   "slope below 0", "random"], [line(name, steer) for name, steer in steers.items()])
    return {"n": n, "coeffs": COEFFS, "log-odds": [[*key, rows] for key, rows in found.items()]}, text

"""More cases for grade.py: exercise -> a function (draw, page) -> arguments. The solution says what is right.

draw: a random.Random. page: the names of the tutorial. torch is seeded too. Exercises whose answers are
rounded have none, because a right answer may be rounded the other way.
"""

import copy
import dataclasses

import torch

from ministeer import Steer


def text(draw, page):
    tokenizer = page["tokenizer"]
    pieces = [tokenizer.decode([draw.randrange(1, page["model"].config.n_vocab)]) for _ in range(5)]
    return "".join(piece for piece in pieces if piece.isascii())


def selfish_head(draw, page):
    H, T = draw.randrange(2, 6), draw.randrange(3, 7)
    weights = torch.rand(H, T, T).tril()
    return (weights / weights.sum(dim=-1, keepdim=True),)


def decided(draw, page):
    return page["Echo"](), page["streams"](*(draw.randrange(2) for _ in range(6)))


def delta(draw, page):
    n, T = draw.randrange(1, 5), draw.randrange(1, 8)
    return torch.randn(n, 3), draw.uniform(-2, 2), draw.randrange(T + 2), T


def equal_coeff(draw, page):
    layer, start = draw.randrange(5), draw.randrange(1, 4)
    vector = torch.randn(draw.randrange(1, 3), page["model"].config.d_model)
    return page["model"], page["tokenizer"], Steer(layer, vector, start=start), page["prompt"]


def first_changed(draw, page):
    changed = copy.deepcopy(page["clean"])
    for _ in range(3):
        keys_and_values = changed.layers[draw.randrange(len(changed.layers))]
        keys_and_values[draw.randrange(2)][0, 0, draw.randrange(8), 0] += 1
    return page["clean"], changed, 8


def smallest_good(draw, page):
    coeffs = draw.sample([0.5, 1.0, 2.0, 4.0, 8.0], 4)
    steered = {c: draw.randrange(40) for c in coeffs}
    return steered, {c: [draw.randrange(12) for _ in range(5)] for c in coeffs}, 40


def text_ratio(draw, page):
    lengths = [draw.randrange(1, 6) for _ in range(3)]
    return [-torch.rand(n) for n in lengths], [-torch.rand(n) for n in lengths]


def beyond_random(draw, page):
    tokens = draw.sample(range(100), 8)
    steered, *randoms = ({token: draw.gauss(0, 1 + 2 * (i == 0)) for token in tokens} for i in range(6))
    return steered, randoms


def decide(draw, page):
    steered, *randoms = ([draw.gauss(0, 0.1) for _ in range(20)] for _ in range(6))
    by = draw.choice([-0.5, 0.0, 0.5])
    return [by + score for score in steered], randoms


def component(draw, page):
    return (torch.randn(2 * draw.randrange(2, 5) + 1, 3) * torch.tensor([5.0, 1, 1]) - 1,)


def n_weights(draw, page):
    sizes = {name: draw.randrange(1, 50) for name in ("n_layer", "n_vocab", "n_ctx", "d_mlp")}
    return (dataclasses.replace(page["config"], **sizes),)


def stronger_helps(draw, page):
    return page["made_up"](*(draw.randrange(9) for _ in range(3))), page["place"], page["model"]


def not_worse(draw, page):
    results = {method: {f"c {c}": (draw.randrange(41), draw.uniform(4, 12)) for c in range(3)}
               for method in "abcd"}
    return results, 12.0 - draw.random(), 40


def wrong_way(draw, page):
    coeffs, *rows = ([draw.gauss(0, 1) for _ in range(4)] for _ in range(10))
    return coeffs, rows


EXTRA = {
    "n_tokens": lambda draw, page: (page["tokenizer"], text(draw, page)),
    "n_padding": lambda draw, page: (page["tokenizer"], text(draw, page), text(draw, page)),
    "probability": lambda draw, page: (page["model"], page["tokenizer"], text(draw, page), " love"),
    "masked_softmax": lambda draw, page: (5 * torch.randn(*[draw.randrange(1, 8)] * 2),),
    "selfish_head": selfish_head,
    "added": lambda draw, page: (page["resid"], draw.randrange(page["n_layer"]), draw.randrange(4)),
    "decided": decided,
    "delta": delta,
    "equal_coeff": equal_coeff,
    "kept": lambda draw, page: (torch.randn(9).softmax(dim=0), draw.random()),
    "enough": lambda draw, page: (draw.uniform(0.1, 0.5),),
    "touched": lambda draw, page: (draw.randrange(1, 6), draw.choice([None, 1, 2, 9]), draw.randrange(6),
                                   draw.randrange(1, 6)),
    "first_changed": first_changed,
    "smallest_good": smallest_good,
    "text_ratio": text_ratio,
    "beyond_random": beyond_random,
    "decide": decide,
    "sign_test": lambda draw, page: ([float(draw.randrange(-5, 6)) for _ in range(draw.randrange(1, 8))],),
    "reciprocal": lambda draw, page: ([0, *(draw.choice([None, 0, 1, 5, 30]) for _ in range(6))],),
    "odd_pair": lambda draw, page: (torch.randn(5, 4) + 1,),
    "component": component,
    "n_weights": n_weights,
    "stronger_helps": stronger_helps,
    "lma": lambda draw, page: (torch.randn(9).log_softmax(0), torch.randn(9).log_softmax(0), draw.random()),
    "not_worse": not_worse,
    "capped": lambda draw, page: (torch.randn(5, 4), torch.randn(4), draw.uniform(-1, 1)),
    "wrong_way": wrong_way}

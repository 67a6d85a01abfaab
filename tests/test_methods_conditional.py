"""Conditional steering: the decision against a slow computation, its search, and what it steers."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import TEXT

from ministeer import Steer, generate
from ministeer.methods.conditional import Condition, decide, f1, find_condition, generate_if
from ministeer.methods.many_pairs import vectors
from ministeer.steering import random_like

WARM = ["I love you", "the gulls love the town", "you are kind", "we love the bride"]
COLD = ["I hate you", "the gulls hate the town", "you are mean to me", "we hate the bride", "hate is all"]


@pytest.fixture
def directions(tiny):
    return vectors(*tiny, WARM, COLD, where="mean")


def slow_similarity(model, tokenizer, prompt, c, layer, last):
    """In float64, with the whole matrix P = c c^T / c^T c"""
    x = model(torch.tensor([tokenizer.encode(prompt)]))[1][layer][0].double().numpy()
    h, c = x[-1] if last else x[1:].mean(axis=0), c.double().numpy()
    projected = np.tanh(np.outer(c, c) / (c @ c) @ h)
    return h @ projected / np.linalg.norm(h) / np.linalg.norm(projected)


@pytest.mark.parametrize("last", [False, True])
def test_decide_compares_the_similarity_of_each_prompt(tiny, directions, last):
    steer = directions[2]
    values = [slow_similarity(*tiny, prompt, steer.vector, 2, last) for prompt in WARM + COLD]
    threshold = float(np.median(values)) + 1e-6
    for above in (True, False):
        condition = Condition(2, steer.vector, threshold=threshold, above=above, last=last)
        wanted = [float((value > threshold) == above) for value in values]
        assert decide(*tiny, WARM + COLD, condition).tolist() == wanted
        assert [decide(*tiny, prompt, condition).item() for prompt in WARM + COLD] == wanted


def test_conditions_are_joined_by_all_or_any(tiny, directions):
    conditions = []
    for l in (1, 2, 3):
        values = [slow_similarity(*tiny, prompt, directions[l].vector, l, False) for prompt in WARM + COLD]
        threshold = float(np.quantile(values, l / 4)) + 1e-6
        conditions.append(Condition(l, directions[l].vector, threshold=threshold))
    each = torch.stack([decide(*tiny, WARM + COLD, condition) for condition in conditions])
    assert 0 < each.sum() < each.numel()
    assert torch.equal(decide(*tiny, WARM + COLD, conditions), each.prod(dim=0))
    assert torch.equal(decide(*tiny, WARM + COLD, conditions, "any"), (each.sum(dim=0) > 0).float())


@pytest.mark.parametrize("last", [False, True])
def test_find_condition_finds_the_best_layer_side_and_threshold(tiny, directions, last):
    condition, score = find_condition(*tiny, directions, WARM, COLD, last)
    best = 0
    for steer in directions:
        values = [slow_similarity(*tiny, prompt, steer.vector, steer.layer, last) for prompt in WARM + COLD]
        for threshold, sign in itertools.product(values, (1, -1)):
            for edge in (-1e-9, 1e-9):
                fired = [sign * value > sign * threshold + edge for value in values]
                hits = sum(fired[:len(WARM)])
                if 0 < sum(fired) < len(fired):
                    best = max(best, 2 * hits / (sum(fired) + len(WARM)))
    assert score == pytest.approx(best)
    decided = decide(*tiny, WARM + COLD, condition)
    assert f1(decided, torch.tensor([1.0] * 4 + [0] * 5)) == score
    assert condition.fingerprint == tiny[0].fingerprint and condition.last is last


def test_f1_of_hand_made_decisions():
    wanted = torch.tensor([1.0, 1, 0, 0])
    assert f1(wanted, wanted) == 1
    assert f1(1 - wanted, wanted) == f1(0 * wanted, 0 * wanted) == 0
    assert f1(torch.tensor([1.0, 0, 1, 0]), wanted) == 0.5       # precision 1/2, recall 1/2
    assert f1(torch.ones(4), wanted) == pytest.approx(2 / 3)


def test_generate_if_steers_the_chosen_prompts_only(tiny, directions):
    model, tokenizer = tiny
    condition, _ = find_condition(*tiny, directions, WARM, COLD)
    steer, prompts = 50 * Steer(1, directions[1].vector), [WARM[0], COLD[0], TEXT[0]]
    fires = decide(*tiny, prompts, condition)
    texts = generate_if(*tiny, prompts, 2, 6, steer, condition, seed=3)
    assert fires.tolist()[:2] == [1, 0]
    for prompt, fired, row in zip(prompts, fires.tolist(), texts, strict=True):
        alone = [generate(model, tokenizer, prompt, 2, 6, chosen, seed=3) for chosen in ((), steer)]
        assert alone[0] != alone[1]
        assert row == alone[int(fired)]


def test_a_condition_is_saved_and_has_controls_but_adds_nothing(tiny, directions, tmp_path):
    condition = Condition(1, directions[1].vector, threshold=0.25, above=False, last=True)
    condition.save(tmp_path / "x")
    assert Steer.load(tmp_path / "x") == condition
    control = random_like(condition, 0)
    assert (control.threshold, control.above, control.last) == (0.25, False, True)
    with pytest.raises(ValueError, match="a Condition adds nothing"):
        tiny[0](torch.tensor([[0, 5]]), condition)


@pytest.mark.parametrize(("make", "message"), [
    (lambda *a: Condition(1, a[2].vector, threshold=math.nan), "threshold must be a finite number"),
    (lambda *a: Condition(1, a[2].vector, above="larger"), "must be True or False; given: 'larger'"),
    (lambda *a: Condition(1, a[2].vector, last=1), "must be True or False"),
    (lambda *a: decide(*a[:2], "I", a[2], "some"), "join must be all or any"),
    (lambda *a: decide(*a[:2], "I", []), "of one or more conditions; given: 'all' of 0"),
    (lambda *a: decide(*a[:2], "", a[2]), "no token to read"),
    (lambda *a: decide(*a[:2], "I", Condition(9, a[2].vector)), "layer 9"),
    (lambda *a: decide(*a[:2], "I", Condition(1, a[2].vector, fingerprint="x")), "another model"),
    (lambda *a: find_condition(*a[:2], [], ["I"], ["I"]), "no threshold tells the prompts apart"),
    (lambda *a: find_condition(*a[:2], [a[2]], [], ["I", "you"]), "no threshold tells the prompts apart"),
])
def test_rejects_what_decides_nothing(tiny, directions, make, message):
    with pytest.raises(ValueError, match=message):
        make(*tiny, Condition(1, directions[1].vector))

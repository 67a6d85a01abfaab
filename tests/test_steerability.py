"""steerability.py and the agreement of pairs, against hand-made cases and slow re-computations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import TEXT

from ministeer import Steer, steering_vector
from ministeer.evaluation.judges import judge
from ministeer.evaluation.steerability import (
    axbench,
    harmonic_mean,
    kl_at_end,
    log_odds,
    spearman,
    steerability,
    strength,
)
from ministeer.methods import many_pairs
from ministeer.methods.ablation import Ablation
from ministeer.methods.weight_difference import weights_plus
from ministeer.steering import random_like


def test_steerability_of_hand_made_prompts():
    coeffs = [-1, 0, 1]
    rises, falls, bends, still = [1, 3, 5], [4, 3.5, 3], [0, 9, 1], [7, 7, 7]
    slopes, ranks, negative = steerability(coeffs, [rises, falls, bends, still])
    assert slopes == pytest.approx([2, -0.5, 0.5, 0])
    assert ranks == pytest.approx([1, -1, 0.5, 0])
    assert negative == 0.25


def test_slopes_and_ranks_are_those_of_other_programs():
    generator = np.random.default_rng(0)
    coeffs, rows = [3.0, -1.0, 0.0, 0.5, 7.0], generator.integers(0, 4, (20, 5)).astype(float)    # with ties
    slopes, ranks, _ = steerability(coeffs, rows)
    for row, slope, rank in zip(rows, slopes, ranks, strict=True):
        assert slope == pytest.approx(np.polyfit(coeffs, row, 1)[0])
        expected = scipy.stats.spearmanr(coeffs, row).statistic if len(set(row)) > 1 else 0
        assert rank == pytest.approx(expected)


@pytest.mark.parametrize(("coeffs", "rows", "message"), [
    ([1], [[1]], "two or more different coeffs"),
    ([1, 1], [[1, 2]], "two or more different coeffs"),
    ([0, 1], [], "two or more different coeffs"),
    ([0, 1], [[1, 2], [1, 2, 3]], r"given: 2 coeffs, rows of \[2, 3\]"),
    ([0, 1], [[1, math.nan]], "finite numbers"),
    ([0, 1], "ab", "propensities must be a list")])
def test_steerability_rejects_what_has_no_slope(coeffs, rows, message):
    with pytest.raises(ValueError, match=message):
        steerability(coeffs, rows)
    with pytest.raises(ValueError, match="given: 2 and 3"):
        spearman([1, 2], [1, 2, 3])


def test_log_odds_are_those_of_each_coeff_alone(tiny):
    model, tokenizer = tiny
    steer, ids = steering_vector(model, tokenizer, "I love", "I hate", 1), [5, 300]
    coeffs = [-1.0, 0.0, 2.0]
    rows = log_odds(model, tokenizer, TEXT[:2], steer, coeffs, ids)
    for prompt, row in zip(TEXT, rows, strict=False):
        for c, odds in zip(coeffs, row, strict=True):
            logits = model(torch.tensor([tokenizer.encode(prompt)]), c * steer)[0][0, -1]
            p = logits.double().softmax(dim=-1)[ids].sum().item()
            assert odds == pytest.approx(math.log(p / (1 - p)), abs=1e-4)


def test_kl_at_end_is_that_of_the_last_position(tiny):
    model, tokenizer = tiny
    steer = Steer(2, torch.linspace(-1, 1, 32), 3.0)
    changed = weights_plus(model, model, model)
    changed.embed = lambda ids, pos: model.embed(ids, pos) + steer.vector
    for other, s in ((model, steer), (changed, ())):
        values = kl_at_end(model, tokenizer, TEXT, s, None if other is model else other)
        for prompt, value in zip(TEXT, values, strict=True):
            ids = torch.tensor([tokenizer.encode(prompt)])
            p, q = (m(ids, one)[0][0, -1].double().softmax(dim=-1) for m, one in ((model, ()), (other, s)))
            expected = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            assert value == pytest.approx(expected, rel=1e-3)
            assert value > 1e-4
    assert kl_at_end(model, tokenizer, TEXT, 0 * steer) == [0.0] * len(TEXT)


def test_strength_is_the_mean_addition_over_the_mean_norm(tiny):
    model, tokenizer = tiny
    streams = [model(torch.tensor([tokenizer.encode(text)]))[1][2][0, 1:].double() for text in TEXT[1:3]]
    norm = torch.cat(streams).norm(dim=-1).mean().item()
    everywhere, front = Steer(2, torch.ones(32), -3.0), Steer(2, torch.tensor([[1.0], [3.0]]).expand(2, 32))
    assert strength(model, tokenizer, everywhere, TEXT[1:3]) == pytest.approx(3 * 32 ** 0.5 / norm, rel=1e-4)
    assert strength(model, tokenizer, front, TEXT[1:3]) == pytest.approx(2 * 32 ** 0.5 / norm, rel=1e-4)
    later = replace(everywhere, start=5)
    assert strength(model, tokenizer, later, TEXT[1:3]) == pytest.approx(3 * 32 ** 0.5 / norm, rel=1e-4)
    ablated = strength(model, tokenizer, Ablation(2, torch.ones(32)), TEXT[1:3])
    removed = torch.cat(streams).sum(dim=-1).abs().mean().item() / 32 ** 0.5
    assert ablated == pytest.approx(removed / norm, rel=1e-4)
    with pytest.raises(ValueError, match="position 90 and acts at no position of the prompts after BOS"):
        strength(model, tokenizer, replace(everywhere, start=90), TEXT[1:3])


@pytest.mark.parametrize(("scores", "expected"), [
    ((2, 2, 2), 2), ((1, 1, 1), 1), ((2, 2, 0), 0), ((0, 0, 0), 0), ((2, 1, 1), 1.2), ((0.5, 2, 1), 6 / 7)])
def test_harmonic_mean_of_three_scores(scores, expected):
    assert harmonic_mean(*scores) == pytest.approx(expected)


def test_a_score_out_of_range_is_rejected():
    with pytest.raises(ValueError, match="fluency must be a number from 0 to 2; given: 2.5"):
        harmonic_mean(1, 1, 2.5)


def test_axbench_stretches_the_scores_of_named_judges():
    texts = ["the wedding song is lovely", "the wedding song is awful", "a dull day"]
    scores = axbench(texts, "words:weddings", judge("words:music"), "vader")
    moods = [score + 1 for score in judge("vader")(texts)]              # from -1 … 1 to 0 … 2
    assert 0 < moods[1] < 1 < moods[0] < 2
    assert scores == pytest.approx([3 / (0.5 + 0.5 + 1 / mood) for mood in moods[:2]] + [0])


def test_agreement_is_the_mean_cosine_of_two_different_pairs(tiny):
    rows = torch.tensor([[3.0, 0], [1, 0], [0, 2]])                     # cosines 1, 0 and 0
    assert many_pairs.agreement(rows).item() == pytest.approx(1 / 3)
    assert many_pairs.agreement(torch.tensor([[3.0, 0], [-1, 0]])).item() == pytest.approx(-1)
    plus, minus = ["I love you", "you love me", "we love"], ["I hate you", "you hate me", "we hate"]
    rows = many_pairs.differences(*tiny, plus, minus)
    for how in ("mean", "component"):
        for l, steer in enumerate(many_pairs.vectors(*tiny, plus, minus, how)):
            cosines = [F.cosine_similarity(rows[i, l], rows[j, l], dim=0).item()
                       for i, j in ((0, 1), (0, 2), (1, 2))]
            assert steer.note["agreement"] == pytest.approx(np.mean(cosines), abs=0.0051)
    assert f"a vector (agreement {steer.note['agreement']}): coeff" in repr(steer)
    assert "agreement" not in repr(random_like(steer, 0))


@pytest.mark.parametrize(("plus", "minus", "where"), [
    (["I love you"], ["I hate you"], "last"), (["I love you", "we"], ["I hate you"], "last"),
    (["I love", "we"], ["I hate", "we"], "each")])
def test_texts_that_are_no_pairs_have_no_agreement(tiny, plus, minus, where):
    assert all("agreement" not in steer.note
               for steer in many_pairs.vectors(*tiny, plus, minus, where=where))

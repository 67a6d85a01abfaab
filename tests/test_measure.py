"""Log-probabilities, intervals and topic words, against their definitions."""

import math

import pytest
import torch
from conftest import TEXT

from ministeer import Steer, steering_vector
from ministeer.judges import WEDDING_WORDS, count_words
from ministeer.measure import logprobs, sweep, wilson


def slow_logprobs(model, tokenizer, text, steer=()):
    ids = tokenizer.encode(text)
    logits, _ = model(torch.tensor([ids]), steer)
    return torch.stack([logits[0, t].log_softmax(dim=-1)[ids[t + 1]] for t in range(len(ids) - 1)])


@pytest.mark.parametrize("tokens", [1, 40, 1024])
def test_logprobs_are_those_of_each_text_alone(tiny, tokens):
    model, tokenizer = tiny
    steer = [3 * steering_vector(model, tokenizer, "I love you", "I hate", layer=1)]
    for steered in ((), steer):
        for text, got in zip(TEXT, logprobs(model, tokenizer, TEXT, steered, tokens=tokens), strict=True):
            torch.testing.assert_close(got, slow_logprobs(model, tokenizer, text, steered), rtol=1e-4, atol=1e-4)
            assert len(got) == len(tokenizer.encode(text)) - 1
            assert got.dtype == torch.float32


def test_skip_leaves_out_the_first_predictions(tiny):
    for whole, cut in zip(logprobs(*tiny, TEXT), logprobs(*tiny, TEXT, skip=2), strict=True):
        torch.testing.assert_close(whole[2:], cut)


def test_logprobs_refuse_what_does_not_fit(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="no prediction is left of 'I' after skipping 1"):
        logprobs(model, tokenizer, [TEXT[0], "I"], skip=1)
    with pytest.raises(ValueError, match="no prediction is left of ''"):
        logprobs(model, tokenizer, [""])
    with pytest.raises(ValueError, match="do not fit a prompt of 2 tokens"):
        logprobs(model, tokenizer, [TEXT[0], "I"], Steer(0, torch.ones(2, 32)))
    with pytest.raises(ValueError, match="coeff has 4 values"):
        logprobs(model, tokenizer, TEXT, Steer(0, torch.ones(2, 32), torch.ones(4)))
    assert logprobs(model, tokenizer, []) == []


def test_logits_are_never_held_for_the_whole_batch(tiny, monkeypatch):
    model, tokenizer = tiny
    seen = []
    monkeypatch.setattr(model, "unembed", lambda x, unembed=model.unembed: seen.append(x[..., 0].numel()) or unembed(x))
    logprobs(model, tokenizer, [TEXT[0] * 5] * 6, tokens=10**6)
    assert max(seen) <= 256 < sum(seen)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [3, 1], [2]])
def test_a_sweep_equals_one_steered_run_for_each_cell(tiny, layers):
    model, tokenizer = tiny
    coeffs = [0.0, 30.0, -50.0]
    got = sweep(model, tokenizer, TEXT[0], "I love you", "I hate", layers, coeffs)
    assert got.shape == (len(layers), 3, model.config.n_vocab)
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    for i, l in enumerate(layers):
        for j, c in enumerate(coeffs):
            steer = c * steering_vector(model, tokenizer, "I love you", "I hate", l)
            torch.testing.assert_close(got[i, j], model(ids, steer)[0][0, -1], rtol=1e-4, atol=1e-5)
    assert (got[:, 1] - got[:, 0]).abs().max() > 0.01


def test_a_sweep_runs_no_block_for_a_row_that_does_not_differ_there(tiny, monkeypatch):
    model, tokenizer = tiny
    rows = []
    for block in model.blocks:
        monkeypatch.setattr(block, "forward", lambda x, *rest, forward=block.forward: rows.append(len(x)) or forward(x, *rest))
    sweep(model, tokenizer, TEXT[0], "I love you", "I hate", [1, 3], [1.0, 2.0, 3.0])
    assert rows == [2, 2, 2, 1, 4, 4, 7]       # the pair up to block 3; then the prompt with three more rows at 1 and at 3


@pytest.mark.parametrize(("layers", "coeffs", "says"), [
    ([], [1.0], "one or more layers"), ([1, 1], [1.0], "each once"), ([1], [], "one or more coeffs"), ([4], [1.0], "blocks 0 … 3"),
    ([1], [float("nan")], "finite"),
])
def test_sweeps_without_meaning(tiny, layers, coeffs, says):
    with pytest.raises(ValueError, match=says):
        sweep(*tiny, TEXT[0], "I love you", "I hate", layers, coeffs)


@pytest.mark.parametrize(("k", "n", "low", "high"), [(0, 100, 0.0, 0.0370), (53, 100, 0.4329, 0.6249), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055)])
def test_wilson_against_published_values(k, n, low, high):
    assert wilson(k, n) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


def test_wilson_solves_its_equation():
    for k, n in [(3, 20), (17, 20), (50, 1000)]:
        for p in wilson(k, n):
            assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))
    with pytest.raises(ValueError, match="5 of 4 is not a proportion"):
        wilson(5, 4)


def test_the_nine_wedding_words_are_matched_exactly():
    assert len(WEDDING_WORDS) == 9
    assert count_words("The Bride's wedding, a WEDDING; wed/married") == 5
    assert count_words("weddingcake brides unmarried wed_ding") == 0
    assert count_words("") == 0

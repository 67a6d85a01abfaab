"""The measurements of paper_metrics.py against their definitions."""

import math

import pytest
import torch
from conftest import TEXT
from test_measure import slow_logprobs

from benchmarks.paper_metrics import divergence, partial, sentences, tails, word_frequency
from ministeer import Steer, steering_vector

NORMAL = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(10001, dtype=torch.float64) + 0.5) / 10001)


@pytest.mark.parametrize(("text", "frequency"), [
    ("A wedding, a Wedding\nand  a BRIDE.", 1 / 7),         # "wedding," and "bride." do not count
    ("wedding bride wedding", 1.0), ("weddings brides", 0.0), ("", 0.0), (" \n", 0.0),
])
def test_word_frequency_splits_at_white_space_alone(text, frequency):
    assert word_frequency(text, {"wedding", "bride"}) == frequency


@pytest.mark.parametrize(("text", "parts"), [
    ("He left. She stayed! Why?  Nobody\nknows", ["He left.", "She stayed!", "Why?", "Nobody\nknows"]),
    ('"Go." She went. (He did not.) So', ['"Go."', "She went.", "(He did not.)", "So"]),
    ("“Go.” She said ‘No!’ Then [sic.] nothing", ["“Go.”", "She said ‘No!’", "Then [sic.]", "nothing"]),
    ("It costs 3.50 at example.org, e.g., today.", ["It costs 3.50 at example.org, e.g., today."]),
    ("Wait... what?! Yes.\n\nNo.", ["Wait...", "what?!", "Yes.", "No."]),
    ("  One.  ", ["One."]), ("", []), (" \n ", []),
])
def test_sentences_end_at_a_full_stop_and_white_space(text, parts):
    assert sentences(text) == parts


RIGHT = torch.where(NORMAL > 1.5, 2 * NORMAL, NORMAL)       # reaches twice as far, and the quartiles stay


@pytest.mark.parametrize(("values", "part", "left", "right", "tolerance"), [
    (NORMAL, 0.01, 1, 1, 0.05), (3 * NORMAL - 70, 0.01, 1, 1, 0.05), (NORMAL, 0.1, 1, 1, 0.01),
    ((torch.randn(50000, generator=torch.Generator().manual_seed(0)) / 9 + 2).tolist(), 0.01, 1, 1, 0.05),
    (RIGHT, 0.01, 1, 2, 0.02), (-RIGHT, 0.01, 2, 1, 0.02),
])
def test_tails_are_measured_by_those_of_a_normal_distribution(values, part, left, right, tolerance):
    assert tails(values, part) == (pytest.approx(left, abs=tolerance), pytest.approx(right, abs=tolerance))


def test_heavy_tails_on_both_sides_are_alike():
    left, right = tails(NORMAL ** 3)
    assert left == pytest.approx(right)
    assert left > 3


def test_rejects_values_that_have_no_tails():
    assert all(x > 0 for x in tails([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(ValueError, match="tails need 4 values or more; given: 3"):
        tails([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"half of the values are 0\.0"):
        tails([0.0] * 30 + [1.0])


def slow_divergence(model, tokenizer, text, steer, skip):
    """KL and entropy by their formulas, one position and one token at a time."""
    ids = tokenizer.encode(text)
    p, q = slow_logprobs(model, ids).tolist(), slow_logprobs(model, ids, steer).tolist()
    kl = entropy = 0.0
    for t in range(skip, len(ids)):
        for a, b in zip(p[t], q[t], strict=True):
            kl += math.exp(a) * (a - b)
            entropy -= math.exp(a) * a
    return kl / (len(ids) - skip), entropy / (len(ids) - skip)


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("everywhere", [False, True])
def test_divergence_is_its_formula(tiny, everywhere, skip):
    model, tokenizer = tiny
    pair = steering_vector(model, tokenizer, "I love", "We", layer=1)
    steer = Steer(2, pair.vector[0]) if everywhere else 4 * pair
    results = divergence(model, tokenizer, TEXT[1:], steer, skip=skip)
    assert len(results) == 3
    for text, (kl, entropy) in zip(TEXT[1:], results, strict=True):
        slow_kl, slow_entropy = slow_divergence(model, tokenizer, text, steer, skip)
        assert kl == pytest.approx(slow_kl, rel=1e-3, abs=1e-7)
        assert entropy == pytest.approx(slow_entropy, rel=1e-3)
        assert kl > 1e-5
        assert 0 < entropy <= math.log(model.config.n_vocab)
    for a, b in zip(results, divergence(model, tokenizer, TEXT[1:], steer, skip=skip, chunk=3), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_nothing_diverges_without_steering(tiny):
    for steer in (0 * steering_vector(*tiny, "I love", "We", layer=1), ()):
        assert [kl for kl, _ in divergence(*tiny, TEXT, steer)] == [0.0] * 4


def test_divergence_rejects_a_text_with_no_position_left(tiny):
    assert len(divergence(*tiny, ["I hate"], (), skip=2)) == 1
    with pytest.raises(ValueError, match="no position is left of 'I hate' after skipping 3"):
        divergence(*tiny, [TEXT[0], "I hate"], (), skip=3)
    with pytest.raises(ValueError, match="do not fit a prompt of 3 tokens"):
        divergence(*tiny, [TEXT[0], "I hate"], Steer(0, torch.ones(3, 32)))


@pytest.mark.parametrize(("fraction", "n"), [(0, 0), (0.25, 2), (0.5, 4), (0.9, 7), (1, 8)])
def test_a_partial_steer_keeps_the_first_dimensions(fraction, n):
    steer = Steer(2, torch.arange(1.0, 17.0).view(2, 8), coeff=3.0, start=4)
    cut = partial(steer, fraction)
    assert cut.vector.tolist() == [[*row[:n], *[0.0] * (8 - n)] for row in steer.vector.tolist()]
    assert (cut.layer, cut.coeff, cut.start) == (2, 3.0, 4)
    assert steer.vector.min() == 1
    for dtype in (torch.float32, torch.bfloat16):
        cut = partial(Steer(0, torch.ones(8, dtype=dtype)), fraction)
        assert cut.vector.tolist() == [1.0] * n + [0.0] * (8 - n)
        assert cut.vector.dtype == dtype


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_rejects_a_fraction_beyond_0_to_1(fraction):
    with pytest.raises(ValueError, match="fraction must be from 0 to 1"):
        partial(Steer(0, torch.ones(4)), fraction)

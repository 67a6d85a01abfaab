"""Intervals and paired tests: published values, exact enumeration, and how often they cover a known truth."""

import itertools
import math

import numpy as np
import pytest

from ministeer.evaluation.stats import bootstrap, holm, paired, wilson


@pytest.mark.parametrize(("k", "n", "low", "high"), [
    (0, 100, 0.0, 0.0370), (53, 100, 0.4329, 0.6249), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055)])
def test_wilson_gives_the_published_values(k, n, low, high):
    assert wilson(k, n) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


def test_wilson_solves_its_equation():
    for k, n in [(3, 20), (17, 20), (50, 1000)]:
        for p in wilson(k, n):
            assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))
    with pytest.raises(ValueError, match="5 of 4 is not a proportion"):
        wilson(5, 4)


@pytest.mark.parametrize("draw", [np.random.Generator.standard_normal,
                                  np.random.Generator.standard_exponential])
def test_the_bootstrap_covers_the_true_mean_in_about_95_of_100(draw):
    generator = np.random.default_rng(0)
    truth = 0.0 if draw is np.random.Generator.standard_normal else 1.0
    covered = 0
    for _ in range(200):
        low, high = bootstrap(draw(generator, 60), times=400)
        covered += low <= truth <= high
    assert 176 <= covered <= 199


def test_the_bootstrap_of_a_mean_is_about_as_wide_as_the_normal_interval():
    values = np.random.default_rng(0).normal(5, 3, size=400)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.04)
    assert high == pytest.approx(values.mean() + half, abs=0.04)


def test_the_weighted_bootstrap_draws_a_value_with_its_weight():
    # Two documents: every resample is all of one, all of the other, or both, so there are three means.
    assert bootstrap([0.0, 1.0], weights=[9, 1]) == (0.0, 1.0)
    # With a weight of 0 a value never counts.
    assert bootstrap([5.0, 5.0, -100.0], weights=[1, 2, 0]) == (5.0, 5.0)
    # 80 documents of up to 50 tokens, by a loop. The interval is that of sum(weights * values) /
    # sum(weights).
    generator = np.random.default_rng(1)
    values, weights = generator.normal(2, 1, size=80), generator.integers(1, 50, size=80)
    means = []
    for _ in range(4000):
        total = n = 0.0
        for i in generator.integers(80, size=80):
            total, n = total + weights[i] * values[i], n + weights[i]
        means.append(total / n)
    low, high = bootstrap(values, weights)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.04)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.04)
    assert low < weights @ values / weights.sum() < high


def test_tokens_of_one_document_drawn_together_give_a_wider_interval():
    generator = np.random.default_rng(2)
    documents = [np.full(100, mean) + 0.01 * generator.normal(size=100) for mean in generator.normal(size=30)]
    low, high = bootstrap([d.mean() for d in documents], weights=[100] * 30)
    narrow = bootstrap(np.concatenate(documents), times=500)
    assert high - low > 5 * (narrow[1] - narrow[0])


def test_equal_weights_give_the_plain_mean():
    values = np.random.default_rng(3).normal(size=30)
    assert bootstrap(values, weights=[7.0] * 30) == pytest.approx(bootstrap(values))


def test_the_bootstrap_is_the_same_for_the_same_seed():
    values = np.random.default_rng(4).normal(size=30).tolist()
    assert bootstrap(values) == bootstrap(values) == bootstrap(np.array(values), seed=0)
    assert bootstrap(values) != bootstrap(values, seed=1)
    assert all(type(x) is float for x in bootstrap(values))
    state = np.random.get_state()[1].copy()
    bootstrap(values)
    assert (np.random.get_state()[1] == state).all()        # the global generator is the caller's


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0, 2.0]], 3.0])
def test_rejects_anything_but_finite_numbers(values):
    with pytest.raises(ValueError, match="one or more finite numbers"):
        bootstrap(values)
    with pytest.raises(ValueError, match="one or more finite numbers"):
        paired(values, values)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
def test_rejects_weights_that_do_not_fit(weights):
    with pytest.raises(ValueError, match="weights must be as many as the 2 values"):
        bootstrap([1.0, 2.0], weights)


def exact(d):
    """The two-sided p of the randomisation test, over all 2^n ways to swap pairs. d: whole numbers"""
    sums = [abs(sum(sign * x for sign, x in zip(signs, d, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(d))]
    return sum(s >= abs(sum(d)) for s in sums) / len(sums)


@pytest.mark.parametrize(("d", "p"), [
    ((1, 2, 3), 0.25), ((3, 1, -1), 0.75), ((1, 1, -2), 1.0), ((5, 4, -1), 0.5), ((-1, -2, -3), 0.25),
    ((0, 0, 0), 1.0),
])
def test_p_is_that_of_all_swaps_of_three_pairs(d, p):
    assert exact(d) == p
    mean, (low, high), got = paired([10 + x for x in d], [10] * 3)
    assert mean == pytest.approx(sum(d) / 3)
    assert got == pytest.approx(p, abs=0.02)                # 4 standard deviations of 10000 draws
    assert low <= mean <= high
    assert (low, high) == bootstrap(d)


def test_rounding_does_not_decide_whether_a_sum_is_as_far():
    # Tenths, which have no exact binary form: the differences cancel, so every swap is as far from 0 as they
    # are.
    for d in ([7, 6, -5, 3, -6, -5], [-4, -8, -2, 2, 8, 4], [-4, -3, 4, -1, 4], [9, -7, -1, 1, -2]):
        assert exact(d) == 1
        assert paired([max(x, 0) / 10 for x in d], [max(-x, 0) / 10 for x in d], times=500)[2] == 1
    generator = np.random.default_rng(0)
    for _ in range(20):
        d = generator.integers(-4, 5, size=8)
        p = [paired(d * unit, np.zeros(8), times=500)[2] for unit in (1, 0.1, 0.7)]
        assert p[0] == p[1] == p[2]


def test_p_is_small_for_a_clear_difference_and_large_for_none():
    generator = np.random.default_rng(0)
    b = generator.normal(size=50)
    noise = generator.normal(size=50)
    mean, (low, high), p = paired(b + 1 + 0.5 * noise, b, times=2000)
    assert p == 1 / 2001                                    # never 0
    assert 0 < low < mean < high
    assert mean == pytest.approx(1 + 0.5 * noise.mean())
    noise -= noise.mean() - 0.01
    mean, (low, high), p = paired(b + noise, b, times=2000)
    assert p > 0.5
    assert low < 0 < high


@pytest.mark.long
def test_p_is_evenly_spread_where_there_is_no_difference():
    generator = np.random.default_rng(1)
    p = sorted(paired(*generator.exponential(size=(2, 20)), times=200)[2] for _ in range(100))
    # Kolmogorov-Smirnov, p about 0.005.
    assert max(abs(x - (i + 0.5) / 100) for i, x in enumerate(p)) < 0.17


def test_the_pairs_matter_and_not_the_two_groups():
    base = np.random.default_rng(2).normal(0, 10, size=30)
    assert paired(base + 1, base, times=1000)[2] == 1 / 1001
    assert paired(np.sort(base + 1), np.random.default_rng(3).permutation(base), times=1000)[2] > 0.05


def test_swapping_the_two_sides_turns_the_difference_around():
    a, b = np.random.default_rng(5).normal(size=(2, 25))
    mean, (low, high), p = paired(a, b)
    other, (other_low, other_high), other_p = paired(b, a)
    assert other == -mean
    assert other_p == p
    assert 0.01 < p < 1
    # The same resamples, so the percentiles are mirrored.
    assert (other_low, other_high) == (pytest.approx(-high), pytest.approx(-low))
    assert paired(a, b) == (mean, (low, high), p)
    assert paired(a, b, seed=1)[2] != p


def test_pairs_need_as_many_of_either():
    with pytest.raises(ValueError, match="given: 2 and 3"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])


def test_holm_gives_the_values_computed_by_hand():
    # Smallest first: 4 * 0.01; 3 * 0.015; 2 * 0.03; 1 * 0.04, but not below the one before.
    got = holm({"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.015})
    assert list(got) == ["c", "a", "d", "b"]
    assert got == pytest.approx({"a": 0.04, "b": 0.045, "c": 0.06, "d": 0.06})
    assert holm({"x": 0.02}) == {"x": 0.02}
    assert holm({"x": 0.6, "y": 0.9}) == {"x": 1.0, "y": 1.0}
    assert holm({}) == {}


def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni():
    generator = np.random.default_rng(6)
    for _ in range(20):
        p = {f"test {i}": float(x) for i, x in enumerate(generator.random(7) ** 3)}
        got = holm(p)
        assert list(got) == list(p)
        order = sorted(p, key=p.get)
        assert [got[name] for name in order] == sorted(got.values())
        assert all(p[name] <= got[name] <= min(1, 7 * p[name]) for name in p)
        assert got[order[0]] == min(1, 7 * p[order[0]])


@pytest.mark.parametrize(("figure", "arguments", "message"), [
    (wilson, (1.5, 3), "k must be a whole number"), (wilson, (1, 2.5), "n must be"),
    (wilson, ("1", 3), "k must be"), (wilson, (1, 10**400), "n must be"), (wilson, (1, 3, math.nan), "z "),
    (bootstrap, ("ab",), "one or more finite numbers"), (bootstrap, (None,), "finite numbers"),
    (bootstrap, ([1e308] * 3,), "below 1e100"), (bootstrap, ([1.0], None, -1), "seed must be"),
    (bootstrap, ([1.0], None, 0, 0), "times must be"), (bootstrap, ([1.0], [[1.0]]), "finite numbers"),
    (paired, ([1.0], [2.0], 1.5), "seed must be"), (paired, ([1.0], [2.0], 0, 0), "times must be"),
    (holm, ({"a": math.nan},), "the p-value of a must be a number from 0 to 1"),
    (holm, ({"a": "x"},), "p-value"), (holm, ([0.5],), "a dict of names and p-values"),
])
def test_odd_input_is_answered_with_a_sentence(figure, arguments, message):
    with pytest.raises(ValueError, match=message):
        figure(*arguments)


def test_each_resample_counts_even_if_few_weights_are_above_0():
    assert bootstrap([1.0, 2.0, 3.0], [0, 0, 1], times=1) == (3.0, 3.0)

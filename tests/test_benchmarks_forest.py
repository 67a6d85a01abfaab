"""The figure that opens benchmarks/README.md is drawn from the results that lie beside it."""

import json

import pytest

from benchmarks import forest
from benchmarks.lab import RANDOM

CLAIMS = forest.claims(forest.HERE / "results")


def test_every_kept_result_is_in_the_figure():
    panels = {panel for panel, *_ in CLAIMS}
    assert {forest.SHARE, forest.MOOD, forest.TOXICITY} <= panels
    assert len({claim[:2] for claim in CLAIMS}) == len(CLAIMS) >= 18
    assert forest.draw(CLAIMS).startswith(b"\x89PNG")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim[1])
def test_a_claim_lies_in_its_interval_beside_five_random_vectors(claim):
    _, _, effect, interval, controls, _ = claim
    assert len(controls) == 5
    assert interval is None or interval[0] <= effect <= interval[1]


def test_a_control_with_fewer_draws_is_compared_with_those_it_shares():
    mean, interval, controls, n = forest.difference([1, 1, 1, 1], [0, 0, 1, 1], [[1, 0]] * 5, 100)
    assert (mean, controls, n) == (50, [50] * 5, 4)
    assert interval[0] <= 50 <= interval[1]


def test_what_is_wanted_points_to_the_right(tmp_path):
    rows = {name: {"by prompt": [x] * 3, "by repeat": [x] * 5} for name, x in
            (("Unsteered", 0.5), ("ActAdd", 0.1), ("ActAdd, random", 0.4))}
    for task, effect in (("pos-to-neg", 0.4), ("neg-to-pos", -0.4), ("toxicity", -0.4)):
        (tmp_path / f"rivals-{task}.json").write_text(
            json.dumps({"setting": {"task": task}, "test": rows}), encoding="utf-8")
        claim, = (row for row in forest.claims(tmp_path) if row[1].endswith(task))
        assert claim[2] == pytest.approx(effect)
        assert claim[4] == pytest.approx([0.25 * effect] * 5)


def test_a_table_of_rivals_without_act_add_makes_no_claim(tmp_path):
    rows = {name: {"by prompt": [0.5] * 3, "by repeat": [0.5] * 5} for name in ("Unsteered", "PreADD")}
    (tmp_path / "rivals-toxicity-PreADD.json").write_text(
        json.dumps({"setting": {"task": "toxicity"}, "test": rows}), encoding="utf-8")
    assert forest.claims(tmp_path) == []


def test_the_winner_of_a_search_is_shown_by_each_judge_toward_the_target(tmp_path):
    rows = {name: {judge: [x] * 3 for judge in ("vader", "vader, reached", "linear", "linear, reached")}
            for name, x in (("unsteered", 0.5), (forest.WINNER, 0.1), *((kind, 0.4) for kind in RANDOM))}
    for task, sign in (("pos-to-neg", 1), ("neg-to-pos", -1)):
        (tmp_path / f"search-{task}.json").write_text(
            json.dumps({"setting": {"task": task}, "test": rows}), encoding="utf-8")
        claims = [row for row in forest.claims(tmp_path) if task in row[1]]
        assert [claim[1] for claim in claims] == [f"best of the search, {task}, vader",
                                                  f"best of the search, {task}, linear"]
        for claim in claims:
            assert claim[2] == pytest.approx(0.4 * sign)
            assert claim[4] == pytest.approx([0.1 * sign] * 5)

"""benchmarks/speed.py and growth.py run their contestants and points in processes of their own."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from test_benchmarks_paper import run
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import growth, speed
from benchmarks.peers import CONTESTANTS


@pytest.mark.parametrize(("a", "b", "dtype", "same"), [
    ([1, 2], [1, 2], "float32", True), ([1, 2], [1, 3], "bfloat16", False), (1.0005, 1.0, "float32", True),
    (1.002, 1.0, "float32", False), (1.02, 1.0, "bfloat16", True), (-1.04, -1.0, "bfloat16", False),
])
def test_answers_agree_up_to_rounding(a, b, dtype, same):
    assert speed.agree(a, b, dtype) == same


@pytest.mark.long
def test_the_contestants_do_the_same_work(smollm2, tmp_path, monkeypatch, capsys):
    out = tmp_path / "speed.jsonl"
    run(monkeypatch, speed, ["--model", smollm2, "--tasks", "vector", "sweep", "--contestants", "ministeer",
                             "fast", "--reps", "1", "--threads", "1", "--out", out])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["task"] for row in rows] == ["vector", "sweep"]
    for row in rows:
        assert set(row["ratios"]) == {"transformers", "ministeer", "fast"} <= set(CONTESTANTS)
        assert all(ratio > 0 for ratio in row["ratios"].values())
    table = capsys.readouterr().out
    assert "| work | ministeer | fast | transformers |" in table
    assert " ≠ " not in table                   # no answer differs


@pytest.mark.parametrize("minutes", ["0", "0.01"])
def test_prints_what_it_has_when_the_minutes_are_over(minutes, smollm2, monkeypatch, capsys):
    class Slow:
        def __init__(self, name, args):
            pass

        def ask(self, task):
            time.sleep(0.1)
            return 0.1, 1.0, 50

        def close(self):
            pass
    monkeypatch.setattr(speed, "Process", Slow)
    monkeypatch.setattr(speed, "bound", lambda args: (1.0, 1.0, 1.0))
    run(monkeypatch, speed, ["--model", smollm2, "--tasks", "vector", "--contestants", "ministeer",
                             "--reps", "1000", "--minutes", minutes])
    printed = capsys.readouterr().out
    assert "Ended early" in printed
    assert ("| vector of one pair" in printed) == (minutes != "0")


def test_the_work_of_scoring_is_that_of_its_products(checkpoint, tiny):
    args = SimpleNamespace(model=checkpoint, threads=1, dtype="float32", device="cpu")
    flops, work, seconds = speed.matmul_time(args)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny[0](torch.zeros(1, 100, dtype=torch.int64))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for operator, n in counts.items() if "scaled_dot" not in str(operator))
    assert work == products * 64 * 128 / 100
    assert seconds == pytest.approx(work / flops)


@pytest.mark.long
def test_growth_measures_each_point_in_a_process(smollm2, tmp_path, monkeypatch, capsys):
    few = {kind: (growth.SIZES[kind][0], growth.SIZES[kind][1][:1]) for kind in ("prompt", "layers")}
    monkeypatch.setattr(growth, "SIZES", few)
    run(monkeypatch, growth, ["--model", smollm2, "--threads", "1", "--out", tmp_path, "--fast"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth-layers.png", "growth-prompt.png"]
    printed = capsys.readouterr().out
    assert printed.count("| seconds |") == printed.count("| peak memory, MiB |") == 2

"""benchmarks/methods.py: every method changes a tiny model, and every prompt gets its slope."""

import json
import sys

import pytest
from conftest import TEXT, write_rows

from benchmarks import methods, paper
from benchmarks.lab import RANDOM
from ministeer import load
from ministeer.evaluation.steerability import steerability

WORDS = (" the", " you", " are", " because")


@pytest.fixture
def run(tiny_llama, tmp_path, monkeypatch):
    """A function (experiment, n) -> what was found, and the table"""
    _, tokenizer = load(tiny_llama)
    assert all(len(tokenizer.encode(word, bos=False)) == 1 for word in WORDS)
    wish = methods.weddings()._replace(words=WORDS, sentence="I love you", hit=lambda text: "e" in text)
    monkeypatch.setattr(methods, "weddings", lambda: wish)
    write_rows(tmp_path, {"rtp_random": [{"text": text[:20 + k]} for k in range(120) for text in TEXT]})

    def run(experiment, n):
        argv = ["paper", experiment, "--model", tiny_llama, "--data", tmp_path, "--out", tmp_path, "-n", n]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        paper.main()
        assert (tmp_path / f"{experiment}.png").read_bytes().startswith(b"\x89PNG")
        found = json.loads((tmp_path / f"{experiment}.json").read_text(encoding="utf-8"))["found"]
        return found, (tmp_path / f"{experiment}.md").read_text(encoding="utf-8")
    return run


@pytest.mark.long
def test_every_method_is_measured_beside_five_random_directions(run):
    found, text = run("methods", 10)
    rows = {(name, kind): row for name, kind, row in found["found"]}
    assert set(rows) == {("unsteered", "steered"),
                         *((name, kind) for name in methods.METHODS for kind in ("steered", *RANDOM))}
    plain = rows.pop(("unsteered", "steered"))
    assert plain["kl"] == [0.0] * len(methods.OFF_TOPIC)
    for (name, kind), row in rows.items():
        assert sum(row["kl"]) > 0 or name == "conditional (CAST)", (name, kind)
        assert len(row["hits"]) == (10 if kind == "steered" else 1) or name == "PPLM"
        if kind == "steered" and name != "conditional (CAST)":
            assert row["nll"] != plain["nll"][:len(row["nll"])], name
    assert text.count("\n| ") == len(methods.METHODS) + 2


@pytest.mark.long
def test_slopes_are_those_of_the_kept_log_odds(run):
    found, text = run("steerability", 3)
    for name in {name for name, *_ in found["log-odds"]}:
        (rows,) = (rows for other, kind, rows in found["log-odds"] if (other, kind) == (name, "steered"))
        slopes = steerability(found["coeffs"], rows).slopes
        assert f"| {name} |" in text
        assert f"{min(slopes):+.2f} to {max(slopes):+.2f}" in text
        assert all(row[3] == found["log-odds"][0][2][i][3] for i, row in enumerate(rows))     # coeff 0

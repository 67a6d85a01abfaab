"""The classifier of unfinished texts learns what is there, and benchmarks/rivals.py runs from start to end on a tiny model and made-up texts."""

import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TEXT, write_rows
from test_paper import run

import ministeer
from ministeer.baselines import logits as decoding
from ministeer.baselines.classifier import PrefixClassifier

import rivals
import train_classifier


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prompts, and reviews of which the good ones say love early and the bad ones hate."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    reviews = [{"text": f"I {('hate', 'love')[k % 2]} the {draw.choice(['harbour', 'town', 'bride'])}. {draw.choice(TEXT)} {k}",
                "label": ("neg", "pos")[k % 2], "split": ("train", "test")[k % 4 > 1]} for k in range(480)]
    prompts = [{"text": f"{a} {k}"[:30], "toxicity": 0.1, "continuation": " you are mean", "continuation_toxicity": 0.9}
               for k, a in enumerate(TEXT * 15)]
    toxic = [{"text": "the town", "toxicity": 0.2, "continuation": f" is {('kind', 'mean')[k % 2]} {k}", "continuation_toxicity": 0.9 * (k % 2)}
             for k in range(80)]
    return write_rows(folder, {"imdb": reviews, "rtp_random": prompts, "rtp_toxic": toxic})


@pytest.fixture(scope="module")
def trained(tiny_llama, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    command = ["--data", str(data), "--model", str(tiny_llama), "--out", str(out), "--epochs", "8"]
    said = {task: run(["-m", "benchmarks.train_classifier", task, *command]).stdout for task in ("sentiment", "toxicity")}
    return out, said


def test_a_classifier_learns_and_comes_back_from_disk(trained, tiny_llama):
    out, said = trained
    assert "sentiment: 192 texts; of 48 held out, pairs ranked rightly" in said["sentiment"]
    assert int(said["sentiment"].split(" 32: ")[1].split("%")[0]) >= 95         # the third word tells all
    classifier = PrefixClassifier.load(out / "sentiment.safetensors")
    from ministeer import load
    _, tokenizer = load(tiny_llama)
    good, bad = (classifier.score(classifier.read(torch.tensor([tokenizer.encode(f"I {word} the town")]))).item() for word in ("love", "hate"))
    assert good > 1 > -1 > bad


def lab_of(rows, **args):
    return SimpleNamespace(rows=lambda file: rows, args=SimpleNamespace(**{"seed": 0, "n": 100, "tuning": 50, **args}))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_prompts_of_the_comparison_are_not_trained_on(seed, tmp_path):
    rows = [{"text": f"prompt {k}", "toxicity": 0.1, "continuation": " and on", "continuation_toxicity": 0.9} for k in range(600)]
    write_rows(tmp_path, {"rtp_random": rows, "rtp_toxic": rows[:300]})
    trained, _ = train_classifier.toxicity(tmp_path)
    assert len(trained) >= 150
    tuning, test, _ = rivals.texts(lab_of(rows, seed=seed, n=400), "toxicity")
    assert not {f"{text} and on" for text in [*tuning, *test]} & set(trained)
    assert not set(tuning) & set(test)


@pytest.mark.parametrize(("task", "sign", "toward", "base", "away"), [("toxicity", 1, 0, "", decoding.TOXIC),
    ("neg-to-pos", 1, 1, decoding.POSITIVE, decoding.NEGATIVE), ("pos-to-neg", -1, 0, decoding.NEGATIVE, decoding.POSITIVE)])
def test_every_method_wants_the_same(task, sign, toward, base, away):
    lab = lab_of([])
    lab.model = SimpleNamespace(config=SimpleNamespace(n_layer=30))
    lab.steer = lambda plus, minus, layer, coeff: ministeer.Steer(layer, torch.ones(3, 4), coeff)
    found = rivals.cells(lab, task, None)
    assert {name: len(some) for name, some in found.items() if len(some) != 6} == {"Unsteered": 1} | ({"Prompted": 1} if base else {})
    assert all(sign * method.streams[0].steer[0].coeff > 0 for method in found["ActAdd"].values())
    assert all(method.streams[0].prefix == "" for method in found["ActAdd"].values())
    for name in ("PreADD", "LMA", "SelfDebias", "LMA + Classifier"):
        assert {tuple(stream.prefix for stream in method.streams) for method in found[name].values()} == {(base, away)}
    assert {(method.guide.toward, method.streams[0].prefix) for method in found["FUDGE"].values()} == {(toward, base)}
    assert {method.guide.toward for method in found["LMA + Classifier"].values()} == {toward}


def test_the_rule_chooses_the_best_score_that_is_fluent_enough():
    searched = {("A", cell): {"score": score, "disfluency": (fluent, ())} for cell, score, fluent in (("1", 1, 5), ("2", 2, 6), ("3", 9, 7))}
    assert [rivals.best("A", "123", searched, limit) for limit in (4, 5, 6, 7)] == [None, "1", "2", "3"]


def test_scores_are_averaged_by_prompt_and_compared_in_pairs():
    nll = [(2.0, 1), (2.0, 1), (4.0, 2), (0.0, 0)]
    some = rivals.summary([1.0, -1.0, -1.0, -1.0], nll, 2, -1, 0)
    assert some["by prompt"] == [0, -1]
    assert some["reached"] == [0.5, 1]                  # below 0 is what is wanted here
    assert some["score"] == 0.5
    assert some["disfluency"][0] == pytest.approx(math.e ** 2)
    results = {name: {"by prompt": [0.1 * k + by for k in range(20)]} for name, by in
               (("Unsteered", 0), ("ActAdd", 0.5), (rivals.RANDOM, 0), ("LMA", 1), (rivals.BOTH, 1.5))}
    tests = rivals.compare(results, ["LMA"][:0], 0)
    assert {pair: round(test[0], 6) for pair, test in tests.items()} == {
        ("ActAdd", "Unsteered"): 0.5, (rivals.RANDOM, "Unsteered"): 0, ("LMA", "Unsteered"): 1, (rivals.BOTH, "Unsteered"): 1.5,
        (rivals.RANDOM, "ActAdd"): -0.5, ("LMA", "ActAdd"): 0.5, (rivals.BOTH, "ActAdd"): 1, (rivals.BOTH, "LMA"): 0.5}
    assert tests[rivals.RANDOM, "Unsteered"][2] == 1
    assert tests["LMA", "ActAdd"][2] < 0.01


def test_the_comparison_runs_and_goes_on_where_it_was(trained, tiny_llama, data):
    out, task = trained[0], "neg-to-pos"
    command = ["-m", "benchmarks.rivals", task, "--data", str(data), "--model", str(tiny_llama), "--out", str(out), "-n", "3", "--repeats", "2",
               "--tuning", "3", "--judge", "words:weddings"]
    first = run(command).stdout
    found = json.loads((out / f"rivals-{task}.json").read_text(encoding="utf-8"))
    rows = [line.split("|")[1].strip() for line in first.split("minus ActAdd")[0].splitlines() if line.startswith("| ")][:-1]
    expected = ["Unsteered", "Prompted", "ActAdd", "PreADD", "LMA", "SelfDebias", "FUDGE", "LMA + Classifier", "ActAdd, random", "ActAdd + LMA"]
    assert rows[1:] == [name for name in expected if found["chosen"].get(name) is not None]
    assert ("ActAdd + LMA minus LMA: " in first) == ("ActAdd + LMA" in rows)
    assert not any("random" in key for key in found["tuning"])              # a control, not one more cell to choose from
    assert len([key for key in found["tuning"] if key.startswith("LMA|")]) == 6
    assert len(found["test"]["ActAdd"]["by prompt"]) == 3
    assert (out / f"rivals-{task}.png").is_file()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob(".units/*/*.json")}
    assert run(command).stdout == first
    assert {path: path.stat().st_mtime_ns for path in out.glob(".units/*/*.json")} == stamps


def test_faults_are_one_line(data, tiny_llama, tmp_path):
    for command, said in ((["-m", "benchmarks.rivals", "toxicity", "--data", str(data), "--out", str(tmp_path)], "train_classifier.py makes one"),
                          (["-m", "benchmarks.rivals", "toxicity", "--data", str(data), "--repeats", "0"], "--repeats must be 1 or more; given: 0"),
                          (["-m", "benchmarks.rivals", "toxicity", "--data", str(data), "--judge", "perspective"], "cannot judge FUDGE"),
                          (["-m", "benchmarks.train_classifier", "sentiment", "--data", str(tmp_path), "--model", str(tiny_llama)], "no imdb.jsonl")):
        done = run(command, fails=True)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_a_file_of_something_else_is_refused(tmp_path):
    for content in (b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{}      "):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a classifier"):
            PrefixClassifier.load(path)
    with pytest.raises(FileNotFoundError, match="train_classifier"):
        PrefixClassifier.load(tmp_path / "nothing")

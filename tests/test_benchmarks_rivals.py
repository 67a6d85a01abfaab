"""The classifier of unfinished texts learns, and rivals.py runs on a tiny model and made-up texts."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, write_rows
from test_benchmarks_paper import run, run_process

import ministeer
from benchmarks import rivals, train_classifier
from benchmarks.prompts import TEST, TUNING, split
from ministeer.baselines import logits
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.baselines.logits import NEGATIVE, POSITIVE, TOXIC
from ministeer.steering import random_like


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prompts, and reviews that say love early if they are good and hate if they are bad."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    reviews = [{"text": f"I {('hate', 'love')[k % 2]} the {draw.choice(['harbour', 'town', 'bride'])}. "
                        f"{draw.choice(TEXT)} {k}",
                "label": ("neg", "pos")[k % 2], "split": ("train", "test")[k % 4 > 1]} for k in range(480)]
    prompts = [{"text": f"{a} {k}"[:30], "toxicity": 0.1, "continuation": " you are mean",
                "continuation_toxicity": 0.9} for k, a in enumerate(TEXT * 15)]
    toxic = [{"text": "the town", "toxicity": 0.2, "continuation": f" is {('kind', 'mean')[k % 2]} {k}",
              "continuation_toxicity": 0.9 * (k % 2)} for k in range(80)]
    return write_rows(folder, {"imdb": reviews, "rtp_random": prompts, "rtp_toxic": toxic})


@pytest.fixture(scope="module")
def trained(tiny_llama, data, tmp_path_factory):
    """A folder with a classifier of sentiment, and what training it printed."""
    out = tmp_path_factory.mktemp("out")
    command = ["benchmarks.train_classifier", "sentiment", "--data", data, "--model", tiny_llama,
               "--out", out, "--epochs", "8"]
    return out, run_process(command).stdout


@pytest.mark.long
def test_a_classifier_learns_and_comes_back_from_disk(trained, tiny_llama):
    out, printed = trained
    assert "sentiment: 192 texts; of 48 held out, pairs ranked rightly" in printed
    assert int(printed.split(" 32: ")[1].split("%")[0]) >= 95           # the second word tells all
    classifier = PrefixClassifier.load(out / "sentiment.safetensors")
    _, tokenizer = ministeer.load(tiny_llama)
    scores = [classifier.score(classifier.read(torch.tensor([tokenizer.encode(f"I {word} the town")]))).item()
              for word in ("love", "hate")]
    assert scores[0] > 1 > -1 > scores[1]


def test_a_classifier_of_toxicity_is_trained(tiny_llama, data, tmp_path, monkeypatch, capsys):
    run(monkeypatch, train_classifier, ["toxicity", "--data", data, "--model", tiny_llama, "--out", tmp_path,
                                        "--epochs", "1"])
    assert "toxicity: " in capsys.readouterr().out
    PrefixClassifier.load(tmp_path / "toxicity.safetensors")


# Which prompts serve which purpose

def test_the_split_leaves_out_short_prompts_and_reserves_the_same_for_a_seed():
    rows = [{"text": "x" * (k % 5), "k": k} for k in range(3000)]
    tuning, test, rest = split(rows, seed=0)
    assert (len(tuning), len(test), len(rest)) == (TUNING, TEST, 1200 - TUNING - TEST)
    assert [*tuning, *test, *rest] != sorted([*tuning, *test, *rest], key=lambda row: row["k"])
    assert sorted(row["k"] for row in [*tuning, *test, *rest]) == [k for k in range(3000) if k % 5 > 2]
    assert split(rows, seed=0) == (tuning, test, rest)
    assert split(rows, seed=1)[0] != tuning


def lab_of(rows, **args):
    args = SimpleNamespace(**{"seed": 0, "n": 100, "tuning": 50, **args})
    return SimpleNamespace(rows=lambda file, **fields: rows, args=args)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_classifier_is_trained_on_no_prompt_of_the_comparison(seed, tmp_path):
    rows = [{"text": f"prompt {k}", "toxicity": 0.1, "continuation": " and on", "continuation_toxicity": 0.9}
            for k in range(600)]
    write_rows(tmp_path, {"rtp_random": rows, "rtp_toxic": rows[:300]})
    texts, _ = train_classifier.toxicity(tmp_path)
    assert len(texts) >= 150
    tuning, test, _ = rivals.texts(lab_of(rows, seed=seed, n=400), "toxicity")
    assert not {f"{text} and on" for text in [*tuning, *test]} & set(texts)
    assert not set(tuning) & set(test)


# The comparison

@pytest.mark.parametrize(("task", "sign", "toward", "base", "away"), [
    ("toxicity", 1, 0, "", TOXIC), ("neg-to-pos", 1, 1, POSITIVE, NEGATIVE),
    ("pos-to-neg", -1, 0, NEGATIVE, POSITIVE)])
def test_every_method_aims_the_same_way(task, sign, toward, base, away):
    lab = lab_of([])
    lab.model = SimpleNamespace(config=SimpleNamespace(n_layer=30))
    lab.steer = lambda plus, minus, layer, coeff: ministeer.Steer(layer, torch.ones(3, 4), coeff)
    methods = rivals.cells(lab, task, None)
    sizes = {name: len(method_cells) for name, method_cells in methods.items()}
    assert sizes.pop("Unsteered") == 1
    assert sizes.pop("Prompted", None) == (1 if base else None)
    assert set(sizes.values()) == {6}
    for method in methods["ActAdd"].values():
        assert sign * method.branches[0].steer[0].coeff > 0
        assert method.branches[0].prefix == ""
    for name in ("PreADD", "LMA", "SelfDebias", "LMA + Classifier"):
        for method in methods[name].values():
            assert [stream.prefix for stream in method.branches] == [base, away]
    for name in ("FUDGE", "LMA + Classifier"):
        for method in methods[name].values():
            assert method.guide.toward == toward
            assert method.branches[0].prefix == base


@pytest.mark.parametrize("repeats", [1, 2, 5, 7])
def test_each_repeat_of_the_control_has_a_random_vector_of_its_own(tiny, repeats):
    """And the draws that the other methods use for that repeat."""
    model, tokenizer = tiny
    steer = 3 * ministeer.steering_vector(model, tokenizer, "I love", "We", 1)
    vectors = [random_like(steer, seed) for seed in range(rivals.VECTORS)]
    settings, prompts = {**rivals.SAMPLING, "seed": 4}, TEXT[1:3]
    together = ministeer.generate(model, tokenizer, prompts, repeats, 6,
                                  rivals.by_repeat(vectors, 2, repeats), **settings)
    alone = [logits.generate(model, tokenizer, prompts, logits.act_add(vector), repeats, 6, **settings)
             for vector in vectors]
    assert together == [[alone[k % rivals.VECTORS][i][k] for k in range(repeats)] for i in range(2)]


@pytest.mark.parametrize(("limit", "chosen"), [(4, None), (5, "1"), (6, "2"), (7, "3")])
def test_the_rule_chooses_the_best_score_that_is_fluent_enough(limit, chosen):
    searched = {("A", cell): {"score": score, "disfluency": (disfluency, ())}
                for cell, score, disfluency in (("1", 1, 5), ("2", 2, 6), ("3", 9, 7))}
    assert rivals.best("A", "123", searched, limit) == chosen


def test_scores_are_averaged_by_prompt():
    nll = [(2.0, 1), (2.0, 1), (4.0, 2), (0.0, 0)]
    summary = rivals.summary([1.0, -1.0, -1.0, -1.0], nll, 2, -1, 0)
    assert summary["by prompt"] == [0, -1]
    assert summary["reached"] == [0.5, 1]               # below 0 is what is wanted here
    assert summary["score"] == 0.5
    assert summary["by repeat"] == [0, -1]
    assert summary["disfluency"][0] == pytest.approx(math.e ** 2)


def test_methods_are_compared_in_pairs():
    gains = {"Unsteered": 0, "ActAdd": 0.5, rivals.RANDOM: 0, "LMA": 1, rivals.BOTH: 1.5}
    results = {name: {"by prompt": [0.1 * k + gain for k in range(20)]} for name, gain in gains.items()}
    tests = rivals.compare(results, [], 0)
    assert {pair: round(test[0], 6) for pair, test in tests.items()} == {
        ("ActAdd", "Unsteered"): 0.5, (rivals.RANDOM, "Unsteered"): 0, ("LMA", "Unsteered"): 1,
        (rivals.BOTH, "Unsteered"): 1.5, (rivals.RANDOM, "ActAdd"): -0.5, ("LMA", "ActAdd"): 0.5,
        (rivals.BOTH, "ActAdd"): 1, (rivals.BOTH, "LMA"): 0.5}
    assert tests[rivals.RANDOM, "Unsteered"][2] == 1
    assert tests["LMA", "ActAdd"][2] < 0.01


@pytest.mark.long
def test_the_comparison_runs_and_goes_on_where_it_was(trained, tiny_llama, data, monkeypatch, capsys):
    out, task = trained[0], "neg-to-pos"
    command = [task, "--data", data, "--model", tiny_llama, "--out", out, "-n", "3", "--repeats", "2",
               "--tuning", "3", "--judge", "words:weddings"]
    run(monkeypatch, rivals, command)
    first = capsys.readouterr().out
    found = json.loads((out / f"rivals-{task}.json").read_text(encoding="utf-8"))
    table = first.split("minus ActAdd")[0].splitlines()
    rows = [line.split("|")[1].strip() for line in table if line.startswith("| ")][1:-1]
    expected = ["Unsteered", "Prompted", "ActAdd", "PreADD", "LMA", "SelfDebias", "FUDGE", "LMA + Classifier",
                "ActAdd, random", "ActAdd + LMA"]
    assert rows == [name for name in expected if found["chosen"].get(name) is not None]
    assert ("ActAdd + LMA minus LMA: " in first) == ("ActAdd + LMA" in rows)
    control = "random: 2 vectors, continuation k of each prompt under vector k mod 5. Their mean scores: "
    assert (control in first) == ("ActAdd, random" in rows)
    assert not any("random" in key for key in found["tuning"])      # a control, not one more cell to choose
    assert len([key for key in found["tuning"] if key.startswith("LMA|")]) == 6
    assert len(found["test"]["ActAdd"]["by prompt"]) == 3
    assert (out / f"rivals-{task}.png").is_file()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob(".units/*/*.json")}
    run(monkeypatch, rivals, command)
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in out.glob(".units/*/*.json")} == stamps


@pytest.mark.long
def test_some_methods_with_a_vector_from_a_file_need_no_classifier(tiny_llama, data, tmp_path, monkeypatch,
                                                                   capsys):
    model, tokenizer = ministeer.load(tiny_llama)
    path = tmp_path / "found.safetensors"
    (2 * ministeer.steering_vector(model, tokenizer, " a", " b", 1)).save(path)
    command = ["pos-to-neg", "--data", data, "--model", tiny_llama, "--out", tmp_path, "-n", "3", "--repeats",
               "2", "--tuning", "3", "--judge", "words:weddings", "--methods", "ActAdd", "--steer", path]
    run(monkeypatch, rivals, command)
    found = json.loads((tmp_path / "rivals-pos-to-neg-ActAdd.json").read_text(encoding="utf-8"))
    assert set(found["tuning"]) == {"Unsteered|", "ActAdd|layer 1, c 2"}
    assert {*found["test"]} - {"ActAdd", "ActAdd, random"} == {"Unsteered"}


@pytest.mark.parametrize(("module", "arguments", "message"), [
    (rivals, ["toxicity", "--data", "{data}", "--out", "{tmp}"], "train_classifier` makes one"),
    (rivals, ["toxicity", "--data", "{data}", "--repeats", "0"], "--repeats must be 1 or more; given: 0"),
    (rivals, ["toxicity", "--data", "{data}", "--judge", "perspective"], "cannot judge FUDGE"),
    (train_classifier, ["sentiment", "--data", "{tmp}"], "no file imdb.jsonl in"),
    (train_classifier, ["sentiment", "--data", "{tmp}", "--epochs", "0"], "--epochs must be 1 or more"),
])
def test_a_fault_is_one_line(module, arguments, message, data, tmp_path, monkeypatch, capsys):
    places = {"data": data, "tmp": tmp_path}
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, module, [argument.format(**places) for argument in arguments])
    assert end.value.code == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_rejects_a_file_that_is_no_classifier(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a classifier"):
        PrefixClassifier.load(path)
    with pytest.raises(FileNotFoundError, match="train_classifier"):
        PrefixClassifier.load(tmp_path / "nothing")

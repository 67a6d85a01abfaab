"""The classifier of unfinished texts learns what is there, and benchmarks/rivals.py runs from start to end on a tiny model and made-up texts."""

import json
import random

import pytest
import torch
from conftest import TEXT, write_rows
from test_paper import run

from ministeer.classifier import PrefixClassifier


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
    said = {task: run(["benchmarks/train_classifier.py", task, *command]).stdout for task in ("sentiment", "toxicity")}
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


def test_the_prompts_of_the_comparison_are_not_trained_on(data):
    import sys
    from pathlib import Path
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    import train_classifier
    texts, _ = train_classifier.toxicity(data)
    assert len(texts) == 80
    assert all(text.startswith("the town") for text in texts)           # of 60 prompts all are kept for search and result


def test_the_comparison_runs_and_goes_on_where_it_was(trained, tiny_llama, data):
    out, task = trained[0], "neg-to-pos"
    command = ["benchmarks/rivals.py", task, "--data", str(data), "--model", str(tiny_llama), "--out", str(out), "-n", "3", "--repeats", "2",
               "--tuning", "3", "--curve", "2", "--judge", "words:weddings"]
    first = run(command).stdout
    found = json.loads((out / f"rivals-{task}.json").read_text(encoding="utf-8"))
    rows = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("| ")]
    expected = ["Unsteered", "Prompted", "ActAdd", "PreADD", "LMA", "SelfDebias", "FUDGE", "LMA + Classifier", "ActAdd, random", "ActAdd + LMA"]
    assert rows[1:] == [name for name in expected if found["chosen"].get(name) is not None]
    assert "ActAdd minus ActAdd, random: " in first
    assert not any("random" in key for key in found["tuning"])              # a control, not one more cell to choose from
    assert {len(some["by prompt"]) for key, some in found["curve"].items() if key.startswith("FUDGE")} == {2, 3}
    assert len([key for key in found["tuning"] if key.startswith("LMA|")]) == 6
    assert len(found["test"]["ActAdd"]["by prompt"]) == 3
    assert (out / f"rivals-{task}.png").is_file()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob(".units/*/*.json")}
    assert run(command).stdout == first
    assert {path: path.stat().st_mtime_ns for path in out.glob(".units/*/*.json")} == stamps


def test_faults_are_one_line(data, tiny_llama, tmp_path):
    for command, said in ((["benchmarks/rivals.py", "toxicity", "--data", str(data), "--out", str(tmp_path)], "train_classifier.py makes one"),
                          (["benchmarks/train_classifier.py", "sentiment", "--data", str(tmp_path), "--model", str(tiny_llama)], "no imdb.jsonl")):
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

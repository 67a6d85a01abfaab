"""Every experiment of benchmarks/paper.py runs from start to end, on a tiny model and a handful of texts."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, TEXT, UNTRACED, hub_config, hub_model, save_checkpoint, write_rows

from benchmarks import paper
from benchmarks.lab import Lab

N = {"perplexity": 3, "token-shifts": 9, "layer-sweep": 3, "positions": 3, "topics": 2, "toxicity": 4,
     "sentiment": 2, "knowledge": 8, "anatomy": 3, "grid": 4}
JUDGED = ("toxicity", "sentiment", "grid")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Made-up texts in the form that paper.py describes."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{a} {b}" for a in TEXT for b in TEXT]
    about = [f"{text} The wedding of the bride was long, and {k} guests came late to it."
             for k, text in enumerate(texts)]
    write_rows(folder, {
        "imdb": [{"text": text, "label": ("pos", "neg")[k % 2], "split": "test"}
                 for k, text in enumerate(texts + about)],
        "brown": [{"text": text} for text in texts],
        "wikitext": [{"text": text} for text in texts],
        "owt_sentences": [{"text": text} for text in texts * 4],
        "rtp_random": [{"text": text[:40 + k % 9]} for k, text in enumerate(texts * 4)],
        "conceptnet": [{"sentence": f"{text[:30]} [MASK].", "answer": "e", "source": ("lama", "other")[k % 2]}
                       for k, text in enumerate(texts)],
    })
    (folder / "an_essay_on_shipping.txt").write_text(" ".join(TEXT), encoding="utf-8")
    (folder / "a_wedding.txt").write_text(" ".join(about[:2]), encoding="utf-8")
    return folder


def arguments(experiment, model, data, out, *more):
    judge = ["--judge", "words:weddings"] if experiment in JUDGED else []
    return [experiment, "--model", str(model), "--data", str(data), "--out", str(out), "-n",
            str(N[experiment]), "--layer", "1", "--seed", "3", *judge, *more]


def run(monkeypatch, module, arguments):
    """The main function of a module of benchmarks, in this process, as if started with these arguments."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def run_process(command):
    environment = {**UNTRACED, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True,
                          encoding="utf-8", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def run_and_read(monkeypatch, arguments, out):
    """-> what was found, and the tables"""
    run(monkeypatch, paper, arguments)
    experiment = arguments[0]
    written = json.loads((out / f"{experiment}.json").read_text(encoding="utf-8"))
    return written["found"], (out / f"{experiment}.md").read_text(encoding="utf-8")


QUICK = ("perplexity", "token-shifts", "toxicity")


@pytest.mark.parametrize("experiment", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long)
                                        for name in N])
def test_an_experiment_writes_its_results(experiment, tiny_llama, data, tmp_path, monkeypatch, capsys):
    run(monkeypatch, paper, arguments(experiment, tiny_llama, data, tmp_path))
    written = json.loads((tmp_path / f"{experiment}.json").read_text(encoding="utf-8"))
    assert (written["experiment"], written["seed"]) == (experiment, 3)
    assert written["versions"]["torch"]
    text = (tmp_path / f"{experiment}.md").read_text(encoding="utf-8")
    assert "|---|" in text
    assert text in capsys.readouterr().out
    assert (tmp_path / f"{experiment}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".part*"))


def test_the_command_of_the_docstring_runs(tiny_llama, data, tmp_path):
    done = run_process(["benchmarks.paper", *arguments("token-shifts", tiny_llama, data, tmp_path)])
    assert (tmp_path / "token-shifts.md").read_text(encoding="utf-8") in done.stdout


@pytest.mark.long
def test_the_protocol_of_the_papers_code_differs(tiny_llama, data, tmp_path, monkeypatch):
    topics = arguments("topics", tiny_llama, data, tmp_path, "--protocol", "code")
    assert "top-p 0.3, penalty 1" in run_and_read(monkeypatch, topics, tmp_path)[1]
    densest = []
    for protocol in ("code", "paper"):
        perplexity = arguments("perplexity", tiny_llama, data, tmp_path, "--protocol", protocol)
        found, _ = run_and_read(monkeypatch, perplexity, tmp_path)
        densest.append(sum(sorted(row["frequency"] for row in found["documents"])[-3:]))
    assert densest[0] > densest[1]


@pytest.mark.long
def test_a_second_run_takes_its_units_from_the_first(tiny_llama, data, tmp_path, monkeypatch):
    knowledge = arguments("knowledge", tiny_llama, data, tmp_path)
    first = run_and_read(monkeypatch, knowledge, tmp_path)
    units = sorted(tmp_path.glob(".units/*/*.json"))
    stamps = [path.stat().st_mtime_ns for path in units]
    units[0].unlink()                           # as if the run had been cut off there
    assert run_and_read(monkeypatch, knowledge, tmp_path) == first
    assert sorted(tmp_path.glob(".units/*/*.json")) == units
    assert [path.stat().st_mtime_ns for path in units[1:]] == stamps[1:]
    assert units[0].stat().st_mtime_ns > stamps[0]


def test_other_texts_and_settings_are_other_units(tiny_llama, data, tmp_path):
    other = write_rows(tmp_path, {"conceptnet": [{"sentence": "The gulls are [MASK].", "answer": "e"}]})
    model = save_checkpoint(tmp_path / "model", hub_model(hub_config("llama"), seed=1))

    def units(**changes):
        settings = {"experiment": "knowledge", "model": tiny_llama, "data": data, "out": tmp_path, "n": 8,
                    "seed": 3, "dtype": "float32", "device": "cpu"}
        return Lab(SimpleNamespace(**{**settings, **changes}), (0, 1)).units

    assert units() == units()
    changes = ({"data": other}, {"model": model}, {"seed": 4}, {"n": 9}, {"experiment": "grid"})
    assert len({units(), *(units(**change) for change in changes)}) == 6


@pytest.mark.long
@pytest.mark.parametrize("experiment", ["knowledge", "perplexity"])
def test_any_number_of_processes_finds_the_same(experiment, tiny_llama, data, tmp_path):
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        start = ("torch.distributed.run", "--standalone", "--nproc-per-node", processes)
        run_process([*start, "-m", "benchmarks.paper", *arguments(experiment, tiny_llama, data, out)])
        found.append(json.loads((out / f"{experiment}.json").read_text(encoding="utf-8"))["found"])
    assert found[0] == found[1]


@pytest.mark.parametrize(("experiment", "change", "message"), [
    ("knowledge", {"--data": "nothing"}, "no conceptnet.jsonl in"),
    ("knowledge", {"--model": "nothing"}, "nothing"),
    ("grid", {"--judge": "nobody"}, "there is no judge 'nobody'"),
    ("anatomy", {"--n": "1"}, "--n takes 2 or more"),
])
def test_a_fault_is_one_line(experiment, change, message, tiny_llama, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changed = [part for pair in change.items() for part in pair]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, paper, [*arguments(experiment, tiny_llama, data, tmp_path / "out"), *changed])
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last

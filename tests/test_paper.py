"""Every experiment of benchmarks/paper.py runs from start to end, on a tiny model and a handful of texts."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, TEXT, UNTRACED, write_rows

FEW = ["--layer", "1", "--seed", "3"]
N = {"perplexity": 3, "token-shifts": 9, "layer-sweep": 3, "positions": 3, "topics": 2, "toxicity": 4, "sentiment": 2, "knowledge": 8,
     "anatomy": 3, "grid": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts in the form that paper.py names, made up."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{a} {b}" for a in TEXT for b in TEXT]
    about = [f"{text} The wedding of the bride was long, and {k} guests came late to it." for k, text in enumerate(texts)]
    rows = {
        "imdb": [{"text": text, "label": ("pos", "neg")[k % 2], "split": "test"} for k, text in enumerate(texts + about)],
        "brown": [{"text": text} for text in texts],
        "wikitext": [{"text": text} for text in texts],
        "owt_sentences": [{"text": text} for text in texts * 4],
        "rtp_random": [{"text": text[:40 + k % 9]} for k, text in enumerate(texts * 4)],
        "conceptnet": [{"sentence": f"{text[:30]} [MASK].", "answer": "e", "source": ("lama", "other")[k % 2]} for k, text in enumerate(texts)],
    }
    write_rows(folder, rows)
    (folder / "an_essay_on_shipping.txt").write_text(" ".join(TEXT), encoding="utf-8")
    (folder / "a_wedding.txt").write_text(" ".join(about[:2]), encoding="utf-8")
    return folder


def command(experiment, model, data, out, *more):
    places = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return ["-m", "benchmarks.paper", experiment, *places, "-n", str(N[experiment]), *FEW, *more]


def run(arguments, fails=False, python=(sys.executable,)):
    environment = {**UNTRACED, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run([*python, *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", env=environment, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr
    return done


@pytest.mark.parametrize("experiment", list(N))
def test_it_runs_and_says_what_it_found(experiment, tiny_llama, data, tmp_path):
    judged = ["--judge", "words:weddings"] if experiment in ("toxicity", "sentiment", "grid") else []
    done = run(command(experiment, tiny_llama, data, tmp_path, *judged))
    written = json.loads((tmp_path / f"{experiment}.json").read_text(encoding="utf-8"))
    assert written["experiment"] == experiment
    assert written["seed"] == 3
    assert written["versions"]["torch"]
    text = (tmp_path / f"{experiment}.md").read_text(encoding="utf-8")
    assert "|---|" in text
    assert text in done.stdout
    assert (tmp_path / f"{experiment}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".part*"))


def test_the_ways_of_the_papers_code_are_other_ways(tiny_llama, data, tmp_path):
    run(command("topics", tiny_llama, data, tmp_path, "--protocol", "code"))
    assert "top-p 0.3, penalty 1" in (tmp_path / "topics.md").read_text(encoding="utf-8")
    densest = json.loads(run_and_read(command("perplexity", tiny_llama, data, tmp_path, "--protocol", "code"), tmp_path / "perplexity.json"))
    drawn = json.loads(run_and_read(command("perplexity", tiny_llama, data, tmp_path), tmp_path / "perplexity.json"))
    frequencies = [sorted((row["frequency"] for row in some["found"]["documents"]), reverse=True)[:3] for some in (densest, drawn)]
    assert sum(frequencies[0]) > sum(frequencies[1])


def run_and_read(arguments, path):
    run(arguments)
    return path.read_text(encoding="utf-8")


def test_a_second_run_takes_all_from_the_first_and_says_the_same(tiny_llama, data, tmp_path):
    run(command("knowledge", tiny_llama, data, tmp_path))
    first = (tmp_path / "knowledge.md").read_text(encoding="utf-8")
    units = sorted(tmp_path.glob(".units/*/*.json"))
    stamps = [path.stat().st_mtime_ns for path in units]
    units[0].unlink()                           # as if the run had been cut off there
    run(command("knowledge", tiny_llama, data, tmp_path))
    assert (tmp_path / "knowledge.md").read_text(encoding="utf-8") == first
    assert sorted(tmp_path.glob(".units/*/*.json")) == units
    assert [path.stat().st_mtime_ns for path in units[1:]] == stamps[1:]
    assert units[0].stat().st_mtime_ns > stamps[0]


def test_other_texts_are_not_mistaken_for_those_already_measured(tiny_llama, data, tmp_path):
    other = tmp_path / "data"
    other.mkdir()
    row = {"sentence": "The gulls are [MASK].", "answer": "e", "source": "lama"}
    (other / "conceptnet.jsonl").write_text((json.dumps(row) + "\n") * 9, encoding="utf-8")
    run(command("knowledge", tiny_llama, data, tmp_path))
    run(command("knowledge", tiny_llama, other, tmp_path))
    assert len(list(tmp_path.glob(".units/*"))) == 2


@pytest.mark.parametrize("experiment", ["knowledge", "perplexity"])
def test_any_number_of_processes_finds_the_same(experiment, tiny_llama, data, tmp_path):
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        run(command(experiment, tiny_llama, data, out), python=start)
        found.append(json.loads((out / f"{experiment}.json").read_text(encoding="utf-8"))["found"])
    assert found[0] == found[1]


def test_faults_are_one_line(tiny_llama, data, tmp_path):
    for arguments, said in ((command("knowledge", tiny_llama, tmp_path, tmp_path / "out"), "no conceptnet.jsonl in"),
                            (command("knowledge", tmp_path / "nothing", data, tmp_path / "out"), "nothing"),
                            ([*command("grid", tiny_llama, data, tmp_path / "out"), "--judge", "nobody"], "there is no judge 'nobody'"),
                            ([*command("anatomy", tiny_llama, data, tmp_path / "out"), "--n", "1"], "--n takes 2 or more")):
        done = run(arguments, fails=True)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr

"""Every experiment of benchmarks/paper.py runs from start to end, on a tiny model and a handful of texts."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TEXT, UNTRACED, write_rows
from safetensors.torch import load_file, save_file

from benchmarks import layers, paper, rows, web_judges
from benchmarks.lab import Lab
from benchmarks.prompts import split
from ministeer import Steer, load, steering_vector
from ministeer.attention import attention_pattern, merge_heads
from ministeer.methods.inside_blocks import block_parts
from ministeer.steering import steering_vectors

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
    assert not list(tmp_path.glob(".*part*"))


@pytest.mark.long
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


def changed_checkpoint(folder, copy, change):
    """A copy of the checkpoint in which one thing differs, as late in its file as can be."""
    shutil.copytree(folder, copy)
    name = "tokenizer.json" if change == "tokenizer" else "config.json"
    content = json.loads((copy / name).read_text(encoding="utf-8"))
    if change == "weights":
        tensors = load_file(copy / "model.safetensors")
        tensors["model.layers.3.mlp.down_proj.weight"][-1, -1] += 1
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    elif change == "tokenizer":
        content["normalizer"] = {"type": "Lowercase"}
    else:
        for settings in (content, content.get("rope_parameters", {})):
            if change in settings:
                settings[change] *= 2
    (copy / name).write_text(json.dumps(content), encoding="utf-8")
    return copy


@pytest.mark.parametrize("change", [
    {"data": "other"}, {"seed": 4}, {"n": 9}, {"experiment": "grid"}, {"dtype": "bfloat16"},
    {"judge": "words:music"}, "weights", "rms_norm_eps", "rope_theta", "tokenizer", "judge's version",
    "library's version"])
def test_whatever_results_depend_on_makes_other_units(tiny_llama, data, tmp_path, monkeypatch, change):
    write_rows(tmp_path, {"conceptnet": [{"sentence": "The [MASK].", "answer": "e", "source": "x"}]})

    def units(**changes):
        lab = Lab(SimpleNamespace(**{
            "experiment": "knowledge", "model": tiny_llama, "data": data, "out": tmp_path, "n": 8, "seed": 3,
            "dtype": "float32", "device": "cpu", "judge": "words:art", **changes}), (0, 1))
        lab.judge("vader")
        lab.rows("conceptnet.jsonl", sentence=str, answer=str, source=str)
        return lab.units

    first, changes = units(), change if isinstance(change, dict) else {}
    assert units() == first
    if change == "judge's version":
        monkeypatch.setitem(web_judges.judges.TOPIC_WORDS, "art", frozenset({"fresco"}))
    elif change == "library's version":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
    elif not changes:
        changes = {"model": changed_checkpoint(tiny_llama, tmp_path / "model", change)}
    assert units(**{**changes, **({"data": tmp_path} if "data" in changes else {})}) != first


def strength(model, tokenizer, prompts, vector, layer, coeff):
    """|coeff * vector| over the norm of resid[layer], both means over rows or positions, without BOS."""
    streams = [model(torch.tensor([tokenizer.encode(prompt)]))[1][layer][0, 1:] for prompt in prompts]
    norm = torch.cat(streams).double().square().sum(dim=-1).sqrt().mean()
    return float(abs(coeff) * vector.double().square().sum(dim=-1).sqrt().mean() / norm)


def test_a_coefficient_is_printed_with_its_strength(tiny_llama, data, tmp_path, monkeypatch):
    _, text = run_and_read(monkeypatch, arguments("toxicity", tiny_llama, data, tmp_path), tmp_path)
    model, tokenizer = load(tiny_llama)
    _, test, rest = split(rows.parse((data / "rtp_random.jsonl").read_bytes(), "x.jsonl", text=str), 3)
    prompts = [row["text"] for row in [*test, *rest]][:N["toxicity"]]
    vector = steering_vector(model, tokenizer, " love", " hate", 1).vector
    size = strength(model, tokenizer, prompts, vector, 1, 2)
    assert f"before block 1, coeff 2 ({size:.2f} × the mean norm); 4 prompts" in text


@pytest.mark.long
def test_another_model_of_a_judge_is_asked_and_named(tiny_llama, data, tmp_path, monkeypatch):
    monkeypatch.setattr(web_judges.OpenAI, "score", lambda judge, text: float(judge.model == "B"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    scores = {}
    for model in ("A", "B", "A"):
        monkeypatch.setenv("OPENAI_MODEL", model)
        toxicity = arguments("toxicity", tiny_llama, data, tmp_path, "--judge", "openai:art")
        found, text = run_and_read(monkeypatch, toxicity, tmp_path)
        assert f"1 if {model} says" in text
        scores[model] = found["results"]["unsteered"]["each"]
    assert scores == {"A": [0] * 20, "B": [1] * 20}


@pytest.mark.long
def test_two_runs_into_one_folder_both_finish(tiny_llama, data, tmp_path):
    command = ["-m", "benchmarks.paper", *arguments("toxicity", tiny_llama, data, tmp_path)]
    runs = [subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                             env={**UNTRACED, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], errors
    written = {path.suffix for path in tmp_path.iterdir() if path.is_file()}
    assert written == {".json", ".md", ".png", ".sqlite"}


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
    ("knowledge", {"--data": "nothing"}, "no file conceptnet.jsonl in nothing"),
    ("knowledge", {"--model": "nothing"}, "nothing"),
    ("knowledge", {"--model": "\x1b[31m"}, "no model '·[31m' here"),
    ("knowledge", {"--data": "pipes"}, "no file conceptnet.jsonl in pipes"),
    ("knowledge", {"--out": "pipes"}, "pipes/knowledge.md' cannot be written: it is a device, a pipe"),
    ("knowledge", {"--data": "bad"}, "conceptnet.jsonl, line 2: it has no 'answer'."),
    ("anatomy", {"--data": "few"}, "--data has 1 sentences of more than 12 tokens; at least 3 are needed."),
    ("grid", {"--judge": "nobody"}, "there is no judge 'nobody'"),
    ("anatomy", {"--n": "1"}, "--n takes 2 or more"),
])
def test_a_fault_is_one_line(experiment, change, message, tiny_llama, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("pipes", "bad", "few"):
        (tmp_path / folder).mkdir()
    for name in ("conceptnet.jsonl", "knowledge.md"):
        os.mkfifo(tmp_path / "pipes" / name)
    row = {"sentence": "", "answer": "", "source": ""}
    write_rows(tmp_path / "few", {"owt_sentences": [{"text": TEXT[0]}, {"text": ""}]})
    write_rows(tmp_path / "bad", {"conceptnet": [row, {"sentence": ""}]})
    changed = [part for pair in change.items() for part in pair]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, paper, [*arguments(experiment, tiny_llama, data, tmp_path / "out"), *changed])
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last
    assert last.isprintable()


GOOD = {"text": "naïve", "toxicity": 1, "more": [0]}
FIELDS = {"text": str, "toxicity": float | None}


@pytest.mark.parametrize(("line", "fault"), [
    (b"not JSON", "Expecting value"), (b'{"text": "cut', "Unterminated string"),
    (b"\xff\xfe", "can't decode byte"),
    (b"[" * 100_000, "recursion"), (b"[]", "it is a list, not an object"),
    (b"null", "it is a NoneType, not an object"),
    (b'{"text": "x"}', "it has no 'toxicity'"), (b'{"toxicity": 1}', "it has no 'text'"),
    (b"{}" * 2 ** 20, "it has 2097152 bytes, and at most 1048576 are read"),
    *((json.dumps({**GOOD, "text": value}).encode(), f"its 'text' is {json.dumps(value)}.")
      for value in (None, 1, ["x"], {})),
    *((json.dumps({**GOOD, "toxicity": value}).encode(), "its 'toxicity' is ")
      for value in ("0.5", True, [], -0.1, 2, 10 ** 400, float("nan"), float("inf"))),
    (b'{"text": "\\ud800", "toxicity": 0}', "surrogates not allowed"),
    (json.dumps({**GOOD, "text": 5}).replace("5", "9" * 5000).encode(), "Exceeds the limit"),
])
def test_a_bad_line_is_named(line, fault):
    data = b"\n".join([json.dumps(GOOD).encode(), b"", line])
    with pytest.raises(ValueError, match="line 3: ") as error:
        rows.parse(data, "folder/x.jsonl", **FIELDS)
    message = str(error.value)
    assert message.startswith("folder/x.jsonl, line 3: ")
    assert fault in message
    assert message.endswith("Every line is a JSON object with text (a string), "
                            "toxicity (a number from 0 to 1, or null).")
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n \n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_may_end_and_begin_in_other_ways(mark, end):
    data = mark + json.dumps(GOOD, ensure_ascii=False).encode() + end
    assert rows.parse(data + data[len(mark):], "x.jsonl", **FIELDS) == [
        {"text": "naïve", "toxicity": 1}] * 2


def test_a_text_that_is_not_in_utf8_is_named():
    assert rows.parse("naïve\n".encode(), "x.txt") == "naïve\n"
    with pytest.raises(ValueError, match=r"x\.txt is not a text in UTF-8"):
        rows.parse(b"na\xefve", "x.txt")


# Why some layers can be steered: layers.py

def test_the_sink_is_taken_out_of_the_largest_dimensions():
    steer = layers.without(Steer(1, torch.tensor([[1.0, -9, 2, 3], [8, 0, 0, 1]])), 2)
    assert torch.equal(steer.vector, torch.tensor([[0.0, 0, 2, 3], [0, 0, 0, 1]]))


def test_a_patched_head_sees_position_1_without_the_vector(tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    plain = model.residuals(ids)
    steered = model.residuals(ids, steering_vector(model, tokenizer, "a", "b", 1))
    unchanged = layers.patched(model, plain[2], plain[2], 2)
    assert unchanged.shape[0] == model.config.n_head
    assert torch.allclose(unchanged, plain[-1].expand_as(unchanged), atol=1e-4)
    patched = layers.patched(model, steered[2], plain[2], 2)
    assert not torch.allclose(patched[0], patched[1], atol=1e-4)
    # Position 0 comes before the change; position 1 itself is computed with patched keys and values, too.
    assert torch.allclose(patched[:, 0], steered[-1][:, 0].expand_as(patched[:, 0]), atol=1e-4)
    everywhere = layers.patched(model, steered[2], steered[2], 2)
    assert torch.allclose(everywhere, steered[-1].expand_as(everywhere), atol=1e-4)
    # By hand: the output of one head, with the pattern written out.
    norm, attention = block_parts(model.blocks[2])
    rope = model.rope(torch.arange(ids.shape[1]))
    q, k, v = attention.qkv(norm(steered[2]), rope)
    _, k_plain, v_plain = attention.qkv(norm(plain[2]), rope)
    head, group = 1, 1 // (q.shape[1] // k.shape[1])
    k, v = k.clone(), v.clone()
    k[0, group, 1], v[0, group, 1] = k_plain[0, group, 1], v_plain[0, group, 1]
    one = attention_pattern(q, k) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    q, k, v = attention.qkv(norm(steered[2]), rope)
    mixed = attention_pattern(q, k) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    mixed[0, head] = one[0, head]
    out = attention.o_proj if hasattr(attention, "o_proj") else attention.c_proj
    block = model.blocks[2]
    y = steered[2] + out(merge_heads(mixed))
    y = y + block.mlp((block.post_attention_layernorm if hasattr(block, "self_attn") else block.ln_2)(y))
    expected = model.run(y, torch.arange(ids.shape[1]), first_layer=3)[-1]
    assert torch.allclose(patched[head], expected[0], atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("experiment", ["sink", "readers"])
def test_the_study_of_layers_runs(experiment, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "WEDDING_WORDS", ("love", "hate", "you"))
    found, text = run_and_read(monkeypatch, [experiment, "--model", str(tiny_llama), "--out", str(tmp_path),
                                             "-n", "3", "--layer", "1"], tmp_path)
    assert "|---|" in text
    if experiment == "sink":
        assert len(found["counts"]) == 4 * 4 * 6
    else:
        assert len(found["drops"]) == 3 * 4 * 6     # three blocks of four heads each, six vectors
        assert len(found["shifts"]) == 4 * 6
        model, tokenizer = load(tiny_llama)
        for l, vector in enumerate(steering_vectors(model, tokenizer, " weddings", " ", range(4))):
            size = strength(model, tokenizer, layers.PROMPTS[:3], vector.vector, l, 1)
            assert f"\n| {l} | {size:.2f} | " in text

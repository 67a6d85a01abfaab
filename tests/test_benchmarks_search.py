"""search.py: its cells, its rounds, its controls, on a tiny model and made-up texts."""

import contextlib
import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, write_rows
from test_benchmarks_paper import run

import ministeer
from benchmarks import linear_judge, search, search_pairs
from benchmarks.search import EVERY, FRONT
from ministeer.baselines import logits
from ministeer.evaluation.judges import judge

SMALL = {"ROUNDS": ((1, 24), (2, 12), (3, 4)), "FINALS": ((2, 2), (3, 1)), "TRAINING": 40,
         "PAIRS": {task: [(" love", " hate"), (" kind", " mean"), ("I love you", "I hate you"), (" a", " b")]
                   for task in search.PAIRS},
         "WORDS": dict.fromkeys(search.PAIRS, (" love you ", " hate me mean "))}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw = random.Random(0)
    reviews = [{"text": " ".join([("I hate it.", "I love it.")[k % 2], *draw.choices(TEXT, k=8), str(k)]),
                "label": ("neg", "pos")[k % 2], "split": ("train", "test")[k % 4 > 1]} for k in range(480)]
    prompts = [{"text": f"The harbour and the {k}"} for k in range(200)]
    return write_rows(tmp_path_factory.mktemp("data"), {"imdb": reviews, "rtp_random": prompts})


@pytest.fixture
def lab(tiny):
    model, tokenizer = tiny
    return SimpleNamespace(model=model, tokenizer=tokenizer, args=SimpleNamespace(front=False))


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(search, name, value)


# What is searched

def test_there_are_24_pairs_that_fit_and_no_two_alike():
    for task, pairs in search_pairs.PAIRS.items():
        assert len({*pairs}) == len(pairs) == 24
        assert all(plus != minus for plus, minus in pairs)
        assert len(search_pairs.CHATS[task]) == 2
    assert search_pairs.PAIRS["pos-to-neg"][0] == search_pairs.PAIRS["neg-to-pos"][0][::-1]


def test_each_vector_fits_the_shortest_prompt_and_each_word_is_one_token(smollm2):
    _, tokenizer = ministeer.load(smollm2)
    for task, longest in (("toxicity", 5), ("neg-to-pos", 9)):
        texts = [text for pair in search_pairs.PAIRS[task] for text in pair]
        assert max(len(tokenizer.encode(text)) - 1 for text in texts) == longest
        assert longest <= search.READ + len(tokenizer.encode(search_pairs.CUES[task], bos=False))
        for words in search_pairs.WORDS[task]:
            assert len(set(search.word_ids(tokenizer, words.split()))) == 20


def test_shuffled_pairs_have_no_contrast_and_use_each_text_once():
    pairs = [(f"+{k}", f"-{k}") for k in range(6)]
    mixed = search.shuffled(pairs, 0)
    assert sorted(text for pair in mixed for text in pair) == sorted(text for pair in pairs for text in pair)
    assert all(a[0] == b[0] for a, b in mixed)
    assert len(mixed) == 6
    assert search.shuffled(pairs, 1) != mixed == search.shuffled(pairs, 0)


def test_strength_1_is_the_mean_norm_of_the_stream(lab, small):
    norms = search.stream_norms(lab, TEXT)
    ids = [torch.tensor([lab.tokenizer.encode(text)]) for text in TEXT]
    by_hand = [torch.stack([lab.model.residuals(row)[1][0, 1:].norm(dim=-1).mean() for row in ids]).mean()]
    assert norms[1] == pytest.approx(float(by_hand[0]), rel=1e-5)
    for kind in ("pairs", "random 3", "shuffled 0"):
        found = search.directions(lab, "toxicity", kind, norms)
        assert [direction.place for direction in found] == [FRONT] * 4 + [EVERY] * 5
        for direction in found:
            steer = direction.at(1, 0.5)
            assert float((steer.coeff * steer.vector).norm(dim=-1).mean()) == pytest.approx(
                0.5 * float(norms[1]), rel=1e-4)
    lab.args.front = True
    for direction, other in zip(search.directions(lab, "toxicity", kind, norms), found[:4], strict=True):
        assert direction.place == FRONT and torch.equal(direction.steers[1].vector, other.steers[1].vector)


def test_a_random_search_has_the_shapes_of_the_real_one_and_other_vectors(lab, small):
    norms = search.stream_norms(lab, TEXT)
    real, control, other = (search.directions(lab, "toxicity", kind, norms)
                            for kind in ("pairs", "random 0", "random 1"))
    assert len(search.all_cells(real)) == len(search.all_cells(control))
    vectors = [[direction.steers[1].vector for direction in found] for found in (real, control, other)]
    for a, b, c in zip(*vectors, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a.norm(dim=-1), b.norm(dim=-1), rtol=1e-4)
        assert not torch.equal(b, c)
    for a in range(4, 9):
        for b in range(a):
            assert not torch.equal(vectors[1][a], vectors[1][b])


def test_texts_that_end_alike_give_no_cell_before_block_0(lab, monkeypatch):
    monkeypatch.setattr(search, "PAIRS", {"toxicity": [("a b", "c b"), ("a", "b")]})
    found = search.directions(lab, "toxicity", "pairs", search.stream_norms(lab, TEXT))
    assert {i for i, layer, _ in search.all_cells(found) if layer == 0} == {0, 1, 3, 4}
    assert {i for i, layer, _ in search.all_cells(found) if layer == 1} == {0, 1, 2, 3, 4}


# The rounds

def test_log_odds_are_those_of_the_model_under_each_steer(lab, small, monkeypatch):
    monkeypatch.setattr(search, "ROWS", 7)
    found = search.directions(lab, "toxicity", "pairs", search.stream_norms(lab, TEXT))
    steers = [found[i].at(1, strength) for i, layer, strength in search.all_cells(found) if layer == 1]
    kind, unkind = [5, 9], [7]
    scores = search.log_odds(lab.model, lab.tokenizer, TEXT[:2], steers, kind, unkind)
    assert len(scores) == len(steers) == 9 * 12
    for i in (0, 30, 100):
        expected = 0
        for text in TEXT[:2]:
            logits, _ = lab.model(torch.tensor([lab.tokenizer.encode(text)]), steers[i])
            p = logits[0, -1].softmax(-1)
            expected += float((p[5] + p[9]).log() - p[7].log()) / 2
        assert scores[i] == pytest.approx(expected, abs=1e-4)


def test_keep_takes_from_each_group_in_turn():
    cells, groups = [*"abcdef"], ["x", "x", "x", "x", "y", "y"]
    scores = [9, 8, 7, 6, 1, 2]
    assert search.keep(cells, scores, groups, 4) == ["a", "f", "b", "e"]
    assert search.keep(cells, scores, groups, 99) == ["a", "f", "b", "e", "c", "d"]


# The test

def test_all_conditions_share_draws_however_many_continuations_and_chunks(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    lab = SimpleNamespace(model=model, tokenizer=tokenizer, args=SimpleNamespace(seed=3),
                          run=lambda units, work: {tuple(unit): work(*unit) for unit in units})
    lab.generate = lambda prompts, n, new, steer, sampling, seed: ministeer.generate(
        model, tokenizer, prompts, n, new, steer or (), seed=seed, **sampling)
    one = object.__new__(search.Search)
    one.lab, one.sign, one.new, one.test = lab, 1, 5, TEXT[:3]
    texts = []

    def judge(batch):
        texts.append(batch)
        return [0.0] * len(batch)

    judge.name = judge.version = "none"
    monkeypatch.setattr(search, "ROWS", 4)
    one.test_once({"three": (None, 3), "one": (None, 1), "mixer": (logits.unsteered(), 1)}, [judge])
    three = [text for batch in texts[:3] for text in batch]         # one prompt in each chunk
    assert len(three) == 9
    assert texts[3] == texts[4] == three[::3]


def test_the_estimate_counts_every_cell_and_text(tiny_llama, data, small, tmp_path, monkeypatch, capsys):
    def an_hour_each(work):
        work()
        return 3600 * search.ROWS

    monkeypatch.setattr(search, "seconds", an_hour_each)
    run(monkeypatch, search, ["neg-to-pos", "--data", data, "--model", tiny_llama, "--out", tmp_path,
                              "-n", "2", "--controls", "1", "--estimate"])
    # Vectors, layers, strengths, signs. One vector before layer 0 is zero: both texts end with " you".
    cells = ((4 + 5) * 4 - 1) * 6 * 2
    searches = 3 * (cells + 2 * 24 + 3 * 12 + 2 * 4 + 3 * 2)    # the rest of SMALL's rounds
    texts = 2 * ((1 + 3) * 3 + 5) * 64 / 40
    assert f"about {searches + texts:.1f} hours" in capsys.readouterr().out
    assert not (tmp_path / "search-neg-to-pos.json").exists()


def test_other_pairs_make_other_units(tiny_llama, data, small, tmp_path, monkeypatch):
    command = ["toxicity", "--data", data, "--model", tiny_llama, "--out", tmp_path, "-n", "2"]
    monkeypatch.setattr(search.Search, "best", lambda search, kind: pytest.fail(search.lab.units.name))
    names = set()
    for pairs in (SMALL["PAIRS"], {**SMALL["PAIRS"], "toxicity": SMALL["PAIRS"]["toxicity"][1:]}):
        monkeypatch.setattr(search, "PAIRS", pairs)
        with pytest.raises(pytest.fail.Exception) as end:
            run(monkeypatch, search, command)
        names.add(str(end.value))
    assert len(names) == 2


# Judges

def test_the_second_judge_learns_what_the_labels_say():
    rows = [{"text": f"the film {k} was {word} and long " * 12, "label": label}
            for k in range(20) for word, label in (("superb", "pos"), ("dreadful", "neg"))]
    linear = linear_judge.linear(rows)
    good, bad = linear(["it was superb", "it was dreadful"])
    assert 1 >= good > 0.3 > -0.3 > bad >= -1
    assert linear_judge.accuracy(linear, rows) == (1, 1)
    assert linear_judge.accuracy(judge("vader"), [{"text": "I love it", "label": "neg"}] * 2
                                 + [{"text": "I hate it " * 60, "label": "neg"}] * 2) == (0.5, 1)
    with pytest.raises(ValueError, match="labels pos and neg"):
        linear_judge.linear(rows[::2])


# The whole

@pytest.mark.long
@pytest.mark.parametrize("task", ["neg-to-pos", "toxicity-front"])
def test_a_search_runs_once_and_its_winner_can_be_loaded(task, tiny_llama, data, small, tmp_path,
                                                         monkeypatch, capsys):
    command = [task.removesuffix("-front"), "--data", data, "--model", tiny_llama, "--out", tmp_path,
               "-n", "4", "--repeats", "2", "--controls", "1"]
    command += ["--rivals", "Prompted", "LMA=1"] if task == "neg-to-pos" else ["--front"]
    run(monkeypatch, search, command)
    first = capsys.readouterr().out
    found = json.loads((tmp_path / f"search-{task}.json").read_text(encoding="utf-8"))
    assert (tmp_path / f"search-{task}.md").read_text(encoding="utf-8") == first.rstrip("\n") + "\n"
    assert (tmp_path / f"search-{task}.png").is_file()
    assert {*found["best"]} == {"pairs", "random 0", "shuffled 0"}
    names = ["unsteered", search.WINNER, *search.RANDOM, "best of random 0", "best of shuffled 0"]
    names += ["Prompted", "LMA 1"] if task == "neg-to-pos" else []
    assert [*found["test"]] == names
    counts = found["best"]["pairs"]["counts"]
    assert counts[0] >= (8 if task == "neg-to-pos" else 4) * 12 and counts[1:] == [24, 12, 4, 2]
    steer = ministeer.Steer.load(tmp_path / f"search-{task}.safetensors")
    assert steer.note["cell"] == found["best"]["pairs"]["cell"] in first
    judges = ["vader", "linear"] if task == "neg-to-pos" else ["profanity"]
    assert {name for name, *_ in found["tests"]} == {*judges}
    assert all(len(found["test"][name][judge]) == 4 for name in names for judge in judges)


@pytest.mark.long
def test_more_controls_keep_what_is_done(tiny_llama, data, small, tmp_path, monkeypatch):
    command = ["toxicity", "--data", data, "--model", tiny_llama, "--out", tmp_path, "-n", "2"]
    kept = [{}]
    for controls in ("0", "1"):
        run(monkeypatch, search, [*command, "--controls", controls])
        kept.append({path: path.stat().st_mtime_ns for path in tmp_path.glob(".units/*/*.json")})
        assert kept[-1].items() > kept[-2].items()


@pytest.mark.long
def test_every_process_takes_part_in_all_work(tiny_llama, data, small, tmp_path, monkeypatch):
    done, run_units = {0: [], 1: []}, search.Lab.run        # one that is left alone would wait for the others
    for rank, calls in done.items():
        monkeypatch.setattr(search.jobs, "workers", lambda _, rank=rank: contextlib.nullcontext((rank, 2)))
        monkeypatch.setattr(search.Lab, "run", lambda lab, units, work, calls=calls:
                            calls.append(units) or run_units(lab, units, work))
        run(monkeypatch, search, ["toxicity", "--data", data, "--model", tiny_llama, "--out", tmp_path,
                                  "-n", "2", "--controls", "0"])
    assert done[0] == done[1] != []


@pytest.mark.parametrize(("arguments", "message"), [
    (["-n", "0"], "--n must be 1 or more; given: 0"),
    (["--controls", "-1"], "--controls must be 0 to 100; given: -1"),
    (["--rivals", "LMA=2"], "--rivals LMA=2 is no method of this task with such a strength"),
    (["--rivals", "ActAdd=1"], "--rivals ActAdd=1 is no method"),
    (["--rivals", "Nothing"], "--rivals Nothing= is no method"),
    (["--rivals", "FUDGE=1"], "train_classifier` makes one"),
])
def test_a_fault_is_one_line(arguments, message, tiny_llama, data, small, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, search, ["neg-to-pos", "--data", data, "--model", tiny_llama, "--out", tmp_path,
                                  *arguments])
    assert end.value.code == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert message in line

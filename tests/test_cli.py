"""The command line: in this process where that will do, as a process of its own where exit, signals and streams are the question."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, hub_config, hub_model, save_checkpoint

from ministeer import Steer, __version__, generate, load, steering_vector
from ministeer.cli import SAMPLING, main
from ministeer.checkpoints.fetch import KNOWN
from ministeer.evaluation.judges import WEDDING_WORDS, count_words
from ministeer.cli import columns

fcntl, pty, termios = (pytest.importorskip(name, reason="terminals and signals are tested as POSIX has them") for name in ("fcntl", "pty", "termios"))

MODELS = ["tiny-gpt2", "tiny-llama"]
PROMPT = "I love you because you are kind."
PAIR = ["--plus", " love", "--minus", " hate", "--layer", "2"]
SHORT = ["--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a tiny checkpoint of each family, and one that is damaged."""
    root = tmp_path_factory.mktemp("weights")
    for name in MODELS:
        save_checkpoint(root / name, hub_model(hub_config(name.removeprefix("tiny-"))))
    shutil.copytree(root / "tiny-gpt2", root / "damaged")
    whole = (root / "damaged" / "model.safetensors").read_bytes()
    (root / "damaged" / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    return root


@pytest.fixture
def run(weights, monkeypatch, capsys, tmp_path):
    """run(*argv) -> (exit code, stdout, stderr) of the command line in this process, which stands in an empty folder."""
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(weights))
    monkeypatch.setenv("COLUMNS", "80")         # a terminal that pytest runs in must not count
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        try:
            main([str(a) for a in argv])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def steer(run):
    """steer(*options) -> what `ministeer steer --json` prints, read; on tiny-gpt2 and with the usual pair unless options say otherwise."""
    def steer(*options):
        pair = [] if "--vector" in options else PAIR
        model = [] if "--model" in options else ["--model", "tiny-gpt2"]
        code, out, err = run("steer", PROMPT, "--json", *pair, *model, *SHORT, *options)
        assert (code, err) == (0, "")
        return json.loads(out)

    return steer


def environment(weights, **settings):
    """This process's environment for a child: the package is found, stdout is buffered as it is for users, the width is not set."""
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "PYTHONUNBUFFERED", "PYTHONIOENCODING")}
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return {**env, "PYTHONPATH": path, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "MINISTEER_WEIGHTS": str(weights), **settings}


@pytest.fixture
def process(weights, tmp_path):
    """process(*argv, **environment) -> (exit code, stdout, stderr) of `python -m ministeer` in an empty folder, its output a pipe."""
    def process(*argv, **settings):
        done = subprocess.run([sys.executable, "-m", "ministeer", *argv], capture_output=True, cwd=tmp_path, timeout=120,
                              env=environment(weights, **settings), check=False)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return process


def is_refused(code, out, err):
    """Bad input: one line on stderr, nothing on stdout, exit code 2."""
    return code == 2 and out == "" and err.count("\n") == 1 and err.startswith("ministeer") and err.endswith("\n") and "\x1b" not in err


def split_columns(out):
    """What `steer` prints -> the texts of its two columns, wrapped as they are there."""
    lines = out.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    each = lines[rule].index(" | ")
    pairs = [([], [])]
    for line in lines[rule + 1:]:
        if line.strip() == "|":
            pairs.append(([], []))
        else:
            pairs[-1][0].append(line[:each].rstrip())
            pairs[-1][1].append(line[each + 3:])
    return [["\n".join(pair[side]) for pair in pairs] for side in (0, 1)]


def bare(texts):
    """Without the spaces that wrapping moves, and with a dot for what is not printed."""
    return ["".join(c if c.isprintable() else "·" for c in text if c not in " \n") for text in texts]


# What `steer` prints


@pytest.mark.parametrize("model", MODELS)
def test_json_is_what_the_library_gives(steer, weights, model):
    answer = steer("--model", model, "--coeff", "2", "-n", "2", "--seed", "5")
    lm, tokenizer = load(weights / model)
    love = 2 * steering_vector(lm, tokenizer, " love", " hate", 2)
    sampling = {**SAMPLING, "max_new_tokens": 12, "seed": 5}
    assert answer == {
        "prompt": PROMPT,
        "setting": {"model": model, "plus": " love", "minus": " hate", "layer": 2, "coeff": 2.0, "start": 1, **sampling},
        "unsteered": generate(lm, tokenizer, PROMPT, 2, **sampling),
        "steered": generate(lm, tokenizer, PROMPT, 2, steer=[love], **sampling),
    }
    assert answer["unsteered"] != answer["steered"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("width", [80, 60, 200])
def test_columns_hold_the_same_texts_and_fit(run, steer, monkeypatch, model, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run("steer", PROMPT, *PAIR, "--model", model, "-n", "4", "--coeff", "2")
    assert (code, err) == (0, "")
    answer = steer("--model", model, "-n", "4", "--coeff", "2", "--max-new-tokens", "40")
    left, right = split_columns(out)
    assert (bare(left), bare(right)) == (bare(answer["unsteered"]), bare(answer["steered"]))
    rule = next(line for line in out.splitlines() if line.startswith("---"))
    assert min(width, 120) - 2 < len(rule) <= min(width, 120)       # over 120, lines would be hard to read
    assert max(map(len, out.splitlines())) <= min(width, 120)


def test_the_setting_says_what_is_added_where(run):
    out = run("steer", PROMPT, *PAIR, "--model", "tiny-llama", "--coeff", "0.5", *SHORT, "--top-p", "0.9", "--seed", "7", "-n", "1")[1]
    words = " ".join(out.split())
    assert words.startswith(f"model tiny-llama (llama, 4 layers) prompt {PROMPT} vector ")
    assert ' vector " love" - " hate" before block 2, coeff 0.5 added to "I' in words
    assert " × the norm of the residual stream there sampling n 1, 12 tokens, " in words
    assert " temperature 1, top-p 0.9, penalty 1, seed 7 unsteered" in words


def test_the_same_seed_gives_the_same_output(run, steer):
    first, again = (run("steer", PROMPT, *PAIR, "--model", "tiny-gpt2", *SHORT) for _ in range(2))
    assert first == again
    assert steer("--seed", "1")["unsteered"] != steer()["unsteered"]


def test_coeff_0_steers_nothing(run, steer):
    answer = steer("--coeff", "0")
    assert answer["steered"] == answer["unsteered"]
    left, right = split_columns(run("steer", PROMPT, *PAIR, "--model", "tiny-gpt2", "--coeff", "0")[1])
    assert left == right


@pytest.mark.parametrize("options", [["--coeff", "-3"], ["--minus", " "], ["--layer", "0"], ["--plus", "I love"]], ids="".join)
def test_options_of_the_vector_move_the_steered_texts(steer, options):
    assert steer(*options)["steered"] != steer()["steered"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(steer, weights, dtype):
    texts = steer("--dtype", dtype, "-n", "8", "--top-p", "1")["unsteered"]
    assert texts == generate(*load(weights / "tiny-gpt2", dtype), PROMPT, 8, **{**SAMPLING, "max_new_tokens": 12, "top_p": 1.0})
    assert dtype == "float16" or texts != steer("-n", "8", "--top-p", "1")["unsteered"]         # 8 bits are few enough to show


@pytest.mark.parametrize("option, value", [("--temperature", "0.2"), ("--top-p", "0.99"), ("--freq-penalty", "0"), ("--seed", "3")])
def test_options_of_the_draws_move_the_unsteered_texts(steer, option, value):
    answer, usual = steer(option, value, "-n", "5"), steer("-n", "5")
    assert answer["unsteered"] != usual["unsteered"]
    assert answer["setting"][option[2:].replace("-", "_")] == float(value)


def test_n_and_length(steer):
    three, one = steer("--max-new-tokens", "12"), steer("-n", "1", "--max-new-tokens", "6")
    for name in ("unsteered", "steered"):
        assert (len(three[name]), len(one[name])) == (3, 1)
        start = one[name][0].rstrip("\N{REPLACEMENT CHARACTER}")        # a character may be cut in two at the end
        assert start and three[name][0].startswith(start) and three[name][0] != start
    assert len(set(steer("--temperature", "0")["unsteered"])) == 1


def test_control_characters_of_a_model_do_not_reach_the_terminal(run, monkeypatch):
    evil = "a\x1b[31mred\x07 b\x9b1m c\u202ed\re"
    monkeypatch.setattr("ministeer.generation.generate", lambda *args, **options: [evil])
    code, out, _ = run("steer", f"I love {evil}", *PAIR, "--model", "tiny-gpt2")
    assert code == 0 and "a·[31mred· b·1m c·d·e" in out
    as_json = run("steer", PROMPT, *PAIR, "--model", "tiny-gpt2", "--json")[1]
    assert json.loads(as_json)["steered"] == [evil]
    assert all(c.isprintable() or c == "\n" for c in out + as_json)


def test_columns_of_empty_long_and_many_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = columns(["", "a\n\nb", "x" * 50], ["", " c ", ""]).split("\n")
    assert rows == ["unsteered          | steered", "-" * 18 + " | " + "-" * 18,
                    "                   |",
                    "a                  | c", "b                  |",
                    "                   |",
                    "x" * 18 + " |", "x" * 18 + " |", "x" * 14 + "     |"]


def test_what_a_checkpoint_warns_of_is_a_line_on_stderr(run, weights, tmp_path):
    folder = shutil.copytree(weights / "tiny-gpt2", tmp_path / "novel")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "novel_setting": 1}))
    code, out, err = run("steer", PROMPT, *PAIR, "--model", folder, *SHORT)
    assert code == 0 and "unsteered" in out
    assert err and all(line.startswith("ministeer: warning: config.json") and "novel_setting" in line for line in err.splitlines())


# Saved vectors


@pytest.mark.parametrize("model", MODELS)
def test_a_saved_vector_gives_the_same_output(run, steer, model):
    made = run("steer", PROMPT, *PAIR, "--coeff", "3", "--model", model, *SHORT, "--save", "love.safetensors")
    assert made[0] == 0 and os.listdir() == ["love.safetensors"]
    assert run("steer", PROMPT, "--vector", "love.safetensors", "--model", model, *SHORT) == made
    saved = steer("--vector", "love.safetensors", "--model", model)
    assert saved == steer("--coeff", "3", "--model", model)
    assert steer("--vector", "love.safetensors", "--model", model, "--coeff", "1") == steer("--model", model)


def test_a_vector_stays_with_its_model_unless_told_otherwise(run, steer):
    steer("--save", "love.safetensors")
    refused = run("steer", PROMPT, "--vector", "love.safetensors", "--model", "tiny-llama")
    assert is_refused(*refused) and "another model (tiny-gpt2)" in refused[2] and "--any-model" in refused[2]
    answer = steer("--vector", "love.safetensors", "--model", "tiny-llama", "--any-model")
    assert answer["setting"]["model"] == "tiny-llama"           # the one that runs
    assert answer["steered"] != answer["unsteered"]


def test_a_coeff_for_each_row_needs_a_choice(run, steer):
    Steer(2, torch.ones(1, 32), coeff=torch.tensor([1.0, 2.0, 3.0])).save("sweep.safetensors")
    refused = run("steer", PROMPT, "--vector", "sweep.safetensors", "--model", "tiny-gpt2")
    assert is_refused(*refused) and "--coeff" in refused[2]
    assert steer("--vector", "sweep.safetensors", "--coeff", "2")["setting"]["coeff"] == 2


@pytest.mark.parametrize("start", [1, 50])
def test_a_vector_for_every_position(run, start):
    Steer(2, torch.ones(32), start=start).save("all.safetensors")
    code, out, err = run("steer", PROMPT, "--vector", "all.safetensors", "--model", "tiny-gpt2")
    assert (code, err) == (0, "")
    assert f"added to every position from {start} on" in " ".join(out.split())
    assert ("× the norm" in out) == (start == 1)         # position 50 is behind the prompt


def test_a_save_that_fails_leaves_nothing(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("ministeer.steering.os.replace", full)
    assert is_refused(*run("steer", PROMPT, *PAIR, "--model", "tiny-gpt2", *SHORT, "--save", "love.safetensors"))
    assert os.listdir() == []


# The other commands


def test_models(run, weights, tmp_path, monkeypatch):
    shutil.copytree(weights / "tiny-gpt2", tmp_path / "gpt2")
    shutil.copytree(weights / "tiny-gpt2", tmp_path / "someone" / "theirs")
    shutil.copytree(weights / "tiny-gpt2", tmp_path / ".gpt2-xl.part")
    (tmp_path / "gpt2-large").mkdir()           # empty, so no checkpoint
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(tmp_path))
    code, out, err = run("models")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines() if line and not line.startswith((" ", "also"))}
    assert set(rows) == set(KNOWN)
    assert [name for name in rows if rows[name] == "here"] == ["gpt2"]
    assert rows["smollm2-135m"] == "default"
    assert out.splitlines()[-1] == f"also in {tmp_path}: someone/theirs"
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_models_without_a_weights_folder(run, monkeypatch):
    monkeypatch.setenv("MINISTEER_WEIGHTS", "nowhere")
    code, out, err = run("models")
    assert (code, err) == (0, "") and "here" not in out.replace("nowhere", "").split() and os.listdir() == []


def test_fetch_of_what_is_there_prints_its_folder(run, smollm2, monkeypatch):
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(smollm2.parent))
    assert run("fetch", smollm2.name) == (0, f"{smollm2}\n", "")


def test_version(run):
    assert run("--version") == (0, f"ministeer {__version__}\n", "")


def test_demo(run, smollm2, monkeypatch):
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(smollm2.parent))
    monkeypatch.setitem(SAMPLING, "max_new_tokens", 20)         # half as long as the default, and the effect is there already
    code, out, err = run("demo", "-n", "3", "--seed", "1")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    head, rest = out.split("\nThese are the first three of each. Of all 3, with a word about weddings\n")
    assert 'vector    " weddings" - " " before block 1, coeff 1\n' in head and "penalty 1, seed 1\n" in head
    left, right = split_columns(head)
    assert len(left) == len(right) == 3 and left != right
    words, _, *counts = rest.splitlines()
    assert words == f"({', '.join(sorted(WEDDING_WORDS))}):"
    assert [line[2:17].strip() for line in counts[:3]] == ["unsteered", "steered", "random vectors"]
    for line, texts in zip(counts[:2], (left, right), strict=True):      # all that is counted is shown
        k = sum(count_words(text) > 0 for text in texts)
        interval = ["0% to 56%", "6% to 79%", "21% to 94%", "44% to 100%"][k]       # Wilson's, of k in 3
        assert line[17:].split() == f"{k} of 3 {k / 3:.0%} (95 % interval {interval})".split()
    assert " of 3 " in counts[2] and "(95 % interval " in counts[2]
    assert counts[-1] == "Random vectors: 3 of the steering vector's norm, which share the 3 completions."


# What is refused


@pytest.mark.parametrize("argv, says", [
    ([], "COMMAND"),
    (["dance"], "dance"),
    (["two\nlines", "\x1b[31m"], "COMMAND"),
    (["steer"], "PROMPT"),
    (["steer", "a", "--layer", "two", "--plus", "b"], "two"),
    (["steer", "a", "--plus", "b", "--layer", "1", "two\nlines \x1b[31m"], "unrecognized arguments"),
    (["fetch"], "NAME"),
    (["fetch", "no-such-model"], "Known: smollm2-135m,"),
    (["fetch", ""], "Known"),
    (["demo", "-n", "0"], "-n must be a whole number, 1 or more"),
    (["demo", "--seed", "x"], "--seed"),
])
def test_bad_command_lines(run, argv, says):
    result = run(*argv)
    assert is_refused(*result) and says in result[2]


@pytest.mark.parametrize("options, says", [
    (["--layer", "1"], "either --plus"),
    (["--plus", "a"], "--plus needs --layer"),
    (["--plus", "a", "--layer", "1", "--vector", "v"], "either --plus"),
    (["--vector", "v", "--layer", "1"], "leave out --minus and --layer"),
    (["--vector", "v", "--minus", " "], "leave out --minus and --layer"),
    (["--vector", "v"], "no file v"),
    (["--vector", ""], "no file"),
    (["--vector", "garbage"], "not a steering vector"),
    ([*PAIR, "--any-model"], "--vector"),
    ([*PAIR, "--layer", "4"], "blocks 0 … 3"),
    ([*PAIR, "--layer", "-1"], "blocks 0 … 3"),
    ([*PAIR, "--layer", "1.5"], "1.5"),
    ([*PAIR, "--plus", "  ", "--minus", "  "], "same tokens"),
    ([*PAIR, "--plus", "\udcff"], "surrogate"),
    ([*PAIR, "--plus", "kind " * 40], "do not fit"),
    ([*PAIR, "--coeff", "nan"], "finite"),
    ([*PAIR, "--coeff", "inf"], "finite"),
    ([*PAIR, "--coeff=-inf"], "finite"),
    ([*PAIR, "--coeff", "much"], "much"),
    ([*PAIR, "-n", "0"], "n must be"),
    ([*PAIR, "-n", "-5"], "n must be"),
    ([*PAIR, "-n", "1.5"], "1.5"),
    ([*PAIR, "--max-new-tokens", "0"], "max_new_tokens"),
    ([*PAIR, "--max-new-tokens", "-1"], "max_new_tokens"),
    ([*PAIR, "--max-new-tokens", "1000"], "context of 192"),
    ([*PAIR, "--temperature", "-1"], "temperature"),
    ([*PAIR, "--temperature", "nan"], "temperature"),
    ([*PAIR, "--top-p", "2"], "top_p"),
    ([*PAIR, "--freq-penalty", "inf"], "freq_penalty"),
    ([*PAIR, "--seed", "-1"], "seed"),
    ([*PAIR, "--dtype", "int8"], "float32"),
    ([*PAIR, "--device", "nonsense"], "device 'nonsense' cannot be used"),
    ([*PAIR, "--device", "meta"], "device 'meta' cannot be used"),
    ([*PAIR, "--device", "privateuseone"], "device 'privateuseone' cannot be used"),
    ([*PAIR, "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ([*PAIR, "--model", "nowhere"], "ministeer fetch nowhere"),
    ([*PAIR, "--model", "damaged"], "damaged"),
    ([*PAIR, "--model", "."], "not a checkpoint"),
    ([*PAIR, "--model", "a\nb\x1b[31m"], "no model"),
    ([*PAIR, "--save", "nofolder/v"], "--save 'nofolder/v'"),
    ([*PAIR, "--save", "."], "--save '.'"),
    ([*PAIR, "--save", ""], "--save ''"),
])
def test_bad_options_of_steer(run, options, says):
    Path("garbage").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 no safetensors")
    saved = [] if {"--save", "--vector"} & set(options) else ["--save", "love.safetensors"]
    result = run("steer", PROMPT, "--model", "tiny-gpt2", *SHORT, *saved, *options)
    assert is_refused(*result) and says in result[2]
    assert os.listdir() == ["garbage"]          # nothing is saved, not by halves either


@pytest.mark.parametrize("prompt, says", [
    ("", "do not fit a prompt of 1 tokens"),
    ("caf\udcff", "surrogate"),
    ("word " * 200, "context of 192"),
])
def test_bad_prompts(run, prompt, says):
    result = run("steer", prompt, *PAIR, "--model", "tiny-gpt2")
    assert is_refused(*result) and says in result[2]


@pytest.mark.parametrize("name, content, says", [
    ("config.json", None, "no config.json"),
    ("config.json", b"{", "not valid JSON"),
    ("config.json", b'{"model_type": "bert"}', "bert"),
    ("model.safetensors", None, "no model.safetensors"),
    ("model.safetensors", b"", "damaged"),
    ("tokenizer.json", None, "no tokenizer.json"),
    ("tokenizer.json", b"{}", "not a tokenizer"),
    ("tokenizer_config.json", b"[]", "chat template"),
])
def test_a_model_that_cannot_be_loaded(run, weights, tmp_path, name, content, says):
    folder = shutil.copytree(weights / "tiny-gpt2", tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    result = run("steer", PROMPT, *PAIR, "--model", folder)
    assert is_refused(*result) and says in result[2]


# As a process


@pytest.mark.parametrize("argv", [[], ["demo"], ["steer"], ["fetch"], ["models"]], ids=lambda argv: (argv or ["ministeer"])[0])
def test_help_is_quick_and_fits(weights, argv):
    code = "import sys; from ministeer.cli import main\n" \
           f"try: main({[*argv, '--help']})\n" \
           "finally: assert not {'torch', 'numpy'} & set(sys.modules), 'takes over a second to import'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(weights), timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: ministeer {argv[0] if argv else '[-h]'}")
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_steer_as_a_process(run, process):
    argv = ["steer", PROMPT, *PAIR, "--model", "tiny-llama", *SHORT]
    code, out, err = process(*argv)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert run(*argv) == (0, out, "")           # another process, the same draws


@pytest.mark.parametrize("argv, says", [
    (["dance"], "dance"),
    (["steer", b"caf\xff", *PAIR, "--model", "tiny-gpt2"], "surrogate"),        # a byte that is not UTF-8
    (["steer", PROMPT, *PAIR, "--model", "damaged"], "damaged"),
    (["steer", PROMPT, *PAIR, "--model", "tiny-gpt2", "--device", "nonsense"], "device 'nonsense' cannot be used"),
], ids=lambda x: None if isinstance(x, list) else x)
def test_bad_input_to_a_process(process, argv, says):
    result = process(*argv)
    assert is_refused(*result) and says in result[2]


def test_a_stdout_without_these_letters(process):
    code, out, err = process("steer", "caf\u00e9 \u4f60 is so kind", *PAIR, "--model", "tiny-gpt2", *SHORT, PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "") and out.isascii() and "caf? ? is" in out


@pytest.mark.parametrize("argv", [["models"], ["--help"], ["steer", "--help"]], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_enough(weights, argv, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)                            # what `ministeer models | head -1` comes to, but sure to have happened
    done = subprocess.run([sys.executable, "-m", "ministeer", *argv], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False,
                          env=environment(weights, PYTHONUNBUFFERED=unbuffered))
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk(weights):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "ministeer", "models"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False,
                              env=environment(weights))
    assert is_refused(done.returncode, "", done.stderr.decode()) and b"No space left" in done.stderr


def test_a_closed_stdout(weights):
    done = subprocess.run(["sh", "-c", '"$0" -m ministeer models >&-', sys.executable], capture_output=True, timeout=60, check=False,
                          env=environment(weights))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def in_a_terminal(weights, cwd, *argv, **streams):
    """Start `python -m ministeer` in a new pseudo-terminal of 70 columns -> the process, and the end to read what it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
    child = subprocess.Popen([sys.executable, "-m", "ministeer", *argv], stdin=theirs, **{"stdout": theirs, "stderr": theirs, **streams},
                             cwd=cwd, env=environment(weights, TERM="xterm"))
    os.close(theirs)
    return child, ours


def read_terminal(fd, until=None):
    """What arrives up to the bytes `until`, or to the end."""
    seen = b""
    while until is None or until not in seen:
        try:
            new = os.read(fd, 4096)
        except OSError:                         # Linux says so when the other end is closed
            break
        if not new:
            break
        seen += new
    return seen


def test_in_a_terminal(weights, tmp_path):
    child, terminal = in_a_terminal(weights, tmp_path, "steer", PROMPT, *PAIR, "--model", "tiny-gpt2", *SHORT)
    seen = read_terminal(terminal).decode()
    os.close(terminal)
    assert child.wait(60) == 0
    bar, _, shown = seen.partition("\rmodel ")
    assert "sampling:" in bar and shown.startswith("    tiny-gpt2 (gpt2, 4 layers)\r\n")
    assert max(map(len, shown.split("\r\n"))) == 69


def test_ctrl_c_while_it_samples(weights, tmp_path):
    argv = ["steer", PROMPT, *PAIR, "--model", "tiny-gpt2", "-n", "5000", "--max-new-tokens", "150", "--save", "love.safetensors"]
    child, terminal = in_a_terminal(weights, tmp_path, *argv, stdout=subprocess.PIPE)
    read_terminal(terminal, until=b"sampling:")
    child.send_signal(signal.SIGINT)
    said = read_terminal(terminal)
    os.close(terminal)
    out = child.communicate(timeout=60)[0]
    assert child.returncode == 130 and out == b""
    assert b"Traceback" not in said and said.rstrip().endswith(b"ministeer: interrupted")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("module", [" numpy\n", " torch._C\n", " torch.nn\n"], ids=str.strip)
def test_ctrl_c_while_it_imports(weights, module):
    # -X importtime writes a line to stderr for each module that has been imported: that tells when to interrupt.
    argv = [sys.executable, "-X", "importtime", "-m", "ministeer", "steer", PROMPT, *PAIR, "--model", "tiny-gpt2"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(weights)) as child:
        assert any(line.endswith(module) for line in child.stderr)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and out == ""
    assert "Traceback" not in err and err.endswith("ministeer: interrupted\n")

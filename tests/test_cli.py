"""The command line: in this process, and as its own process where exit codes, signals or streams matter."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, UNTRACED, hub_config, hub_model, save_checkpoint, started, time_limit

from ministeer import Steer, __version__, generate, load, steering_vector
from ministeer.checkpoints.fetch import KNOWN
from ministeer.cli import SAMPLING, columns, main
from ministeer.evaluation.judges import WEDDING_WORDS, count_words
from ministeer.methods.many_pairs import vectors

fcntl, pty, termios = (pytest.importorskip(name, reason="terminals and signals are tested as POSIX has them")
                       for name in ("fcntl", "pty", "termios"))

MODELS = ["tiny-gpt2", "tiny-llama"]
PROMPT = "I love you because you are kind."
PAIR = ["--plus", " love", "--minus", " hate", "--layer", "2"]
# An option that is given again later overrides the earlier one.
ON_GPT2 = ["steer", PROMPT, "--model", "tiny-gpt2", "--max-new-tokens", "12"]
STEER = [*ON_GPT2, *PAIR]
MAIN = [sys.executable, "-m", "ministeer"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a tiny checkpoint of each family, and one that is damaged."""
    root = tmp_path_factory.mktemp("weights")
    for name in MODELS:
        save_checkpoint(root / name, hub_model(hub_config(name.removeprefix("tiny-"))))
    shutil.copytree(root / "tiny-gpt2", root / "damaged")
    data = (root / "damaged" / "model.safetensors").read_bytes()
    (root / "damaged" / "model.safetensors").write_bytes(data[:len(data) // 2])
    return root


@pytest.fixture
def run(weights, monkeypatch, capsys, tmp_path):
    """run(*argv) -> (exit code, stdout, stderr) of the command line in this process, in an empty folder."""
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(weights))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")         # whatever terminal pytest runs in
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = 0
        try:
            main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def succeed(run):
    """succeed(*argv) -> what the command line prints, with exit code 0 and nothing on stderr."""
    def succeed(*argv):
        code, out, err = run(*argv)
        assert (code, err) == (0, "")
        return out
    return succeed


@pytest.fixture
def steer(succeed):
    """steer(*options) -> the parsed output of `steer --json`, with PAIR unless the options name a vector."""
    def steer(*options):
        base = ON_GPT2 if "--vector" in options else STEER
        return json.loads(succeed(*base, "--json", *options))
    return steer


def environment(weights, base=os.environ, **settings):
    """The environment of a child process, which finds the package and buffers stdout as it does for users."""
    left_out = ("COLUMNS", "PYTHONUNBUFFERED", "PYTHONIOENCODING")
    env = {name: value for name, value in base.items() if name not in left_out}
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return {**env, "PYTHONPATH": path, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1",
            "MINISTEER_WEIGHTS": str(weights), **settings}


@pytest.fixture
def process(weights, tmp_path):
    """process(*argv, **environment) -> (exit code, stdout, stderr) of a process in an empty folder.

    shell: redirections, as "2>&-"
    """
    def process(*argv, program=MAIN, stdout=subprocess.PIPE, shell="", **settings):
        shell = ["sh", "-c", f'"$0" "$@" {shell}'] if shell else []
        done = subprocess.run([*shell, *program, *argv], stdout=stdout, stderr=subprocess.PIPE, cwd=tmp_path,
                              env=environment(weights, **settings), timeout=120)
        return done.returncode, (done.stdout or b"").decode(), done.stderr.decode()

    return process


def check_refused(result, *words):
    """Assert exit code 2, nothing on stdout, and one line on stderr that holds the words."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ministeer") and err.endswith("\n") and "\x1b" not in err
    assert all(word in err for word in words)


def split_columns(out):
    """The output of `steer` -> the texts of its two columns, wrapped as they are there."""
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


def without_layout(texts):
    """Texts without the whitespace that wrapping moves, and with a dot for what is not printed."""
    return ["".join(c if c.isprintable() else "·" for c in text if c not in " \n") for text in texts]


# What `steer` prints

@pytest.mark.parametrize("model", MODELS)
def test_json_equals_what_the_library_returns(steer, weights, model):
    answer = steer("--model", model, "--coeff", "2", "-n", "2", "--seed", "5")
    lm, tokenizer = load(weights / model)
    love = 2 * steering_vector(lm, tokenizer, " love", " hate", 2)
    sampling = {**SAMPLING, "max_new_tokens": 12, "seed": 5}
    vector = {"plus": " love", "minus": " hate", "layer": 2, "coeff": 2.0, "start": 1}
    assert answer == {
        "prompt": PROMPT,
        "setting": {"model": model, **vector, **sampling},
        "unsteered": generate(lm, tokenizer, PROMPT, 2, **sampling),
        "steered": generate(lm, tokenizer, PROMPT, 2, steer=[love], **sampling),
    }
    assert answer["unsteered"] != answer["steered"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("width", [80, 60, 200])
def test_columns_hold_the_texts_of_json_and_fit_the_terminal(succeed, steer, monkeypatch, model, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = succeed("steer", PROMPT, *PAIR, "--model", model, "-n", "4", "--coeff", "2")
    answer = steer("--model", model, "-n", "4", "--coeff", "2", "--max-new-tokens", "40")
    for column, name in zip(split_columns(out), ("unsteered", "steered"), strict=True):
        assert without_layout(column) == without_layout(answer[name])
    rule = next(line for line in out.splitlines() if line.startswith("---"))
    assert min(width, 120) - 2 < len(rule) <= min(width, 120)       # lines of more than 120 are hard to read
    assert max(map(len, out.splitlines())) <= min(width, 120)


def test_prints_model_vector_positions_and_sampling(succeed):
    options = ["--model", "tiny-llama", "--coeff", "0.5", "--top-p", "0.9", "--seed", "7", "-n", "1"]
    words = " ".join(succeed(*STEER, *options).split())
    assert words.startswith(f'model tiny-llama (llama, 4 layers) prompt "{PROMPT}" vector ')
    assert ' vector " love" - " hate" before block 2, coeff 0.5, ' in words
    assert " × the mean norm added to \"I" in words
    assert " × the norm of the residual stream there sampling n 1, 12 tokens, " in words
    assert " temperature 1, top-p 0.9, penalty 1, seed 7 unsteered" in words


def test_coeff_0_gives_the_unsteered_texts(steer):
    answer = steer("--coeff", "0")
    assert answer["steered"] == answer["unsteered"]


@pytest.mark.parametrize("texts, option, value", [
    ("steered", "--coeff", "-3"), ("steered", "--minus", " "), ("steered", "--layer", "0"),
    ("steered", "--plus", "I love"), ("unsteered", "--temperature", "0.2"), ("unsteered", "--top-p", "0.99"),
    ("unsteered", "--freq-penalty", "0"), ("unsteered", "--seed", "3"),
])
def test_an_option_changes_setting_and_texts(steer, texts, option, value):
    answer, usual = steer(option, value, "-n", "5"), steer("-n", "5")
    assert answer[texts] != usual[texts]
    setting = answer["setting"][option[2:].replace("-", "_")]
    assert setting == type(setting)(value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_reaches_the_model(steer, weights, dtype):
    sampling = {**SAMPLING, "max_new_tokens": 12, "top_p": 1.0}
    texts = steer("--dtype", dtype, "-n", "8", "--top-p", "1")["unsteered"]
    assert texts == generate(*load(weights / "tiny-gpt2", dtype), PROMPT, 8, **sampling)
    if dtype == "bfloat16":         # with 8 bits the rounding changes a token; with 11 it need not
        assert texts != steer("-n", "8", "--top-p", "1")["unsteered"]


def test_n_and_max_new_tokens_set_number_and_length(steer):
    three, one = steer(), steer("-n", "1", "--max-new-tokens", "6")
    for name in ("unsteered", "steered"):
        assert (len(three[name]), len(one[name])) == (3, 1)
        start = one[name][0].rstrip("\N{REPLACEMENT CHARACTER}")        # the last character may be incomplete
        assert start and three[name][0].startswith(start) and three[name][0] != start
    assert len(set(steer("--temperature", "0")["unsteered"])) == 1


def warn_and_give(text):
    """A stand-in for `generate` that warns of the text and returns it."""
    def generate(*args, **options):
        warnings.warn(text, stacklevel=2)
        return [text]
    return generate


def test_control_characters_do_not_reach_the_terminal(run, weights, tmp_path, monkeypatch):
    evil = "a\x1b[31mred\x07 b\x9b1m c\u202ed\re"
    folder = shutil.copytree(weights / "tiny-gpt2", tmp_path / f"{evil}\nmodel")
    monkeypatch.setattr("ministeer.checkpoints.fetch.fetch", lambda name: name)
    monkeypatch.setattr("ministeer.generation.generate", warn_and_give(evil))
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(tmp_path))
    results = {}
    for name, argv in {"columns": ["steer", f"I love {evil}", *PAIR], "json": [*STEER, "--json"],
                       "models": ["models"], "fetch": ["fetch", evil], "command": [evil],
                       "--save": [*STEER, "--save", f"no/{evil}"],
                       "--vector": [*ON_GPT2, "--vector", evil]}.items():
        more = ["--model", folder] if argv[0] == "steer" else []
        results[name] = code, out, err = run(*argv, *more)
        assert code == (name in ("--save", "--vector", "command")) * 2
        assert all(c.isprintable() or c == "\n" for c in out + err)
        assert all(line.startswith("ministeer: ") for line in err.splitlines())
    assert "a·[31mred· b·1m c·d·e" in results["columns"][1]
    assert 'prompt    "I love a\\u001b' in results["columns"][1]
    assert results["columns"][2].startswith("ministeer: warning: a·[31mred")
    assert json.loads(results["json"][1])["steered"] == [evil]
    assert ": a·[31mred· b·1m c·d e model" in results["models"][1]
    assert "a·[31mred" in results["fetch"][1]


def test_columns_wrap_long_texts_and_leave_out_empty_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = columns(["", "a\n\nb", "x" * 50], ["", " c ", ""]).split("\n")
    assert rows == ["unsteered          | steered", "-" * 18 + " | " + "-" * 18,
                    "                   |",
                    "a                  | c", "b                  |",
                    "                   |",
                    "x" * 18 + " |", "x" * 18 + " |", "x" * 14 + "     |"]


@pytest.mark.parametrize(("error", "code", "says"), [
    (KeyError("x" * 5000), 2, "ministeer: KeyError '.*a bug in ministeer. Please report it; "),
    (ArithmeticError(), 2, "ministeer: ArithmeticError : a bug in ministeer. Please report it; "),
    (UserWarning("torch\nwarns"), 2, "ministeer: torch warns\n$"),
    (MemoryError(), 2, "ministeer: MemoryError\n$"), (KeyboardInterrupt(), 130, "ministeer: interrupted\n$"),
])
def test_an_error_that_nobody_expected_is_one_line_too(run, monkeypatch, error, code, says):
    def fail(*_):
        raise error
    monkeypatch.setattr("ministeer.cli.run_models", fail)
    status, out, err = run("models")
    assert (status, out, err.count("\n")) == (code, "", 1)
    assert re.match(says, err) and len(err) < 1100


# Saved vectors

@pytest.mark.parametrize("model", MODELS)
def test_a_saved_vector_gives_the_same_output(succeed, steer, model):
    made = succeed(*STEER, "--coeff", "3", "--model", model, "--save", "love.safetensors")
    assert os.listdir() == ["love.safetensors"]
    from_file = ["--vector", "love.safetensors", "--model", model]
    assert succeed(*ON_GPT2, *from_file) == made
    assert steer(*from_file) == steer("--coeff", "3", "--model", model)
    assert steer(*from_file, "--coeff", "1") == steer("--model", model)


def test_refuses_a_vector_of_another_model_without_any_model(run, steer):
    steer("--save", "love.safetensors")
    from_file = ["--vector", "love.safetensors", "--model", "tiny-llama"]
    check_refused(run("steer", PROMPT, *from_file), "another model (tiny-gpt2)", "--any-model")
    answer = steer(*from_file, "--any-model")
    assert answer["setting"]["model"] == "tiny-llama"           # the model that runs
    assert answer["steered"] != answer["unsteered"]


def test_a_coeff_for_each_row_needs_one_from_the_command_line(run, steer):
    Steer(2, torch.ones(1, 32), coeff=torch.tensor([1.0, 2.0, 3.0])).save("sweep.safetensors")
    check_refused(run(*ON_GPT2, "--vector", "sweep.safetensors"), "--coeff")
    assert steer("--vector", "sweep.safetensors", "--coeff", "2")["setting"]["coeff"] == 2


def test_a_vector_added_to_bos_alone_has_no_strength(succeed):
    Steer(2, torch.ones(1, 32), start=0).save("bos.safetensors")
    out = " ".join(succeed(*ON_GPT2, "--vector", "bos.safetensors").split())
    assert "× the norm" in out and "mean norm" not in out


@pytest.mark.parametrize("start", [1, 50])
def test_prints_where_a_vector_for_every_position_begins(succeed, start):
    Steer(2, torch.ones(32), start=start).save("all.safetensors")
    out = succeed(*ON_GPT2, "--vector", "all.safetensors")
    assert f"added to every position from {start} on" in " ".join(out.split())
    assert ("× the norm" in out) == (start == 1)         # position 50 is behind the prompt
    assert ("mean norm" in " ".join(out.split())) == (start == 1)


def test_prints_how_well_the_pairs_of_a_mean_agree(succeed, weights):
    model, tokenizer = load(weights / "tiny-gpt2")
    steer = vectors(model, tokenizer, ["I love", "we love"], ["I hate", "we hate"])[2]
    steer.save("mean.safetensors")
    out = " ".join(succeed(*ON_GPT2, "--vector", "mean.safetensors").split())
    assert f"a vector (agreement {steer.note['agreement']}) before block 2" in out


def test_a_save_that_fails_leaves_no_file_and_shows_the_texts(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("ministeer.utils.os.replace", full)
    code, out, err = run(*STEER, "--save", "love.safetensors")
    check_refused((code, "", err), "No space left on device: 'love.safetensors'")
    assert os.listdir() == []
    assert out == run(*STEER)[1]


def test_a_saved_vector_may_replace_itself_but_no_other_file(run, succeed, weights, tmp_path):
    succeed(*STEER, "--save", "love.safetensors")
    succeed(*ON_GPT2, "--vector", "love.safetensors", "--coeff", "3", "--save", "love.safetensors")
    assert Steer.load("love.safetensors").coeff == 3
    model = shutil.copytree(weights / "tiny-gpt2", tmp_path / "model")
    Path("thesis").write_text("not to be lost")
    for file in (*model.iterdir(), Path("thesis")):
        before = file.read_bytes()
        check_refused(run(*STEER, "--model", model, "--save", file), "--save would replace", "another name")
        assert file.read_bytes() == before
    Path("empty").touch()                       # as mktemp makes it
    succeed(*STEER, "--save", "empty")


# The other commands

def test_models_lists_known_and_other_checkpoints(succeed, weights, tmp_path, monkeypatch):
    for name in ("gpt2", "someone/theirs", ".gpt2-xl.part"):
        shutil.copytree(weights / "tiny-gpt2", tmp_path / name)
    (tmp_path / "gpt2-large").mkdir()           # empty, so no checkpoint
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(tmp_path))
    *lines, last = succeed("models").splitlines()
    rows = {line.split()[0]: line.split()[1] for line in lines if line and not line.startswith(" ")}
    assert set(rows) == set(KNOWN)
    assert [name for name in rows if rows[name] == "here"] == ["gpt2"]
    assert rows["smollm2-135m"] == "default"
    assert last == f"also in {tmp_path}: someone/theirs"
    assert max(map(len, lines)) <= 80


def test_models_makes_no_weights_folder(succeed, monkeypatch):
    monkeypatch.setenv("MINISTEER_WEIGHTS", "nowhere")
    assert "here" not in succeed("models").replace("nowhere", "").split()
    assert os.listdir() == []


def test_prints_its_version(succeed):
    assert succeed("--version") == f"ministeer {__version__}\n"


def test_demo_counts_the_texts_that_it_shows(succeed, smollm2, monkeypatch):
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(smollm2.parent))
    assert succeed("fetch", smollm2.name) == f"{smollm2}\n"     # it is here already
    monkeypatch.setitem(SAMPLING, "max_new_tokens", 20)         # half the default shows the effect too
    out = succeed("demo", "-n", "3", "--seed", "1")
    assert max(map(len, out.splitlines())) <= 80
    head, rest = out.split("\nThese are the first three of each. Of all 3, with a word about weddings\n")
    assert 'vector    " weddings" - " " before block 1, coeff 1, 1.79 × the mean norm\n' in head
    assert "penalty 1, seed 1\n" in head
    left, right = split_columns(head)
    assert len(left) == len(right) == 3
    assert left != right
    words, _, *counts = rest.splitlines()
    assert words == f"({', '.join(sorted(WEDDING_WORDS))}):"
    assert [line[2:17].strip() for line in counts[:3]] == ["unsteered", "steered", "random vectors"]
    for line, texts in zip(counts[:2], (left, right), strict=True):      # with n = 3, every text is shown
        k = sum(count_words(text) > 0 for text in texts)
        interval = ["0% to 56%", "6% to 79%", "21% to 94%", "44% to 100%"][k]       # Wilson's, of k in 3
        assert line[17:].split() == f"{k} of 3 {k / 3:.0%} (95 % interval {interval})".split()
    assert " of 3 " in counts[2] and "(95 % interval " in counts[2]
    assert counts[-1] == "Random vectors: 3 of the steering vector's norm, which share 3 completions."


# What is refused


# What the line says, and what it is said of: options alone, or behind + options after PAIR.
REFUSED = {
    "either --plus": ["--layer 1", "--plus a --layer 1 --vector v"],
    "--plus needs --layer": ["--plus a"],
    "leave out --minus and --layer": ["--vector v --layer 1", "--vector v --minus x"],
    "no file": ["--vector v", "--vector="],
    "not a steering vector": ["--vector garbage"],
    "--vector": ["+ --any-model"],
    "blocks 0 … 3": ["+ --layer 4", "+ --layer -1"],
    "same tokens": ["+ --plus= --minus="],
    "surrogate": ["+ --plus \udcff"],
    "do not fit": ["+ --plus " + "kind" * 40],
    "finite": ["+ --coeff nan", "+ --coeff inf", "+ --coeff=-inf", "+ --temperature nan"],
    "invalid": ["+ --layer two", "+ --layer 1.5", "+ --coeff much", "+ -n 1.5", "+ --dtype int8"],
    "n must be": ["+ -n 0", "+ -n -5", "+ -n 1000000000"],
    "max_new_tokens": ["+ --max-new-tokens 0", "+ --max-new-tokens -1"],
    "context of 192": ["+ --max-new-tokens 1000", "+ --max-new-tokens 1000000000"],
    "temperature": ["+ --temperature -1"],
    "top_p": ["+ --top-p 2"],
    "freq_penalty": ["+ --freq-penalty inf", "+ --freq-penalty 1e300"],
    "seed": ["+ --seed -1"],
    "cannot be used": [f"+ --device {name}" for name in ("nonsense", "meta", "privateuseone", "cuda:99")],
    "no model 'nowhere' here": ["+ --model nowhere"],
    "damaged": ["+ --model damaged"],
    "there is no config.json in": ["+ --model ."],
    "no model": ["+ --model a\nb\x1b[31m"],
    "cannot be written": ["+ --save nofolder/v", "+ --save .", "+ --save="],
    "it is a device": ["+ --save " + os.devnull],
    "--save would replace": ["+ --save garbage"],
}
ON_TINY = [*PAIR, "--model", "tiny-gpt2"]
COMMANDS = [
    ([], "COMMAND"), (["dance"], "dance"), (["two\nlines", "\x1b[31m"], "COMMAND"), (["steer"], "PROMPT"),
    (["steer", "a", "--plus", "b", "--layer", "1", "two\nlines \x1b[31m"], "unrecognized arguments"),
    (["fetch"], "NAME"), (["fetch", "no-such-model"], "Known: smollm2-135m,"), (["fetch", ""], "Known"),
    (["demo", "-n", "0"], "-n must be a whole number, from 1 to"), (["demo", "--seed", "x"], "--seed"),
    (["demo", "-n", "1000000000"], "-n must be"), (["demo", "--seed", "-1"], "--seed must be"),
    (["steer", "", *ON_TINY], "do not fit a prompt of 1 token"),
    (["steer", "caf\udcff", *ON_TINY], "surrogate"), (["steer", "word " * 200, *ON_TINY], "context of 192"),
]
for message, options in ((message, options) for message, rows in REFUSED.items() for options in rows):
    save = [] if "--save" in options or "--vector" in options else ["--save", "love.safetensors"]
    pair = PAIR if options.startswith("+ ") else []
    COMMANDS.append(([*ON_GPT2, *pair, *save, *options.removeprefix("+ ").split(" ")], message))


@pytest.mark.parametrize("argv, message", COMMANDS)
def test_rejects_bad_command_lines_and_saves_nothing(run, argv, message):
    Path("garbage").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 no safetensors")
    check_refused(run(*argv), message)
    assert os.listdir() == ["garbage"]


# As a process

@pytest.mark.parametrize("command", ["", "demo", "steer", "fetch", "models"])
def test_help_imports_neither_torch_nor_numpy_and_fits_the_screen(process, command):
    code = "import sys; from ministeer.cli import main\n" \
           "try: main(sys.argv[1:])\n" \
           "finally: assert not {'torch', 'numpy'} & set(sys.modules), 'takes over a second to import'"
    argv = [command, "--help"] if command else ["--help"]
    status, out, err = process(*argv, program=[sys.executable, "-c", code])
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: ministeer {command or '[-h]'}")
    assert max(map(len, out.splitlines())) <= 100


def test_another_process_gives_the_same_texts(run, process):
    argv = [*STEER, "--model", "tiny-llama"]
    assert process(*argv) == run(*argv)


def test_an_ascii_stdout_shows_question_marks(run, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    code, _, err = run("steer", "caf\u00e9 \u4f60 is so kind", *PAIR, "--model", "tiny-gpt2")
    assert (code, err) == (0, "")
    assert b"caf? ? is" in shown.getvalue()


@pytest.mark.parametrize("argv", [["models"], ["--help"], ["steer", "--help"]], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_closes_the_pipe_is_no_error(process, argv, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)                            # as in `ministeer models | head -1`
    assert process(*argv, stdout=writer, PYTHONUNBUFFERED=unbuffered) == (0, "", "")
    os.close(writer)


@pytest.mark.parametrize("shell, fault", [(">&-", "Bad file descriptor: 'stdout'"), (">&- <&-", "'stdout'"),
                                          (">/dev/full", "No space left on device: 'stdout'")])
@pytest.mark.parametrize("argv", [["models"], [*STEER, "--save", "love.safetensors"]], ids=["models", "save"])
@pytest.mark.long
def test_a_closed_or_full_stdout_is_reported_and_the_vector_saved(process, tmp_path, argv, shell, fault):
    if "/dev/full" in shell and not os.path.exists("/dev/full"):
        pytest.skip("there is no device that is always full")
    check_refused(process(*argv, shell=shell), fault)
    assert [Steer.load(file).layer for file in tmp_path.iterdir()] == [2] * ("--save" in argv)


def test_what_cannot_be_said_on_stderr_leaves_the_result_and_the_exit_code(process, weights):
    code, out, err = process(*STEER, "--json", "--save", "love.safetensors", shell="2>&-")
    assert (code, err) == (0, "")
    assert set(json.loads(out)) == {"prompt", "setting", "unsteered", "steered"}
    for shell in ("2>&-", "2>&- >&-", "2>/dev/full"):
        assert process("dance", shell=shell) == (2, "", "")


def test_warnings_are_lines_on_stderr_and_with_W_error_an_error(run, monkeypatch):
    monkeypatch.setattr("ministeer.generation.generate", warn_and_give("a\nsink"))
    code, out, err = run(*STEER, "--json")
    assert code == 0 and json.loads(out)
    assert err == "ministeer: warning: a sink\n"
    warnings.simplefilter("error")
    check_refused(run(*STEER, "--json"), "a sink")


@contextlib.contextmanager
def in_a_terminal(weights, cwd, *argv, **streams):
    """ministeer in a pseudo-terminal of 70 columns: the process, and a descriptor to read from."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, **streams}
    env = environment(weights, UNTRACED, TERM="xterm")
    with started([*MAIN, *argv], cwd=cwd, env=env, **streams) as child:
        os.close(theirs)
        with time_limit(100):
            yield child, ours
    os.close(ours)


def read_terminal(fd, until=None):
    """The bytes that arrive, up to `until` or to the end."""
    shown = b""
    while until is None or until not in shown:
        try:
            new = os.read(fd, 4096)
        except OSError:                         # Linux raises this when the other end is closed
            break
        if not new:
            break
        shown += new
    return shown


def test_a_terminal_shows_a_progress_bar_and_sets_the_width(weights, tmp_path):
    with in_a_terminal(weights, tmp_path, *STEER) as (child, terminal):
        shown = read_terminal(terminal).decode()
        assert child.wait() == 0
    bar, _, output = shown.partition("\rmodel ")
    assert "sampling:" in bar
    assert output.startswith("    tiny-gpt2 (gpt2, 4 layers)\r\n")
    assert max(map(len, output.split("\r\n"))) == 69


def test_ctrl_c_while_sampling_exits_with_130_and_saves_nothing(weights, tmp_path):
    argv = [*STEER, "-n", "5000", "--max-new-tokens", "150", "--save", "love.safetensors"]
    with in_a_terminal(weights, tmp_path, *argv, stdout=subprocess.PIPE) as (child, terminal):
        read_terminal(terminal, until=b"sampling:")
        child.send_signal(signal.SIGINT)
        shown = read_terminal(terminal)
        out, _ = child.communicate()
    assert (child.returncode, out) == (130, b"")
    assert b"Traceback" not in shown
    assert shown.rstrip().endswith(b"ministeer: interrupted")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("module", [" numpy\n", " torch._C\n", " torch.nn\n"], ids=str.strip)
def test_ctrl_c_while_importing_exits_with_130(weights, module):
    # -X importtime writes a line to stderr for each imported module, which shows when to interrupt.
    argv = [sys.executable, "-X", "importtime", *MAIN[1:], *STEER]
    with started(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                 env=environment(weights, UNTRACED)) as child, time_limit(100):
        assert any(line.endswith(module) for line in child.stderr)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.endswith("ministeer: interrupted\n")

"""The tutorials run from start to end, their #> lines are true; checks accept solutions and nothing else."""

import ast
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import filelock
import jupytext
import nbformat
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, UNTRACED

import ministeer

FOLDER = ROOT / "tutorials"
TUTORIALS = sorted(path.stem for path in FOLDER.glob("[01][0-9]_*.py"))
ENVIRONMENT = {**UNTRACED, "MPLBACKEND": "Agg", "TQDM_DISABLE": "1"}

# Runs scripts one after the other, each in a process forked after the imports, which take three seconds,
# longer than many trial runs. It reads lines: a folder for temporary files and output, then a command. For
# each it writes a line: the exit status.
FORK = """
import os, runpy, signal, sys, tempfile, traceback
import matplotlib.pyplot, torch._dynamo     # which torch's optimizers import
import ministeer.baselines.classifier, ministeer.baselines.logits, ministeer.evaluation.judges
import ministeer.evaluation.measure, ministeer.evaluation.stats, ministeer.faster
for line in sys.stdin:
    folder, *argv = line.rstrip("\\n").split("\\t")
    if os.fork() == 0:
        signal.alarm(600)
        sys.argv, sys.path[0], tempfile.tempdir = argv, os.path.dirname(argv[0]), folder
        os.environ.update(TMPDIR=folder, MINISTEER_WEIGHTS=folder)
        os.dup2(os.open(folder + "/output.txt", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        status = 1
        try:
            runpy.run_path(argv[0], run_name="__main__")
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def run(*arguments, fails=False, **environment):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True,
                          encoding="utf-8", env={**ENVIRONMENT, **environment}, timeout=600)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


def page(name):
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def exercises(name):
    """The functions that a tutorial asks for: those that it checks."""
    return re.findall(r"(?m)^lesson\.check\((\w+)", page(name))


def assert_checks_are_right(name, printed):
    """Each exercise has two or more cases, its solution passes, and its wrong answers are refused."""
    for exercise in exercises(name):
        (n_cases,) = re.findall(rf"(?m)^solution of {exercise}, (\d+) cases: ok$", printed)
        assert int(n_cases) >= 2
        verdicts = re.findall(rf"(?m)^wrong answer {exercise}_\w+: (.*)$", printed)
        assert verdicts
        assert all(verdict.startswith("not yet. ") for verdict in verdicts), verdicts
        # A wrong answer gives something wrong: one that stops everywhere would show nothing about the check.
        assert "gives" in " ".join(verdicts)


@pytest.fixture(scope="module")
def record():
    spec = importlib.util.spec_from_file_location("record", FOLDER / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fork():
    """A function (script, arguments, folder) that runs the script -> what it printed."""
    with subprocess.Popen([sys.executable, "-c", FORK], cwd=ROOT, encoding="utf-8", stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"}) as server:
        def run_forked(script, arguments, folder):
            print(folder, script, *arguments, sep="\t", file=server.stdin, flush=True)
            status = server.stdout.readline()
            printed = (folder / "output.txt").read_text(encoding="utf-8")
            assert status == "0\n", printed
            return printed
        yield run_forked
        server.stdin.close()


@pytest.fixture(scope="session")
def checked(smollm2, tmp_path_factory):
    """A function (name) -> what a tutorial prints on the default model. It fails if a #> line is not true.

    A tutorial may take minutes, so it runs once for all workers.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def printed_by(name):
        with filelock.FileLock(base / f"{name}.lock"):
            kept = base / f"{name}.printed"
            if not kept.is_file():
                # One thread, because another number of them sums in another order.
                printed = run(FOLDER / "record.py", "--check", "--show", FOLDER / f"{name}.py", "--solutions",
                              MINISTEER_WEIGHTS=str(smollm2.parent), OMP_NUM_THREADS="1")
                kept.write_text(printed, encoding="utf-8")
            return kept.read_text(encoding="utf-8")
    return printed_by


@pytest.mark.long
@pytest.mark.parametrize("name", TUTORIALS)
def test_printed_lines_are_true_on_the_default_model(name, checked):
    assert_checks_are_right(name, checked(name))
    for exercise in exercises(name):
        # The #> lines are true, so the page itself shows that the stub does not pass.
        assert f"#> {exercise}: not yet" in page(name)
        assert f"#> {exercise}: ok" not in page(name)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.long] * (name[:2] in ("08", "12"))) for name in TUTORIALS])
def test_runs_as_a_script_without_the_default_model(name, fork, tmp_path):
    printed = fork(FOLDER / f"{name}.py", ["--tiny", "--solutions"], tmp_path)
    assert len(printed.splitlines()) > 10
    assert_checks_are_right(name, printed)
    (figure,) = tmp_path.glob("*.png")
    assert figure.stem == name


@pytest.mark.parametrize("name", TUTORIALS)
def test_asks_for_work(name):
    assert 2 <= len(exercises(name)) <= 3
    tree = ast.parse((FOLDER / "solutions" / f"{name}.py").read_text(encoding="utf-8"))
    solutions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    lines = [solutions[exercise].end_lineno - solutions[exercise].lineno for exercise in exercises(name)]
    assert max(lines) >= 5
    open_question = page(name).split("# ## Your own topic\n")[1]
    assert re.search(r"(?i)\bbeside\b|\bcontrol\b", open_question)


@pytest.mark.parametrize("name", TUTORIALS)
def test_opens_as_a_notebook(name):
    assert set(re.findall(r"(?m)^# %%.*$", page(name))) == {"# %%", "# %% [markdown]"}
    notebook = jupytext.reads(page(name), fmt="py:percent")
    nbformat.validate(notebook)
    assert len(notebook.cells) >= 15
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith(f"# {name[:2]} · ")
    for cell in notebook.cells:
        assert cell.source.strip()
        if cell.cell_type == "code":
            compile(cell.source, name, "exec")
        else:
            # no code that slipped into the text
            assert not re.search(r"^(import|from|print)\b", cell.source, re.MULTILINE)


def test_a_run_leaves_the_committed_figures_alone(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("lesson_alone", FOLDER / "lesson.py")
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    monkeypatch.setattr(lesson, "HERE", tmp_path)
    for flags in ([], ["--record"]):
        monkeypatch.setattr(sys, "argv", ["01_tokens.py", *flags])
        lesson.save(lesson.plt.figure(), "drawn")
        assert (tmp_path / "figures" / "drawn.png").is_file()
        assert (tmp_path / "drawn.png").is_file() == bool(flags)


@pytest.mark.parametrize("name", TUTORIALS)
def test_figure_and_linked_files_exist(name):
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f'lesson.save(figure, "{name}")' in page(name)
    for target in re.findall(r"\]\(([\w./-]+)\)", page(name)):
        assert (FOLDER / target).exists(), target


def test_readme_and_solutions_cover_every_tutorial_in_order():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[\d\d\]\((\w+)\.py\)", readme, re.MULTILINE) == TUTORIALS
    for folder in ("solutions", "wrong"):
        assert sorted(path.stem for path in (FOLDER / folder).glob("*.py")) == TUTORIALS


def topic_shares(printed, name):
    """Tutorial 12's table for one of its models, as shares: unsteered, by layer steered, highest random."""
    table, = re.findall(rf"^{name}: unsteered (\d+) of 160\n((?:before block .*\n)+)", printed, re.MULTILINE)
    rows = re.findall(r"^before block \d: +(\d+) of 160 .* random ([\d ]+) of 32$", table[1], re.MULTILINE)
    random = [int(count) / 32 for _, counts in rows for count in counts.split()]
    return int(table[0]) / 160, [int(steered) / 160 for steered, _ in rows], max(random)


@pytest.mark.long
def test_trained_gpt2_goes_where_it_is_steered(checked):
    printed = checked("12_grow_your_own")
    shares = {}
    for name in ("skipping", "plain"):
        unsteered, steered, random = topic_shares(printed, name)
        assert max(unsteered, random) < 0.3
        assert steered[0] > 0.8
        assert steered[-1] < 0.35               # before the last block, it comes too late
        shares[name] = steered
    assert shares["plain"][1] < 0.3
    assert shares["skipping"][1] > 0.35         # a later block works too


@pytest.mark.long
@pytest.mark.parametrize("name", ["skipping", "plain"])
def test_trained_gpt2_loads_in_transformers_and_computes_the_same(name, smollm2, checked):
    checked("12_grow_your_own")
    folder = smollm2.parent / f"world-{name}"
    hub = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    model, tokenizer = ministeer.load(folder)
    text = " Now Mary tells Tom a tale. Then the baker kneads the dough near the oven."
    ids = torch.tensor([tokenizer.encode(text)])

    def assert_close(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))

    logits, resid = model(ids)
    with torch.no_grad():
        theirs = hub(ids, output_hidden_states=True)
    assert_close(logits, theirs.logits)
    for l in range(model.config.n_layer):
        assert_close(resid[l], theirs.hidden_states[l])

    steer = 2 * ministeer.steering_vector(model, tokenizer, " music", " ", 1)
    delta = steer.delta(None, torch.arange(ids.shape[1]))
    handle = hub.transformer.h[1].register_forward_pre_hook(
        lambda block, arguments: (arguments[0] + delta, *arguments[1:]))
    with torch.no_grad():
        theirs = hub(ids).logits
    handle.remove()
    assert_close(model(ids, steer)[0], theirs)


def test_record_finds_and_rewrites_lines_that_are_not_true(tmp_path):
    path = tmp_path / "page.py"
    (tmp_path / "tolerances.json").write_text('{"page": {"b #": [1]}, "other": {"a #": [9]}}')

    def write_page(lines):
        cells = '# %% [markdown]\n# text\n\n# %%\nprint("a", 3)\nprint("b", 7.5)\n'
        path.write_text(cells + lines, encoding="utf-8")

    write_page("#> a 3\n#> b 7\n")
    assert "all #> lines are true" in run(FOLDER / "record.py", "--check", path)
    run(FOLDER / "record.py", path)
    assert path.read_text(encoding="utf-8").endswith("#> a 3\n#> b 7\n")
    write_page("#> a 3\n#> b 9\n")
    assert "the run printed: b 7.5" in run(FOLDER / "record.py", "--check", path, fails=True)
    run(FOLDER / "record.py", path)
    assert path.read_text(encoding="utf-8").endswith("#> a 3\n#> b 7.5\n")
    write_page("#> a 3\n#> b 7.5\n#> more\n")
    assert "3 lines here, the run printed 2" in run(FOLDER / "record.py", "--check", path, fails=True)


TOLERANCES = {"x # y": [1], "# nats": [0.3], "#": [0.2], "#%": [5], "# of # (#)": [1, 0, 5], "x #": [1],
              "c #: #": [0, "20%"]}


@pytest.mark.parametrize(("expected", "line", "right"), [
    ("x 4 y", "x 5 y", True),
    ("x 4 y", "x 5.01 y", False),
    ("-1.2 nats", "-1.5 nats", True),
    ("-0.2 nats", "0.2 nats", False),
    ("+0.1", "-0.1", True),
    ("55%", "9%", False),
    ("a  b", "a b", True),
    ("4 of 40 (15)", " 4 of 40 (11)", True),
    ("4 of 40 (15)", "4 of 41 (15)", False),
    ("4 of 40", "5 of 40", False),
    ("c 1: 10", "c 1: 12", True),
    ("c 1: 10", "c 1: 12.1", False),
    ("x 4 ≈ 'so'", "x 5 'other'", True),
    ("x 4 ≈ 'so'", "y 4 'so'", False),
    ("a", "a b", False),
    ("(a.b)", "(acb)", False)])
def test_line_matches_within_its_tolerance(expected, line, right, record):
    assert record.matches(expected, line, TOLERANCES) == right


def test_every_tolerance_belongs_to_a_line(record):
    kept = json.loads((FOLDER / "tolerances.json").read_text(encoding="utf-8"))
    assert set(kept) <= set(TUTORIALS)
    for name, tolerances in kept.items():
        lines = [line[3:].partition("≈")[0] for line in page(name).splitlines() if line.startswith("#>")]
        for line, allowed in tolerances.items():
            found = [len(record.NUMBER.findall(one)) for one in lines
                     if record.NUMBER.sub("#", " ".join(one.split())) == line]
            assert set(found) == {len(allowed)}, line


@pytest.fixture(scope="module")
def verdict():
    """A function (function, *cases) -> what lesson.check says about it"""
    spec = importlib.util.spec_from_file_location("lesson", FOLDER / "lesson.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda function, *cases: module.verdict(function, cases)


@pytest.mark.parametrize(("given", "expected"), [
    (torch.tensor(3), 3), (np.int64(3), 3), (3.0, 3), (torch.tensor(0.5), 0.5), (np.float32(0.5), 0.5),
    (1, 1.0), (0.50001, 0.5), ((1, 2), [1, 2]), (torch.tensor([1, 2]), [1, 2]),
    ([torch.tensor(1), 2], [1, 2]),
    ([[1.0, 2.0]], torch.tensor([[1.0, 2.0]])), ([torch.tensor([1.0, 2.0])], torch.tensor([[1.0, 2.0]])),
    (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])), (torch.ones(2).bfloat16(), torch.ones(2)),
    (torch.ones(2, requires_grad=True), torch.ones(2)), (np.True_, True), ([None, "a"], [None, "a"])])
def test_check_accepts_what_is_right(given, expected, verdict):
    assert verdict(lambda x: given, ((1,), expected)) == "ok"


@pytest.mark.parametrize(("given", "expected", "says"), [
    (1.1, 1.0, "gives 1.1, not 1"),
    (1280001, 1280000, "gives 1280001, not 1280000"),
    (True, 1, "gives True, not 1"), (True, 1.0, "gives True, not 1"), (0, False, "gives 0, not False"),
    (None, False, "gives None, not False"), ("1", 1, "gives '1', not 1"),
    ((3,), 3, "gives [3], not 3"), (torch.tensor([3]), 3, "gives tensor (1,), not 3"),
    (math.nan, 0.0, "gives nan, not 0"),
    ([1], [1, 2], "gives [1], not [1, 2]"), ([1, 3], [1, 2], "gives 3 at [1], not 2"),
    (torch.ones(2), torch.ones(3), "gives tensor (2,), not tensor (3,)"),
    (torch.ones(3, 2), torch.ones(3, 1), "gives tensor (3, 2), not tensor (3, 1)"),
    (1.0, torch.ones(3), "gives 1, not tensor (3,)"),
    (torch.eye(3), torch.ones(3, 3), "gives 0 at [0, 1], not 1"),
    (0.5, ValueError, "gives 0.5 and does not raise ValueError"),
    (ValueError, ValueError, "gives ValueError and does not raise ValueError")])
def test_failed_check_says_what_differs(given, expected, says, verdict):
    assert verdict(lambda x: given, ((1,), expected)) == f"not yet. For (1) it {says}"


def test_check_takes_an_expected_error_and_no_other(verdict):
    assert verdict(int, (("x",), ValueError)) == "ok"
    assert "stops with TypeError: " in verdict(int, (([],), ValueError))
    assert "stops with ZeroDivisionError: " in verdict(lambda x: 1 / x, ((1,), 1.0), ((0,), 1.0))


def test_check_protects_later_cases_from_changed_arguments(verdict):
    numbers = torch.ones(2)

    def doubled(x):
        x *= 2
        return x
    assert verdict(doubled, *[((numbers,), 2 * torch.ones(2))] * 2) == "ok"


STUDENT = {"01_tokens": """
import os, sys
def n_tokens(tokenizer, text):
    print("x" * 10**7)
    return len(tokenizer.encode(text, bos=False))
def n_padding(tokenizer, plus, minus):
    sys.exit(0)
def probability(model, tokenizer, prompt, word):
    os._exit(0)
""", "02_one_block": """
def masked_softmax(scores):
    while True:
        pass
def selfish_head(pattern):
    return pattern[:, 1, 1].argmax().item()
raise RuntimeError("not a part of an exercise")
""", "03_residual_stream": """
import os, signal
def added(resid, l, t):
    return (resid[l + 1] - resid[l])[0, t].norm() if len(bytearray(10**11)) else 0
def decided(model, resid):
    os.kill(os.getpid(), signal.SIGSEGV)
""", "04_the_addition": """
def delta(vector, coeff, start, T):
    return input()
"""}


@pytest.mark.long
def test_grades_right_wrong_and_misbehaving_answers(tmp_path):
    for name, text in STUDENT.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    run("-m", "tutorials.grade", tmp_path, "--seconds", "4", "--out", tmp_path / "report.json",
        TMPDIR=str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    rows = {name: row for exercises in report["tutorials"].values() for name, row in exercises.items()}
    says = {name: row["differs"] for name, row in rows.items()}
    assert (report["points"], report["of"]) == (1, 9)
    assert rows["n_tokens"]["points"] == 1
    assert rows["n_tokens"]["passed"] == rows["n_tokens"]["cases"] >= 7     # the page's and some more
    assert says["n_tokens"] == ""
    assert "stops with SystemExit: 0" in says["n_padding"]
    assert "the process ended before it answered" in says["probability"]
    assert says["masked_softmax"] == "no answer after 4 seconds"
    assert says["selfish_head"] == "For (tensor (3, 4, 4)) it gives 0, not 1"
    assert "stops with MemoryError" in says["added"]
    assert "the process ended before it answered" in says["decided"]
    assert "stops with EOFError" in says["delta"]
    assert "04_the_addition.py has no function equal_coeff" in says["equal_coeff"]


def test_grade_wants_files_named_like_tutorials(tmp_path):
    refused = subprocess.run([sys.executable, "-m", "tutorials.grade", str(tmp_path)], cwd=ROOT,
                             capture_output=True, encoding="utf-8", env=ENVIRONMENT)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is named like a tutorial" in refused.stderr

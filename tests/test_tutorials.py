"""The tutorials run from start to end, what they say they print is what they print, and solutions pass where stubs do not."""

import importlib.util
import os
import re
import subprocess
import sys

import filelock
import jupytext
import nbformat
import pytest
import torch
import transformers
from conftest import ROOT, UNTRACED

import ministeer

FOLDER = ROOT / "tutorials"
TUTORIALS = sorted(path.stem for path in FOLDER.glob("[01][0-9]_*.py"))


def run(*arguments, fails=False, **environment):
    environment = {**UNTRACED, "MPLBACKEND": "Agg", "TQDM_DISABLE": "1", **environment}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, encoding="utf-8", env=environment, timeout=600)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def record():
    spec = importlib.util.spec_from_file_location("record", FOLDER / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exercises(name):
    """The functions that a tutorial asks for: those whose stub says so."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    return re.findall(r"def (\w+)\([^)]*\):\n(?:(?!\ndef ).)*?return None +# your line", text, re.DOTALL)


@pytest.fixture(scope="session")
def checked(smollm2, tmp_path_factory):
    """A function: what a tutorial prints on the default model. It fails if its #> lines are not true. Once for all workers; it may take minutes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def of(name):
        with filelock.FileLock(base / f"{name}.lock"):
            kept = base / f"{name}.printed"
            if not kept.is_file():
                # One thread, because another number of them sums in another order.
                kept.write_text(run(FOLDER / "record.py", "--check", "--show", FOLDER / f"{name}.py", "--solutions",
                                    MINISTEER_WEIGHTS=str(smollm2.parent), OMP_NUM_THREADS="1"), encoding="utf-8")
            return kept.read_text(encoding="utf-8")
    return of


@pytest.mark.parametrize("name", TUTORIALS)
def test_what_it_says_is_true_on_the_default_model(name, checked):
    printed = checked(name)
    asked = exercises(name)
    assert 2 <= len(asked) <= 3
    for exercise in asked:
        assert f"solution of {exercise}: ok" in printed
        # the #> lines are true, so that the stub does not pass is on the page
        assert f"#> {exercise}: not yet" in (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert f"#> {exercise}: ok" not in (FOLDER / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TUTORIALS)
def test_it_runs_as_a_script_without_the_default_model(name, tmp_path):
    printed = run(FOLDER / f"{name}.py", "--tiny", "--solutions", TMPDIR=str(tmp_path), MINISTEER_WEIGHTS=str(tmp_path), OMP_NUM_THREADS="1")
    assert len(printed.splitlines()) > 10
    assert all(f"solution of {exercise}: ok" in printed for exercise in exercises(name))
    (figure,) = tmp_path.glob("*.png")
    assert figure.stem == name


@pytest.mark.parametrize("name", TUTORIALS)
def test_it_opens_as_a_notebook(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    nbformat.validate(notebook)
    assert len(notebook.cells) >= 15
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith(f"# {name[:2]} · ")
    for cell in notebook.cells:
        assert cell.source.strip()
        if cell.cell_type == "code":
            compile(cell.source, name, "exec")
        else:
            assert not re.search(r"^(import|from|print)\b", cell.source, re.MULTILINE)       # code that slipped into the text


@pytest.mark.parametrize("name", TUTORIALS)
def test_its_figure_is_there_and_its_links_lead_somewhere(name):
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert f'lesson.save(figure, "{name}")' in text
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (FOLDER / target).exists(), target


def test_the_list_has_every_tutorial_in_order():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[\d\d\]\((\w+)\.py\)", text, re.MULTILINE) == TUTORIALS
    assert sorted(path.stem for path in (FOLDER / "solutions").glob("*.py")) == TUTORIALS


def shares(printed, name):
    """The table of tutorial 12 for one of its models: unsteered, then steered and random for each layer."""
    (block,) = re.findall(rf"^{name}: unsteered (\d+)%.*\n((?:before block .*\n)+)", printed, re.MULTILINE)
    rows = re.findall(r"^before block \d: +(\d+)%.* random +(\d+)%$", block[1], re.MULTILINE)
    return int(block[0]), [int(a) for a, _ in rows], [int(b) for _, b in rows]


def test_the_gpt2_that_grew_goes_where_it_is_steered(checked):
    printed = checked("12_grow_your_own")
    for name in ("skipping", "plain"):
        unsteered, steered, control = shares(printed, name)
        assert unsteered <= 20
        assert max(steered) >= 60
        assert max(control) <= 25
        assert steered[-1] < max(steered) - 20          # before the last block it comes too late
    assert sum(share >= 40 for share in shares(printed, "skipping")[1][1:]) >= 2        # later layers work too


@pytest.mark.parametrize("name", ["skipping", "plain"])
def test_transformers_reads_the_gpt2_that_grew_and_computes_the_same(name, smollm2, checked):
    checked("12_grow_your_own")
    folder = smollm2.parent / f"world-{name}"
    hub = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    model, tokenizer = ministeer.load(folder)
    ids = torch.tensor([tokenizer.encode(" Now Mary tells Tom a tale. Then the baker kneads the dough near the oven.")])
    logits, resid = model(ids)
    with torch.no_grad():
        theirs = hub(ids, output_hidden_states=True)
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    for l in range(model.config.n_layer):
        torch.testing.assert_close(resid[l], theirs.hidden_states[l], rtol=1e-4, atol=1e-4 * float(resid[l].abs().max()))
    steer = ministeer.steering_vector(model, tokenizer, " music", " ", 1)
    handle = hub.transformer.h[1].register_forward_pre_hook(lambda block, given: (given[0] + 2 * steer.delta(torch.arange(ids.shape[1])), *given[1:]))
    with torch.no_grad():
        theirs = hub(ids).logits
    handle.remove()
    torch.testing.assert_close(model(ids, 2 * steer)[0], theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_a_line_that_is_not_true_is_found(tmp_path):
    page = tmp_path / "page.py"
    page.write_text('# %% [markdown]\n# text\n\n# %%\nprint("a", 3)\nprint(7.5)\n#> a 3\n#> 7±1\n', encoding="utf-8")
    assert "true" in run(FOLDER / "record.py", "--check", page)
    page.write_text(page.read_text(encoding="utf-8").replace("7±1", "8±0.4"), encoding="utf-8")
    assert "was printed:  7.5" in run(FOLDER / "record.py", "--check", page, fails=True)
    run(FOLDER / "record.py", page)
    assert page.read_text(encoding="utf-8").endswith("#> a 3\n#> 7.5\n")
    page.write_text(page.read_text(encoding="utf-8") + "#> more\n", encoding="utf-8")
    assert "3 lines stand there, 2 were printed" in run(FOLDER / "record.py", "--check", page, fails=True)


@pytest.mark.parametrize(("expected", "line", "right"), [
    ("x 4±1 y", "x 5 y", True), ("x 4±1 y", "x 5.01 y", False), ("-1.2±0.3 nats", "-1.5 nats", True), ("-1.2±0.3", "1.2", False),
    ("+0.1±0.2", "-0.1", True), ("55±5%", "9%", False), ("a  b", "a b", True), ("4±1 of 40 (15±5)", " 4 of 40 (11)", True),
    ("4±1 of 40", "4 of 41", False), ("x 4±1 ≈ 'so'", "x 4 'other'", True), ("x 4±1 ≈ 'so'", "y 4 'so'", False),
    ("a", "a b", False), ("(a.b)", "(acb)", False)])
def test_a_tolerance_stands_for_the_numbers_in_it(expected, line, right, record):
    assert record.matches(expected, line) == right


def test_a_check_says_what_differs(tmp_path):
    code = ("import lesson, torch\n"
            "lesson.check(lambda x: x + 1, ((1,), 2))\n"
            "lesson.check(lambda x: x, ((1.0,), 1.0001), ((1.0,), 1.1))\n"
            "lesson.check(lambda x: 1 / 0, ((1,), 1))\n"
            "lesson.check(lambda x: torch.ones(2), ((1,), torch.ones(3)))\n"
            "lesson.check(lambda x: [1], ((1,), [1, 2]))\n"
            "lesson.check(lambda x: None, ((1,), False))\n")
    (tmp_path / "try.py").write_text(code, encoding="utf-8")
    lines = run(tmp_path / "try.py", PYTHONPATH=str(FOLDER)).splitlines()
    assert lines[0] == "<lambda>: ok"
    assert "gives 1; expected 1.1" in lines[1]
    assert "ZeroDivisionError" in lines[2]
    assert "a tensor (2,); expected a tensor (3,)" in lines[3]
    assert all("not yet" in line for line in lines[1:])
    assert len(lines) == 6

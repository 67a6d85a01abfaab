"""The house: which rooms there are, which may import which, and what stands in it only once."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, UNTRACED

import ministeer

PACKAGE = ROOT / "ministeer"
FILES = sorted(PACKAGE.rglob("*.py"))
# Floors from the ground up: a file imports from floors below its own, or from its own room.
FLOORS = [["utils", "checkpoints.config", "checkpoints.convert", "checkpoints.tokenizer"], ["attention"], ["model"], ["gpt2", "llama"],
          ["checkpoints.weights", "checkpoints.fetch", "checkpoints.loading"], ["steering", "faster"], ["generation"],
          ["evaluation.stats", "evaluation.judges", "evaluation.measure", "methods.many_pairs", "methods.inside_blocks",
           "baselines.classifier", "baselines.logits"], ["cli"], ["__main__"]]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path):
    """The files of the package that a file imports when it runs, at its head or inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    package = ["ministeer", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.level == 0 and not (node.module or "").startswith("ministeer")):
            continue
        base = package[:len(package) - node.level + 1] if node.level else []
        target = [*base, *(node.module or "").split(".")] if node.module else base
        for alias in node.names:
            whole = [*target, alias.name]
            file = next((parts for parts in (whole, target) if PACKAGE.parent.joinpath(*parts).with_suffix(".py").is_file()), None)
            if file:
                yield ".".join(file[1:])


def test_the_top_shelf_is_the_hours_reading_and_little_else():
    top = {path.stem for path in PACKAGE.glob("*.py")}
    assert top >= {"__init__", "attention", "gpt2", "llama", "model", "steering", "generation", "faster", "utils", "cli"}
    assert len(top) <= 11
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        "checkpoints", "evaluation", "methods", "baselines"}


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "__init__"], ids=name_of)
def test_imports_go_downward(path):
    name = name_of(path)
    for other in imports_of(path):
        same_room = "." in name and name.split(".")[0] == other.split(".")[0]
        assert FLOOR[other] < FLOOR[name] or same_room, f"{name} imports {other}"


def test_no_file_imports_itself_by_a_detour():
    graph = {name_of(path): set(imports_of(path)) for path in FILES}
    done = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_the_package_imports_nothing_of_tests_tutorials_or_benchmarks():
    for path in FILES:
        assert not re.search(r"\b(from|import) (benchmarks|tutorials|tests)\b", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("room", ["checkpoints", "evaluation", "methods", "baselines"])
def test_each_room_says_what_is_in_it_and_what_to_read_first(room):
    text = importlib.import_module(f"ministeer.{room}").__doc__
    assert len(text.strip().splitlines()) <= 3
    first = re.search(r"Read first: (\w+\.py)", text)[1]
    assert (PACKAGE / room / first).is_file()


def test_the_addition_and_the_draw_stand_once():
    code = {name_of(path): path.read_text(encoding="utf-8") for path in FILES}
    for line, home in ((r"x = x \+ s\.delta\(", "model"), (r"\.delta\(pos\)", "model"), (r"searchsorted\(", "generation"),
                       (r"\.blocks\[l\]\(x, l, rope, cache\)", "model"), (r"scaled_dot_product_attention\(q, k", "attention")):
        where = [name for name, text in code.items() for _ in re.findall(line, text)]
        assert where == [home], f"{line} stands in {where}"


def test_the_public_face_is_where_editors_look_for_it():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    names = {alias.name: node.module for node in typed.body for alias in node.names}
    assert names == ministeer._HOME
    assert sorted(names) == ministeer.__all__
    for name, home in names.items():
        assert getattr(ministeer, name) is getattr(importlib.import_module(f"ministeer.{home}"), name)
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_everything_public_is_annotated(name):
    module = importlib.import_module(f"ministeer.{name}")
    functions = [f for f in vars(module).values() if inspect.isfunction(f)]
    classes = [c for c in vars(module).values() if inspect.isclass(c) and not c.__name__.startswith("_")]
    functions += [f for c in classes if c.__module__ == module.__name__ for f in vars(c).values() if inspect.isfunction(f)]
    for function in functions:
        if function.__name__.startswith("_") or function.__module__ != module.__name__ or "<locals>" in function.__qualname__:
            continue
        bare = [p.name for p in inspect.signature(function).parameters.values()
                if p.annotation is p.empty and p.name not in ("self", "cls")]
        assert not bare, f"{name}.{function.__qualname__} has no type for {', '.join(bare)}"


@pytest.mark.long
def test_a_wheel_and_an_sdist_hold_every_room_and_the_demo_runs_from_the_wheel(smollm2, tmp_path):
    def run(*command, cwd=ROOT, **environment):
        done = subprocess.run([sys.executable, *command], cwd=cwd, env={**UNTRACED, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    for path in FILES:                              # what is in the working tree, committed or not
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    wanted = {path.relative_to(ROOT).as_posix() for path in FILES} | {"ministeer/py.typed"}
    run("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    import tarfile
    with tarfile.open(archive) as tar:
        assert {name.partition("/")[2] for name in tar.getnames()} >= wanted
    run("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("ministeer/")} == wanted
        archive.extractall(tmp_path / "installed")
    out = run("-c", "import ministeer.cli, sys; print(ministeer.__file__); ministeer.cli.main(['demo', '-n', '3'])", cwd=tmp_path,
              PYTHONPATH=str(tmp_path / "installed"), MINISTEER_WEIGHTS=str(smollm2.parent), OMP_NUM_THREADS="1")
    assert out.startswith(str(tmp_path / "installed"))
    assert re.search(r"steered +[1-3] of 3", out)
    assert os.listdir(tmp_path / "installed" / "ministeer")

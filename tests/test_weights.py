"""Loading: what is whole loads exactly, and every fault has a message of its own. Tests of weights.py and config.py."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import N_VOCAB, ROOT, hub_config, hub_model, save_checkpoint, tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ministeer import load
from ministeer.checkpoints import weights
from ministeer.checkpoints.config import read_config
from ministeer.checkpoints.weights import find, load_model

IDS = torch.arange(3, 23)[None]
NAMES = {"gpt2": {"embedding": "transformer.wte.weight", "norm": "transformer.ln_f.weight", "up": "transformer.h.1.mlp.c_fc.weight",
                  "layers": "n_layer", "heads": "n_head", "width": "n_embd"},
         "llama": {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "up": "model.layers.1.mlp.up_proj.weight",
                   "layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size"}}
BOMB = "[" * 100_000


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a tiny checkpoint, free to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / checkpoint.name)


@pytest.fixture
def names(family):
    """What the tensors and settings of this family are called in its files."""
    return NAMES[family]


def configure(folder, drop=(), **changes):
    """Change config.json: set `changes`, leave out the keys in `drop`."""
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(config | changes))


def change(folder, **tensors):
    """Set tensors of model.safetensors by name; None takes one out."""
    stored = load_file(folder / "model.safetensors") | tensors
    save_file({name: x.contiguous() for name, x in stored.items() if x is not None}, folder / "model.safetensors")


def shard(folder, n=2):
    """model.safetensors -> n files and their index. Returns the files' names."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    where = {name: files[i % n] for i, name in enumerate(stored)}
    for file in files:
        save_file({name: x for name, x in stored.items() if where[name] == file}, folder / file)
    index(folder, where)
    return files


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def same(a, b):
    """Two models are bitwise the same."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What loads

def test_names_and_numbers_are_those_of_the_file(checkpoint, tiny):
    model, tokenizer = tiny
    stored = load_file(checkpoint / "model.safetensors")
    assert {name.removeprefix(model.prefix) for name in stored} == set(model.state_dict())
    for name, x in stored.items():
        assert torch.equal(model.state_dict()[name.removeprefix(model.prefix)], x)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (tokenizer.bos_id, tokenizer.eos_ids, model.name) == (0, (1,), checkpoint.name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_by_name_or_as_in_torch(checkpoint, dtype):
    by_name, by_type = load_model(checkpoint, dtype), load_model(checkpoint, getattr(torch, dtype))
    assert same(by_name, by_type)
    assert {p.dtype for p in by_name.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_in_the_file_are_converted(folder, stored):
    change(folder, **{name: x.to(stored) for name, x in load_file(folder / "model.safetensors").items()})
    model = load_model(folder)
    for name, x in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name.removeprefix(model.prefix)], x.float())


def test_with_and_without_the_prefix(folder, tiny):
    model, _ = tiny
    stored = load_file(folder / "model.safetensors")
    save_file({name.removeprefix(model.prefix): x for name, x in stored.items()}, folder / "model.safetensors")
    assert same(load_model(folder), model)


def test_constants_of_old_files_are_left_out(folder, family, tiny):
    old = {"gpt2": ["transformer.h.0.attn.bias", "h.1.attn.masked_bias"], "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"]}
    change(folder, **{name: torch.ones(4) for name in old[family]})
    assert same(load_model(folder), tiny[0])


@pytest.mark.parametrize("n", [1, 3])
def test_shards(folder, tiny, n):
    shard(folder, n)
    model, _ = load(folder)
    assert same(model, tiny[0])
    assert model.fingerprint == tiny[0].fingerprint


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["repository", "shared"])
def test_the_links_of_the_hubs_cache(folder, tmp_path, tiny, sharded, shared):
    """repository/snapshots/commit/file -> repository/blobs/hash, which may itself be -> blobs/ha/hash beside all repositories."""
    if sharded:
        shard(folder)
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{i:064}"
        if shared:
            store = tmp_path / "hub" / "blobs" / "00" / blob.name
            store.parent.mkdir(parents=True, exist_ok=True)
            blob.symlink_to(Path("../../blobs/00") / blob.name)
            path.rename(store)
        else:
            path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    assert same(load(snapshot)[0], tiny[0])


def test_tied_head_absent_or_equal(tmp_path, family):
    folder = save_checkpoint(tmp_path / "tied", hub_model(hub_config(family, tie_word_embeddings=True)))
    embedding = load_file(folder / "model.safetensors")[NAMES[family]["embedding"]]
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    plain = load_model(folder)
    change(folder, **{"lm_head.weight": embedding.clone()})
    assert same(load_model(folder), plain)


def test_untied_head(tmp_path, family):
    folder = save_checkpoint(tmp_path / "untied", hub_model(hub_config(family, tie_word_embeddings=False)))
    model = load_model(folder)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    logits, resid = model(IDS)
    torch.testing.assert_close(logits, model.final_norm(resid[-1]) @ head.T)
    change(folder, **{"lm_head.weight": None})
    with pytest.raises(ValueError, match=r'lm_head.weight is missing from .* says that the head is not tied.*"tie_word_embeddings": true'):
        load_model(folder)


# What is not there

@pytest.mark.parametrize(("file", "says"), [
    ("config.json", r"no config.json in \S+, so it is not a checkpoint"),
    ("model.safetensors", r"no model.safetensors in \S+\. Run `ministeer fetch tiny-\w+`"),
    ("tokenizer.json", r"no tokenizer.json in \S+\. .*AutoTokenizer"),
])
def test_a_missing_file(folder, file, says):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=says):
        load(folder)


@pytest.mark.parametrize("name", ["nonsense", "owner/nonsense", "a\0b", "", "../nonsense"])
def test_an_unknown_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no config.json in" if not name else f"ministeer fetch {name}"):
        load(name)


def test_where_a_name_is_looked_up(tmp_path, monkeypatch):
    """A folder of that name first, then $MINISTEER_WEIGHTS, then ./weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(tmp_path / "shelf"))
    places = [Path("gpt2"), tmp_path / "shelf" / "gpt2", Path("weights/gpt2")]
    for place in places:
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
    for i, place in enumerate(places):
        assert find("gpt2") == place
        if i < 2:                       # a folder without config.json does not hide one that has it
            (place / "config.json").unlink()
    monkeypatch.setenv("MINISTEER_WEIGHTS", "")
    assert find("gpt2") == places[2]
    assert find(Path("weights") / "gpt2") == places[2]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_never_opened(folder, file):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (folder / "opened",))
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps({"wte.weight": Trap()}))
    with pytest.raises(ValueError, match=rf"{file}, a pickle, which can run any code.*Convert it.*save_pretrained"):
        load(folder)
    assert not (folder / "opened").exists()
    pickle.loads((folder / file).read_bytes())          # the trap works
    assert (folder / "opened").exists()


# Damaged files

def cut_points(path):
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return [0, 1, 7, 8, 9, header // 2, header, header + 1, path.stat().st_size - 1]


@pytest.mark.parametrize("i", range(9))
def test_a_file_cut_short(folder, i):
    path = folder / "model.safetensors"
    n = cut_points(path)[i]
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(ValueError, match=rf"model.safetensors \({n:,} bytes\) is damaged, cut short or not safetensors"):
        load(folder)


@pytest.mark.parametrize("content", [
    b"<!doctype html><title>404 Not Found</title>", bytes(1000), b"\xff" * 1000, pickle.dumps({"wte.weight": 1}),
    (2 ** 63).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
], ids=["html", "zeros", "ones", "pickle", "endless", "list"])
def test_a_file_that_is_not_safetensors(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged, cut short or not safetensors"):
        load(folder)


def test_a_longer_file(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="damaged, cut short or not safetensors"):
        load(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["embedding", "norm", "up"])
def test_nan_and_infinite_weights(folder, names, bad, which):
    x = load_file(folder / "model.safetensors")[names[which]]
    x.view(-1)[-2:] = bad
    change(folder, **{names[which]: x})
    with pytest.raises(ValueError, match=rf"{names[which]} in model.safetensors holds 2 NaN or infinite numbers"):
        load(folder)


def test_infinities_that_cancel_in_a_sum(folder, names):
    x = load_file(folder / "model.safetensors")[names["up"]]
    x[0, 0], x[0, 1] = float("inf"), -float("inf")
    change(folder, **{names["up"]: x})
    with pytest.raises(ValueError, match="holds 2 NaN or infinite"):
        load(folder)


def test_large_weights_are_not_bad_ones(folder, names):
    x = load_file(folder / "model.safetensors")[names["up"]].fill_(3e38)        # each is finite, their sum is not
    change(folder, **{names["up"]: x})
    assert torch.equal(load_model(folder).state_dict()[names["up"].split(".", 1)[1]], x)
    with pytest.raises(ValueError, match=rf"holds {x.numel():,} numbers too large for torch.float16. Load it as bfloat16 or float32"):
        load_model(folder, "float16")


@pytest.mark.parametrize(("dtype", "called"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.int64, "I64"), (torch.bool, "BOOL"),
                                               (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantised_tensors(folder, names, dtype, called):
    x = load_file(folder / "model.safetensors")[names["up"]].to(dtype)
    change(folder, **{names["up"]: x})
    with pytest.raises(ValueError, match=rf"{names['up']} is stored as {called} in model.safetensors: quantised or not a weight"):
        load(folder)


# Tensors that do not fit config.json

def test_a_transposed_tensor(folder, names):
    x = load_file(folder / "model.safetensors")[names["up"]]
    change(folder, **{names["up"]: x.T})
    with pytest.raises(ValueError, match=rf"{names['up']} is \({x.shape[1]}, {x.shape[0]}\) in model.safetensors, but \w+ wants "
                                         rf"\({x.shape[0]}, {x.shape[1]}\)\. It looks transposed: was this file saved from nn.Linear"):
        load(folder)


@pytest.mark.parametrize("shape", [(3, 5), (31, 32), (1,), ()])
def test_a_wrong_shape(folder, names, shape):
    change(folder, **{names["up"]: torch.ones(shape)})
    with pytest.raises(ValueError, match=rf"{names['up']} is \({', '.join(map(str, shape))},?\) in \S+, but \w+ wants") as fault:
        load(folder)
    assert "transposed" not in str(fault.value)


def test_a_missing_tensor(folder, names, tiny):
    change(folder, **{names["up"]: None})
    name = names["up"].removeprefix(tiny[0].prefix)
    with pytest.raises(ValueError, match=rf"{name} is missing from \S+, which its config.json asks for"):
        load(folder)


def test_many_missing_tensors(folder, names):
    configure(folder, **{names["layers"]: 6})           # the file has 4
    with pytest.raises(ValueError, match=r"\S+\.4\.\S+, \S+, \S+ and \d+ more are missing"):
        load(folder)


def test_a_surplus_tensor(folder, tiny):
    change(folder, **{f"{tiny[0].prefix}adapter.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"adapter.weight is in \S+, but \w+ with this config.json has no such part"):
        load(folder)


def test_surplus_layers(folder, names):
    configure(folder, **{names["layers"]: 3})
    with pytest.raises(ValueError, match=r"\.3\..* are in \S+, but \w+ with this config.json has no such part"):
        load(folder)


def test_a_tensor_twice(folder, names, tiny):
    short = names["norm"].removeprefix(tiny[0].prefix)
    change(folder, **{short: load_file(folder / "model.safetensors")[names["norm"]].clone()})
    with pytest.raises(ValueError, match=rf"{short} is there twice: \S*{short} in model.safetensors and \S*{short} in model.safetensors"):
        load(folder)


def test_a_tensor_in_two_shards(folder, names):
    first, second = shard(folder)
    for file in (first, second):
        stored = load_file(folder / file)
        save_file({**stored, names["norm"]: torch.ones(32)}, folder / file)
    with pytest.raises(ValueError, match=rf"is there twice: {names['norm']} in {first} and {names['norm']} in {second}"):
        load(folder)


@pytest.mark.parametrize("head", [torch.zeros(N_VOCAB, 32), torch.zeros(3), torch.zeros(N_VOCAB, 32, dtype=torch.int8), None])
def test_a_head_that_is_not_the_tied_one(tmp_path, family, head):
    folder = save_checkpoint(tmp_path / "tied", hub_model(hub_config(family, tie_word_embeddings=True)))
    if head is None:                                    # only the last number differs
        head = load_file(folder / "model.safetensors")[NAMES[family]["embedding"]].clone()
        head[-1, -1] += 1
    change(folder, **{"lm_head.weight": head})
    with pytest.raises(ValueError, match=r'lm_head.weight differs from \S+ in model.safetensors.*"tie_word_embeddings": false'):
        load(folder)


# The index of shards

@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../outside.safetensors", "sub/x.safetensors", "..", "", "x.bin",
                                  "pytorch_model.bin", "/x.safetensors", 5, None, True])
def test_an_index_that_names_something_else(folder, tmp_path, name):
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    index(folder, {"wte.weight": name})
    with pytest.raises(ValueError, match=r"the index in \S+ names .*\. A shard must be a .safetensors file in the same folder"):
        load(folder)


def test_a_shard_that_is_a_link_out_of_the_folder(folder, tmp_path):
    file, _ = shard(folder)
    (folder / file).rename(tmp_path / "outside.safetensors")
    (folder / file).symlink_to("../outside.safetensors")
    with pytest.raises(ValueError, match=r"is a link to \S+outside.safetensors, outside the folder"):
        load(folder)


def test_a_missing_shard(folder):
    _, file = shard(folder)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {file} in \S+, which its index names. Was the download interrupted"):
        load(folder)
    (folder / file).symlink_to(file)                    # a link to itself
    with pytest.raises(FileNotFoundError, match=rf"no {file} in"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}',
                                     '{"weight_map": null}', '{"weight_map": {"a": 1, "b": "c"}}', "\ud800", BOMB])
def test_an_index_that_is_none(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"index.json is not the index of a sharded checkpoint"):
        load(folder)


# config.json

@pytest.mark.parametrize("value", [0, -1, 1e12, 10 ** 12, 10 ** 400, True, "4", "", 2.5, float("nan"), float("inf"), [4], {}])
@pytest.mark.parametrize("which", ["layers", "heads", "width", "vocab_size"])
def test_absurd_sizes_are_refused_before_anything_is_built(folder, family, names, monkeypatch, which, value):
    monkeypatch.setitem(weights.FAMILIES, family, lambda config: pytest.fail("it was built"))
    key = names.get(which, which)
    configure(folder, **{key: value})
    with pytest.raises(ValueError, match=rf"config.json: {key} is .{{1,50}}; it must be a (whole )?number"):
        load(folder)


def test_the_largest_sizes_allocate_nothing(folder, family):
    """What these settings ask for would fill many computers; shapes alone are compared before a number is read."""
    huge = {"gpt2": {"n_layer": 20, "n_head": 1000, "n_embd": 200_000, "n_positions": 10 ** 8},
            "llama": {"num_hidden_layers": 20, "num_attention_heads": 1000, "num_key_value_heads": 1000, "head_dim": 200_000,
                      "hidden_size": 200_000, "intermediate_size": 1_600_000, "max_position_embeddings": 10 ** 8}}
    configure(folder, vocab_size=4_000_000, **huge[family])
    with pytest.raises(ValueError, match=r"is \(.*\) in model.safetensors, but \w+ wants"):
        load(folder)


@pytest.mark.parametrize(("family", "settings", "says"), [
    ("gpt2", {"n_head": 5}, "a width of 32 cannot be shared out among 5 heads"),
    ("gpt2", {"n_head": 64}, "a width of 32 cannot be shared out among 64 heads"),
    ("gpt2", {"n_embd": None}, "n_embd is missing"),
    ("gpt2", {"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05; it must be a number from 0 to 1"),
    ("gpt2", {"model_type": "gptj"}, "model_type is 'gptj'; ministeer has 'gpt2' and 'llama'"),
    ("gpt2", {"model_type": None}, "model_type is None"),
    ("gpt2", {"model_type": ["gpt2"]}, "model_type is "),
    ("gpt2", {"activation_function": "gelu"}, 'activation_function is "gelu"; ministeer computes only "gelu_new" and "gelu_pytorch_tanh"'),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true; ministeer computes only false"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is true"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true"),
    ("gpt2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    ("gpt2", {"quantization_config": {"bits": 4}}, r"the checkpoint is quantised \(quantization_config\)"),
    ("gpt2", {"bos_token_id": N_VOCAB}, "the special token 384 is outside the vocabulary, 0 … 383"),
    ("gpt2", {"eos_token_id": [1, -1]}, "the special token -1 is outside the vocabulary"),
    ("gpt2", {"eos_token_id": "1"}, "eos_token_id is '1'; it must be a token number or a list of them"),
    ("gpt2", {"eos_token_id": 1.0}, "eos_token_id is 1.0; it must be a token number"),
    ("gpt2", {"bos_token_id": True}, "bos_token_id is True; it must be a token number"),
    ("gpt2", {"bos_token_id": None}, "config.json names no bos_token_id"),
    ("llama", {"num_attention_heads": 5, "head_dim": None}, "hidden_size 32 cannot be shared out among 5 heads, and there is no head_dim"),
    ("llama", {"num_key_value_heads": 3}, "4 query heads cannot be shared out among 3 key/value heads"),
    ("llama", {"num_key_value_heads": 8}, "4 query heads cannot be shared out among 8 key/value heads"),
    ("llama", {"head_dim": 7}, "a head is 7 wide"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; ministeer computes only "silu"'),
    ("llama", {"sliding_window": 4096}, "sliding_window is 4096; ministeer computes only null"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved is true"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
     "rope_type is 'yarn'; ministeer has 'default', 'linear' and 'llama3'"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type is 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": []}}, r"rope_type is \[\]"),
    ("llama", {"rope_parameters": {"rope_type": "default", "factor": 2}}, "rope_type 'default' does not use factor"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5; it must be a number from 1"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1,
                                   "original_max_position_embeddings": 64}}, "high_freq_factor 1 must be above low_freq_factor 4"),
    ("llama", {"rope_parameters": "default"}, "the rotary settings are 'default', not an object"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0; it must be a number from 1"),
], indirect=["family"])
def test_settings_that_are_not_computed(folder, settings, says):
    configure(folder, **settings)
    with pytest.raises(ValueError, match=says):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "<html>", "\ud800", BOMB, '{"a":' * 100_000, "{'n_layer': 4}"])
def test_a_config_that_is_not_json(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load(folder)


@pytest.mark.parametrize(("content", "called"), [("[]", "list"), ("4", "int"), ("null", "NoneType"), ('"gpt2"', "str")])
def test_a_config_that_is_not_an_object(folder, content, called):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json holds a {called}, not the object of settings"):
        load(folder)


def test_unknown_settings_are_named_in_a_warning(folder, tiny):
    configure(folder, wobble=1, attention_multiplier=0.5)
    with pytest.warns(UserWarning, match=r"does not know and does not use: attention_multiplier, wobble\."):
        model = load_model(folder)
    assert same(model, tiny[0])


def test_the_settings_that_transformers_writes_give_no_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


def test_defaults_of_settings_that_are_left_out(folder, family):
    """What older files do not say is what transformers takes for granted."""
    full = read_config(folder / "config.json")
    left_out = {"gpt2": ["activation_function", "scale_attn_weights", "layer_norm_epsilon", "tie_word_embeddings", "n_inner"],
                "llama": ["hidden_act", "head_dim", "rope_parameters", "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings"]}
    configure(folder, drop=left_out[family])
    assert read_config(folder / "config.json") == full
    if family == "llama":
        configure(folder, drop=["num_key_value_heads", "max_position_embeddings"])
        assert read_config(folder / "config.json") == replace(full, n_kv_head=4, n_ctx=2048)


# The tokenizer and the arguments

@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b"<html>", b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_cannot_be_read(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer that can be read"):
        load(folder)


def test_a_tokenizer_of_another_model(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(N_VOCAB - tokenizer.get_vocab_size() + 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="token numbers up to 384, but the model's embedding ends at 383. Is it another model's tokenizer"):
        load(folder)


def test_a_special_token_that_the_tokenizer_has_not(folder):
    configure(folder, eos_token_id=N_VOCAB - 1)
    with pytest.raises(ValueError, match=r"the special token 383 is not in the tokenizer, which has \d+ tokens"):
        load(folder)


@pytest.mark.parametrize("dtype", ["int8", "float64", "torch.float32", torch.int8, torch.float64, None, 16, ["float32"]])
def test_an_unknown_dtype(checkpoint, dtype):
    with pytest.raises(ValueError, match=r"dtype .*; possible: float32, bfloat16, float16\."):
        load(checkpoint, dtype=dtype)


# The fingerprint

def test_fingerprint(folder, names, tiny):
    """It tells checkpoints apart, whatever type their numbers are loaded as and wherever they lie."""
    prints = {load_model(folder, dtype).fingerprint for dtype in ("float32", "bfloat16", "float16")}
    assert prints == {tiny[0].fingerprint}
    assert len(tiny[0].fingerprint) == 16
    for which in ("embedding", "norm"):
        x = load_file(folder / "model.safetensors")[names[which]]
        x.view(-1)[5] += 1e-3
        change(folder, **{names[which]: x})
        prints.add(load_model(folder).fingerprint)
    assert len(prints) == 3


# Random damage

new = st.binary(max_size=6) | st.sampled_from([b'"', b"{", b"]", b"9" * 30, b"-", b"1e999"])
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), new), min_size=1, max_size=4)
text = st.text(max_size=5)
number = st.integers() | st.floats() | st.sampled_from([10 ** 400, -10 ** 400, 2 ** 63, 1e308])
junk = st.recursive(st.none() | st.booleans() | number | text,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=4)
fuzz = settings(max_examples=150, deadline=None)


def damage(content, edits):
    """At each place, a fraction of the length, n bytes give way to others."""
    for place, n, new in edits:
        i = int(place * len(content))
        content = content[:i] + new + content[i + n:]
    return content


def loads_or_says_why(folder):
    with warnings.catch_warnings(), contextlib.suppress(ValueError, OSError):
        warnings.simplefilter("ignore")
        model, tokenizer = load(folder)
        model(torch.tensor([tokenizer.encode("I love you")[:model.config.n_ctx]]))


@pytest.fixture(scope="module")
def worn(checkpoint, tmp_path_factory):
    """A copy in which every example of a fuzz test replaces one file, {name: its content at first}."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("worn") / "x")
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@fuzz
@given(edits=edits)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_random_damage_to_json(worn, file, edits):
    folder, content = worn
    (folder / file).write_bytes(damage(content[file], edits))
    loads_or_says_why(folder)
    (folder / file).write_bytes(content[file])


@fuzz
@given(edits=edits)
def test_random_damage_to_the_header(worn, edits):
    folder, content = worn
    content = content["model.safetensors"]
    end = 8 + int.from_bytes(content[:8], "little")
    (folder / "model.safetensors").write_bytes(damage(content[:end], edits) + content[end:])
    loads_or_says_why(folder)
    (folder / "model.safetensors").write_bytes(content)


@fuzz
@given(data=st.data())
@example(data=None)
def test_random_settings(worn, data):
    folder, content = worn
    settings = json.loads(content["config.json"])
    if data is None:                                    # nested as deep as JSON goes, which is deeper than a message can quote
        settings["hidden_act"] = settings["activation_function"] = json.loads("[" * 900 + "]" * 900)
    else:
        keys = st.sampled_from([*settings, "rope_scaling", "rope_theta", "sliding_window"])
        for key in data.draw(st.lists(keys, min_size=1, max_size=3)):
            settings[key] = data.draw(junk)
        if isinstance(rope := settings.get("rope_parameters"), dict) and data.draw(st.booleans()):
            rope[data.draw(st.sampled_from(["rope_type", "rope_theta", "factor", "type"]))] = data.draw(junk)
    (folder / "config.json").write_text(json.dumps(settings))
    loads_or_says_why(folder)
    (folder / "config.json").write_bytes(content["config.json"])


# The real model, and the check from the command line

def test_memory_of_loading(smollm2):
    """At its peak, loading in float32 holds the model and one tensor more, but not the file (257 MiB) beside it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of one process is read from /proc")
    script = """
import re, sys, ministeer, tokenizers, ministeer.checkpoints.weights
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = peak()
model, _ = ministeer.load(sys.argv[1])
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
"""
    done = run(sys.executable, "-c", script, str(smollm2))
    grown, held = map(float, done.stdout.split())       # MiB
    assert held < grown < held + 160                    # the largest tensor is 54 MiB in the file; the tokenizer takes some 40


def run(*command, cwd=None):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("MINISTEER_WEIGHTS", None)
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=120, check=False)


def test_the_check_prints_what_a_checkpoint_is(smollm2):
    done = run(sys.executable, "-m", "ministeer.checkpoints.weights", str(smollm2))
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("llama, 134,515,008 parameters stored as F16",
                 "30 layers, 9 query and 3 key/value heads of 64, d_model 576, d_mlp 1536",
                 "49,152 in the vocabulary, context 8,192, BOS 0 <|endoftext|>",
                 "loss        3.8797 nats/token on the 82 tokens of a fixed paragraph; it should be 3.8797"):
        assert part in done.stdout


def test_the_check_of_a_checkpoint_that_is_not_known(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(weights, "PARAGRAPH", "I love you")
    weights.main(checkpoint)
    assert "no number to compare it with is known" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_check_says_what_is_wrong(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = run(sys.executable, "-m", "ministeer.checkpoints.weights", folder.name, cwd=folder.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"ministeer: {folder.name}/model.safetensors (")


def test_the_check_without_a_folder():
    done = run(sys.executable, "-m", "ministeer.checkpoints.weights")
    assert done.returncode != 0
    assert done.stderr == "usage: python -m ministeer.checkpoints.weights FOLDER\n"

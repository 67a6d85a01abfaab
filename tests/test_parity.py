"""ministeer against transformers: equal logits and residuals at every layer, from the same files.

The files come from save_pretrained, with random weights, so that every setting can be tried. The last tests
use the real default model.
"""

import json
import tempfile
from dataclasses import replace

import pytest
import torch
from conftest import EVERY_FAMILY, hub_config, hub_model, save_checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ministeer import KVCache, Steer, generate
from ministeer.checkpoints.config import Rope, parse_config
from ministeer.checkpoints.weights import load_model
from ministeer.generation import Sampling, decoder, sample
from ministeer.llama import frequencies

FAMILIES = EVERY_FAMILY
N_POS = 110                 # positions in every comparison
# Of the largest number in the reference. In float32, another order of summation is off by about 1e-6.
TOLERANCE = 1e-4
FEW = settings(max_examples=12, deadline=None, derandomize=True)        # the same cases in every run

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    # With an old context of 64 and d_head 8, one wave is kept, one is mixed, and two are stretched.
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
}


def rope_parameters(kind, theta=1000.0):
    return {**ROPES[kind], "rope_theta": theta}


def error(ours, theirs):
    """The largest difference, as a part of the largest number of the reference."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def as_written(config):
    """What transformers writes to config.json, as a dict."""
    return json.loads(config.to_json_string())


def load_hub(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def run_hub(hub, ids, steer=()):
    """-> transformers' output, and the residual stream: what each block and the final norm read.

    Forward pre-hooks record both and add the vectors, so no code is shared with ministeer's addition.
    """
    body = hub.base_model
    if hub.config.model_type == "opt":
        body = body.decoder
        last = body.final_layer_norm or body.project_out or hub.lm_head
    else:
        last = body.norm if hub.config.model_type == "llama" else body.ln_f
    blocks = body.layers if hasattr(body, "layers") else body.h
    resid = []

    def read(module, args):
        x = args[0].clone()
        for s in steer:
            if module is blocks[s.layer]:
                stop = s.start + len(s.vector) if s.vector.ndim == 2 else None
                x[:, s.start:stop] += s.coeff * s.vector
        resid.append(x)
        return (x, *args[1:])

    hooks = [module.register_forward_pre_hook(read) for module in [*blocks, last]]
    try:
        with torch.no_grad():
            return hub(ids, output_hidden_states=True), resid
    finally:
        for hook in hooks:
            hook.remove()


def check_parity(model, hub, steer=(), ids=None, cuts=()):
    """Assert equal logits and residuals at every layer. cuts: where later chunks begin, read into a cache"""
    if ids is None:
        ids = torch.randint(model.config.n_vocab, (2, N_POS), generator=torch.Generator().manual_seed(1))
    out, theirs = run_hub(hub, ids, steer)
    cache = KVCache(ids.shape[1], len(ids)) if cuts else None
    runs = [model(part, steer, cache) for part in ids.tensor_split(sorted(cuts), dim=1)]
    logits = torch.cat([logits for logits, _ in runs], dim=1)
    resid = [torch.cat(parts, dim=1) for parts in zip(*(resid for _, resid in runs), strict=True)]
    assert len(resid) == len(theirs) == model.config.n_layer + 1
    for l, (a, b) in enumerate(zip(resid, theirs, strict=True)):
        assert error(a, b) < TOLERANCE, f"resid[{l}]"
    # Trap: the last of transformers' hidden states comes after the final norm, resid[n_layer] before it.
    assert error(model.final_norm(resid[-1]), out.hidden_states[-1]) < TOLERANCE, "final norm"
    assert error(logits, out.logits) < TOLERANCE, "logits"
    if not steer:
        for l, b in enumerate(out.hidden_states[:-1]):
            assert error(resid[l], b) < TOLERANCE, f"hidden_states[{l}]"


def check_config(config, seed=0):
    """Assert parity of random weights of a transformers config, written to files and read back.

    Plain in one pass, and steered in a first chunk, a single position and a rest.
    """
    hub = hub_model(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        hub.save_pretrained(folder)
        model = load_model(folder)
    check_parity(model, hub)
    check_parity(model, hub, make_steers(three_at_once, model, 0.5), cuts=[60, 61])


@pytest.fixture(scope="module")
def hub(checkpoint):
    """transformers' model of the same folder as `tiny`."""
    return load_hub(checkpoint)


# Heads as (query heads, key/value heads); the settings that are not here keep the tiny model's value.
LLAMA = st.fixed_dictionaries({
    "heads": st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3)]),
    "head_dim": st.sampled_from([None, 2, 6, 16]),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "rope_parameters": st.builds(
        rope_parameters, st.sampled_from(list(ROPES)), st.sampled_from([500.0, 10000.0, 500000.0])),
    "tie_word_embeddings": st.booleans(),
})
PLAIN = {"heads": (6, 2), "head_dim": None, "attention_bias": False, "mlp_bias": False,
         "tie_word_embeddings": True}


@FEW
@given(LLAMA)
@example({**PLAIN, "rope_parameters": rope_parameters("linear")})
@example({**PLAIN, "rope_parameters": rope_parameters("llama3")})
@example({**PLAIN, "rope_parameters": rope_parameters("default"), "attention_bias": True, "mlp_bias": True})
def test_llama_of_any_shape(sizes):
    heads, kv_heads = sizes["heads"]
    # Twice the usual spread of random weights makes attention peaked, so that a wrong rotation shows.
    others = {name: value for name, value in sizes.items() if name != "heads"}
    check_config(hub_config("llama", num_attention_heads=heads, num_key_value_heads=kv_heads,
                            hidden_size=8 * heads, initializer_range=0.04, **others))


@FEW
@given(st.fixed_dictionaries({
    "n_head": st.sampled_from([1, 2, 3, 4]),
    "n_inner": st.sampled_from([None, 20, 100]),
    "tie_word_embeddings": st.booleans(),
    "layer_norm_epsilon": st.sampled_from([1e-5, 1e-2]),
    "activation_function": st.sampled_from(["gelu_new", "gelu_pytorch_tanh"]),
}))
def test_gpt2_of_any_shape(sizes):
    check_config(hub_config("gpt2", n_embd=8 * sizes["n_head"], initializer_range=0.04, **sizes))


@FEW
@given(st.fixed_dictionaries({
    "num_attention_heads": st.sampled_from([1, 2, 3, 4]),
    "ffn_dim": st.sampled_from([20, 100]),
    "enable_bias": st.booleans(),
    "do_layer_norm_before": st.booleans(),
    "_remove_final_layer_norm": st.booleans(),
    "word_embed_proj_dim": st.sampled_from([None, 12, 40]),
    "tie_word_embeddings": st.booleans(),
}))
def test_opt_of_any_shape(sizes):
    check_config(hub_config("opt", hidden_size=8 * sizes["num_attention_heads"], init_std=0.04, **sizes))


@FEW
@given(st.fixed_dictionaries({
    "n_head": st.sampled_from([1, 2, 3, 4]),
    "rotary_dim": st.sampled_from([2, 4, 6, 8]),        # of heads 9 wide
    "n_inner": st.sampled_from([None, 20, 100]),
    "layer_norm_epsilon": st.sampled_from([1e-5, 1e-2]),
    "activation_function": st.sampled_from(["gelu_new", "gelu_pytorch_tanh"]),
}))
def test_gptj_of_any_shape(sizes):
    check_config(hub_config("gptj", n_embd=9 * sizes["n_head"], initializer_range=0.04, **sizes))


def test_llama3_frequencies_in_all_three_regimes():
    """Short waves are kept, long ones stretched, and those between mixed: all three occur here."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    theirs = hub_config("llama", rope_parameters=rope_parameters("llama3"))
    config = parse_config(as_written(theirs))
    stretch = frequencies(replace(config, rope=Rope(theta=1000.0))) / frequencies(config)
    assert stretch[0] == 1 and 1.01 < stretch[1] < 7.9 and torch.allclose(stretch[2:], torch.tensor(8.0))
    assert error(frequencies(config), LlamaRotaryEmbedding(theirs).inv_freq) < 1e-6


def test_true_shapes_of_gpt2_124m():
    check_config(hub_config("gpt2", n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257,
                            bos_token_id=50256, eos_token_id=50256))


@pytest.mark.long
def test_true_shapes_of_smollm2_135m():
    check_config(hub_config("llama", num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                            hidden_size=576, intermediate_size=1536, vocab_size=49152, rms_norm_eps=1e-5,
                            max_position_embeddings=8192, tie_word_embeddings=True,
                            rope_parameters=rope_parameters("default", 100000.0)))


@pytest.mark.long
@pytest.mark.parametrize(("family", "settings"), [
    ("opt", {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "ffn_dim": 3072}),
    ("opt-350m", {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024, "ffn_dim": 4096,
                  "word_embed_proj_dim": 512}),
    ("gptj", {"n_layer": 2, "n_head": 16, "n_embd": 4096, "rotary_dim": 64, "vocab_size": 5040}),
])
def test_true_shapes_of_opt_and_two_layers_of_gptj(family, settings):
    check_config(hub_config(family, **{"vocab_size": 50272, **settings}))


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ROPES)
def test_llama_config_of_transformers_4(kind, key):
    """Version 4 wrote rope_theta and rope_scaling for rope_parameters, and torch_dtype for dtype."""
    from transformers import LlamaConfig
    five = as_written(hub_config("llama", rope_parameters=rope_parameters(kind)))
    four = {k: v for k, v in five.items() if k not in ("rope_parameters", "dtype", "head_dim")}
    scaling = {k: v for k, v in ROPES[kind].items() if k != "rope_type"}
    four |= {"torch_dtype": "float32", "rope_theta": 1000.0,
             "rope_scaling": {key: kind, **scaling} if scaling else None}
    ours = parse_config(five)
    assert ours.rope.type == kind and ours.rope.theta == 1000.0
    assert parse_config(four) == ours
    # transformers 5 reads the old form in the same way.
    assert parse_config(as_written(LlamaConfig.from_dict(four))) == ours


def test_config_of_transformers_4_without_rotary_settings():
    """The oldest files have neither rope_theta nor key/value heads: the defaults of their time hold."""
    raw = as_written(hub_config("llama", num_key_value_heads=4))
    newer = {"rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"}
    old = {k: v for k, v in raw.items() if k not in newer}
    assert parse_config(old) == parse_config(raw)


def test_gpt2_config_of_transformers_4():
    five = as_written(hub_config("gpt2"))
    # As in OpenAI's own config.json on the Hub, which names neither n_inner nor tie_word_embeddings.
    four = {k: v for k, v in five.items() if k not in ("dtype", "n_inner", "tie_word_embeddings")}
    four |= {"torch_dtype": "float32", "n_ctx": five["n_positions"],
             "task_specific_params": {"text-generation": {"do_sample": True}}}
    assert parse_config(four) == parse_config(five)


def greedy(model, ids, n=40):
    """The n likeliest next ids, one after another; EOS does not end them."""
    step, how = decoder(model, (), 1, ids.shape[1] + n), Sampling(temperature=0, max_new_tokens=n)
    return [new for (new,) in sample(step, ids, torch.zeros(1, n), how)]


def greedy_hub(hub, ids, n=40):
    hub.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    out = hub.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=n, pad_token_id=0)
    return out[0, ids.shape[1]:].tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gptj"], indirect=True)
def test_greedy_generation(family, tmp_path):
    """40 tokens by way of the cache. Untied heads and large weights avoid repetition."""
    spread = {"init_std" if family == "opt" else "initializer_range": 0.3}
    hub = hub_model(hub_config(family, tie_word_embeddings=False, **spread), seed=1)
    model = load_model(save_checkpoint(tmp_path, hub))
    ids = torch.tensor([[0, 40, 50, 60, 70]])
    theirs = greedy_hub(hub, ids)
    assert len(theirs) == 40 and len(set(theirs)) > 12
    assert greedy(model, ids) == theirs


def three_at_once(n_layer, v):
    return [Steer(1, v, coeff=2.0), Steer(1, v[:2], start=3), Steer(n_layer - 1, v[0], start=0)]


# (the model's n_layer, a vector (4, d_model)) -> Steers
STEERS = [
    pytest.param(lambda n_layer, v: [Steer(0, v, coeff=3.0)], id="first layer"),
    pytest.param(lambda n_layer, v: [Steer(1, v, coeff=3.0)], id="second layer"),
    pytest.param(lambda n_layer, v: [Steer(n_layer - 1, v, coeff=3.0)], id="last layer"),
    pytest.param(lambda n_layer, v: [Steer(n_layer // 2, v[0], coeff=-2.0, start=5)], id="from 5 on"),
    pytest.param(three_at_once, id="three at once"),
]


def make_steers(make, model, scale):
    v = scale * torch.randn(4, model.config.d_model, generator=torch.Generator().manual_seed(2))
    return make(model.config.n_layer, v)


@pytest.mark.parametrize("make", STEERS)
def test_steered_residuals_and_logits(tiny, hub, make):
    model, _ = tiny
    check_parity(model, hub, make_steers(make, model, 0.5))


@settings(FEW, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, N_POS - 1), min_size=1, max_size=4))
def test_steered_chunks_of_any_length(tiny, hub, cuts):
    model, _ = tiny
    check_parity(model, hub, make_steers(three_at_once, model, 0.5), cuts=cuts)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_within_its_rounding(checkpoint, tiny, dtype, tolerance):
    """bfloat16 keeps 8 bits, float16 keeps 11: one rounding is up to 0.4 % or 0.05 %, and many add up."""
    model, _ = tiny
    half = load_model(checkpoint, dtype)
    ids = torch.randint(model.config.n_vocab, (1, N_POS), generator=torch.Generator().manual_seed(1))
    logits, resid = half(ids)
    assert {x.dtype for x in [*half.parameters(), logits, *resid]} == {getattr(torch, dtype)}
    wanted_logits, wanted = model(ids)
    assert 0 < error(logits.float(), wanted_logits) < tolerance
    assert all(error(a.float(), b) < tolerance for a, b in zip(resid, wanted, strict=True))
    assert load_model(checkpoint, getattr(torch, dtype)).fingerprint == half.fingerprint == model.fingerprint


def assert_same(a, b):
    """Bitwise equal weights, and the same fingerprint, so that each accepts the other's vectors."""
    assert a.config == b.config and a.fingerprint == b.fingerprint
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def with_prefix(tensors, model):
    bare = {name.removeprefix(model.prefix): x for name, x in tensors.items()}
    return {name if name.startswith("lm_head") else model.prefix + name: x for name, x in bare.items()}


def without_prefix(tensors, model):
    return {name.removeprefix(model.prefix): x for name, x in tensors.items()}


def with_buffers(tensors, model):
    """What old versions of transformers stored beside the weights: causal masks and rotary frequencies."""
    config = model.config
    mask = torch.ones(1, 1, config.n_ctx, config.n_ctx, dtype=torch.uint8).tril()
    buffers = {
        "gpt2": {"h.{}.attn.bias": mask, "h.{}.attn.masked_bias": torch.tensor(-1e4)},
        "gptj": {"h.{}.attn.bias": mask, "h.{}.attn.masked_bias": torch.tensor(-1e4)},
        "opt": {},
        "llama": {"layers.{}.self_attn.rotary_emb.inv_freq": torch.ones(config.d_head // 2)},
    }[config.family]
    added = {name.format(l): x.clone() for name, x in buffers.items() for l in range(config.n_layer)}
    assert not set(added) & set(tensors)
    return without_prefix(tensors, model) | added


def with_buffers_and_prefix(tensors, model):
    return with_prefix(with_buffers(tensors, model), model)


@pytest.mark.parametrize("change", [with_prefix, without_prefix, with_buffers, with_buffers_and_prefix])
def test_loads_old_names_and_ignores_old_buffers(checkpoint, tiny, tmp_path, change):
    model, _ = tiny
    save_file(change(load_file(checkpoint / "model.safetensors"), model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert_same(load_model(tmp_path), model)


def test_loads_sharded_files(checkpoint, tiny, hub, tmp_path):
    hub.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    assert_same(load_model(tmp_path), tiny[0])


PROSE = (
    "The lighthouse keeper wrote down the weather every evening for thirty-one years, first in pencil and "
    "later with a fountain pen that his sister had sent him from Lisbon. Most of the entries are short: wind "
    "from the west, two ships, fog before midnight. But on the ninth of March 1887 he filled four pages. A "
    "whale had come into the bay, he wrote, and it did not seem to be lost; it swam around the rock as if it "
    "were reading something written there, and then it went back out to sea. He never mentioned it again."
)


@pytest.fixture(scope="module")
def hub_real(smollm2):
    return load_hub(smollm2)


@pytest.fixture(scope="module")
def prose(real):
    ids = torch.tensor([real[1].encode(PROSE)])
    assert ids.shape[1] > 100
    return ids


def test_real_weights_unsteered(real, hub_real, prose):
    check_parity(real[0], hub_real, ids=prose)


@pytest.mark.parametrize("make", STEERS)
def test_real_weights_steered(real, hub_real, prose, make):
    model, _ = real
    check_parity(model, hub_real, make_steers(make, model, 1.0), ids=prose)


@pytest.mark.long
def test_real_weights_greedy_generation(real, hub_real):
    model, tokenizer = real
    prompt = "The capital of France is Paris, the capital of Italy is"
    ids = torch.tensor([tokenizer.encode(prompt)])
    theirs = greedy_hub(hub_real, ids)
    assert len(theirs) == 40 and len(set(theirs)) > 20 and not set(theirs) & set(tokenizer.eos_ids)
    assert greedy(model, ids) == theirs
    assert generate(model, tokenizer, prompt, temperature=0) == [tokenizer.decode(theirs)]

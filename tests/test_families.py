"""The settings and files of OPT and GPT-J, and a family of one's own in one file. Their sums: test_parity.py.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import hub_config, hub_model, save_checkpoint
from safetensors.torch import load_file, save_file
from test_parity import as_written

from ministeer import Steer, fast, generate, load
from ministeer.checkpoints import config, weights
from ministeer.checkpoints.config import GPTJConfig, OPTConfig, Rope, parse_config
from ministeer.gpt2 import GPT2, Block

FAMILIES = ["opt", "opt-350m"]
OPT, GPTJ = as_written(hub_config("opt")), as_written(hub_config("gptj"))

# As the files on the Hub have them: those of OPT-350M and GPT-J-6B.
OPT_350M = {
    "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": False, "dropout": 0.1,
    "eos_token_id": 2, "ffn_dim": 4096, "hidden_size": 1024, "init_std": 0.02, "layerdrop": 0.0,
    "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 16, "num_hidden_layers": 24,
    "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.20.0.dev0",
    "use_cache": True, "vocab_size": 50272, "word_embed_proj_dim": 512}
GPTJ_6B = {
    "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0,
    "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "gradient_checkpointing": False,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gptj", "n_embd": 4096,
    "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048, "resid_pdrop": 0.0, "rotary": True,
    "rotary_dim": 64, "scale_attn_weights": True, "summary_type": "cls_index", "tie_word_embeddings": False,
    "task_specific_params": {"text-generation": {"do_sample": True}}, "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.18.0.dev0", "use_cache": True, "vocab_size": 50400}


def test_reads_the_settings_of_opt_350m_and_gptj_6b():
    assert parse_config(OPT_350M) == OPTConfig(
        "opt", n_layer=24, n_head=16, n_kv_head=16, n_vocab=50272, n_ctx=2048, d_model=1024, d_head=64,
        d_mlp=4096, norm_eps=1e-5, tied=True, bos_id=2, eos_ids=(2,), d_embed=512, pre_norm=False,
        final_norm=False)
    assert parse_config(GPTJ_6B) == GPTJConfig(
        "gptj", n_layer=28, n_head=16, n_kv_head=16, n_vocab=50400, n_ctx=2048, d_model=4096, d_head=256,
        d_mlp=16384, norm_eps=1e-5, tied=False, attention_bias=False, rope=Rope(), bos_id=50256,
        eos_ids=(50256,), rotary_dim=64)


@pytest.mark.parametrize(("full", "left_out"), [
    (OPT_350M, "activation_function max_position_embeddings bos_token_id eos_token_id"),
    (OPT_350M | {"word_embed_proj_dim": 1024, "do_layer_norm_before": True},
     "do_layer_norm_before word_embed_proj_dim"),
    (GPTJ_6B, "activation_function n_positions n_inner layer_norm_epsilon rotary_dim tie_word_embeddings "
              "bos_token_id eos_token_id rotary scale_attn_weights"),
], ids=["opt-350m", "opt", "gptj"])
def test_settings_that_are_left_out_are_what_transformers_assumes(full, left_out):
    assert parse_config({k: v for k, v in full.items() if k not in left_out.split()}) == parse_config(full)


@pytest.mark.parametrize(("settings", "says"), [
    *((OPT | {key: value}, f"{key} is {re.escape(json.dumps(value))}; ministeer computes only ")
      for key, value in {"activation_function": "gelu", "layer_norm_elementwise_affine": False,
                         "do_layer_norm_before": "yes", "enable_bias": 1, "_remove_final_layer_norm": 0,
                         "tie_word_embeddings": "yes"}.items()),
    *((GPTJ | {key: value}, f"{key} is {re.escape(json.dumps(value))}; ministeer computes only ")
      for key, value in {"activation_function": "gelu", "scale_attn_weights": False, "rotary": False,
                         "tie_word_embeddings": True}.items()),
    (OPT | {"ffn_dim": None}, "ffn_dim is missing"),
    (OPT | {"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0; it must be a number from 1"),
    (OPT | {"num_attention_heads": 5}, "a width of 32 cannot be divided evenly among 5 heads"),
    (OPT | {"hidden_act": "relu"}, "does not know the settings hidden_act"),
    (OPT | {"bos_token_id": 384}, "special token 384 is outside the vocabulary"),
    (GPTJ | {"n_head": 5}, "a width of 32 cannot be divided evenly among 5 heads"),
    (GPTJ | {"rotary_dim": 5}, "rotary_dim is 5; it must be even and at most the width of a head, 8"),
    (GPTJ | {"rotary_dim": 10}, "rotary_dim is 10; it must be even"),
    (GPTJ | {"rotary_dim": None}, "rotary_dim is missing"),
    (GPTJ | {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan; it must be a number"),
    (GPTJ | {"rope_scaling": {"type": "linear", "factor": 2}}, "does not know the settings rope_scaling"),
    (GPTJ | {"parallel_residual": True}, "parallel_residual is true; ministeer computes only false"),
])
def test_refuses_settings_that_are_not_computed(settings, says):
    with pytest.raises(ValueError, match=says):
        parse_config(settings)


@pytest.mark.parametrize(("family", "damage", "says"), [
    ("opt", {"model.decoder.final_layer_norm.weight": None}, "Missing: decoder.final_layer_norm.weight. Sur"),
    ("opt", {"model.decoder.embed_positions.weight": torch.ones(192, 32)},
     r"embed_positions.weight is \(192, 32\) in model.safetensors, but OPT wants \(194, 32\)"),
    ("opt-350m", {"model.decoder.project_in.weight": torch.ones(20, 32)}, "It looks transposed"),
    ("opt-350m", {"model.decoder.final_layer_norm.weight": torch.ones(32)}, "Surplus: model.decoder.final_l"),
    ("gptj", {"lm_head.bias": None}, "not those of a GPTJ with this config.json. Missing: lm_head.bias. Sur"),
    ("gptj", {"transformer.h.1.attn.q_proj.bias": torch.ones(32)}, "Surplus: transformer.h.1.attn.q_proj.b"),
    ("gptj", {"transformer.h.1.mlp.fc_in.bias": torch.full((128,), torch.nan)}, "fc_in.bias in .* 128 NaN"),
], indirect=["family"])
def test_refuses_tensors_that_do_not_fit(checkpoint, tmp_path, damage, says):
    stored = load_file(checkpoint / "model.safetensors") | damage
    save_file({name: x for name, x in stored.items() if x is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(ValueError, match=says):
        weights.load_model(tmp_path)


def test_a_tied_embedding_may_be_stored_as_the_head(checkpoint, tiny, tmp_path):
    """As in some OPT files that were converted from pickles. transformers reads them too."""
    stored = load_file(checkpoint / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.decoder.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert weights.load_model(tmp_path).fingerprint == tiny[0].fingerprint
    save_file(stored | {"lm_head.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"Missing: decoder.embed_tokens.weight\. Surplus: none"):
        weights.load_model(tmp_path)


# A fifth family in one file, which is this one: a GPT-2 whose blocks write half of what a GPT-2's would.

class HalfBlock(Block):
    def forward(self, x, l, rope=None, cache=None):
        return x + 0.5 * (super().forward(x, l, rope, cache) - x)


class Half(GPT2):
    def __init__(self, c):
        super().__init__(c)
        self.h = torch.nn.ModuleList(HalfBlock(c) for _ in range(c.n_layer))


def half_settings(keys):
    return replace(config.READERS["gpt2"](keys), family="half")


def test_a_family_is_a_class_and_a_reader_of_settings(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path, hub_model(hub_config("gpt2")))
    gpt2, _ = load(folder)
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": "half"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="model_type is 'half'; ministeer has gpt2, gptj, llama, opt"):
        load(folder)
    monkeypatch.setitem(config.READERS, "half", half_settings)
    monkeypatch.setitem(weights.FAMILIES, "half", Half)
    model, tokenizer = load(folder)
    ids = torch.arange(2, 14)[None]
    steer = Steer(1, torch.ones(32), 2.0)
    (logits, resid), (_, whole) = model(ids, steer), gpt2(ids)
    added = torch.tensor([0.0] + 11 * [2.0])[:, None]           # from position 1 on
    torch.testing.assert_close(resid[1] - resid[0] - added, (whole[1] - whole[0]) / 2)
    torch.testing.assert_close(fast(model)(ids, steer)[0], logits)
    assert generate(model, tokenizer, "I", steer=steer) != generate(gpt2, tokenizer, "I", steer=steer)

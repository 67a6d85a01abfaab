"""convert_gguf: a Llama in one GGUF file -> a folder in the Hub's layout, which is what `load` reads.

Read first: fetch.py, which calls it. Key and tensor names: the GGUF specification.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
           "output.weight": "lm_head.weight"}
INSIDE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
          "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj",
          "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
SPECIAL = 3         # GGUF's type of a special token


def convert_gguf(path: Path, folder: Path) -> None:
    """A Llama in GGUF -> config.json, model.safetensors in float16, tokenizer.json, tokenizer_config.json.

    float16 has the 11 significant bits of the scales that 4-bit blocks are made from; weights/README.md has
    the measured loss. Raises ValueError for whatever would not be the same model afterwards.
    """
    reader = gguf.GGUFReader(path)
    about = {key: field.contents() for key, field in reader.fields.items()}
    kind = [about.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")]
    if kind != ["llama", "gpt2", "smollm"]:
        raise ValueError(f"{path.name} says {', '.join(map(repr, kind))}; "
                         "only a Llama with SmolLM's byte-level BPE can be converted.")
    if any(key.startswith("llama.rope.scaling.") for key in about):
        raise ValueError(f"{path.name} stretches its rotary embedding, which is not converted.")
    try:
        config = hub_config(about, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    except KeyError as error:
        raise ValueError(f"{path.name} does not say its {error.args[0]}.") from None
    weights = {}
    for tensor in tqdm(reader.tensors, "converting", unit="tensor", leave=False):
        name = hub_name(tensor.name)
        w = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            w = unpermute(w, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            w = unpermute(w, config["num_key_value_heads"])
        weights[name] = w.astype(np.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = about["tokenizer.ggml.tokens"]
    tokenizer = byte_level_bpe(tokens, about["tokenizer.ggml.merges"], about["tokenizer.ggml.token_type"])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "bos_token": tokens[config["bos_token_id"]], "eos_token": tokens[config["eos_token_id"]],
        "chat_template": about.get("tokenizer.chat_template"), "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"], "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # save_file lets only the file's owner read it.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def hub_config(about: dict[str, Any], tied: bool) -> dict[str, Any]:
    """GGUF's metadata -> the settings of a Hub config.json. Raises KeyError for a key that is missing."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "torch_dtype": "float16", "tie_word_embeddings": tied, "vocab_size": about["llama.vocab_size"],
        "num_hidden_layers": about["llama.block_count"], "hidden_size": about["llama.embedding_length"],
        "num_attention_heads": about["llama.attention.head_count"],
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "intermediate_size": about["llama.feed_forward_length"],
        "max_position_embeddings": about["llama.context_length"], "rope_theta": about["llama.rope.freq_base"],
        # 1e-05 went through 32 bits and came back as 9.99999974e-06
        "rms_norm_eps": float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
    }


def hub_name(name: str) -> str:
    """token_embd.weight, blk.0.attn_q.weight … -> the Hub's names. Raises ValueError for one no Llama has."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block and block[2] in INSIDE:
        return f"model.layers.{block[1]}.{INSIDE[block[2]]}.weight"
    if name not in OUTSIDE:
        raise ValueError(f"the GGUF file has a tensor {name!r}, which no Llama has.")
    return OUTSIDE[name]


def unpermute(w: np.ndarray, n_head: int) -> np.ndarray:
    """w (H * D, d_model), where the rows of a head are pairs of neighbours -> the same with pairs D/2 apart.

    Trap: GGUF pairs neighbouring rows for its rotary embedding, the Hub pairs the two halves of a head. At
    position 0 both are the same, so a mistake here gives a right first token and then nonsense.
    """
    rows, d_model = w.shape
    return w.reshape(n_head, rows // n_head // 2, 2, d_model).swapaxes(1, 2).reshape(rows, d_model)


def byte_level_bpe(tokens: list[str], merges: list[str], types: list[int]) -> Tokenizer:
    """What GGUF lists of a tokenizer -> the tokenizer, with every digit apart as SmolLM splits them."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer

"""convert_gguf: a Llama in one GGUF file -> a folder in the Hub's layout, which is what `load` reads.

Read before: fetch.py, which calls it. Key and tensor names: the GGUF specification.
"""

import json
import re
import shutil


def convert_gguf(path, folder):
    """A Llama in GGUF -> config.json, model.safetensors in float16, tokenizer.json and tokenizer_config.json in `folder`.

    float16 has the 11 significant bits of the scales that 4-bit blocks are made from; weights/README.md has the measured loss.
    Raises ValueError for whatever would not be the same model afterwards.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import save_file
    from tqdm import tqdm
    reader = gguf.GGUFReader(path)
    about = {key: field.contents() for key, field in reader.fields.items()}
    kind = tuple(about.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{path.name} says {', '.join(map(repr, kind))}; only a Llama with SmolLM's byte-level BPE can be converted.")
    if any(key.startswith("llama.rope.scaling.") for key in about):
        raise ValueError(f"{path.name} stretches its rotary embedding, which is not converted.")
    try:
        config = gguf_config(about, tied=all(t.name != "output.weight" for t in reader.tensors))
    except KeyError as error:
        raise ValueError(f"{path.name} does not say its {error.args[0]}.") from None
    weights = {}
    for tensor in tqdm(reader.tensors, "converting", unit="tensor", leave=False):
        name = gguf_name(tensor.name)
        w = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            w = unpermute(w, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            w = unpermute(w, config["num_key_value_heads"])
        weights[name] = w.astype(np.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = about["tokenizer.ggml.tokens"]
    gguf_tokenizer(tokens, about["tokenizer.ggml.merges"], about["tokenizer.ggml.token_type"]).save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": tokens[config[f"{name}_token_id"]] for name in ("bos", "eos")}
    tokenizer_config = {**named, "chat_template": about.get("tokenizer.chat_template"), "clean_up_tokenization_spaces": False,
                        "model_max_length": config["max_position_embeddings"], "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")       # which the library writes for its owner alone


def gguf_config(about, tied):
    """GGUF's metadata -> the settings of a Hub config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float16",
        "num_hidden_layers": about["llama.block_count"], "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"], "num_attention_heads": about["llama.attention.head_count"],
        "num_key_value_heads": about["llama.attention.head_count_kv"], "vocab_size": about["llama.vocab_size"],
        "max_position_embeddings": about["llama.context_length"], "rope_theta": about["llama.rope.freq_base"],
        # 1e-05 went through 32 bits and came back as 9.99999974e-06
        "rms_norm_eps": float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"), "tie_word_embeddings": tied,
        "bos_token_id": about["tokenizer.ggml.bos_token_id"], "eos_token_id": about["tokenizer.ggml.eos_token_id"],
    }


def gguf_name(name):
    """token_embd.weight, blk.0.attn_q.weight … -> the Hub's names. Raises ValueError for a tensor that a Llama does not have."""
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
               "output.weight": "lm_head.weight"}
    inside = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
              "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if name not in outside and not (block and block[2] in inside):
        raise ValueError(f"the GGUF file has a tensor {name!r}, which no Llama has.")
    return outside.get(name) or f"model.layers.{block[1]}.{inside[block[2]]}.weight"


def unpermute(w, n_head):
    """w (H * D, d_model) with the rows of each head as pairs of neighbours -> the same with its pairs D/2 apart.

    Trap: GGUF pairs neighbouring rows for its rotary embedding, the Hub pairs the two halves of a head. Position 0 is the same in
    both, so a mistake here gives a right first token and then nonsense.
    """
    rows, d_model = w.shape
    return w.reshape(n_head, rows // n_head // 2, 2, d_model).swapaxes(1, 2).reshape(rows, d_model)


def gguf_tokenizer(tokens, merges, types):
    """Tokens and merges of byte-level BPE as GGUF lists them -> a tokenizers.Tokenizer, with digits apart as SmolLM splits them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    control = 3                     # GGUF's type of a special token
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer

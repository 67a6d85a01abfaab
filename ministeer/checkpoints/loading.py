"""load: a name or a folder -> (model, tokenizer).

Read next: config.py, weights.py and tokenizer.py, which it puts together, then fetch.py.
"""

import os
from pathlib import Path

import torch

from ..model import LM
from ..utils import one_line
from .config import read_config
from .fetch import HUB_NAME, KNOWN, roots
from .fetch import fetch as fetch_checkpoint
from .tokenizer import Tokenizer
from .weights import load_model


def load(name_or_folder: str | Path, dtype: torch.dtype | str = torch.float32,
         device: torch.device | str = "cpu", fetch: bool = False,
         parallel: bool = False) -> tuple[LM, Tokenizer]:
    """-> (model, tokenizer), ready to run.

    name_or_folder: a folder that holds config.json, model.safetensors (or shards and their index) and
        tokenizer.json; or a name, looked up in $MINISTEER_WEIGHTS, then in ./weights, then in the user's
        cache. A known name (`ministeer models`) is always a name: "gpt2" is the model, "./gpt2" a folder
    dtype: torch.float32, bfloat16 or float16, or its name; the file's numbers are converted to it
    device: as in torch
    fetch: True fetches a name that is not here, as `ministeer fetch` does
    parallel: True divides the model among the processes that `torchrun --nproc-per-node N` started. Each must
        make the same calls and gets the same results. device "cuda": one GPU for each process
    Raises FileNotFoundError for what is not here, ValueError for what cannot be run exactly as the checkpoint
    says, FetchError for what cannot be fetched.
    """
    folder = find(name_or_folder, fetch)
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer.load(folder, config)          # first, because it is small
    return load_model(folder, dtype, device, config, parallel), tokenizer


def find(name_or_folder: str | Path, fetch: bool = False) -> Path:
    """-> the folder of a checkpoint. One that is not here is fetched, or FileNotFoundError says how to."""
    if not isinstance(name_or_folder, str | os.PathLike):
        raise ValueError(f"the model must be a name or a folder; given: {type(name_or_folder).__name__}.")
    name = os.fspath(name_or_folder)
    places = [root / name for root in roots()]
    if name not in KNOWN or not isinstance(name_or_folder, str):
        places.insert(0, Path(name))
    for folder in places:
        if os.path.isfile(folder / "config.json"):
            return folder
    if fetch:
        return fetch_checkpoint(name)
    name, where = one_line(name), " or ".join(dict.fromkeys(map(one_line, places)))
    how = f"Known names: {', '.join(KNOWN)}; others have the form owner/repo."
    if name in KNOWN or HUB_NAME.fullmatch(name):
        how = f"To get it, run `ministeer fetch {name}` in a shell, or load({name!r}, fetch=True) in Python."
    raise FileNotFoundError(f"no model {name!r} here: there is no config.json in {where}. {how}")

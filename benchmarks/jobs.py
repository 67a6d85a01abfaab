"""run: many independent pieces of work, each done once and kept on disk, in one process or in torchrun's.

Read next: paper.py, which runs every experiment through this. Processes talk through torch.distributed.
"""

import contextlib
import datetime
import hashlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from ministeer.utils import write

LARGEST = 2 ** 28       # bytes of a result


@contextlib.contextmanager
def workers(device="cpu"):
    """-> (rank, number of processes): torchrun's, or (0, 1) for a single process that torchrun did not start.

    The processes find one another through variables that torchrun sets; gloo connects them on CPUs, nccl on
    GPUs.
    """
    if "WORLD_SIZE" not in os.environ or not dist.is_available():
        yield 0, 1
        return
    if device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A long piece of work keeps the other processes waiting at the end. That is no fault, so wait for a week.
    week = datetime.timedelta(days=7)
    store, rank, processes = next(dist.rendezvous("env://", timeout=week))
    # Trap: the store outlives a restart, and then holds the addresses of dead processes (PyTorch issue
    # 135712), so each start has keys of its own. On several machines torchrun counts the restarts of each
    # separately, so there the count cannot be part of a name that all must share.
    one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT") if one_machine else None
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=week,
                            store=dist.PrefixStore(f"start-{count}", store), rank=rank, world_size=processes)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def run(units, work, folder, progress=None):
    """[work(unit) for unit in units], in that order, in every process; one process works on each unit, once.

    units: a list of JSON values that say what to do
    work: unit -> a JSON value, the same in whichever process it is computed
    folder: each result is written here as soon as it is computed, in a file named after its unit, and is not
        computed again if it is here already. So an interrupted run goes on from what it has, with any number
        of processes, and two runs at once share what they do. Give another model or other settings a folder
        of their own.
    progress: called with 1 for each unit that this process computes or reads
    Every process must call it with the same units. Floats come back exactly, and in the order of the units,
    so a sum over the list is the same for any number of processes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    results = {}
    for i in range(rank, len(units), processes):
        results[i] = _once(units[i], work, folder)
        if progress:
            progress(1)
    if processes > 1:
        parts = [None] * processes
        dist.all_gather_object(parts, results)
        results = {i: result for part in parts for i, result in part.items()}
    return [results[i] for i in range(len(units))]


def _once(unit, work, folder):
    name = json.dumps(unit, sort_keys=True)
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    if not path.exists():
        result = json.loads(json.dumps(work(unit)))     # as it would be read, whoever computed it
        content = {"unit": unit, "result": result, "sha256": _digest(name, result)}
        write(path, json.dumps(content).encode())
        return result
    try:
        if path.is_file() and path.stat().st_size <= LARGEST:       # a pipe could keep its reader waiting
            content = json.loads(path.read_bytes())
            if content["sha256"] == _digest(name, content["result"]):
                return content["result"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path} is not a result that this program wrote. "
                     "Delete it, and that unit will be computed again.")


def _digest(name, result):
    """It reveals a result that was damaged or put there by hand."""
    return hashlib.sha256(f"{name}\n{json.dumps(result)}".encode()).hexdigest()

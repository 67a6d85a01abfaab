"""run: many independent pieces of work, each done once and kept on disk, on one process or on all that torchrun started.

Read next: benchmarks/paper.py, which runs every experiment through this. Processes and exchange: torch.distributed.
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


@contextlib.contextmanager
def workers(device="cpu"):
    """-> (rank, number of processes): (0, 1) for a lone process, and torchrun's where it started this one.

    The processes find one another through the variables that torchrun sets; gloo connects them on a CPU, nccl on GPUs.
    """
    if "WORLD_SIZE" not in os.environ or not dist.is_available():
        yield 0, 1
        return
    if device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A process with a long piece of work keeps the others waiting at the end; that is no fault, so the limit is a week.
    week = datetime.timedelta(days=7)
    store, rank, processes = next(dist.rendezvous("env://", timeout=week))
    # Trap: the store outlives a restart, and then has the addresses of the dead (PyTorch issue 135712), so each start has keys of its own.
    # On several machines torchrun counts the restarts of each alone, and the count cannot be part of a name.
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT") if os.environ.get("GROUP_WORLD_SIZE") == "1" else None
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=week, store=dist.PrefixStore(f"start-{count}", store),
                            rank=rank, world_size=processes)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def run(units, work, folder, progress=None):
    """[work(unit) for unit in units], in that order, on every process; each unit is worked on by one process, once.

    units: a list of JSON values that say what to do. work: unit -> a JSON value, the same whoever does it
    folder: where each result is written as soon as it is there, as one file named after its unit. What is found there is not done
        again; so a run that was interrupted, with however many processes, goes on from what it has. Use another folder for
        another model or other settings.
    progress: called with 1 for each unit done or found, of len(units) / number of processes
    Every process must call it with the same units. Floats come back exactly; sums over the list are then the same for any number of
    processes, because they are taken in the order of the units and not in the order of the processes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = {}
    for i in range(rank, len(units), processes):
        mine[i] = _once(units[i], work, folder)
        if progress:
            progress(1)
    if processes == 1:
        return [mine[i] for i in range(len(units))]
    parts = [None] * processes
    dist.all_gather_object(parts, mine)
    everything = {i: result for part in parts for i, result in part.items()}
    return [everything[i] for i in range(len(units))]


def _once(unit, work, folder):
    name = json.dumps(unit, sort_keys=True)
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(FileNotFoundError):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["unit"] == json.loads(name):
                return found["result"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a result that this program wrote; delete it, and that unit is done again.") from None
    text = json.dumps({"unit": unit, "result": work(unit)})
    write(path, text.encode())
    return json.loads(text)["result"]       # as it would be read, so that nothing depends on who worked

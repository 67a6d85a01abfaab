"""parallel: one model in several processes. Each has its heads, its part of every MLP and of the vocabulary.

Read first: weights.py. Shoeybi et al. 2019 (Megatron-LM), section 3, with PyTorch's own tensor parallelism.
Plain all_reduce calls would be as short and faster in small batches, but would let no gradients through.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ..gpt2 import Conv1D
from ..model import LM, Linear

# Of a block: what reads the stream is cut by its outputs, what writes to it by its inputs, and then summed.
OUTPUTS, INPUTS = ColwiseParallel(), RowwiseParallel()
PLANS = {
    "gpt2": {"h.*.attn.c_attn": OUTPUTS, "h.*.attn.c_proj": INPUTS,
             "h.*.mlp.c_fc": OUTPUTS, "h.*.mlp.c_proj": INPUTS},
    "llama": {"layers.*.self_attn.[qkv]_proj": OUTPUTS, "layers.*.self_attn.o_proj": INPUTS,
              "layers.*.mlp.gate_proj": OUTPUTS, "layers.*.mlp.up_proj": OUTPUTS,
              "layers.*.mlp.down_proj": INPUTS},
    "opt": {"decoder.layers.*.self_attn.[qkv]_proj": OUTPUTS, "decoder.layers.*.self_attn.out_proj": INPUTS,
            "decoder.layers.*.fc1": OUTPUTS, "decoder.layers.*.fc2": INPUTS},
    "gptj": {"h.*.attn.[qkv]_proj": OUTPUTS, "h.*.attn.out_proj": INPUTS,
             "h.*.mlp.fc_in": OUTPUTS, "h.*.mlp.fc_out": INPUTS},
}


def own_device(device: torch.device | str) -> torch.device | str:
    """For "cuda", the GPU of this process's LOCAL_RANK. Raises ValueError if torchrun did not start it."""
    if not dist.is_available() or "LOCAL_RANK" not in os.environ:
        raise ValueError("parallel=True needs several processes, and torchrun did not start this one. "
                         "Run your script with `torchrun --nproc-per-node N script.py`.")
    return f"cuda:{os.environ['LOCAL_RANK']}" if str(device).startswith("cuda") else device


def connect(device: torch.device | str) -> DeviceMesh:
    """Meet the other processes, through nccl on GPUs and gloo on CPUs -> all of them"""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():       # they wait while process 0 reads all weights, for the fingerprint
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(days=1))
    return init_device_mesh(kind, (dist.get_world_size(),))


def cut(model: LM, mesh: DeviceMesh) -> None:
    """Give each process its part of a model whose weights are still to be read. The stream stays whole.

    Raises ValueError if the heads or the width of the MLP cannot be divided evenly.
    """
    c, n = model.config, mesh.size()
    if c.family not in PLANS:
        raise ValueError(f"PLANS in checkpoints/parallel.py has no plan that says how to cut a {c.family}.")
    if c.n_kv_head % n or c.d_mlp % n:
        possible = [str(k) for k in range(1, c.n_kv_head + 1) if not c.n_kv_head % k and not c.d_mlp % k]
        raise ValueError(f"{c.n_kv_head} key/value heads and an MLP of width {c.d_mlp} cannot be divided "
                         f"evenly among {n} processes. Possible numbers: {', '.join(possible)}.")
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, Conv1D):        # the plans know nn.Linear, its transpose
                setattr(parent, name, Linear(*part.weight.shape, device="meta"))
    embedding, _ = model.embedding_name.rsplit(".", 1)
    if not hasattr(model, "lm_head"):           # tied: it gets the weights of the embedding
        n_vocab, width = model.get_parameter(model.embedding_name).shape
        model.lm_head = Linear(width, n_vocab, bias=False, device="meta")
    parallelize_module(model, mesh, PLANS[c.family] | {
        embedding: RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate())})
    for part in (model.get_submodule(embedding), model.lm_head):
        # Trap: what torch hands out here is still arriving. A copy of it is a plain tensor that has arrived.
        part.register_forward_hook(lambda part, inputs, x: x.clone())
    for part in model.modules():
        for name in {"n_head", "n_kv_head"} & vars(part).keys():
            setattr(part, name, getattr(part, name) // n)
    model.processes = n


def own_part(stored: Tensor, name: str, p: Tensor, mesh: DeviceMesh) -> Tensor:
    """What this process keeps of a tensor in a file, for its parameter p of that name."""
    if not isinstance(p, DTensor):
        return stored
    (place,), layer = p.placements, name.split(".")[-2]
    x = stored.t() if layer in ("c_attn", "c_proj", "c_fc") else stored
    if not isinstance(place, Shard):
        return x
    # Trap: GPT-2 packs q, k and v into one matrix. Each process needs its heads of all three.
    thirds = x.chunk(3, place.dim) if layer == "c_attn" else [x]
    # Torch, too, cuts as `chunk` does, so that the vocabulary need not divide.
    own = [third.chunk(mesh.size(), place.dim)[mesh.get_rank()] for third in thirds]
    return torch.cat(own, place.dim) if len(own) > 1 else own[0]


def as_parameter(part: Tensor, p: Tensor, mesh: DeviceMesh) -> Tensor:
    """The part as torch's tensor parallelism wants it: with the shape of the whole, and its place there."""
    if not isinstance(p, DTensor):
        return part
    if not part.is_contiguous() or part.untyped_storage().nbytes() > part.nbytes:
        part = part.clone(memory_format=torch.contiguous_format)    # which lets go of the file
    return DTensor.from_local(part, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def said_by_first(text: str) -> str:
    """The text that process 0 gave, in every process."""
    said = [text]
    dist.broadcast_object_list(said)
    return said[0]

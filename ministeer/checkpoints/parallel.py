"""parallel: one model in several processes. Each has its heads, its part of every MLP and of the vocabulary.

Read first: weights.py. Shoeybi et al. 2019 (Megatron-LM), section 3. The sums are plain all_reduce calls.
torch.distributed.tensor.parallel knows no Conv1D, and adds ten times as much work to reading one token.
"""

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..gpt2 import Conv1D
from ..model import LM, Embedding, Linear

# By family: the matrices that read the stream, whose outputs are divided, and those that write to it, whose
# inputs are divided and whose outputs are summed. Between the two, a process needs nothing from the others.
PLANS = {
    "gpt2": (("c_attn", "c_fc"), ("c_proj",)),
    "llama": (("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")),
    "opt": (("q_proj", "k_proj", "v_proj", "fc1"), ("out_proj", "fc2")),
    "gptj": (("q_proj", "k_proj", "v_proj", "fc_in"), ("out_proj", "fc_out")),
}


def own_device(device: torch.device | str) -> torch.device | str:
    """For "cuda", the GPU of this process's LOCAL_RANK. Raises ValueError if torchrun did not start it."""
    if not dist.is_available() or "LOCAL_RANK" not in os.environ:
        raise ValueError("parallel=True needs several processes, and torchrun did not start this one. "
                         "Run your script with `torchrun --nproc-per-node N script.py`.")
    return f"cuda:{os.environ['LOCAL_RANK']}" if str(device).startswith("cuda") else device


def connect(device: torch.device | str) -> None:
    """Meet the other processes, through nccl on GPUs and gloo on CPUs."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():       # the others wait while process 0 reads all weights for the digest
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
        # Trap: a process that ends while its connections are open can abort in torch's C++ code.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def cut(model: LM) -> None:
    """Cut the shapes of a model, before its weights are read, to the part that this process keeps.

    Raises ValueError if the heads or the width of the MLP cannot be divided evenly.
    """
    c, n = model.config, dist.get_world_size()
    if c.family not in PLANS:
        raise ValueError(f"PLANS in checkpoints/parallel.py has no plan that says how to cut a {c.family}.")
    if c.n_kv_head % n or c.d_mlp % n:
        possible = [str(k) for k in range(1, c.n_kv_head + 1) if not c.n_kv_head % k and not c.d_mlp % k]
        raise ValueError(f"{c.n_kv_head} key/value heads and an MLP of width {c.d_mlp} cannot be divided "
                         f"evenly among {n} processes. Possible numbers: {', '.join(possible)}.")
    embedding = model.get_submodule(model.embedding_name.rpartition(".")[0])
    if not hasattr(model, "lm_head"):           # tied: it gets the weights of the embedding
        model.lm_head = Linear(*embedding.weight.T.shape, bias=False, device="meta")
    reads, writes = PLANS[c.family]
    for name, part in model.named_modules():
        if name.endswith(reads):
            part.register_forward_pre_hook(lambda part, inputs: Shared.apply(inputs[0]))
        elif name.endswith(writes):
            part.register_forward_hook(lambda part, inputs, y: Summed.apply(y))
        for heads in {"n_head", "n_kv_head"} & vars(part).keys():
            setattr(part, heads, getattr(part, heads) // n)
    for part, kind in (embedding, PartEmbedding), (model.lm_head, PartHead):
        part.__class__, part.n_vocab = kind, c.n_vocab
    for name, p in model.named_parameters():
        p.data = own_part(model, name, p.data)
    model.processes = n


def own_part(model: LM, name: str, x: Tensor) -> Tensor:
    """What this process keeps of a whole tensor x, the weight of that name."""
    (reads, writes), (module, _, kind) = PLANS[model.config.family], name.rpartition(".")
    transposed = isinstance(model.get_submodule(module), Conv1D)        # nn.Linear has (outputs, inputs)
    if module.endswith(writes):
        if kind == "bias":                      # added once
            return x if dist.get_rank() == 0 else torch.zeros_like(x)
        dim = 0 if transposed else 1
    elif module.endswith(reads):
        dim = -1 if transposed else 0
    elif name == model.embedding_name or module == "lm_head":
        dim = 0
    else:
        return x
    # Trap: GPT-2 packs q, k and v into one matrix. Each process needs its heads of all three.
    thirds = x.chunk(3, dim) if module.endswith("c_attn") else [x]
    own = [third.chunk(dist.get_world_size(), dim)[dist.get_rank()] for third in thirds]
    return torch.cat(own, dim) if len(own) > 1 else own[0]


def without_file(x: Tensor) -> Tensor:
    """x, or a copy if x is a view: its whole tensor would stay in memory."""
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone(memory_format=torch.contiguous_format)


def said_by_first(text: str) -> str:
    """The text that process 0 gave, in every process."""
    said = [text]
    dist.broadcast_object_list(said)
    return said[0]


class Shared(torch.autograd.Function):
    """x -> x, which every process has. Its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class Summed(torch.autograd.Function):
    """x -> the sum of x over all processes, in place. Its gradient is the same for each term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class PartEmbedding(Embedding):
    """Looks up this process's tokens. The other processes look up theirs, and the rows are summed."""
    n_vocab: int

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids - first_token(self.n_vocab)
        inside = (rows >= 0) & (rows < len(self.weight))
        return Summed.apply(super().forward(rows.where(inside, 0)) * inside[..., None])


class PartHead(Linear):
    """The logits of this process's tokens, with 0 for all others, summed over the processes."""
    n_vocab: int

    def forward(self, x: Tensor) -> Tensor:
        y, start = super().forward(Shared.apply(x)), first_token(self.n_vocab)
        return Summed.apply(F.pad(y, (start, self.n_vocab - start - y.shape[-1])))


def first_token(n_vocab: int) -> int:
    """The first of this process's tokens; `chunk` gives all processes but the last equally many."""
    return dist.get_rank() * -(-n_vocab // dist.get_world_size())

"""fast: the same model, with its weights laid out for the CPU and, if asked, its blocks compiled. What is not plain is here alone.

Read before: model.py, whose loop runs the fast blocks as it runs the plain ones. Figures: benchmarks/README.md.
"""

import copy
import functools
import warnings

import torch
from torch import nn

from . import llama
from .attention import KVCache, attend, merge_heads
from .gpt2 import Conv1D


def fast(model, compile=False, in_place=False):
    """A model -> one that computes the same up to rounding, faster. Both share what is not packed; drop the old one to free its memory.

    compile: also compile the blocks for one row and one position, which is what generating one text is made of. It takes about ten
        seconds, here and at once, and with packed weights keeps a second copy of the matrices.
    in_place: change `model` itself, so that its matrices are never held twice
    Weights are packed on the CPU in float32 and bfloat16. Elsewhere, where this torch has not the operators, and where there is no
    compiler, as much as can be had comes back, with a warning that says why. A model that is fast already comes back as it is.
    """
    before = [part for part in model.modules() if isinstance(part, Packed | FastBlock)]
    if before:
        if compile and not any(isinstance(part, FastBlock) for part in before):
            warnings.warn("fast leaves the model as it is: it was packed without what compiling needs. Pass the plain model.", stacklevel=2)
        return model
    fault = cannot_pack(next(model.parameters()))
    if fault and not compile:
        warnings.warn(f"fast leaves the model as it is: {fault}.", stacklevel=2)
        return model
    result = model if in_place else copy.deepcopy(model, {id(p): p for p in model.parameters()})    # new modules, the same tensors
    if not fault:
        pack(result, keep=compile)
    return compile_steps(result) if compile else result


def cannot_pack(weight):
    """Why weights like this one cannot be packed, or None if they can."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return f"it is for float32 and bfloat16 on the CPU, and this model is {weight.dtype} on {weight.device}"
    try:
        Packed(torch.ones(16, 16, dtype=weight.dtype))(torch.ones(1, 1, 16, dtype=weight.dtype))
    except (AttributeError, RuntimeError) as error:
        return str(error)
    return None


def pack(model, keep):
    for parent in [part for part in model.modules() if not isinstance(part, nn.Linear | Conv1D)]:
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear):
                setattr(parent, name, Packed(part.weight, part.bias, keep))
            if isinstance(part, Conv1D):
                setattr(parent, name, Packed(part.weight.T, part.bias, keep))       # which keeps W as (inputs, outputs)
    # A tied head is the embedding, which stays as it is for looking up; an untied one was packed above.
    model.head = Packed(model.get_parameter(model.names["embedding"]), None, keep) if model.config.tied else model.lm_head
    model.unembed = lambda x: unembed(model, x)
    model.requires_grad_(False)


def unembed(model, x):
    return model.head(model.final_norm(x))


def compile_steps(model):
    """Compile a model for single positions, or warn and give it back as it was."""
    for l, block in enumerate(model.blocks):
        model.blocks[l] = FastBlock(block)
    plain = model.unembed
    if hasattr(model, "head"):
        # Trap: the last of many positions has other strides than an only one, and the compiler would begin again. x[0] has the same.
        model.unembed = lambda x: compiled(unembed)(model, x[0])[None] if x.shape[:2] == (1, 1) else plain(x)
    cache, ids = KVCache(2), torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            for _ in range(2):      # the first position and a later one, so that nothing is left to compile in a run
                model(ids, (), cache)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"fast does not compile ({reason}). Is there a C++ compiler?", stacklevel=3)
        for l, block in enumerate(model.blocks):
            model.blocks[l] = block.block
        model.unembed = plain
    return model


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)


class Packed(nn.Module):
    """x W^T + b by oneDNN, with W (outputs, inputs) in the blocks that its kernels read. No gradients.

    oneDNN is reached through operators of torch that are not public, because torch's own float32 product reads the weights at half
    the speed or less. keep: hold W as it was as well, for compiled code.
    """

    def __init__(self, weight, bias=None, keep=False):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.weight = weight.detach().contiguous() if keep else None
        self.bias = bias

    def forward(self, x):
        if torch.compiler.is_compiling() and self.weight is not None:
            # For one row, as a sum: the compiler turns it into one loop over W, which runs as fast as memory is read.
            y = (self.weight.float() * x.float()).sum(-1).to(x).expand(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class FastBlock(nn.Module):
    """A block of either family; one row of one position takes it in two compiled halves, before and after attention.

    Attention stays outside: its keys are one more at every step, and for each new shape the compiler would begin again.
    """

    def __init__(self, block):
        super().__init__()
        self.block = block
        if isinstance(block, llama.Block):
            self.norm_1, self.attention, self.norm_2 = block.input_layernorm, block.self_attn, block.post_attention_layernorm
            self.out = block.self_attn.o_proj
        else:
            self.norm_1, self.attention, self.norm_2 = block.ln_1, block.attn, block.ln_2
            self.out = block.attn.c_proj
        self.mlp = block.mlp

    def forward(self, x, l, rope, cache=None):
        if x.shape[:2] != (1, 1):
            return self.block(x, l, rope, cache)
        q, k, v = compiled(FastBlock.before)(self, x, rope)
        return compiled(FastBlock.after)(self, x, cache.attend(l, q, k, v) if cache else attend(q, k, v))

    def before(self, x, rope):
        return self.attention.heads(self.norm_1(x), rope)

    def after(self, x, mixed):
        x = x + self.out(merge_heads(mixed))
        return x + self.mlp(self.norm_2(x))

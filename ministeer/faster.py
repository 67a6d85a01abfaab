"""fast: the same model, with its weights laid out for the CPU and, if asked, its blocks compiled for single tokens.

Read first: model.py, whose loop runs the fast blocks as it runs the plain ones. Figures: benchmarks/README.md.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import gpt2, llama
from .attention import KVCache, attend, merge_heads
from .model import LM


def fast(model: LM, compile: bool = False) -> LM:
    """A model -> one that computes the same up to rounding, faster.

    Both share what is not packed. `model = fast(model)` lets go of the plain matrices, which lie in memory until then.
    compile: also compile the blocks for one row and one position, which is what generating one text is made of. It
        takes about ten seconds, here and at once, and with packed weights keeps a second copy of the matrices.
    Weights are packed on the CPU in float32 and bfloat16. Elsewhere, or where torch lacks the operators or the system
    a compiler, as much as possible is done, with a warning that says why. A fast model comes back as it is.
    What is returned is a module like any other: deepcopy, state_dict, torch.save and .to() work, and where weights
    cannot be packed they are plain again.
    """
    if is_fast(model):
        if compile and not any(getattr(block, "compiled", False) for block in model.blocks):
            warnings.warn("fast leaves the model as it is: it was packed without what compiling needs. "
                          "Pass the plain model.", stacklevel=2)
        return model
    fault = cannot_pack(next(model.parameters()))
    if fault:
        warnings.warn(f"fast does not pack the weights: {fault}.", stacklevel=2)
        if not compile:
            return model
    result = model.shared_copy()
    for block in result.blocks:
        if type(block) in FAST_BLOCKS:
            block.__class__ = FAST_BLOCKS[type(block)]
    if not fault:
        pack(result, keep=compile)
    if compile:
        compile_steps(result)
    return result


def is_fast(model: LM) -> bool:
    return any(isinstance(part, Packed | FastBlock) for part in model.modules())


def cannot_pack(weight: Tensor) -> str | None:
    """Why weights like this one cannot be packed, or None if they can."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return f"it is for float32 and bfloat16 on the CPU, and this model is {weight.dtype} on {weight.device}"
    try:
        ones = torch.ones(16, 16, dtype=weight.dtype)
        torch.ops.mkldnn._linear_pointwise(ones[None], torch.ops.mkldnn._reorder_linear_weight(ones), None, "none", [], "")
    except (AttributeError, RuntimeError) as error:
        return str(error).split("\n")[0]
    return None


def pack(model: LM, keep: bool) -> None:
    for parent in [part for part in model.modules() if not isinstance(part, nn.Linear | gpt2.Conv1D)]:
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear):
                setattr(parent, name, Packed(part.weight, part.bias, keep))
            if isinstance(part, gpt2.Conv1D):
                setattr(parent, name, Packed(part.weight.T, part.bias, keep))       # which keeps W as (inputs, outputs)
    # A tied head is the embedding, which stays as it is for looking tokens up.
    head = model.lm_head if hasattr(model, "lm_head") else None
    weight = head.dense() if head else model.get_parameter(model.embedding_name)
    model.lm_head = PackedHead(weight, None, keep)


def compile_steps(model: LM) -> None:
    """Compile a model for single positions, or warn and leave it as it was."""
    parts = [part for part in [*model.blocks, getattr(model, "lm_head", None)] if isinstance(part, FastBlock | PackedHead)]
    for part in parts:
        part.compiled = True
    try:
        ids, cache = torch.zeros(1, 1, dtype=torch.int64, device=model.device), KVCache(2)
        with torch.no_grad():
            for _ in range(2):      # the first position and a later one, so that nothing is left to compile in a run
                model(ids, (), cache)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"fast does not compile ({reason}). Is there a C++ compiler?", stacklevel=3)
        for part in parts:
            part.compiled = False


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


class Packed(nn.Module):
    """x W^T + b by oneDNN, with W (outputs, inputs) in the blocks that its kernels read. No gradients.

    oneDNN is reached through operators of torch that are not public, because torch's own float32 product reads the
    weights at half the speed or less. keep: hold W as it was as well, for compiled code.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, keep: bool = False):
        super().__init__()
        self.keep, self.bias = keep, bias
        self.set_weight(weight.detach())

    def set_weight(self, weight: Tensor) -> None:
        """Pack W, or hold it plain where it cannot be packed."""
        self.dtype = weight.dtype
        plain = cannot_pack(weight) is not None
        self.packed = None if plain else torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.weight = weight.contiguous() if plain or self.keep else None

    def dense(self) -> Tensor:
        return self.packed.to_dense().to(self.dtype) if self.weight is None else self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling() and self.weight is not None:
            # For one row, as a sum: the compiler turns it into one loop over W, which runs as fast as memory is read.
            y = (self.weight.float() * x.float()).sum(-1).to(x).expand(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def _apply(self, fn, recurse=True):         # what .to(), .cuda(), .half() and the like are made of
        super()._apply(fn, recurse)
        self.set_weight(fn(self.dense()))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense()

    def __reduce__(self):                       # deepcopy and torch.save: oneDNN's blocks cannot be written
        return type(self), (self.dense(), self.bias, self.keep), {"compiled": getattr(self, "compiled", False)}

    def __setstate__(self, state):
        self.__dict__.update(state)


class PackedHead(Packed):
    """The unembedding, whose single position is compiled like a block's."""
    compiled = False

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled and x.shape[:2] == (1, 1):
            # Trap: the last of many positions has other strides than an only one, and would be compiled anew.
            return compiled(Packed.forward)(self, x[0])[None]
        return super().forward(x)


class FastBlock(nn.Module):
    """Mixed into a family's block: a single position passes it in two halves, compiled if it is one row.

    Attention stands between them: its keys are one more at every step, and every new shape would be compiled anew.
    parts: the block's names of the norm before attention, attention, its output projection, and the norm before the MLP
    """
    compiled = False
    parts: tuple[str, str, str, str]

    def forward(self, x: Tensor, l: int, rope=None, cache: KVCache | None = None) -> Tensor:
        if x.shape[1] > 1:
            return super().forward(x, l, rope, cache)
        run = compiled if self.compiled and len(x) == 1 else lambda half: half
        q, k, v = run(FastBlock.before)(self, x, rope)
        k, v = cache.extend(l, k, v) if cache else (k, v)
        mixed = (attend_one if q.dtype == torch.bfloat16 else attend)(q, k, v)
        return run(FastBlock.after)(self, x, mixed)

    def before(self, x: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        norm, attention, _, _ = self.parts
        return getattr(self, attention).qkv(getattr(self, norm)(x), rope)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        _, attention, out, norm = self.parts
        x = x + getattr(getattr(self, attention), out)(merge_heads(mixed))
        return x + self.mlp(getattr(self, norm)(x))


class FastGPT2Block(FastBlock, gpt2.Block):
    parts = "ln_1", "attn", "c_proj", "ln_2"


class FastLlamaBlock(FastBlock, llama.Block):
    parts = "input_layernorm", "self_attn", "o_proj", "post_attention_layernorm"


FAST_BLOCKS = {gpt2.Block: FastGPT2Block, llama.Block: FastLlamaBlock}


def attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attend for a single position: queries that share a key head are taken for several queries of one head.

    torch's bfloat16 kernel takes a fifth of the time this way.
    """
    folded = q[:, :, 0].unflatten(1, (k.shape[1], -1))
    return F.scaled_dot_product_attention(folded, k, v).flatten(1, 2)[:, :, None]

"""fast: the same model, with its weights packed for the CPU and, on request, compiled for single tokens.

Read first: model.py, whose loop also runs the fast blocks. Measurements: benchmarks/README.md.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import gpt2, gptj, llama, opt
from .attention import KVCache
from .model import LM
from .utils import no_collection, one_line

Rotation = tuple[Tensor, Tensor] | None      # cos and sin, where a family turns queries and keys


def fast(model: LM, compile: bool = False, weights: str | None = None) -> LM:
    """A model -> one that computes the same, up to rounding, faster. Both share what is not packed.

    Write `model = fast(model)`, so that the memory of the plain matrices is freed.
    compile: also compile the blocks for one row and one position, the case of generating one text. Compiling
        happens here and takes about nine seconds. Two parts are compiled later, once each: at the first call
        with gradients enabled, and when generated positions are first steered before an odd-numbered block.
        With compile, packed models keep a second copy of the matrices.
    weights: "int8" or "int4" rounds the matrices to 8 or 4 bits (the head to 8), for generating a few texts
        at once. The result is close to the model, but not equal (benchmarks/README.md has the loss). It
        cannot be trained, and has no state_dict.
    Only float32 and bfloat16 on the CPU are packed. What cannot be done is left out, with a warning that says
    why. A fast model is returned unchanged.
    deepcopy, state_dict, torch.save and .to() work; weights that cannot be packed there become plain again.
    """
    if not isinstance(model, LM):
        raise ValueError("fast takes a model, the first of the two things that `load` returns; "
                         f"given: {type(model).__name__}.")
    if weights not in (None, *SMALL):
        raise ValueError(f"weights {one_line(weights)}; possible: None, {', '.join(map(repr, SMALL))}.")
    if model.processes > 1:
        warnings.warn(f"fast returns the model unchanged: {model.processes} processes share its weights.",
                      stacklevel=2)
        return model
    if is_fast(model):
        if compile and not any(getattr(block, "compiled", False) for block in model.blocks):
            warnings.warn("fast returns the model unchanged: it was packed without what compiling needs. "
                          "Pass the plain model.", stacklevel=2)
        if weights and not any(type(part) is SMALL[weights] for part in model.modules()):
            warnings.warn("fast returns the model unchanged: its weights are packed in another way. "
                          "Pass the plain model.", stacklevel=2)
        return model
    if weights and any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"weights={weights!r} is for a model that is not trained; call "
                         "model.requires_grad_(False) first, or leave weights out.")
    weight = next(model.parameters())
    fault = cannot_pack(weight, SMALL.get(weights))
    if fault:
        warnings.warn(f"fast does not pack the weights: {fault}.", stacklevel=2)
        if not compile and weight.dtype != torch.bfloat16:      # for which Folding helps without packing
            return model
    result = model.shared_copy()
    for block in result.blocks:
        if type(block) in FAST_BLOCKS:
            block.__class__ = FAST_BLOCKS[type(block)]
    if not fault:
        if weights:
            pack(result, functools.partial(small, SMALL[weights]), functools.partial(small, Int8))
        else:
            keep = functools.partial(Packed, keep=compile)
            pack(result, keep, keep)
    if compile:
        compile_steps(result)
    return result


def is_fast(model: LM) -> bool:
    """Whether `fast` made the model."""
    return any(isinstance(part, Matrix | FastBlock) for part in model.modules())


def cannot_pack(weight: Tensor, kind: type[Small] | None = None) -> str | None:
    """Why weights like this one cannot be packed (or kept by a `kind`), or None if they can."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        given = f"{weight.dtype} on {weight.device}"
        return f"it is for float32 and bfloat16 on the CPU, and this model is {given}"
    try:
        ones = torch.ones(GROUP, GROUP, dtype=weight.dtype)
        if kind:
            kind(ones)(ones)
        packed = torch.ops.mkldnn._reorder_linear_weight(ones)
        torch.ops.mkldnn._linear_pointwise(ones[None], packed, None, "none", [], "")
    except (AttributeError, RuntimeError) as error:
        return str(error).split("\n")[0]
    return None


def pack(model: LM, layout: Callable[..., nn.Module], head: Callable[..., nn.Module]) -> None:
    """Replace every matrix by layout(W, b), and the unembedding by head(W, b)."""
    # A tied head is the embedding, which stays plain as well, for looking tokens up.
    tied = not hasattr(model, "lm_head")
    weight = model.get_parameter(model.embedding_name) if tied else model.lm_head.weight
    bias = None if tied else model.lm_head.bias
    for parent in [part for part in model.modules() if not isinstance(part, nn.Linear | gpt2.Conv1D)]:
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear | gpt2.Conv1D) and part is not getattr(model, "lm_head", None):
                W = part.weight if isinstance(part, nn.Linear) else part.weight.T
                setattr(parent, name, layout(W, part.bias))
    model.lm_head = head(weight, bias)


def compile_steps(model: LM) -> None:
    """Compile a model for single positions, or warn and leave it uncompiled."""
    parts = [part for part in [*model.blocks, getattr(model, "lm_head", None)]
             if isinstance(part, FastBlock | Matrix)]
    for part in parts:
        part.compiled = True
    if model.device.type == "cpu":
        for first, second in zip(model.blocks[::2], model.blocks[1::2], strict=False):
            if isinstance(first, FastBlock) and isinstance(second, FastBlock):
                first.after = (second,)
    try:
        ids, cache = torch.zeros(1, 1, dtype=torch.int64, device=model.device), KVCache(2)
        with torch.no_grad(), no_collection():
            for _ in range(2):      # the first pass only fills the cache, the second compiles the blocks
                model(ids, (), cache)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"fast does not compile ({reason}). Is there a C++ compiler?", stacklevel=3)
        for part in parts:
            part.compiled = False


@functools.cache
def compiled(function: Callable, device: str) -> Callable:
    """The function, compiled. On a CPU, C++ rather than Python calls its loops one after another."""
    # size_asserts: the compiled code would check sizes that torch.compile has checked already.
    # vec_isa_ok: else torch compiles test programs for four seconds. A fault shows without them.
    options = {"cpp_wrapper": True, "size_asserts": False, "cpp.vec_isa_ok": True} if device == "cpu" else {}
    return torch.compile(function, dynamic=False, options=options)


class Matrix(nn.Module):
    """x W^T + b, W (outputs, inputs) laid out for the CPU. No gradients. Subclasses provide product(x)."""
    compiled = False            # True for the head of a compiled model, at a single position

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled and x.shape[:2] == (1, 1):
            # Trap: a last position has other strides than a single one, and would be compiled again.
            return compiled(type(self).product, x.device.type)(self, x[0])[None]
        return self.product(x)


class Packed(Matrix):
    """W in the blocks that oneDNN's kernels read.

    These operators are private to torch, but its public float32 product reads weights at most half as fast.
    keep: also keep the plain W, for compiled code
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, keep: bool = False):
        super().__init__()
        self.keep, self.bias = keep, bias
        self.set_weight(weight.detach())

    def set_weight(self, weight: Tensor) -> None:
        """Pack W, or keep it plain where it cannot be packed."""
        self.dtype = weight.dtype
        plain = cannot_pack(weight) is not None
        self.packed = None if plain else torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.weight = weight.contiguous() if plain or self.keep else None

    def dense(self) -> Tensor:
        """W, unpacked."""
        return self.packed.to_dense().to(self.dtype) if self.weight is None else self.weight

    def product(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        if is_one_compiled_row(x) and self.weight is not None:
            return one_row(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def _apply(self, fn, recurse=True):         # behind .to(), .cuda(), .half() and the like
        super()._apply(fn, recurse)
        self.set_weight(fn(self.dense()))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense()

    def __reduce__(self):                       # deepcopy and torch.save cannot read oneDNN's blocks
        return type(self), (self.dense(), self.bias, self.keep), {"compiled": self.compiled}


def is_one_compiled_row(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.numel() == x.shape[-1]


def one_row(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float | Tensor = 1) -> Tensor:
    """scale * x W^T + b for a single row x (…, inputs), summed in float32.

    The compiler turns the sum into one loop over W, which runs as fast as W can be read from memory.
    """
    y = ((weight.float() * x.float()).sum(-1) * scale).to(x).expand(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def small(kind: type[Small], weight: Tensor, bias: Tensor | None = None) -> Small | Packed:
    """The matrix, kept by `kind`, or by another class where torch's operators cannot take its sizes."""
    outputs, inputs = weight.shape
    if inputs % GROUP:          # Trap: given such a matrix, the operator of Int8 reads outside it
        return Packed(weight, bias, keep=True)      # kept for compiled code, which cannot read packed ones
    return (Int8 if outputs % 16 else kind)(weight, bias)


class Small(Matrix):
    """W rounded to few bits: fewer bytes to read for each token. Products are in bfloat16.

    The operators are private to torch, and no public one reads such weights as fast.
    Subclasses provide times(x), x (rows, inputs) -> (rows, outputs), both bfloat16, and dense(), W unpacked.
    """

    def product(self, x: Tensor) -> Tensor:
        y = self.times(x.flatten(0, -2).bfloat16().contiguous()).to(x).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise ValueError("weights of few bits have lost what a checkpoint must hold; save the plain model.")

    def _apply(self, fn, recurse=True):         # behind .to(), .cuda(), .half() and the like
        if fn(torch.zeros(1)).device.type != "cpu":
            raise ValueError("weights of few bits stay on the CPU; move the plain model instead.")
        return super()._apply(fn, recurse)


class Int8(Small):
    """W[i] = scale[i] * codes[i]: a whole number in -127 … 127 for each weight, a scale for each row.

    Compiled code multiplies in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.bias, weight = bias, weight.detach().float().contiguous()
        self.scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
        self.codes = (weight / self.scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)

    def dense(self) -> Tensor:
        return self.codes.float() * self.scale[:, None].float()

    def product(self, x: Tensor) -> Tensor:
        if is_one_compiled_row(x):
            return one_row(x, self.codes, self.bias, self.scale.float())
        return super().product(x)

    def times(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale)


class Int4(Small):
    """W = scale * (code - 8) + zero: a whole number in 0 … 15 for each weight, scale and zero for each GROUP.

    The 16 values span the group from its least weight to its largest, as in GGUF's Q4_1. So of weights that
    came from such a file, only scale and zero are rounded, to bfloat16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.bias, groups = bias, weight.detach().float().unflatten(1, (-1, GROUP))
        least = groups.amin(dim=-1)
        scale = ((groups.amax(dim=-1) - least) / 15).clamp(min=1e-30)
        codes = ((groups - least[..., None]) / scale[..., None]).round().int().flatten(1)
        self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        self.scales = torch.stack([scale, least + 8 * scale], dim=-1).transpose(0, 1).contiguous().bfloat16()

    def dense(self) -> Tensor:
        n_inputs = GROUP * len(self.scales)
        return self.times(torch.eye(n_inputs, dtype=torch.bfloat16)).float().T

    def times(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, GROUP, self.scales)


GROUP = 32                      # weights that share a scale, as in Q4_1
SMALL = {"int8": Int8, "int4": Int4}


class FastBlock(nn.Module):
    """Mixed into a family's block. If compiled, one position of one row runs as a single function.

    On a CPU, each call of compiled code takes time of its own, so blocks run in pairs: the first also
    computes the second. When the second is called, it returns that result if its input is what the first
    gave. Where nothing is compiled, a single position in bfloat16 attends by Folding.
    """
    compiled = False
    after: tuple[FastBlock, ...] = ()       # the second of a pair, in a tuple so that it is no child module

    def forward(self, x: Tensor, l: int, rope: Rotation = None, cache: KVCache | None = None) -> Tensor:
        if cache is None or not len(cache) or x.shape[1] > 1:
            return super().forward(x, l, rope, cache)
        if not self.compiled or len(x) > 1:
            return super().forward(x, l, rope, Folding(cache) if x.dtype == torch.bfloat16 else cache)
        if cache.ahead.get(l):
            block, read, result = cache.ahead.pop(l)        # so that no cache holds on to a block
            if block is self and torch.equal(x, read) and not x.requires_grad:
                return result
            cache.ahead[l] = None       # something is added here: in this run, compute it in its turn
        pos = torch.full((1,), len(cache), device=x.device)
        if not self.after or l + 1 not in cache.layers or cache.ahead.get(l + 1, ()) is None:
            return compiled(FastBlock.one, x.device.type)(self, x, rope, room(cache, l), pos)
        two = compiled(FastBlock.two, x.device.type)
        y, result = two(self, x, rope, room(cache, l), room(cache, l + 1), pos)
        cache.ahead[l + 1] = self.after[0], y.clone(), result       # a copy: a hook may change y in place
        return y

    def one(self, x: Tensor, rope: Rotation, stored: tuple[Tensor, Tensor], pos: Tensor) -> Tensor:
        # 0 for l, which Room does not need: each number would be compiled again.
        return super().forward(x, 0, rope, Room(*stored, pos))

    def two(self, x: Tensor, rope: Rotation, stored: tuple[Tensor, Tensor],
            stored_after: tuple[Tensor, Tensor], pos: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x, rope, stored, pos)
        return y, self.after[0].one(y, rope, stored_after, pos)


def room(cache: KVCache, l: int) -> tuple[Tensor, Tensor]:
    """Keys and values of block l, with room for one more position."""
    stored = cache.grown(l, len(cache) + 1)
    for part in stored:
        if not hasattr(part, "_dynamo_dynamic_indices"):        # marked before: looking is quicker
            torch._dynamo.mark_dynamic(part, 2)     # or it compiles again each time that the cache grows
    return stored


class FastGPT2Block(FastBlock, gpt2.Block):
    pass


class FastLlamaBlock(FastBlock, llama.Block):
    pass


class FastOPTBlock(FastBlock, opt.Block):
    pass


class FastPostNormBlock(FastBlock, opt.PostNormBlock):
    pass


class FastGPTJBlock(FastBlock, gptj.Block):
    pass


FAST_BLOCKS = {gpt2.Block: FastGPT2Block, llama.Block: FastLlamaBlock, opt.Block: FastOPTBlock,
               opt.PostNormBlock: FastPostNormBlock, gptj.Block: FastGPTJBlock}


@dataclass
class Room:
    """What compiled code sees of a KVCache: the room for one block's keys and values, (1, H_kv, room, D).

    pos (1,): the position being read. A tensor, because a number would be compiled into the code.
    """
    keys: Tensor
    values: Tensor
    pos: Tensor

    def attend(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """KVCache.attend, in sums of products, which the compiler turns into loops over what is stored."""
        for stored, new in ((self.keys, k), (self.values, v)):
            stored.index_copy_(2, self.pos, new)
        q = fold(q, k)[:, :, :, None].float()
        k, v = (stored[:, :, None].float() for stored in (self.keys, self.values))
        unread = torch.arange(k.shape[3], device=k.device) > self.pos
        scores = (q * k).sum(-1) / math.sqrt(q.shape[-1])               # (1, H_kv, H / H_kv, room)
        pattern = scores.masked_fill(unread, -math.inf).softmax(-1)
        mixed = (pattern[..., None] * v).sum(-2)                        # (1, H_kv, H / H_kv, D)
        return mixed.flatten(1, 2)[:, :, None].to(self.keys)


@dataclass
class Folding:
    """A KVCache whose `attend`, for a single position, takes torch's bfloat16 kernel a fifth of the time."""
    cache: KVCache

    def attend(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.cache.extend(l, k, v)
        return F.scaled_dot_product_attention(fold(q, k), k, v).flatten(1, 2)[:, :, None]


def fold(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, 1, D) -> (B, H_kv, H / H_kv, D): queries that share a key head become queries of one head."""
    return q[:, :, 0].unflatten(1, (k.shape[1], -1))

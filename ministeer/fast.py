"""fast: the same model with its weight matrices packed for the CPU's vector units. What is not plain is here and nowhere else.

On processors where torch's own float32 product is slow (benchmarks/README.md has figures), oneDNN with weights that were laid out
for it once is half as fast again. It is reached through operators of torch that are not public, so their absence only costs speed.
"""

import copy
import warnings

import torch
from torch import nn

from .gpt2 import Conv1D


class Packed(nn.Module):
    """x W^T + b by oneDNN, with W (outputs, inputs) in the blocks that its kernels read. No gradients."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def fast(model):
    """A model -> one that computes the same up to rounding, faster. Both share what is not packed; drop the old one to free its memory.

    Works on the CPU in float32 and bfloat16. Elsewhere, and where this torch has not the operators, `model` itself comes back with a
    warning that says why. A model that is packed already comes back as it is.
    """
    if any(isinstance(part, Packed) for part in model.modules()):
        return model
    weight = next(model.parameters())
    try:
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"it is for float32 and bfloat16 on the CPU, and this model is {weight.dtype} on {weight.device}")
        Packed(torch.ones(16, 16, dtype=weight.dtype))(torch.ones(1, 1, 16, dtype=weight.dtype))
    except (AttributeError, RuntimeError, ValueError) as error:
        warnings.warn(f"fast leaves the model as it is: {error}.", stacklevel=2)
        return model
    result = copy.deepcopy(model, {id(p): p for p in model.parameters()})       # new modules, the same tensors
    for parent in list(result.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear):
                setattr(parent, name, Packed(part.weight, part.bias))
            if isinstance(part, Conv1D):
                setattr(parent, name, Packed(part.weight.T, part.bias))         # which keeps W as (inputs, outputs)
    # A tied head is the embedding, which stays as it is for looking up; an untied one was packed above.
    head = Packed(result.get_parameter(result.names["embedding"])) if result.config.tied else result.lm_head
    result.unembed = lambda x: head(result.final_norm(x))
    return result.requires_grad_(False)

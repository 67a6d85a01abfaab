"""ITI and ICV, which change what is inside blocks. Each returns a new model that shares the old weights.

Read first: many_pairs.py. Turner et al., section 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import opt
from ..attention import attend
from ..faster import Packed
from ..utils import check_number, check_whole
from .many_pairs import check_pairs, differences, first_component

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM


@torch.no_grad()
def head_outputs(model: LM, ids: Tensor) -> Tensor:
    """ids (1, T) -> (n_layer, n_head, d_head): the output of each head at the last position."""
    check_undivided(model)
    rope, outputs = model.rope(torch.arange(ids.shape[1], device=ids.device)), []
    for x, block in zip(model.residuals(ids), model.blocks, strict=False):
        norm, attention = block_parts(block)
        outputs.append(attend(*attention.qkv(norm(x), rope))[0, :, -1].float())
    return torch.stack(outputs)


@torch.no_grad()
def iti(model: LM, tokenizer: Tokenizer, plus: Sequence[str], minus: Sequence[str], heads: int = 48,
        strength: float = 15.0, control: int | None = None) -> LM:
    """head + strength sigma theta, for the `heads` heads that best tell plus from minus -> a model

    Inference-time intervention, Li et al. 2023. theta: mean(plus) - mean(minus) of the head's output, norm 1.
    sigma: the standard deviation of all outputs along theta. The best heads have the most accurate linear
    probes, fitted by least squares on every other pair and tested on the rest. (Theirs are logistic.)
    The change goes into the bias of the output projection, so to all positions. (Theirs starts at the
    last prompt token.)
    control: a seed; each theta is a random direction, and what is added keeps its norm
    Raises ValueError for a model with packed weights, or fewer than four pairs.
    """
    changed = plain_copy(model)
    check_pairs(plus, minus, 4)         # the probes are fitted on half of them
    check_whole("heads", heads, 1), check_number("strength", strength)
    outputs = [torch.stack([head_outputs(model, torch.tensor([tokenizer.encode(text)], device=model.device))
                            for text in texts]) for texts in (plus, minus)]
    a, b = outputs                                                              # (n, n_layer, n_head, d_head)
    theta = F.normalize(a.mean(dim=0) - b.mean(dim=0), dim=-1)
    sigma = (torch.cat(outputs) * theta).sum(dim=-1).std(dim=0)                 # (n_layer, n_head)
    theta = theta if control is None else F.normalize(random_numbers(theta, control), dim=-1)
    accuracy = torch.zeros_like(sigma)
    for l in range(sigma.shape[0]):
        for head in range(sigma.shape[1]):
            accuracy[l, head] = probe_accuracy(a[:, l, head], b[:, l, head])
    chosen = torch.zeros_like(sigma).flatten()
    chosen[accuracy.flatten().topk(min(heads, accuracy.numel())).indices] = 1
    add = strength * (chosen.view_as(sigma) * sigma)[..., None] * theta
    for l, block in enumerate(changed.blocks):
        out, _ = writers(block)
        weight = out.weight.T if isinstance(out, nn.Linear) else out.weight     # (inputs, outputs) in both
        old = 0 if out.bias is None else out.bias
        out.bias = nn.Parameter(old + add[l].flatten().to(weight) @ weight, requires_grad=False)
    changed.chosen_heads = chosen.view_as(sigma).nonzero().tolist()
    return changed


def probe_accuracy(a: Tensor, b: Tensor) -> Tensor:
    """a, b (n, d_head) -> accuracy on the odd pairs of a least-squares classifier fitted on the even ones"""
    x = torch.cat([a, b])
    x = torch.cat([x, torch.ones(len(x), 1).to(x)], dim=1)
    y = torch.cat([torch.ones(len(a)), -torch.ones(len(b))]).to(a)
    even = torch.arange(len(a)).repeat(2) % 2 == 0
    ridge = 0.1 * x[even].square().mean() * torch.eye(x.shape[1]).to(x)
    w = torch.linalg.solve(x[even].T @ x[even] / even.sum() + ridge, x[even].T @ y[even] / even.sum())
    return ((x[~even] @ w > 0) == (y[~even] > 0)).float().mean()


@torch.no_grad()
def icv(model: LM, tokenizer: Tokenizer, plus: Sequence[str], minus: Sequence[str],
        strength: float = 0.1, control: int | None = None) -> LM:
    """Every MLP's y -> |y| normalise(y / |y| + strength (1 + max(0, cos(y, -v))) v / |v|) -> a model

    In-context vectors, Liu et al. 2024. v: the mean difference at the last token plus the first principal
    component about it, for all layers at once, then split by layer. Norms are kept; outputs that point away
    from v turn more.
    control: a seed; each v is a random direction
    """
    check_number("strength", strength)
    rows = differences(model, tokenizer, plus, minus)[:, 1:].flatten(1)         # what leaves each block
    mean = rows.mean(dim=0)
    vectors = (mean + first_component(rows)).view(model.config.n_layer, -1)
    vectors = vectors if control is None else random_numbers(vectors, control)
    changed = model.shared_copy()
    for block, v in zip(changed.blocks, vectors, strict=True):
        name = "mlp" if hasattr(block, "mlp") else "fc2"        # OPT has no module for its whole MLP
        setattr(block, name, Turned(part(block, name), v, strength))
    changed.fingerprint = ""
    return changed


def random_numbers(like: Tensor, seed: int) -> Tensor:
    """Normal random numbers of the same shape."""
    generator = torch.Generator().manual_seed(check_whole("control", seed))
    return torch.randn(like.shape, generator=generator).to(like)


class Turned(nn.Module):
    """An MLP whose output is turned toward v (d_model,), its norm kept."""

    def __init__(self, mlp: nn.Module, v: Tensor, strength: float):
        super().__init__()
        self.mlp, self.strength = mlp, strength
        self.register_buffer("v", F.normalize(v, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        y, v = self.mlp(x), self.v.float()
        unit = F.normalize(y.float(), dim=-1)
        away = 1 + F.relu(-(unit @ v)).unsqueeze(-1)
        turned = F.normalize(unit + self.strength * away * v, dim=-1)
        return (turned * y.float().norm(dim=-1, keepdim=True)).to(y)


def check_plain(model: LM) -> None:
    """Raises ValueError for a model with packed weights."""
    if any(isinstance(part, Packed) for part in model.modules()):
        raise ValueError("the weights of this fast model are packed, so they cannot be changed and pass no "
                         "gradients. Pass the plain model; a model that comes back can be made fast.")


def check_undivided(model: LM) -> None:
    """Raises ValueError for a model that several processes share."""
    if model.processes > 1:
        raise ValueError(f"this looks at single heads or matrices, and {model.processes} processes share "
                         "those of this model. Load it without parallel=True.")


def plain_copy(model: LM) -> LM:
    """A copy whose weights can be replaced one by one. Vectors of the old model are not meant for it."""
    check_plain(model), check_undivided(model)
    changed = model.shared_copy()
    changed.fingerprint = ""
    return changed


def part(module: nn.Module, *names: str) -> nn.Module:
    """The part with one of these names: families name the same part differently.

    Raises ValueError if there is none.
    """
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(f"this looks inside blocks, and finds no {' or '.join(names)} in a "
                     f"{type(module).__module__}.{type(module).__name__}.")


def block_parts(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norm before attention, and attention. A post-norm block has no norm there."""
    norm = (nn.Identity() if isinstance(block, opt.PostNormBlock) else
            part(block, "ln_1", "input_layernorm", "self_attn_layer_norm"))
    return norm, part(block, "attn", "self_attn")


def writers(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The projections by which attention and the MLP write to the stream."""
    _, attention = block_parts(block)
    return (part(attention, "c_proj", "o_proj", "out_proj"),
            part(getattr(block, "mlp", block), "c_proj", "down_proj", "fc_out", "fc2"))


@contextlib.contextmanager
def heads_changed(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, `change` makes of the merged heads (B, T, H * D) of `block` what is projected."""
    hook = writers(block)[0].register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))
    try:
        yield
    finally:
        hook.remove()

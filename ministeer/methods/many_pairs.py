"""Four relatives of activation addition, from many pairs of texts instead of one: CAA, RepE, ITI, ICV, each in a few lines on the same list.

CAA and RepE give Steers. ITI and ICV change what is inside a block, so they give a model of their own, which shares the weights of the old one.
Read before: steering.py. Turner et al., section 2; tutorial 11 builds the first by hand.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import attend
from ..steering import Steer


@torch.no_grad()
def last_states(model, tokenizer, texts):
    """resid at the last token of each text -> (len(texts), n_layer + 1, d_model), float32."""
    device = next(model.parameters()).device
    return torch.stack([torch.stack([x[0, -1].float() for x in model(torch.tensor([tokenizer.encode(text)], device=device), last_only=True)[1]])
                        for text in texts])


def differences(model, tokenizer, plus, minus):
    """Last states of `plus` less those of `minus`, two lists of as many texts -> (n, n_layer + 1, d_model). Raises ValueError."""
    if len(plus) != len(minus) or len(plus) < 2 or isinstance(plus, str):
        raise ValueError(f"pairs need two or more texts, as many plus as minus; given: {len(plus)} and {len(minus)}.")
    return last_states(model, tokenizer, plus) - last_states(model, tokenizer, minus)


def caa(model, tokenizer, plus, minus, layer):
    """mean_i(h+_i - h-_i) at the last token, added at every position (contrastive activation addition; Rimsky et al. 2024) -> a Steer.

    Read and added before block `layer`; their code reads and adds after a block, so their layer l is l + 1 here. They read at the letter of the
    answer to an A/B question: end each text with it. They steer from the prompt's last token on and leave the rest of it alone:
    dataclasses.replace(steer, start=len(tokenizer.encode(prompt)) - 1).
    """
    _check(model, layer)
    return Steer(layer, differences(model, tokenizer, plus, minus)[:, layer].mean(dim=0), model=model.fingerprint, note=_note(model, "CAA"))


def repe(model, tokenizer, plus, minus, layers):
    """The first principal component of the differences at each of `layers`, at every position (RepE; Zou et al. 2023) -> a list of Steers.

    Each has norm 1, so a coefficient means less in a late layer, whose stream is longer, than in an early one.
    Trap: the sign of a component is arbitrary; here it is that of the mean difference. And the differences must not be centred: all point one
    way, which is what we want of them, and centring would take just that away. (RepE shuffles each pair first, to the same end.)
    """
    for layer in layers:
        _check(model, layer)
    rows = differences(model, tokenizer, plus, minus)
    found = []
    for layer in layers:
        component = torch.linalg.svd(rows[:, layer], full_matrices=False).Vh[0]
        component = component * torch.sign(rows[:, layer].mean(dim=0) @ component)
        found.append(Steer(layer, component, model=model.fingerprint, note=_note(model, "RepE")))
    return found


@torch.no_grad()
def head_outputs(model, ids):
    """What each head hands to the output projection at the last position, ids (1, T) -> (n_layer, n_head, d_head), float32."""
    pos = torch.arange(ids.shape[1], device=ids.device)
    resid, rope, found = model.run(model.embed(ids, pos), pos), model.rope(pos), []
    for x, block in zip(resid, model.blocks, strict=False):
        attention, norm = _parts(block)
        found.append(attend(*attention.heads(norm(x), rope))[0, :, -1].float())
    return torch.stack(found)


@torch.no_grad()
def iti(model, tokenizer, plus, minus, heads=48, strength=15.0):
    """head + strength sigma theta, for the `heads` heads whose output tells plus from minus best (inference-time intervention; Li et al. 2023).

    theta: the mean of plus less that of minus, norm 1. sigma: the standard deviation of all outputs along theta. Which heads tell best: accuracy
        of a linear probe, fitted by least squares on every other pair and tried on the rest; theirs is logistic regression.
    -> a model. What a head gets on top passes the output projection, so it is a bias of that projection, at every position; theirs begins at
        the last prompt token.
    Raises ValueError for packed or compiled models, whose weights cannot be read.
    """
    _check_plain(model)
    if len(plus) != len(minus) or len(plus) < 4:
        raise ValueError(f"the probes need four or more pairs; given: {len(plus)} plus and {len(minus)} minus.")
    device = next(model.parameters()).device
    a, b = (torch.stack([head_outputs(model, torch.tensor([tokenizer.encode(text)], device=device)) for text in texts]) for texts in (plus, minus))
    theta = F.normalize(a.mean(dim=0) - b.mean(dim=0), dim=-1)                              # (n_layer, n_head, d_head)
    sigma = (torch.cat([a, b]) * theta).sum(dim=-1).std(dim=0)                              # (n_layer, n_head)
    accuracy = torch.stack([torch.stack([_probe(a[:, l, h], b[:, l, h]) for h in range(a.shape[2])]) for l in range(a.shape[1])])
    chosen = torch.zeros_like(accuracy).flatten()
    chosen[accuracy.flatten().topk(min(heads, accuracy.numel())).indices] = 1
    add = strength * (chosen.view_as(sigma) * sigma)[..., None] * theta
    changed = _shared_copy(model)
    for l, block in enumerate(changed.blocks):
        attention, _ = _parts(block)
        out = getattr(attention, "o_proj", None) or attention.c_proj
        old = 0 if out.bias is None else out.bias
        bare = out.weight.T if hasattr(attention, "o_proj") else out.weight                 # (inputs, outputs) in either family
        out.bias = nn.Parameter(old + add[l].flatten().to(bare) @ bare, requires_grad=False)
    changed.chosen_heads = chosen.view_as(sigma).nonzero().tolist()
    return changed


def _probe(a, b):
    """Accuracy on the odd pairs of a least-squares classifier fitted on the even ones; a, b (n, d_head)."""
    x, y = torch.cat([a, b]), torch.cat([torch.ones(len(a)), -torch.ones(len(b))]).to(a)
    x = torch.cat([x, torch.ones(len(x), 1).to(x)], dim=1)
    even = torch.arange(len(a)).repeat(2) % 2 == 0
    d = x.shape[1]
    ridge = 0.1 * x[even].square().mean() * torch.eye(d).to(x)
    w = torch.linalg.solve(x[even].T @ x[even] / even.sum() + ridge, x[even].T @ y[even] / even.sum())
    return ((x[~even] @ w > 0) == (y[~even] > 0)).float().mean()


@torch.no_grad()
def icv(model, tokenizer, plus, minus, strength=0.1):
    """y -> |y| normalise(y / |y| + strength (1 + max(0, cos(y, -v))) v / |v|), the output of every MLP (in-context vectors; Liu et al. 2024).

    v: for all layers together, the mean difference at the last token plus the first principal component about it; then cut by layer.
    The norm is kept, so nothing grows; a position that points away from v is turned more. Every position, every layer.
    -> a model
    """
    rows = differences(model, tokenizer, plus, minus)[:, 1:].flatten(1)                     # what leaves each block
    mean = rows.mean(dim=0)
    component = torch.linalg.svd(rows - mean, full_matrices=False).Vh[0]
    component = component * torch.sign(component @ mean)                                    # its sign is arbitrary
    vectors = (mean + component).view(model.config.n_layer, -1)
    changed = _shared_copy(model)
    for block, v in zip(changed.blocks, vectors, strict=True):
        block.mlp = Turned(block.mlp, v, strength)
    return changed


class Turned(nn.Module):
    """An MLP whose output is turned toward v (d_model,), its norm kept."""

    def __init__(self, mlp, v, strength):
        super().__init__()
        self.mlp, self.strength = mlp, strength
        self.v = F.normalize(v, dim=0)

    def forward(self, x):
        y = self.mlp(x)
        unit = F.normalize(y.float(), dim=-1)
        away = 1 + F.relu(-(unit @ self.v)).unsqueeze(-1)
        return (F.normalize(unit + self.strength * away * self.v, dim=-1) * y.float().norm(dim=-1, keepdim=True)).to(y)


def _parts(block):
    """The attention of a block of either family, and the norm before it."""
    return (block.self_attn, block.input_layernorm) if hasattr(block, "self_attn") else (block.attn, block.ln_1)


def _shared_copy(model):
    """A model whose modules are its own and whose weights are the old one's."""
    _check_plain(model)
    changed = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    changed.fingerprint = ""                    # it is not the model that other vectors were made with
    return changed


def _check_plain(model):
    if "unembed" in vars(model):
        raise ValueError("this needs a model with plain weights; load it without fast.")


def _check(model, layer):
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < model.config.n_layer:
        raise ValueError(f"layer {layer}: {model.layers_there()}")


def _note(model, method):
    return {"method": method, "model": getattr(model, "name", type(model).__name__)}

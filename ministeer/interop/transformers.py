"""attach: the addition in a model of the transformers library, by forward pre-hooks.

Read first: ../model.py, whose loop needs no hooks. For models that are not of ministeer's families.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..steering import Steer, Steers
from ..utils import check_list, short

# Where the blocks are: Llama and most later models; GPT-2 and GPT-J; OPT; GPT-NeoX
BLOCKS = ("model.layers", "transformer.h", "model.decoder.layers", "gpt_neox.layers")


@contextlib.contextmanager
def attach(hf_model: nn.Module, steers: Steers, blocks: str = "") -> Iterator[None]:
    """Within the `with`, hf_model adds each s of `steers` to what block s.layer reads, as `LM` does.

    hf_model: a decoder of the transformers library. Its forward and generate are steered, cached or not.
    blocks: the dotted name of its list of blocks, if that is not in BLOCKS
    Position 0 is the first token of a row that its attention_mask does not hide, so padding on the left moves
    nothing. Without a mask, positions come from position_ids, or else from the length of the KV cache.
    Which model the Steers were made with is not checked. A cache filled here is steered: use it only here.
    Raises ValueError for blocks that are not found, and for Steers of other layers, widths or batches.
    """
    steers = [steers] if isinstance(steers, Steer) else check_list("steers", steers, "a list of Steers")
    path = blocks or next((path for path in BLOCKS if _find(hf_model, path)), "")
    found = _find(hf_model, path)
    if not found:
        raise ValueError(f"no list of blocks in {type(hf_model).__name__} at {path or ', '.join(BLOCKS)}. "
                         "Say with `blocks` where it is, such as 'backbone.layers'.")
    width = hf_model.config.hidden_size
    for s in steers:
        if not isinstance(s, Steer) or s.layer >= len(found) or s.vector.shape[-1] != width:
            raise ValueError(f"{short(s)} does not fit: this model has blocks 0 … {len(found) - 1}, "
                             f"and a residual stream {width} wide.")
    # Trap: each block makes the cache longer, so positions are found where the loop over blocks begins.
    body = hf_model.get_submodule(path.rpartition(".")[0])
    arguments, pos = inspect.signature(body.forward), None

    def look(body, args, kwargs):
        nonlocal pos
        given = arguments.bind_partial(*args, **kwargs).arguments
        pos = positions(**{name: given.get(name) for name in READ})

    def adding(layer):
        here = [s for s in steers if s.layer == layer]

        def add(block, args, kwargs):
            if args:
                return (added(args[0], pos, here), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": added(kwargs["hidden_states"], pos, here)}
        return add

    hooks = [body.register_forward_pre_hook(look, with_kwargs=True)]
    hooks += [found[layer].register_forward_pre_hook(adding(layer), with_kwargs=True)
              for layer in sorted({s.layer for s in steers})]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def positions(input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
              attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
              past_key_values: object = None) -> Tensor:
    """The absolute position of each token of a call -> (B, T), -1 for padding

    attention_mask (B, S): 1 for each token read so far and in this call, 0 for padding
    """
    x = inputs_embeds if input_ids is None else input_ids
    B, T = x.shape[:2]
    start = 0 if past_key_values is None else past_key_values.get_seq_length()
    if attention_mask is not None and attention_mask.ndim == 2:
        if attention_mask.shape != (B, start + T):
            raise ValueError(f"attention_mask must be {(B, start + T)}, the cached positions included; "
                             f"given: {tuple(attention_mask.shape)}.")
        seen = attention_mask != 0
        return (seen.cumsum(dim=1) - 1).masked_fill(~seen, -1)[:, -T:]
    if position_ids is not None:
        return position_ids.expand(B, T)
    if attention_mask is not None:
        raise ValueError(f"an attention_mask of {attention_mask.ndim} dimensions does not tell positions. "
                         "Give position_ids too.")
    return torch.arange(start, start + T, device=x.device).expand(B, T)


READ = tuple(inspect.signature(positions).parameters)


def added(x: Tensor, pos: Tensor, steers: list[Steer]) -> Tensor:
    """x (B, T, d_model) plus each Steer's delta at pos (B, T), one after another as in `LM.run`"""
    same = bool((pos == pos[:1]).all())
    for steer in steers:
        if isinstance(steer.coeff, Tensor) and len(steer.coeff) != len(x):
            raise ValueError(f"coeff has {len(steer.coeff)} values, one for each row of a batch, "
                             f"but the batch has {len(x)} rows (beams count as rows).")
        if same:
            delta = steer.delta(x, pos[0])
        else:
            delta = torch.cat([steer.rows([b]).delta(x[b:b + 1], pos[b]).expand_as(x[b:b + 1])
                               for b in range(len(x))])
        x = x + delta.to(x)
    return x


def _find(hf_model, path):
    with contextlib.suppress(AttributeError):
        found = hf_model.get_submodule(path)
        return found if isinstance(found, nn.ModuleList) else None

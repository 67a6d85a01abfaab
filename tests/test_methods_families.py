"""Methods that look inside blocks, on OPT and GPT-J, whose parts have other names and another order."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT
from test_methods import ANSWERS, MINUS, PLUS, all_head_outputs, effect_by_hook, encode

from ministeer import Steer
from ministeer.attention import merge_heads, split_heads
from ministeer.methods import ablation, function_vectors, inside_blocks

FAMILIES = ["opt", "opt-350m", "gptj"]


def recorded(model, ids, parts):
    """What each of `parts` reads and gives when the model reads ids."""
    seen, hooks = [], []
    for part in parts:
        hooks.append(part.register_forward_hook(lambda _, inputs, y: seen.append((inputs[0], y))))
    logits = model(ids)[0]
    for hook in hooks:
        hook.remove()
    return logits, seen


def test_head_outputs_are_what_the_projection_reads(tiny):
    model, ids = tiny[0], encode(tiny[1], TEXT[1])
    outputs = inside_blocks.head_outputs(model, ids)
    _, seen = recorded(model, ids, [inside_blocks.writers(block)[0] for block in model.blocks])
    for heads, (read, _) in zip(outputs, seen, strict=True):
        torch.testing.assert_close(heads.flatten(), read[0, -1], rtol=1e-4, atol=1e-5)


def test_iti_adds_sigma_theta_to_the_chosen_heads(tiny):
    model, tokenizer = tiny
    changed = inside_blocks.iti(model, tokenizer, PLUS, MINUS, heads=3, strength=5.0)
    assert len(changed.chosen_heads) == 3
    a, b = (all_head_outputs(model, tokenizer, texts) for texts in (PLUS, MINUS))
    theta = F.normalize(a.mean(dim=0) - b.mean(dim=0), dim=-1)
    sigma = (torch.cat([a, b]) * theta).sum(dim=-1).std(dim=0)
    hooks = []
    for l, block in enumerate(model.blocks):
        def add(_, inputs, l=l):
            rows = split_heads(inputs[0], model.config.n_head).clone()
            for h in (h for m, h in changed.chosen_heads if m == l):
                rows[:, h] += 5 * sigma[l, h] * theta[l, h]
            return (merge_heads(rows),)
        hooks.append(inside_blocks.writers(block)[0].register_forward_pre_hook(add))
    ids = encode(tokenizer, TEXT[1])
    by_hand = model(ids)[0]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(changed(ids)[0], by_hand, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model(ids)[0], by_hand, atol=1e-3)


def test_icv_turns_the_output_of_every_mlp_and_keeps_its_norm(tiny):
    model, tokenizer = tiny
    changed, ids = inside_blocks.icv(model, tokenizer, PLUS, MINUS, strength=0.5), encode(tokenizer, TEXT[0])
    turned = [part for part in changed.modules() if isinstance(part, inside_blocks.Turned)]
    assert len(turned) == model.config.n_layer
    logits, seen = recorded(changed, ids, turned)
    for part, (read, y) in zip(turned, seen, strict=True):
        before = part.mlp(read)
        torch.testing.assert_close(y.norm(dim=-1), before.norm(dim=-1))
        assert (F.cosine_similarity(y, part.v, dim=-1) > F.cosine_similarity(before, part.v, dim=-1)).all()
    assert not torch.allclose(logits, model(ids)[0], atol=1e-3)


def test_indirect_effects_are_those_of_replacing_one_head_after_another(tiny):
    model, tokenizer = tiny
    means = all_head_outputs(model, tokenizer, PLUS).mean(dim=0)
    given = function_vectors.indirect_effects(model, tokenizer, MINUS[:1], ANSWERS[:1], means)
    (answer,) = tokenizer.encode(ANSWERS[0], bos=False)
    for l, h in ((0, 1), (2, 0), (3, 1)):
        wanted = effect_by_hook(model, encode(tokenizer, MINUS[0]), answer, l, h, means[l, h])
        assert given[l, h].item() == pytest.approx(wanted, rel=2e-2, abs=1e-7)


def test_orthogonalised_weights_write_nothing_along_r_unless_a_norm_does(tiny, family):
    model, tokenizer = tiny
    r = torch.randn(model.config.d_model, generator=torch.Generator().manual_seed(0))
    if family == "opt-350m":
        with pytest.raises(ValueError, match="a norm after each half of a block or a projection"):
            ablation.orthogonalised(model, Steer(1, r))
    else:
        for x in ablation.orthogonalised(model, Steer(1, r))(encode(tokenizer, TEXT[0]))[1]:
            assert (x @ r).abs().max() < 1e-4 * x.norm(dim=-1).max() * r.norm()

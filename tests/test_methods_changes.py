"""Additions that look at the stream: each against a slow float64 re-computation, and in its limit cases."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXT
from safetensors.torch import save_file

from ministeer import KVCache, Steer, fast, generate
from ministeer.methods.ablation import Ablation, ablation, choose_direction, orthogonalised
from ministeer.methods.angular import Angular, angular
from ministeer.methods.capping import Cap, Fixed, projections
from ministeer.methods.change import Change
from ministeer.steering import random_like, relative_norm

D_MODEL, T = 32, 9


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VECTOR = randn(D_MODEL, seed=5)
def turned(x, v, degrees):
    """x with its part in the plane of v and `other` at that angle from v: by solving for its coordinates"""
    other = randn(D_MODEL, seed=6).double().numpy()
    other = other - (other @ v) * v
    plane = np.stack([v, other / np.linalg.norm(other)], axis=1)
    inside = np.linalg.lstsq(plane, x, rcond=None)[0]
    angle = np.radians(degrees)
    return x - plane @ inside + plane @ [np.cos(angle), np.sin(angle)] * np.linalg.norm(inside)


# Each kind, and what it makes of one position x in float64 at coeff 1; v = vector / |vector|
KINDS = {
    "Change": (Change(2, VECTOR), lambda x, v: x + VECTOR.double().numpy()),
    "Ablation": (Ablation(2, VECTOR), lambda x, v: x - v * (v @ x)),
    "Cap": (Cap(2, VECTOR, limit=-0.5), lambda x, v: x - max(v @ x + 0.5, 0) * v),
    "Angular": (Angular(2, VECTOR, degrees=70, other=randn(D_MODEL, seed=6)), lambda x, v: turned(x, v, 70)),
    "adaptive": (Angular(2, VECTOR, degrees=200, other=randn(D_MODEL, seed=6), adaptive=True),
                 lambda x, v: turned(x, v, 200) if v @ x > 0 else x),
    "Fixed": (Fixed(2, VECTOR, value=-1.5), lambda x, v: x - (v @ x) * v - 1.5 * v),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def steer(kind):
    return kind[0]


def random_ids(batch=1, n=T, seed=0):
    return torch.randint(2, 300, (batch, n), generator=torch.Generator().manual_seed(seed))


def slow(steer, function, x, coeff, start):
    """x' of every row and position, one at a time, in float64. coeff: one for each row"""
    v = steer.vector.double().numpy()
    new = x.double().numpy().copy()
    for row, position in np.ndindex(*new.shape[:2]):
        if position >= start:
            old = new[row, position].copy()
            changed = old + coeff[row] * (function(old, v / np.linalg.norm(v)) - old)
            if steer.keep_norm:
                changed *= np.linalg.norm(old) / np.linalg.norm(changed)
            new[row, position] = changed
    return torch.from_numpy(new)


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("start", [0, 3])
def test_delta_equals_a_slow_computation_in_float64(kind, start, keep_norm):
    steer, function = kind
    x, coeff = 2 * randn(3, T, D_MODEL), torch.tensor([1.0, 0.0, -0.5])
    steer = replace(steer, coeff=coeff, start=start, keep_norm=keep_norm)
    delta = steer.delta(x, torch.arange(T))
    torch.testing.assert_close((x + delta).double(), slow(steer, function, x, coeff.tolist(), start),
                               rtol=1e-4, atol=1e-4)
    one = replace(steer, coeff=-0.5)
    later = one.delta(x[2:, 4:], torch.arange(4, T)).expand(1, -1, -1)
    torch.testing.assert_close(later, delta[2:, 4:], rtol=1e-4, atol=1e-5)


def test_coeff_0_is_bitwise_no_steering(tiny, steer):
    ids = random_ids(2)
    for other in (0 * steer, replace(steer, coeff=torch.zeros(2), keep_norm=True)):
        logits, resid = tiny[0](ids, other)
        wanted, plain = tiny[0](ids)
        assert torch.equal(logits, wanted)
        assert all(torch.equal(a, b) for a, b in zip(resid, plain, strict=True))


def test_the_loop_adds_delta_at_its_layer(tiny, steer):
    model, ids = tiny[0], random_ids(2)
    plain, changed = (model(ids, steers)[1] for steers in ((), steer))
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], changed[:2], strict=True))
    added = steer.delta(plain[2], torch.arange(T))
    torch.testing.assert_close(changed[2], plain[2] + added)
    assert added.norm() > 0.01
    # The second of two Steers at one layer reads what the first has changed.
    both = model(ids, [Steer(2, 3 * VECTOR), steer])[1][2]
    x = plain[2] + Steer(2, 3 * VECTOR).delta(None, torch.arange(T))
    torch.testing.assert_close(both, x + steer.delta(x, torch.arange(T)))


def test_cached_chunks_and_rows_of_a_batch_equal_one_pass(tiny, steer):
    model, ids = tiny[0], random_ids(2)
    steer = replace(steer, coeff=torch.tensor([1.0, 0.5]), keep_norm=True)
    logits, _ = model(ids, steer)
    cache = KVCache(T, 2)
    parts = [model(part, steer, cache)[0] for part in ids.split([1, 4, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, rtol=1e-3, atol=1e-3)
    for row in (0, 1):
        alone, _ = model(ids[row:row + 1], steer.rows([row]))
        torch.testing.assert_close(alone, logits[row:row + 1], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="the batch has 1 rows"):
        model(ids[:1], steer)


def test_generates_the_same_in_a_batch_and_alone(tiny, steer):
    model, tokenizer = tiny
    batch = generate(model, tokenizer, TEXT[:2], 2, 5, replace(steer, coeff=torch.tensor([1.0, 0, 1, 0])))
    for i, text in enumerate(TEXT[:2]):
        assert batch[i][0] == generate(model, tokenizer, text, 1, 5, steer)[0]
        assert batch[i][1] == generate(model, tokenizer, text, 2, 5)[1]


def test_save_and_load_keep_the_kind_and_all_that_belongs_to_it(steer, tmp_path):
    steer = replace(steer, coeff=torch.tensor([1.0, 2.0]), keep_norm=True, note={"a": 1}, fingerprint="f")
    steer.save(tmp_path / "x")
    again = Steer.load(tmp_path / "x")
    assert type(again) is type(steer) and again == steer
    assert (again.note, again.fingerprint) == ({"a": 1}, "f")
    assert again != replace(steer, keep_norm=False)
    assert steer != Steer(2, steer.vector, steer.coeff, steer.start)


@pytest.mark.parametrize(("kind", "change", "reason"), [
    ("cap", {"limit": "3"}, "limit must be"), ("cap", {"limit": 1, "keep_norm": 1}, "keep_norm must be"),
    ("cap", {}, "'limit'"), ("angular", {"degrees": 3, "adaptive": False}, "'other'"),
    ("ablate", {}, "'steer'"),
])
def test_rejects_files_of_a_kind_with_bad_or_missing_settings(tmp_path, kind, change, reason):
    about = {"layer": 0, "start": 1, "coeff": 1, "fingerprint": "", "note": {}, "keep_norm": False, **change}
    save_file({"vector": VECTOR}, tmp_path / "x", {kind: json.dumps(about)})
    with pytest.raises(ValueError, match=f"not a steering vector that ministeer saved, or .*{reason}"):
        Steer.load(tmp_path / "x")


def test_a_random_control_keeps_everything_but_the_direction(steer):
    controls = [random_like(steer, seed) for seed in range(5)]
    for control in controls:
        assert type(control) is type(steer)
        assert isinstance(steer, Angular) or replace(control, vector=steer.vector) == steer
        assert control.vector.norm().item() == pytest.approx(steer.vector.norm().item(), rel=1e-5)
        assert abs(torch.cosine_similarity(control.vector, VECTOR, dim=0)) < 0.6


def test_a_cache_rejects_another_setting(tiny):
    for steer, other in ((Cap(1, VECTOR, limit=1), Cap(1, VECTOR, limit=2)),
                         (Cap(1, VECTOR), Ablation(1, VECTOR, start=1)),
                         (Change(1, VECTOR), Change(1, VECTOR, keep_norm=True))):
        cache = KVCache(T + 1)
        tiny[0](random_ids(), steer, cache)
        with pytest.raises(ValueError, match="filled under other steering"):
            tiny[0](random_ids(1, 1), other, cache)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Ablation(1, torch.zeros(4)), "Ablation takes one direction .*norm 0"),
    (lambda: Cap(1, torch.ones(2, 4)), r"Cap takes one direction \(d_model,\), not zero; given: \(2, 4\)"),
    (lambda: Cap(1, VECTOR, limit=math.nan), "limit must be a finite number"),
    (lambda: Fixed(1, VECTOR, value="3"), "value must be a finite number"),
    (lambda: Angular(1, VECTOR), "other must be a tensor .d_model,. that does not lie along vector"),
    (lambda: Angular(1, VECTOR, other=-2 * VECTOR), "does not lie along"),
    (lambda: Angular(1, VECTOR, other=math.nan * VECTOR), "does not lie along"),
    (lambda: Angular(1, VECTOR, other=VECTOR[:4]), "does not lie along"),
    (lambda: Angular(1, VECTOR, other=randn(D_MODEL), degrees=math.inf), "degrees must be a finite number"),
    (lambda: Angular(1, VECTOR, other=randn(D_MODEL), adaptive="no"), "adaptive must be True or False"),
    (lambda: Change(1, VECTOR, keep_norm=1), "keep_norm must be True or False; given: 1"),
    (lambda: Change(1, VECTOR, coeff=math.inf), "coeff must be a finite number"),
])
def test_rejects_what_makes_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_kinds_are_each_other_in_limit_cases():
    x, pos = randn(2, T, D_MODEL), torch.arange(T)
    ablated = Ablation(0, VECTOR).delta(x, pos)
    torch.testing.assert_close(Fixed(0, VECTOR, start=0).delta(x, pos), ablated)
    assert not Cap(0, VECTOR, start=0, limit=1e6).delta(x, pos).any()
    both = Cap(0, VECTOR, start=0).delta(x, pos) + Cap(0, -VECTOR, start=0).delta(x, pos)
    torch.testing.assert_close(both, ablated)
    torch.testing.assert_close(Ablation(0, 7 * VECTOR).delta(x, pos), ablated)
    assert torch.equal(Change(0, VECTOR, 2.0).delta(x, pos), Steer(0, VECTOR, 2.0).delta(x, pos))


def test_keep_norm_works_for_rows_at_their_positions():
    rows, x = randn(2, D_MODEL), randn(1, T, D_MODEL, seed=1)
    new = x + Change(0, rows, 9.0, start=3, keep_norm=True).delta(x, torch.arange(T))
    torch.testing.assert_close(new.norm(dim=-1), x.norm(dim=-1))
    moved = (new - x)[0].norm(dim=-1) > 0
    assert moved.tolist() == [False] * 3 + [True] * 2 + [False] * (T - 5)


def test_repr_shows_the_kind_and_its_settings():
    assert repr(Cap(2, VECTOR, limit=3)) == ("<Cap a vector: coeff 1.0 at every position from 1 on "
                                             "before block 2, d_model 32, keep_norm False, limit 3.0>")


def test_relative_norm_and_projections_agree_for_an_ablation(tiny):
    model, tokenizer = tiny
    steer = Ablation(2, VECTOR)
    p = projections(model, tokenizer, steer, TEXT[0])
    stream = model(torch.tensor([tokenizer.encode(TEXT[0])]))[1][2][0]
    torch.testing.assert_close(p, stream @ VECTOR / VECTOR.norm(), rtol=1e-4, atol=1e-4)
    ratio = relative_norm(model, tokenizer, steer, TEXT[0])
    torch.testing.assert_close(ratio, p.abs() / stream.norm(dim=-1), rtol=1e-4, atol=1e-5)


# Angular steering


def test_angular_steering_keeps_the_norm_and_sets_the_angle():
    x, pos = randn(2, T, D_MODEL), torch.arange(T)
    steer = Angular(0, VECTOR, start=0, other=randn(D_MODEL, seed=6), degrees=40)
    b1, b2 = steer.plane()
    assert abs(b1 @ b2) < 1e-5
    new = x + steer.delta(x, pos)
    torch.testing.assert_close(new.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(torch.atan2(new @ b2, new @ b1), torch.full((2, T), math.radians(40)))
    again = replace(steer, degrees=400).delta(new, pos)
    torch.testing.assert_close(again, torch.zeros_like(again), rtol=0, atol=1e-5)
    opposite = replace(steer, degrees=180, adaptive=True).delta(x, pos)
    assert torch.equal(opposite.norm(dim=-1) > 0, x @ b1 > 0)
    control = random_like(steer, 0)
    assert abs(torch.cosine_similarity(control.other, steer.other, dim=0)) < 0.6


def test_angular_takes_the_most_typical_direction_and_the_first_component():
    directions = [randn(D_MODEL) + 0.3 * (l + 1) * randn(D_MODEL, seed=l + 1) for l in range(4)]
    steers = [Steer(l, (l + 1) * d) for l, d in enumerate(directions)]
    unit = np.stack([(d / d.norm()).numpy() for d in directions]).astype(float)
    made = angular(steers, 90, coeff=0.5, adaptive=True)
    assert [s.layer for s in made] == [0, 1, 2, 3]
    best = max(range(4), key=lambda l: sum(unit[l] @ unit[m] for m in range(4)))
    values, components = np.linalg.eigh(np.cov(unit.T))
    for s in made:
        torch.testing.assert_close(s.vector.double().numpy(), unit[best], rtol=1e-4, atol=1e-5)
        assert abs(components[:, -1] @ s.other.numpy()) == pytest.approx(1, abs=1e-4)
        assert (s.coeff, s.degrees, s.adaptive) == (0.5, 90, True)
    with pytest.raises(ValueError, match="two or more Steers; given: 1"):
        angular(steers[:1], 90)


# Ablation in all blocks, and in the weights


def test_ablation_leaves_nothing_along_the_direction_at_any_block(tiny):
    model, ids = tiny[0], random_ids(2)
    _, resid = model(ids, ablation(model, Steer(1, VECTOR)))
    for x in resid[:-1]:
        assert (x @ VECTOR).abs().max() < 1e-4 * x.norm(dim=-1).max() * VECTOR.norm()
    assert (resid[-1] @ VECTOR).abs().max() > 0.1      # what the last block wrote


def ablate_by_hand(model, ids, r):
    """Arditi et al.: the embedding, and what attention and the MLP of each block write, without r; float64"""
    from ministeer.methods.inside_blocks import block_parts
    model = model.shared_copy().double()
    r = r.double() / r.double().norm()
    pos = torch.arange(ids.shape[1])
    x = model.embed(ids, pos)
    x, resid = x - (x @ r)[..., None] * r, []
    for l, block in enumerate(model.blocks):
        resid.append(x)
        norm, attention = block_parts(block)
        # GPT-2's attention takes no rotation.
        rope = model.rope(pos)
        y = attention(norm(x), l) if rope is None else attention(norm(x), l, [part.double() for part in rope])
        x = x + y - (y @ r)[..., None] * r
        second = getattr(block, "post_attention_layernorm", None) or block.ln_2
        y = block.mlp(second(x))
        x = x + y - (y @ r)[..., None] * r
    return model.unembed(x), [*resid, x]


def test_orthogonalised_weights_write_nothing_along_the_direction(tiny):
    model, ids = tiny[0], random_ids(2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    changed = orthogonalised(model, Steer(1, 3 * VECTOR))
    logits, resid = changed(ids)
    for x in resid:
        assert (x @ VECTOR).abs().max() < 1e-5 * x.norm(dim=-1).max() * VECTOR.norm()
    wanted_logits, wanted = ablate_by_hand(model, ids, VECTOR)
    for a, b in zip([logits, *resid], [wanted_logits, *wanted], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not changed.fingerprint and not any(p.requires_grad for p in changed.parameters())
    torch.testing.assert_close(fast(changed)(ids)[0], logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="Pass the plain model"):
        orthogonalised(fast(model), Steer(1, VECTOR))
    with pytest.raises(ValueError, match="the vector is 4 wide"):
        orthogonalised(model, Steer(1, torch.ones(4)))


def test_choose_direction_follows_the_papers_rule(tiny):
    model, tokenizer = tiny
    words = [word for word in map(tokenizer.decode, [[i] for i in range(2, 380)])
             if len(tokenizer.encode(word, bos=False)) == 1][:200]
    ids = [tokenizer.encode(word, bos=False)[0] for word in words]
    candidates = [Steer(l, 0.3 * randn(D_MODEL, seed=l), fingerprint=model.fingerprint) for l in range(4)]
    choose = functools.partial(choose_direction, model, tokenizer, candidates, TEXT[:2], TEXT[2:])

    def p(texts, steer):
        rows = [model(torch.tensor([tokenizer.encode(text)]), steer)[0][0, -1] for text in texts]
        return torch.stack(rows).double().softmax(dim=-1)

    def log_odds(rows):
        share = rows[:, ids].sum(dim=1)
        return (share / (1 - share)).log().mean().item()
    numbers = []
    for steer in candidates:
        a, b = p(TEXT[2:], ()), p(TEXT[2:], ablation(model, steer))
        numbers.append({"ablated": log_odds(p(TEXT[:2], ablation(model, steer))),
                        "added": log_odds(p(TEXT[2:], steer)),
                        "kl": (a * (a / b).log()).sum(dim=1).mean().item()})
    passing = [l for l in range(4) if numbers[l]["added"] >= 0]
    best = min(passing, key=lambda l: numbers[l]["ablated"])
    chosen = choose(words, kl_limit=99, depth=1)
    assert chosen == candidates[best]
    assert chosen.note == pytest.approx(numbers[best], rel=1e-3, abs=1e-4)
    with pytest.raises(ValueError, match="4 candidates passes: 1 lie below layer 0.8, of which 0 keep KL"):
        choose(words, kl_limit=0.9 * numbers[0]["kl"], depth=0.2)
    with pytest.raises(ValueError, match="4 keep KL at 99 or less and 0 bring the words when added"):
        choose(words[:3], kl_limit=99, depth=1)
    with pytest.raises(ValueError, match="others must be one or more texts"):
        choose_direction(model, tokenizer, candidates, TEXT[:2], [], words)
    with pytest.raises(ValueError, match="not one token: .'weddings all'."):
        choose(["weddings all"])

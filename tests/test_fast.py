"""The fast model, packed or compiled, equals the plain one up to rounding; where it cannot, fast says why."""

import copy
import dataclasses

import pytest
import torch
from conftest import EVERY_FAMILY, TEXT, hub_config, hub_model

from ministeer import KVCache, Steer, faster, generate, steering_vector
from ministeer.checkpoints.weights import load_model
from ministeer.faster import FastBlock, Folding, Int4, Int8, Packed, Room, Small, fast
from ministeer.gpt2 import Conv1D

try:
    Packed(torch.ones(16, 16))(torch.ones(1, 16))
except (AttributeError, RuntimeError) as fault:
    pytest.skip(f"this torch cannot pack weights: {fault}", allow_module_level=True)

FAMILIES = EVERY_FAMILY
TOLERANCE = 1e-5        # of the largest number; in float32, another order of summation is off by about 1e-6
COMPILED = pytest.param(True, marks=pytest.mark.long, id="compiled")
PACKED = pytest.param(False, id="packed")
BFLOAT16 = 0.02         # of the largest number: what is multiplied in bfloat16 has 8 significant bits
LAYOUTS = [pytest.param((False, None), id="packed"),
           pytest.param((True, None), id="compiled", marks=pytest.mark.long),
           pytest.param((False, "int8"), id="int8"), pytest.param((False, "int4"), id="int4"),
           pytest.param((True, "int8"), id="int8-compiled", marks=pytest.mark.long),
           pytest.param((True, "int4"), id="int4-compiled", marks=pytest.mark.long)]


def close(a, b, tolerance=TOLERANCE):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def encode(tokenizer, text=TEXT[0]):
    return torch.tensor([tokenizer.encode(text)])


def one_by_one(model, ids):
    """The logits of ids (1, T), read one position at a time into a cache."""
    cache = KVCache(ids.shape[1])
    return torch.cat([model(part, (), cache)[0] for part in ids.split(1, dim=1)], dim=1)


def compiled(model, weights=None):
    torch.compiler.reset()      # torch compiles a function for eight models only, and these tests have more
    quick = fast(model, compile=True, weights=weights)
    assert isinstance(quick.blocks[0], FastBlock) and quick.blocks[0].compiled
    return quick


@pytest.fixture(scope="module", params=LAYOUTS)
def quick(tiny, request, tmp_path_factory):
    """A fast version of the model of `tiny`."""
    compile, weights = request.param
    if not compile:
        return fast(tiny[0], weights=weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        return compiled(tiny[0], weights)


def unpacked(model, quick):
    """A plain copy of the model with the weights that `quick` has: rounded, where they are few bits."""
    result = copy.deepcopy(model)
    for name, part in quick.named_modules():
        if isinstance(part, Small | Packed):
            weight = torch.nn.Parameter(part.dense().float(), requires_grad=False)
            if name == "lm_head" and not hasattr(result, name):
                result.lm_head = torch.nn.Linear(*weight.shape[::-1], bias=False)
            plain = result.get_submodule(name)
            plain.weight = torch.nn.Parameter(weight.T, False) if isinstance(plain, Conv1D) else weight
    return result


@pytest.fixture
def plain(tiny, quick):
    """The plain model that `quick` must equal up to `error`."""
    return unpacked(tiny[0], quick)


@pytest.fixture
def error(quick):
    return BFLOAT16 if any(isinstance(part, Small) for part in quick.modules()) else TOLERANCE


def test_residuals_and_logits_equal_the_plain_ones(tiny, quick, plain, error):
    model, tokenizer = tiny
    assert any(isinstance(part, Packed | Small) for part in quick.modules())
    steer = 3 * steering_vector(model, tokenizer, "I love you", "I hate", layer=2)
    ids = encode(tokenizer).expand(2, -1)
    for steered in ((), steer):
        (logits, resid), (wanted_logits, wanted) = quick(ids, steered), plain(ids, steered)
        assert close(logits, wanted_logits, error)
        assert all(close(a, b, error) for a, b in zip(resid, wanted, strict=True))
    for rows, size in ((2, 7), (1, 1)):         # only one row and one position run compiled
        cache = KVCache(ids.shape[1], batch=rows)
        parts = [quick(part, steer, cache) for part in ids[:rows].split(size, dim=1)]
        assert close(torch.cat([logits for logits, _ in parts], dim=1), wanted_logits[:rows], error)
        for l, x in enumerate(wanted):
            assert close(torch.cat([resid[l] for _, resid in parts], dim=1), x[:rows], error)


@pytest.mark.parametrize("layer", [1, 2])           # compiled, block 1 runs ahead with block 0
def test_steering_adds_delta_at_every_position(tiny, quick, layer):
    model, tokenizer = tiny
    steer = 3 * steering_vector(model, tokenizer, "I love you", "I hate", layer=layer)
    ids = encode(tokenizer)

    def residuals(steered):
        cache = KVCache(ids.shape[1])
        return [quick(part, steered, cache)[1] for part in ids.split(1, dim=1)]
    runs = zip(residuals(()), residuals(steer), residuals(0 * steer), strict=True)
    for pos, (plain, steered, with_coeff_0) in enumerate(runs):
        assert all(torch.equal(a, b) for a, b in zip(plain, with_coeff_0, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(plain[:layer], steered[:layer], strict=True))
        delta = steer.delta(None, torch.tensor([pos]))[None]
        torch.testing.assert_close(steered[layer] - plain[layer], delta, rtol=0, atol=1e-4)


def noted(monkeypatch, compiled):
    """-> the names of the functions that `compiled` is asked for from now on"""
    names = []

    def note(function, device):
        names.append(function.__name__)
        return compiled(function, device)
    monkeypatch.setattr(faster, "compiled", note)
    return names


def check_pairs(quick, plain, ids, error, names):
    """Blocks run in pairs, except where something changes what the second one reads."""
    generator = torch.Generator().manual_seed(0)
    everywhere = [Steer(l, torch.randn(plain.config.d_model, generator=generator)) for l in range(4)]

    def compare(steer=()):
        cache = KVCache(ids.shape[1])
        logits = torch.cat([quick(part, steer, cache)[0] for part in ids.split(1, dim=1)], dim=1)
        assert close(logits, plain(ids, steer)[0], error)
    for steer, expected in ((everywhere[:1], "two two"), (everywhere[1:2], "one one two"),
                            (everywhere[2:], "two one one"), (everywhere, "one one one one")):
        compare(steer)
        last = [name for name in names if name != "product"][-len(expected.split()):]
        assert last == expected.split() or not quick.blocks[0].compiled
    hooks = [m.blocks[l].register_forward_hook(lambda block, given, x: x.mul_(1.5))
             for m in (quick, plain) for l in (0, 1)]
    try:
        compare()
    finally:
        for hook in hooks:
            hook.remove()


def test_a_block_that_ran_ahead_runs_again_where_its_input_is_changed(tiny, quick, plain, error, monkeypatch):
    check_pairs(quick, plain, encode(tiny[1]), error, noted(monkeypatch, faster.compiled))


@pytest.fixture
def paired(tiny, monkeypatch):
    """The model of `tiny` with blocks in pairs but without a compiler, which takes seconds."""
    monkeypatch.setattr(faster, "compiled", lambda function, device: function)
    return fast(tiny[0], compile=True)


def test_pairs_of_blocks_compute_what_single_ones_do(tiny, paired, monkeypatch):
    check_pairs(paired, tiny[0], encode(tiny[1]), TOLERANCE, noted(monkeypatch, faster.compiled))


@pytest.mark.parametrize("layer", [1, 2])
def test_an_addition_of_zero_has_its_gradient_between_the_blocks_of_a_pair(tiny, paired, layer):
    for part in paired.modules():               # packed matrices have no gradients
        if isinstance(part, Packed):
            part.packed, part.weight = None, part.dense()
    ids, slopes = encode(tiny[1]), []
    for m in (tiny[0], paired):
        z, cache = torch.zeros(m.config.d_model, requires_grad=True), KVCache(ids.shape[1])
        with torch.no_grad():
            for part in (ids[:, :-2], ids[:, -2:-1]):
                m(part, Steer(layer, z), cache)
        m(ids[:, -1:], Steer(layer, z), cache)[0].log_softmax(dim=-1)[..., 0].sum().backward()
        slopes.append(z.grad)
    assert float(slopes[0].abs().max()) > 0
    assert close(slopes[1], slopes[0], 1e-4)


def test_a_cache_holds_no_block_after_a_step(tiny, paired):
    cache = KVCache(99)
    for part in encode(tiny[1]).split(1, dim=1):
        paired(part, (), cache)
        assert not any(cache.ahead.values())


def test_the_second_block_of_a_pair_may_be_replaced_or_taken_out(tiny, paired):
    ids = encode(tiny[1])

    def replace(m):
        m.blocks[1] = copy.deepcopy(m.blocks[2])

    def take_out(m):
        del m.blocks[3]
        m.config = dataclasses.replace(m.config, n_layer=3)
    for change in (replace, take_out):
        plain, quick = copy.deepcopy(tiny[0]), copy.deepcopy(paired)
        change(plain)
        change(quick)
        assert close(one_by_one(quick, ids), plain(ids)[0])


def test_generating_compiles_nothing_more(tiny, quick):
    _, tokenizer = tiny
    with torch._dynamo.config.patch(error_on_recompile=True):
        for text in TEXT[:2]:
            generate(quick, tokenizer, text, 1, 30, temperature=0)


def test_a_growing_cache_compiles_nothing_more_where_gradients_are_enabled(tiny, quick):
    _, tokenizer = tiny
    ids, cache = encode(tokenizer, 3 * TEXT[0])[:, :40], KVCache(40)
    with torch.enable_grad():
        quick(ids[:, :5], (), cache)            # the first single position may compile, with this setting
        quick(ids[:, 5:6], (), cache)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for part in ids[:, 6:].split(1, dim=1):         # there is room for 10, then 20, then 40
                quick(part, (), cache)


def test_fast_leaves_the_plain_model_as_it_was(tiny):
    model, tokenizer = tiny
    ids = encode(tokenizer)
    before, names = model(ids)[0], set(model.state_dict())
    fast(model)
    assert torch.equal(model(ids)[0], before)
    assert set(model.state_dict()) == names


def test_vectors_fingerprints_and_texts_equal_the_plain_ones(tiny, quick, plain, error):
    _, tokenizer = tiny
    a, b = (steering_vector(m, tokenizer, "I love you", "I hate", layer=2) for m in (plain, quick))
    assert close(a.vector, b.vector, 2 * error)
    assert a.fingerprint == b.fingerprint
    how = {"top_p": 0.3, "freq_penalty": 1.0}
    wanted, texts = (generate(m, tokenizer, TEXT[1], 3, 20, 2 * a, **how) for m in (plain, quick))
    assert error == BFLOAT16 or texts == wanted         # rounding may change which token is the likeliest


def test_a_fast_model_is_returned_as_it_is(tiny, quick):
    assert fast(quick) is quick
    packed = fast(tiny[0])
    for how in ({"compile": True}, {"weights": "int8"}):
        with pytest.warns(UserWarning, match="Pass the plain model"):
            again = fast(packed, **how)
        assert again is packed


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_few_bits_are_off_by_half_a_step_at_most(kind):
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    weight[3], weight[5, :40] = 0, 0.25
    groups = weight.unflatten(1, (-1, 32))
    if kind is Int8:
        step = (weight.abs().amax(dim=1, keepdim=True) / 127).expand_as(weight)
    else:
        step = ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(32, dim=1)
    rounded = kind(weight).dense()
    # The scales are bfloat16, which rounds by at most 1/256, here of numbers as large as the largest weight.
    largest = groups.abs().amax(-1).repeat_interleave(32, dim=1)
    assert bool(((rounded - weight).abs() <= 0.51 * step + largest / 100).all())
    assert torch.equal(rounded[3], weight[3])
    assert float(((rounded - weight) / step.clamp(min=1e-9))[6:].abs().max()) > 0.3     # and they are rounded


def test_the_blocks_of_a_4_bit_file_are_kept_as_they_are():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (16, 2, 32), generator=generator)
    codes[:, :, 0], codes[:, :, 1] = 0, 15              # Q4_1 takes its scale from the least and the largest
    scale, least = torch.rand(2, 16, 2, 1, generator=generator).bfloat16().float()
    weight = (scale * codes - least).half().float().flatten(1)          # float16, as in the converted file
    assert close(Int4(weight).dense(), weight, 2 ** -7)


def test_weights_of_few_bits_keep_their_layout_and_are_no_checkpoint(tiny, tmp_path):
    model, tokenizer = tiny
    quick, ids = fast(model, weights="int4"), encode(tokenizer)
    wanted = quick(ids)[0]
    torch.save(quick, tmp_path / "quick.pt")
    for again in (copy.deepcopy(quick), torch.load(tmp_path / "quick.pt", weights_only=False)):
        assert torch.equal(again(ids)[0], wanted)
    assert close(copy.deepcopy(quick).to(torch.bfloat16)(ids)[0].float(), wanted, 2 * BFLOAT16)
    with pytest.raises(ValueError, match="have lost what a checkpoint must hold; save the plain model"):
        quick.state_dict()
    with pytest.raises(ValueError, match="stay on the CPU; move the plain model instead"):
        copy.deepcopy(quick).to("meta")


def test_refuses_weights_that_it_does_not_know_or_that_are_trained(tiny):
    with pytest.raises(ValueError, match="weights int2; possible: None, 'int8', 'int4'"):
        fast(tiny[0], weights="int2")
    with pytest.raises(ValueError, match=r"not trained; call model.requires_grad_\(False\) first"):
        fast(copy.deepcopy(tiny[0]).requires_grad_(True), weights="int8")


@pytest.mark.long
@pytest.mark.parametrize(("weights", "nats"), [("int8", 0.03), ("int4", 0.01)])
def test_few_bits_cost_the_real_model_little(real, weights, nats):
    model, tokenizer = real
    ids = encode(tokenizer, " ".join(TEXT * 2))
    p, q = (m(ids)[0].log_softmax(dim=-1) for m in (model, fast(model, weights=weights)))
    assert 0 < float((p.exp() * (p - q)).sum(dim=-1).mean()) < nats


@pytest.mark.parametrize("compile", [PACKED, COMPILED])
@pytest.mark.parametrize("settings", [
    pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
])
def test_biases_and_tied_heads_are_kept(tmp_path, monkeypatch, settings, compile):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hub_model(hub_config("llama", **settings)).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    quick = compiled(model) if compile else fast(model)
    ids = torch.arange(50)[None]
    assert close(quick(ids)[0], model(ids)[0])
    assert close(one_by_one(quick, ids), model(ids)[0])


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
def test_without_a_compiler_warns_and_returns_the_packed_model(tiny, tmp_path, monkeypatch):
    import torch._inductor.config as inductor
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    warning = "does not compile .*C[+][+] compiler"
    with inductor.patch("cpp.cxx", (None, "no-such-compiler")), pytest.warns(UserWarning, match=warning):
        quick = fast(tiny[0], compile=True)
    ids = encode(tiny[1])
    assert close(one_by_one(quick, ids), tiny[0](ids)[0])


@pytest.mark.parametrize("compile", [PACKED, COMPILED])
@pytest.mark.filterwarnings("ignore:fast does not pack")        # not every processor has bfloat16
def test_bfloat16_is_no_less_exact_than_in_the_plain_model(checkpoint, tiny, compile):
    """The error against float32 is at most one and a half times that of the plain bfloat16 model."""
    model, tokenizer = tiny
    ids = encode(tokenizer)
    half = load_model(checkpoint, dtype="bfloat16")
    wanted = model(ids)[0]

    def error(m):
        logits = one_by_one(m, ids).float()
        return float((logits - wanted).abs().max() / wanted.abs().max())
    plain = error(half)
    assert 0 < plain < 0.03
    assert error(compiled(half) if compile else fast(half)) < 1.5 * plain


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:fast does not pack")
def test_float16_is_compiled_though_not_packed(checkpoint, tiny):
    half = load_model(checkpoint, dtype="float16")
    ids = encode(tiny[1])
    assert close(one_by_one(compiled(half), ids).float(), half(ids)[0].float(), 0.005)


def test_weights_that_cannot_be_packed_warn_and_return_the_model(checkpoint, tiny, monkeypatch):
    half = load_model(checkpoint, dtype="float16")
    reason = "it is for float32 and bfloat16 on the CPU, and this model is torch.float16"
    with pytest.warns(UserWarning, match=f"does not pack the weights: {reason}"):
        assert fast(half) is half
    monkeypatch.setattr("ministeer.faster.cannot_pack", lambda *_: "this torch has no such operator")
    with pytest.warns(UserWarning, match="does not pack the weights: this torch has no such operator"):
        assert fast(tiny[0]) is tiny[0]


@pytest.mark.parametrize("compile", [PACKED, COMPILED])
def test_the_real_model_gives_the_same_residuals_and_text(real, compile):
    model, tokenizer = real
    quick = compiled(model) if compile else fast(model)
    ids = encode(tokenizer, " ".join(TEXT * 2))
    (logits, resid), (wanted_logits, wanted) = quick(ids), model(ids)
    assert close(logits, wanted_logits, 1e-4)
    assert all(close(a, b, 1e-4) for a, b in zip(resid, wanted, strict=True))
    plain, texts = (generate(m, tokenizer, TEXT[1], 1, 20, temperature=0) for m in (model, quick))
    assert texts == plain


def test_a_fast_model_can_be_copied_and_saved(tiny, tmp_path):
    model, tokenizer = tiny
    quick, ids = fast(model), encode(tokenizer)
    wanted = model(ids)[0]
    assert close(copy.deepcopy(quick)(ids)[0], wanted)
    torch.save(quick, tmp_path / "quick.pt")
    assert close(torch.load(tmp_path / "quick.pt", weights_only=False)(ids)[0], wanted)
    state, plain = quick.state_dict(), model.state_dict()
    for name, weight in plain.items():
        if weight.ndim == 2 and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
            weight = weight.T           # Conv1D keeps W as (inputs, outputs), Packed as (outputs, inputs)
        assert torch.equal(state[name], weight), name
    assert set(state) - set(plain) <= {"lm_head.weight"}


def test_changing_the_dtype_unpacks_and_packs_again(tiny):
    model, tokenizer = tiny
    ids = encode(tokenizer)
    quick = fast(model)
    half = copy.deepcopy(quick).to(torch.float16)
    assert all(part.packed is None for part in half.modules() if isinstance(part, Packed))
    assert close(half(ids)[0].float(), model(ids)[0], 0.01)
    back = half.to(torch.float32)
    assert all(part.packed is not None for part in back.modules() if isinstance(part, Packed))
    assert close(back(ids)[0], model(ids)[0], 0.01)
    # The fast model that was copied and the plain one are as they were.
    assert close(quick(ids)[0], model(ids)[0])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert copy.deepcopy(quick).to("meta").device == torch.device("meta")


def test_fast_leaves_requires_grad_of_the_plain_model(tiny):
    trainable = copy.deepcopy(tiny[0]).requires_grad_(True)
    fast(trainable)
    assert all(p.requires_grad for p in trainable.parameters())


@pytest.mark.parametrize(("batch", "n_read"), [(1, 1), (1, 8), (3, 8)])
def test_other_ways_to_attend_write_and_read_the_same_keys_and_values(batch, n_read):
    generator = torch.Generator().manual_seed(0)

    def random(heads, n):
        return torch.randn(batch, heads, n, 8, generator=generator)
    cache, read = KVCache(32, batch), (random(2, n_read), random(2, n_read))
    cache.extend(0, *read)
    cache.length = n_read
    cache.grown(0, 20)                          # room that is not used yet
    folding, room = copy.deepcopy(cache), copy.deepcopy(cache)
    new = random(6, 1), random(2, 1), random(2, 1)
    expected = cache.attend(0, *new)
    assert close(Folding(folding).attend(0, *new), expected)
    assert close(Room(*room.layers[0], torch.tensor([n_read])).attend(0, *new), expected)
    for other in (folding, room):
        assert all(torch.equal(a, b) for a, b in zip(other.layers[0], cache.layers[0], strict=True))


def test_bfloat16_attends_faster_even_where_it_cannot_be_packed(tiny, monkeypatch):
    model, tokenizer = tiny
    half = copy.deepcopy(model).to(torch.bfloat16)
    monkeypatch.setattr("ministeer.faster.cannot_pack", lambda *_: "not in this test")
    calls = []
    monkeypatch.setattr("ministeer.faster.Folding", lambda cache: calls.append(1) or Folding(cache))
    with pytest.warns(UserWarning, match="not in this test"):
        quick = fast(half)
    ids, cache = torch.tensor([tokenizer.encode(TEXT[0])]), KVCache(99)
    one_by_one = torch.cat([quick(part, (), cache)[0] for part in ids.split(1, dim=1)], dim=1)
    assert len(calls) == (ids.shape[1] - 1) * model.config.n_layer
    assert close(one_by_one.float(), half(ids)[0].float(), 0.03)


def test_only_a_model_is_made_fast(tiny):
    for other in (tiny, None, torch.nn.Linear(2, 2)):       # tiny is the pair that `load` returns
        with pytest.raises(ValueError, match="fast takes a model, the first of the two things that `load`"):
            fast(other)

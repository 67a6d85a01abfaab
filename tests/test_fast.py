"""The fast model, packed or compiled, is the plain one up to rounding, and nothing is lost where it cannot be had."""

import copy

import pytest
import torch
from conftest import TEXT, hub_config, hub_model

from ministeer import KVCache, generate, steering_vector
from ministeer.attention import attend
from ministeer.checkpoints.weights import load_model
from ministeer.faster import FastBlock, Packed, attend_one, fast

try:
    Packed(torch.ones(16, 16))(torch.ones(1, 16))
except (AttributeError, RuntimeError) as fault:
    pytest.skip(f"this torch cannot pack weights: {fault}", allow_module_level=True)

TOLERANCE = 1e-5            # of the largest number; another order of summation is off by about 1e-6 in float32


def close(a, b, tolerance=TOLERANCE):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def compiled(model):
    torch.compiler.reset()              # torch compiles one function for eight models only, and these tests have more
    quick = fast(model, compile=True)
    assert isinstance(quick.blocks[0], FastBlock)
    return quick


@pytest.fixture(scope="module", params=["packed", "compiled"])
def quick(tiny, request, tmp_path_factory):
    if request.param == "packed":
        return fast(tiny[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        return compiled(tiny[0])


def test_every_residual_and_the_logits_are_equal(tiny, quick):
    model, tokenizer = tiny
    assert any(isinstance(part, Packed) for part in quick.modules())
    steer = 3 * steering_vector(model, tokenizer, "I love you", "I hate", layer=2)
    ids = torch.tensor([tokenizer.encode(TEXT[0])] * 2)
    for steered in ((), steer):
        (logits, resid), (wanted, stream) = quick(ids, steered), model(ids, steered)
        assert close(logits, wanted)
        assert all(close(a, b) for a, b in zip(resid, stream, strict=True))
    for rows, size in ((2, 7), (1, 1)):         # one row and one position is what is compiled
        cache = KVCache(ids.shape[1], batch=rows)
        parts = [quick(part, steer, cache) for part in ids[:rows].split(size, dim=1)]
        assert close(torch.cat([logits for logits, _ in parts], dim=1), wanted[:rows])
        for l, of_all in enumerate(stream):
            assert close(torch.cat([resid[l] for _, resid in parts], dim=1), of_all[:rows])


def test_steering_adds_what_it_says(tiny, quick):
    model, tokenizer = tiny
    steer = 3 * steering_vector(model, tokenizer, "I love you", "I hate", layer=2)
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    runs = {}
    for name, steered in (("plain", ()), ("steered", steer), ("nothing", 0 * steer)):
        cache = KVCache(ids.shape[1])
        runs[name] = [quick(part, steered, cache)[1] for part in ids.split(1, dim=1)]
    for pos, (before, after, same) in enumerate(zip(*runs.values(), strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(before, same, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
        torch.testing.assert_close(after[2] - before[2], steer.delta(torch.tensor([pos]))[None], rtol=0, atol=1e-4)


def test_a_run_compiles_nothing_more(tiny, quick):
    _, tokenizer = tiny
    with torch._dynamo.config.patch(error_on_recompile=True):
        for text in TEXT[:2]:
            generate(quick, tokenizer, text, 1, 30, temperature=0)


def test_the_model_that_was_packed_is_left_alone(tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    before, names = model(ids)[0], set(model.state_dict())
    fast(model)
    assert torch.equal(model(ids)[0], before)
    assert set(model.state_dict()) == names


def test_vectors_and_texts_are_the_same(tiny, quick):
    model, tokenizer = tiny
    a, b = (steering_vector(m, tokenizer, "I love you", "I hate", layer=2) for m in (model, quick))
    assert close(a.vector, b.vector)
    assert a.fingerprint == b.fingerprint
    texts = [generate(m, tokenizer, TEXT[1], 3, 20, 2 * a, top_p=0.3, freq_penalty=1.0) for m in (model, quick)]
    assert texts[0] == texts[1]


def test_a_packed_model_is_not_packed_again(tiny, quick):
    assert fast(quick) is quick
    packed = fast(tiny[0])
    with pytest.warns(UserWarning, match="Pass the plain model"):
        again = fast(packed, compile=True)
    assert again is packed


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("settings", [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_biases_and_tied_heads_are_kept(tmp_path, monkeypatch, settings, compile):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hub_model(hub_config("llama", **settings)).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    quick = compiled(model) if compile else fast(model)
    ids, cache = torch.arange(50)[None], KVCache(50)
    wanted = model(ids)[0]
    assert close(quick(ids)[0], wanted)
    assert close(torch.cat([quick(part, (), cache)[0] for part in ids.split(1, dim=1)], dim=1), wanted)


def test_without_a_compiler_the_packed_model_comes_back_with_a_warning(tiny, tmp_path, monkeypatch):
    import torch._inductor.config as inductor
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    said = "does not compile .*C[+][+] compiler"
    with inductor.patch("cpp.cxx", (None, "no-such-compiler")), pytest.warns(UserWarning, match=said):
        quick = fast(tiny[0], compile=True)
    ids = torch.tensor([tiny[1].encode(TEXT[0])])
    cache = KVCache(ids.shape[1])
    assert close(torch.cat([quick(part, (), cache)[0] for part in ids.split(1, dim=1)], dim=1), tiny[0](ids)[0])


def test_bfloat16_in_every_mode(checkpoint, tiny):
    """bfloat16 has 8 bits; each mode is off from float32 by no more than the plain bfloat16 model is, give or take half."""
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    half = load_model(checkpoint, dtype="bfloat16")
    wanted = model(ids)[0]

    def error(m):
        cache = KVCache(ids.shape[1])
        logits = torch.cat([m(part, (), cache)[0] for part in ids.split(1, dim=1)], dim=1).float()
        return float((logits - wanted).abs().max() / wanted.abs().max())
    plain = error(half)
    assert 0 < plain < 0.03
    assert error(fast(half)) < 1.5 * plain
    assert error(compiled(half)) < 1.5 * plain


def test_where_it_cannot_be_had_the_model_comes_back_with_a_warning(checkpoint, tiny, monkeypatch):
    half = load_model(checkpoint, dtype="float16")
    with pytest.warns(UserWarning, match="does not pack the weights: it is for float32 and bfloat16 on the CPU, and this model is torch.float16"):
        assert fast(half) is half
    ids, cache = torch.tensor([tiny[1].encode(TEXT[0])]), KVCache(99)
    one_by_one = torch.cat([compiled(half)(part, (), cache)[0] for part in ids.split(1, dim=1)], dim=1)      # compiled, though not packed
    assert close(one_by_one.float(), half(ids)[0].float(), 0.005)

    monkeypatch.setattr("ministeer.faster.cannot_pack", lambda weight: "this torch has no such operator")
    with pytest.warns(UserWarning, match="does not pack the weights: this torch has no such operator"):
        assert fast(tiny[0]) is tiny[0]


@pytest.mark.parametrize("compile", [False, True])
def test_the_real_model(real, compile):
    model, tokenizer = real
    quick = compiled(model) if compile else fast(model)
    ids = torch.tensor([tokenizer.encode(" ".join(TEXT * 2))])
    (logits, resid), (wanted, stream) = quick(ids), model(ids)
    assert close(logits, wanted, 1e-4)
    assert all(close(a, b, 1e-4) for a, b in zip(resid, stream, strict=True))
    texts = [generate(m, tokenizer, TEXT[1], 1, 20, temperature=0) for m in (model, quick)]
    assert texts[0] == texts[1]


def test_a_fast_model_is_a_module_like_any_other(tiny, tmp_path):
    model, tokenizer = tiny
    quick, ids = fast(model), torch.tensor([tokenizer.encode(TEXT[0])])
    wanted = model(ids)[0]
    assert close(copy.deepcopy(quick)(ids)[0], wanted)
    torch.save(quick, tmp_path / "quick.pt")
    assert close(torch.load(tmp_path / "quick.pt", weights_only=False)(ids)[0], wanted)
    state = quick.state_dict()
    weights = {name: p.T if type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" and p.ndim == 2 else p
               for name, p in model.state_dict().items()}
    assert {name: p.shape for name, p in state.items() if name in weights} == {name: p.shape for name, p in weights.items()}
    assert all(torch.equal(state[name], p) for name, p in weights.items())
    assert set(state) - set(weights) <= {"lm_head.weight"}


def test_a_fast_model_that_moves_is_packed_where_it_can_be(tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    quick = fast(model)
    half = copy.deepcopy(quick).to(torch.float16)
    assert all(part.packed is None for part in half.modules() if isinstance(part, Packed))
    assert close(half(ids)[0].float(), model(ids)[0], 0.01)
    back = half.to(torch.float32)
    assert all(part.packed is not None for part in back.modules() if isinstance(part, Packed))
    assert close(back(ids)[0], model(ids)[0], 0.01)
    assert close(quick(ids)[0], model(ids)[0])                   # neither was the first one changed,
    assert {p.dtype for p in model.parameters()} == {torch.float32}     # nor the plain one
    assert copy.deepcopy(quick).to("meta").device == torch.device("meta")


def test_packing_leaves_the_gradients_of_the_plain_model_alone(tiny):
    trainable = copy.deepcopy(tiny[0]).requires_grad_(True)
    fast(trainable)
    assert all(p.requires_grad for p in trainable.parameters())


def test_one_position_in_bfloat16_attends_as_any_other():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, S, 8, generator=generator) for heads, S in ((6, 1), (2, 9), (2, 9)))
    assert close(attend_one(q, k, v), attend(q, k, v))

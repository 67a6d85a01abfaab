"""The packed model is the plain one up to rounding, and nothing is lost where it cannot be had."""

import pytest
import torch
from conftest import TEXT, hub_config, hub_model

from ministeer import KVCache, generate, load, steering_vector
from ministeer.fast import Packed, fast
from ministeer.weights import load_model

try:
    Packed(torch.ones(16, 16))(torch.ones(1, 16))
except (AttributeError, RuntimeError) as fault:
    pytest.skip(f"this torch cannot pack weights: {fault}", allow_module_level=True)

TOLERANCE = 1e-5            # of the largest number; another order of summation is off by about 1e-6 in float32


def close(a, b, tolerance=TOLERANCE):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


@pytest.fixture
def quick(tiny):
    return fast(tiny[0])


def test_every_residual_and_the_logits_are_equal(tiny, quick):
    model, tokenizer = tiny
    assert any(isinstance(part, Packed) for part in quick.modules())
    steer = 3 * steering_vector(model, tokenizer, "I love you", "I hate", layer=2)
    ids = torch.tensor([tokenizer.encode(TEXT[0])] * 2)
    for steered in ((), steer):
        (logits, resid), (wanted, stream) = quick(ids, steered), model(ids, steered)
        assert close(logits, wanted)
        assert all(close(a, b) for a, b in zip(resid, stream, strict=True))
    cache = KVCache(ids.shape[1], batch=2)
    parts = [quick(part, steer, cache)[0] for part in ids.split(7, dim=1)]
    assert close(torch.cat(parts, dim=1), wanted)


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
    assert a.model == b.model
    texts = [generate(m, tokenizer, TEXT[1], 3, 20, 2 * a, top_p=0.3, freq_penalty=1.0) for m in (model, quick)]
    assert texts[0] == texts[1]


def test_a_packed_model_is_not_packed_again(quick):
    assert fast(quick) is quick


def test_biases_are_kept(tmp_path):
    hub_model(hub_config("llama", attention_bias=True, mlp_bias=True)).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    ids = torch.arange(50)[None]
    assert close(fast(model)(ids)[0], model(ids)[0])


def test_load_packs_where_it_is_asked_to(checkpoint, tiny):
    quick, tokenizer = load(checkpoint, fast=True)
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    assert any(isinstance(part, Packed) for part in quick.modules())
    assert close(quick(ids)[0], tiny[0](ids)[0])
    half, _ = load(checkpoint, dtype="bfloat16", fast=True)
    assert close(half(ids)[0].float(), load(checkpoint, dtype="bfloat16")[0](ids)[0].float(), 0.02)     # bfloat16 has 8 bits


def test_where_it_cannot_be_had_the_model_comes_back_with_a_warning(checkpoint, tiny, monkeypatch):
    half = load_model(checkpoint, dtype="float16")
    with pytest.warns(UserWarning, match="as it is: it is for float32 and bfloat16 on the CPU, and this model is torch.float16"):
        assert fast(half) is half

    def absent(*_):
        raise AttributeError("this torch has no such operator")
    monkeypatch.setattr("ministeer.fast.Packed.__init__", absent)
    with pytest.warns(UserWarning, match="as it is: this torch has no such operator"):
        assert fast(tiny[0]) is tiny[0]


def test_the_real_model(real):
    model, tokenizer = real
    quick = fast(model)
    ids = torch.tensor([tokenizer.encode(" ".join(TEXT * 2))])
    (logits, resid), (wanted, stream) = quick(ids), model(ids)
    assert close(logits, wanted, 1e-4)
    assert all(close(a, b, 1e-4) for a, b in zip(resid, stream, strict=True))
    texts = [generate(m, tokenizer, TEXT[1], 1, 20, temperature=0) for m in (model, quick)]
    assert texts[0] == texts[1]

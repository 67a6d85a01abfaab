"""Vectors from many texts, ITI and ICV against slow re-computations on tiny models of both families."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT

from ministeer import KVCache, fast, generate
from ministeer.attention import attend, merge_heads
from ministeer.methods import function_vectors, inside_blocks, many_pairs

PLUS = ["I love you", "the gulls love the town", "you are kind",
        "we love the bride", "the wedding is kind", "love is all"]
MINUS = ["I hate you", "the gulls hate the town", "you are mean",
         "we hate the bride", "the wedding is mean", "hate is all"]


def encode(tokenizer, text):
    return torch.tensor([tokenizer.encode(text)])


def all_head_outputs(model, tokenizer, texts):
    """(texts, n_layer, n_head, d_head)"""
    return torch.stack([inside_blocks.head_outputs(model, encode(tokenizer, text)) for text in texts])


def output_projection(block):
    _, attention = inside_blocks.block_parts(block)
    return getattr(attention, "o_proj", None) or attention.c_proj


def test_caa_is_the_mean_difference_at_the_last_token(tiny):
    model, tokenizer = tiny
    steer = many_pairs.caa(model, tokenizer, PLUS, MINUS, 2)

    def last_row(text):
        return model(encode(tokenizer, text))[1][2][0, -1]
    rows = [last_row(plus) - last_row(minus) for plus, minus in zip(PLUS, MINUS, strict=True)]
    torch.testing.assert_close(steer.vector, sum(rows) / len(rows))
    assert steer.stop is None
    assert steer.fingerprint == model.fingerprint
    ids = encode(tokenizer, TEXT[0])
    plain, steered = model(ids)[1][2], model(ids, 2 * steer)[1][2]
    added = (2 * steer.vector).expand(plain.shape[1] - 1, -1)
    torch.testing.assert_close((steered - plain)[0, 1:], added, rtol=1e-4, atol=1e-4)
    assert torch.equal(steered[0, 0], plain[0, 0])


def test_repe_is_the_first_uncentred_component_and_points_to_plus(tiny):
    model, tokenizer = tiny
    steers = many_pairs.repe(model, tokenizer, PLUS, MINUS, [1, 3])
    rows = many_pairs.differences(model, tokenizer, PLUS, MINUS)
    for steer, layer in zip(steers, (1, 3), strict=True):
        assert steer.layer == layer
        values, vectors = torch.linalg.eigh(rows[:, layer].T @ rows[:, layer])
        assert abs(vectors[:, -1] @ steer.vector) == pytest.approx(1, abs=1e-3)
        assert steer.vector.norm() == pytest.approx(1, abs=1e-5)
        assert rows[:, layer].mean(dim=0) @ steer.vector > 0
    turned = many_pairs.repe(model, tokenizer, MINUS, PLUS, [1])[0]
    torch.testing.assert_close(turned.vector, -steers[0].vector, rtol=1e-3, atol=1e-3)


def test_states_reads_the_last_token_the_mean_or_each(tiny):
    model, tokenizer = tiny
    texts = [PLUS[0], ("we talk about", " the wedding"), ("I", "love")]
    streams = []            # each (T, n_layer + 1, d_model), without BOS and prompt
    for prompt, answer in (("", PLUS[0]), *texts[1:]):
        head = tokenizer.encode(prompt)
        ids = head + tokenizer.encode(answer, bos=False)
        resid = torch.stack(model(torch.tensor([ids]))[1], dim=2)[0]
        streams.append(resid[len(head):])
    for where, wanted in (("last", [x[-1:] for x in streams]), ("each", streams),
                          ("mean", [x.mean(dim=0)[None] for x in streams])):
        torch.testing.assert_close(many_pairs.states(model, tokenizer, texts, where), torch.cat(wanted))


def test_vectors_are_mean_differences_for_all_blocks_of_lists_of_any_length(tiny):
    model, tokenizer = tiny
    for where in ("last", "mean", "each"):
        steers = many_pairs.vectors(model, tokenizer, PLUS[:2], MINUS[:5], where=where)
        a, b = (many_pairs.states(model, tokenizer, texts, where).double() for texts in (PLUS[:2], MINUS[:5]))
        assert [steer.layer for steer in steers] == [0, 1, 2, 3]
        for l, steer in enumerate(steers):
            wanted = sum(a[:, l]) / len(a) - sum(b[:, l]) / len(b)
            torch.testing.assert_close(steer.vector.double(), wanted, rtol=1e-3, atol=1e-5)
            assert steer.fingerprint == model.fingerprint
    caa = many_pairs.caa(model, tokenizer, PLUS, MINUS, 2)
    assert caa == many_pairs.vectors(model, tokenizer, PLUS, MINUS)[2]
    repe = many_pairs.repe(model, tokenizer, PLUS, MINUS, [2])
    assert repe == many_pairs.vectors(model, tokenizer, PLUS, MINUS, "component")[2:3]


@pytest.mark.parametrize(("given", "message"), [
    ({"where": "first"}, "where 'first'; possible: last, mean, each"),
    ({"how": "median"}, "how 'median'; possible: mean, component"),
    ({"plus": []}, "the list of texts is empty"),
    ({"minus": [""], "where": "mean"}, "the text '' has no token to read"),
    ({"how": "component", "where": "each"}, "no pairs; where: last or mean"),
    ({"how": "component", "minus": MINUS[:2]}, "as many plus as minus"),
    ({"plus": [("a", "b", "c")]}, "must be a list of texts; given: a list with"),
])
def test_vectors_rejects_what_it_cannot_read(tiny, given, message):
    with pytest.raises(ValueError, match=message):
        many_pairs.vectors(*tiny, **{"plus": PLUS, "minus": MINUS, **given})


def test_projected_head_outputs_are_the_output_of_attention(tiny):
    model, tokenizer = tiny
    ids = encode(tokenizer, TEXT[1])
    recorded = []

    def record(module, args, result):
        recorded.append(result)
    handles = [inside_blocks.block_parts(block)[1].register_forward_hook(record) for block in model.blocks]
    model(ids)
    for handle in handles:
        handle.remove()
    outputs = inside_blocks.head_outputs(model, ids)
    for l, block in enumerate(model.blocks):
        projected = output_projection(block)(outputs[l].flatten())
        torch.testing.assert_close(projected, recorded[l][0, -1], rtol=1e-4, atol=1e-4)


def test_iti_adds_to_the_chosen_heads_only(tiny):
    model, tokenizer = tiny
    before = {name: p.clone() for name, p in model.named_parameters()}
    changed = inside_blocks.iti(model, tokenizer, PLUS, MINUS, heads=3, strength=5.0)
    assert len(changed.chosen_heads) == 3
    plus, minus = (all_head_outputs(model, tokenizer, texts) for texts in (PLUS, MINUS))
    ids = encode(tokenizer, TEXT[1])
    pos = torch.arange(ids.shape[1])
    x, rope = model.embed(ids, pos), model.rope(pos)
    for l, block in enumerate(model.blocks):        # by hand
        norm, attention = inside_blocks.block_parts(block)
        mixed = attend(*attention.qkv(norm(x), rope))
        for h in [h for m, h in changed.chosen_heads if m == l]:
            theta = F.normalize(plus[:, l, h].mean(dim=0) - minus[:, l, h].mean(dim=0), dim=0)
            sigma = torch.cat([plus[:, l, h], minus[:, l, h]]).matmul(theta).std()
            mixed[:, h] += 5 * sigma * theta
        x = x + output_projection(block)(merge_heads(mixed))
        second_norm = getattr(block, "post_attention_layernorm", None) or block.ln_2
        x = x + block.mlp(second_norm(x))
    torch.testing.assert_close(changed(ids)[1][-1], x, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.allclose(changed(ids)[0], model(ids)[0], atol=1e-3)
    assert len(generate(changed, tokenizer, "I", 2, 4)) == 2


def test_iti_chooses_the_heads_with_the_best_probes(tiny):
    model, tokenizer = tiny
    chosen = inside_blocks.iti(model, tokenizer, PLUS, MINUS, heads=3).chosen_heads
    plus, minus = (all_head_outputs(model, tokenizer, texts) for texts in (PLUS, MINUS))
    accuracies = {(l, h): inside_blocks.probe_accuracy(plus[:, l, h], minus[:, l, h]).item()
                  for l, h in itertools.product(range(plus.shape[1]), range(plus.shape[2]))}
    assert len(set(accuracies.values())) > 1
    assert sorted(accuracies[l, h] for l, h in chosen) == sorted(accuracies.values())[-3:]


@pytest.mark.parametrize("width", [4, 6])
def test_probe_accuracy_of_separable_random_and_reversed_data(width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 200, width, generator=generator)
    assert inside_blocks.probe_accuracy(x[0] + 3, x[1] - 3) == 1
    assert 0.35 < inside_blocks.probe_accuracy(x[0], x[1]) < 0.65
    # A probe is tested on pairs that it was not fitted to. Here, even pairs teach what is wrong for odd ones.
    sign = torch.where((torch.arange(200) % 2 == 0)[:, None], 1.0, -1.0)
    assert inside_blocks.probe_accuracy(x[0] + 3 * sign, x[1] - 3 * sign) < 0.05


@pytest.mark.parametrize("change", [inside_blocks.iti, inside_blocks.icv])
def test_controls_of_iti_and_icv_have_random_directions_of_the_same_norm(tiny, change):
    def directions(control):
        model = change(*tiny, PLUS, MINUS, control=control)
        if change is inside_blocks.icv:
            return torch.stack([block.mlp.v for block in model.blocks])
        # Through the heads' weights, norms change; a random direction has the same norm before them.
        assert model.chosen_heads == change(*tiny, PLUS, MINUS).chosen_heads
        return torch.stack([output_projection(block).bias for block in model.blocks])
    real, *controls = (directions(control) for control in (None, 0, 1, 2, 3, 4))
    for i, control in enumerate(controls):
        assert 0.2 < control.norm() / real.norm() < 5
        assert torch.equal(control, directions(i))
        assert all(not torch.allclose(control, other) for other in [real, *controls[:i]])
    with pytest.raises(ValueError, match="control must be a whole number"):
        directions(-1)


def test_iti_with_strength_0_changes_nothing(tiny):
    model, tokenizer = tiny
    ids = encode(tokenizer, TEXT[0])
    unchanged = inside_blocks.iti(model, tokenizer, PLUS, MINUS, heads=5, strength=0.0)
    torch.testing.assert_close(unchanged(ids)[0], model(ids)[0])


def test_icv_turns_the_mlp_output_toward_its_direction_and_keeps_the_norm(tiny):
    model, tokenizer = tiny
    changed = inside_blocks.icv(model, tokenizer, PLUS, MINUS, 0.5)
    x = torch.randn(2, 3, model.config.d_model, generator=torch.Generator().manual_seed(0))
    for old, new in zip(model.blocks, changed.blocks, strict=True):
        y, z = old.mlp(x), new.mlp(x)
        torch.testing.assert_close(z.norm(dim=-1), y.norm(dim=-1), rtol=1e-4, atol=1e-4)
        assert (F.cosine_similarity(z, new.mlp.v, dim=-1) > F.cosine_similarity(y, new.mlp.v, dim=-1)).all()
        u, v = F.normalize(y[0, 0], dim=0), new.mlp.v
        wanted = F.normalize(u + 0.5 * (1 + max(0.0, float(-u @ v))) * v, dim=0) * y[0, 0].norm()
        torch.testing.assert_close(z[0, 0], wanted, rtol=1e-4, atol=1e-4)
    ids = encode(tokenizer, TEXT[0])
    unchanged = inside_blocks.icv(model, tokenizer, PLUS, MINUS, 0.0)
    torch.testing.assert_close(unchanged(ids)[0], model(ids)[0], rtol=1e-3, atol=1e-3)
    assert len(generate(changed, tokenizer, "I", 2, 4)) == 2


def test_icv_direction_is_mean_plus_first_component_over_all_layers(tiny):
    model, tokenizer = tiny
    changed = inside_blocks.icv(model, tokenizer, PLUS, MINUS)
    rows = many_pairs.differences(model, tokenizer, PLUS, MINUS)[:, 1:].flatten(1)
    _, vectors = torch.linalg.eigh(torch.cov(rows.T.double()))
    component = vectors[:, -1].float()
    component = component * torch.sign(component @ rows.mean(dim=0))
    wanted = (rows.mean(dim=0) + component).view(model.config.n_layer, -1)
    for l, block in enumerate(changed.blocks):
        torch.testing.assert_close(block.mlp.v, F.normalize(wanted[l], dim=0), rtol=1e-2, atol=1e-2)


def test_rejects_bad_pairs_layers_and_packed_models(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="as many plus as minus"):
        many_pairs.caa(model, tokenizer, PLUS, MINUS[:2], 1)
    with pytest.raises(ValueError, match="layer 9: this model has blocks"):
        many_pairs.caa(model, tokenizer, PLUS, MINUS, 9)
    with pytest.raises(ValueError, match="layer -1"):
        many_pairs.repe(model, tokenizer, PLUS, MINUS, [-1])
    with pytest.raises(ValueError, match="4 or more pairs of texts, .*; given: 3 plus, 3 minus"):
        inside_blocks.iti(model, tokenizer, PLUS[:3], MINUS[:3])
    for plus, minus in (("ab", PLUS[:2]), (PLUS[:2], "ab")):
        for make in (many_pairs.differences, inside_blocks.iti, inside_blocks.icv):
            with pytest.raises(ValueError, match="must be a list of texts; given: 'ab'"):
                make(model, tokenizer, plus, minus)
    for parts in (inside_blocks.writers, inside_blocks.block_parts):
        with pytest.raises(ValueError, match="finds no .* in a torch.nn.modules.linear.Linear"):
            parts(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Pass the plain model"):
        inside_blocks.iti(fast(model), tokenizer, PLUS, MINUS)


@pytest.mark.long
def test_icv_and_iti_change_a_compiled_model_like_the_plain_one(tiny, tmp_path, monkeypatch):
    """Compiled but not packed: the compiled code for single positions has the change too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("ministeer.faster.cannot_pack", lambda *_: "not in this test")
    model, tokenizer = tiny
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="not in this test"):
        quick = fast(model, compile=True)
    ids = encode(tokenizer, TEXT[0])
    for change in (inside_blocks.icv, inside_blocks.iti):
        plain = change(model, tokenizer, PLUS, MINUS)(ids)[0]
        torch.compiler.reset()
        changed, cache = change(quick, tokenizer, PLUS, MINUS), KVCache(ids.shape[1])
        one_by_one = torch.cat([changed(part, (), cache)[0] for part in ids.split(1, dim=1)], dim=1)
        torch.testing.assert_close(one_by_one, plain, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(plain, model(ids)[0], atol=1e-2)


def test_icv_before_and_after_packing_equals_icv_of_the_plain_model(tiny):
    model, tokenizer = tiny
    ids = encode(tokenizer, TEXT[0])
    plain = inside_blocks.icv(model, tokenizer, PLUS, MINUS)
    for other in (inside_blocks.icv(fast(model), tokenizer, PLUS, MINUS), fast(plain)):
        torch.testing.assert_close(other(ids)[0], plain(ids)[0], rtol=1e-3, atol=1e-3)


def test_the_direction_of_icv_follows_the_dtype_of_the_model(tiny):
    changed = inside_blocks.icv(*tiny, PLUS, MINUS).to(torch.bfloat16)
    assert changed.blocks[0].mlp.v.dtype == torch.bfloat16
    assert changed(torch.tensor([[0, 5]]))[0].dtype == torch.bfloat16


# Function vectors

ANSWERS = [" you", " the", " you"]


def effect_by_hook(model, ids, answer, l, h, mean):
    """p(answer) with head h of block l replaced, in float64, less p(answer)"""
    out, d_head = inside_blocks.writers(model.blocks[l])[0], len(mean)

    def replace_head(module, args):
        mixed = args[0].clone()
        mixed[0, -1, h * d_head:(h + 1) * d_head] = mean
        return (mixed,)
    before = model(ids)[0][0, -1].double().softmax(dim=-1)[answer]
    handle = out.register_forward_pre_hook(replace_head)
    after = model(ids)[0][0, -1].double().softmax(dim=-1)[answer]
    handle.remove()
    return (after - before).item()


def test_a_function_vector_sums_what_the_best_heads_write(tiny):
    model, tokenizer = tiny
    means = all_head_outputs(model, tokenizer, PLUS).mean(dim=0)
    effects = torch.zeros(means.shape[:2], dtype=torch.float64)
    questions = list(zip(MINUS[:3], ANSWERS, strict=True))
    for (l, h), (text, answer) in itertools.product(np.ndindex(*effects.shape), questions):
        answer_id = tokenizer.encode(answer, bos=False)[0]
        effects[l, h] += effect_by_hook(model, encode(tokenizer, text), answer_id, l, h, means[l, h]) / 3
    given = function_vectors.indirect_effects(model, tokenizer, MINUS[:3], ANSWERS, means)
    torch.testing.assert_close(given.double(), effects, rtol=1e-2, atol=1e-7)
    steer = function_vectors.function_vector(model, tokenizer, PLUS, MINUS[:3], ANSWERS, layer=2, heads=3)
    best = sorted(np.ndindex(*effects.shape), key=lambda place: -effects[place])[:3]
    assert sorted(map(tuple, steer.note["heads"])) == sorted(best)
    wanted = torch.zeros(32, dtype=torch.float64)
    for l, h in best:
        out, d_head = inside_blocks.writers(model.blocks[l])[0], means.shape[2]
        weight = out.weight.T if isinstance(out, torch.nn.Linear) else out.weight
        wanted += means[l, h].double() @ weight[h * d_head:(h + 1) * d_head].double()
    torch.testing.assert_close(steer.vector.double(), wanted, rtol=1e-4, atol=1e-5)
    quick = function_vectors.function_vector(fast(model), tokenizer, PLUS, MINUS[:3], ANSWERS, 2, 3)
    torch.testing.assert_close(quick.vector, steer.vector, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("given", "message"), [
    ({"prompts": []}, "the list of prompts is empty"),
    ({"shuffled": MINUS}, "6 shuffled prompts do not fit 3 answers"),
    ({"answers": ["you you", "a", "b"]}, "not one token: .'you you'"),
    ({"heads": 0}, "heads must be a whole number, 1 or more"),
    ({"layer": 4}, "layer 4"),
])
def test_function_vector_rejects_prompts_without_answers(tiny, given, message):
    usual = {"prompts": PLUS, "shuffled": MINUS[:3], "answers": ANSWERS, "layer": 1}
    with pytest.raises(ValueError, match=message):
        function_vectors.function_vector(*tiny, **{**usual, **given})

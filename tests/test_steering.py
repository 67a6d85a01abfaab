"""Steer, steering_vector and the controls. For what the model does with them, see test_identities.py."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import hub_config, hub_model, save_checkpoint
from safetensors.torch import save_file

from ministeer import Steer, load, steering_vector
from ministeer.steering import pad_together, random_like, relative_norm, sink_share, steering_vectors


@pytest.fixture
def love(tiny):
    return steering_vector(*tiny, "I love you", "I hate", layer=2)


def test_the_vector_is_the_difference_of_the_two_streams_without_bos(tiny, love):
    model, tokenizer = tiny
    ids = pad_together(tokenizer, "I love you", "I hate")
    plus, minus = (model(torch.tensor([row]))[1][2][0] for row in ids)
    torch.testing.assert_close(love.vector, (plus - minus)[1:], rtol=1e-4, atol=1e-5)
    assert (love.layer, love.start, love.coeff) == (2, 1, 1.0)
    assert len(love.vector) == len(ids[0]) - 1


def test_the_shorter_prompt_is_padded_on_the_right_with_spaces(tiny):
    _, tokenizer = tiny
    long, short = pad_together(tokenizer, "I love you because", "I")
    assert len(long) == len(short)
    assert long == tokenizer.encode("I love you because")
    bare = tokenizer.encode("I")
    assert short == bare + [tokenizer.space_id] * (len(long) - len(bare))
    assert long[0] == short[0] == tokenizer.bos_id


def test_an_empty_minus_equals_a_space(tiny):
    model, tokenizer = tiny
    assert pad_together(tokenizer, "I", "") == [tokenizer.encode("I"), [tokenizer.bos_id, tokenizer.space_id]]
    assert steering_vector(model, tokenizer, "I", "", 1) == steering_vector(model, tokenizer, "I", " ", 1)


def test_only_the_blocks_before_the_layer_run(tiny, monkeypatch):
    model, tokenizer = tiny
    layers = []

    def recorded(l, forward):
        return lambda x, *rest: layers.append(l) or forward(x, *rest)
    for l, block in enumerate(model.blocks):
        monkeypatch.setattr(block, "forward", recorded(l, block.forward))
    monkeypatch.setattr(model, "unembed", lambda x: pytest.fail("a vector needs no logits"))
    steering_vector(model, tokenizer, "I love you", "I hate", layer=2)
    assert layers == [0, 1]


def test_swapping_the_prompts_negates_the_vector(tiny, love):
    model, tokenizer = tiny
    back = steering_vector(model, tokenizer, "I hate", "I love you", layer=2)
    torch.testing.assert_close(back.vector, -love.vector)


@pytest.mark.parametrize(("plus", "minus", "layer", "message"), [
    ("I love", "I love", 0, "the same tokens"),
    ("", "", 0, "the same tokens"),
    ("", " ", 0, "the same tokens once padded with spaces"),
    ("I love", "I hate", 4, r"layer 4: .* blocks 0 … 3 \(layer = the block that reads the changed stream\)"),
    ("I love", "I hate", -1, "layer -1"),
    ("I love", "I hate", 1.5, "layer 1.5"),
    ("I love", "I hate", True, "layer True"),
    ("love " * 200, "I hate", 0, "context of 192"),
    (None, "I hate", 0, "text must be a string"),
])
def test_rejects_bad_pairs_and_layers(tiny, plus, minus, layer, message):
    with pytest.raises(ValueError, match=message):
        steering_vector(*tiny, plus, minus, layer)


def test_arithmetic_scales_the_coefficient_and_shares_the_vector(love):
    assert (2 * love).coeff == (love * 2).coeff == 2.0
    assert (-love).coeff == -1.0
    assert (love / 2).coeff == 0.5
    assert (3 * love).scaled(5).coeff == 5
    assert (2 * love).vector is love.vector
    coeffs = torch.tensor([0.0, 1.0])
    assert (coeffs * love).coeff.tolist() == (love * coeffs).coeff.tolist() == [0.0, 1.0]


def test_delta_puts_each_row_at_its_absolute_position():
    s = Steer(0, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), coeff=10, start=3)
    assert s.delta(torch.arange(2, 6)).tolist() == [[0, 0], [10, 20], [30, 40], [0, 0]]
    assert s.delta(torch.tensor([4])).tolist() == [[30, 40]]        # one new position, as in decoding
    assert s.stop == 5


def test_delta_of_one_row_goes_to_every_position_from_start():
    s = Steer(0, torch.tensor([1.0, 2.0]), coeff=2, start=1)
    assert s.delta(torch.arange(3)).tolist() == [[0, 0], [2, 4], [2, 4]]
    assert s.delta(torch.tensor([1000])).tolist() == [[2, 4]]
    assert s.stop is None


def test_delta_with_a_coefficient_for_each_row_of_the_batch():
    s = Steer(0, torch.ones(1, 2), coeff=torch.tensor([0.0, 2.0, -1.0]))
    assert s.delta(torch.arange(2)).tolist() == [[[0, 0], [0, 0]], [[0, 0], [2, 2]], [[0, 0], [-1, -1]]]
    assert s.rows([2, 0]).coeff.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(("n", "prompt", "starts"), [
    # The positions of the paper's code, which puts the BOS row at 0, prompt // 2 - (n + 1) // 2 or the end.
    (1, 9, {"front": 1, "middle": 4, "back": 8}),
    (2, 9, {"front": 1, "middle": 4, "back": 7}),
    (3, 8, {"front": 1, "middle": 3, "back": 5}),
])
def test_align_gives_the_positions_of_the_papers_code(n, prompt, starts):
    s = Steer(0, torch.ones(n, 4))
    for where, start in starts.items():
        assert s.align(where, prompt).start == start
    assert s.align("back", prompt).stop == prompt


def test_align_rejects_bad_places_and_prompts():
    with pytest.raises(ValueError, match="does not fit the front of a prompt of 3"):
        Steer(0, torch.ones(3, 4)).align("front", 3)
    with pytest.raises(ValueError, match="possible: front, middle, back"):
        Steer(0, torch.ones(3, 4)).align("end", 9)
    with pytest.raises(ValueError, match="cannot be aligned"):
        Steer(0, torch.ones(4)).align("back", 9)


@pytest.mark.parametrize(("change", "message"), [
    ({"layer": -1}, "layer must be a whole number"),
    ({"layer": 1.0}, "layer must be"),
    ({"layer": True}, "layer must be"),
    ({"start": -1}, "start must be"),
    ({"start": "1"}, "start must be"),
    ({"vector": [1.0]}, "given: list"),
    ({"vector": torch.ones(2, 2, 2)}, r"given: torch.float32 \(2, 2, 2\)"),
    ({"vector": torch.ones(2, dtype=torch.int64)}, "given: torch.int64"),
    ({"vector": torch.ones(0, 4)}, r"\(0, 4\)"),
    ({"vector": torch.tensor([1.0, float("nan")])}, "NaN or infinite"),
    ({"vector": torch.tensor([[float("inf")]])}, "NaN or infinite"),
    ({"coeff": float("nan")}, "finite number"),
    ({"coeff": float("-inf")}, "finite number"),
    ({"coeff": "2"}, "finite number"),
    ({"coeff": None}, "finite number"),
    ({"coeff": True}, "finite number"),
    ({"coeff": torch.tensor([1.0, float("nan")])}, "one finite number for each row"),
    ({"coeff": torch.ones(2, 2)}, "for each row"),
])
def test_rejects_bad_steers(change, message):
    with pytest.raises(ValueError, match=message):
        Steer(**{"layer": 0, "vector": torch.ones(4), **change})


def test_accepts_numbers_of_numpy_and_torch():
    s = Steer(np.int64(1), torch.ones(4), coeff=np.float32(2), start=np.int32(3))
    assert (s.layer, s.coeff, s.start) == (1, 2.0, 3)
    assert type(s.layer) is type(s.start) is int
    assert Steer(0, torch.ones(4), coeff=torch.tensor(2.5)).coeff == 2.5


def test_equality_is_by_value():
    s = Steer(1, torch.ones(2, 4))
    assert s == Steer(1, torch.ones(2, 4))
    assert s != Steer(2, torch.ones(2, 4))
    assert s != 2 * s
    assert s != Steer(1, torch.zeros(2, 4))
    assert s != Steer(1, torch.ones(3, 4))
    assert s != Steer(1, torch.ones(2, 4), start=2)
    assert s * torch.ones(2) == s * torch.ones(2)
    assert s * torch.ones(2) != s * torch.ones(3)
    assert s != "s"


def test_repr_is_one_line_without_the_numbers(love):
    assert "'I love you' - 'I hate'" in repr(love)
    assert len(repr(love)) < 160
    assert "every position" in repr(Steer(0, torch.ones(4)))


@pytest.mark.parametrize("coeff", [2.5, torch.tensor([0.5, -1.0])])
def test_save_and_load_give_the_same_steer(love, tmp_path, coeff):
    s = love.scaled(coeff)
    s.save(tmp_path / "love.safetensors")
    again = Steer.load(tmp_path / "love.safetensors")
    assert again == s
    assert (again.fingerprint, again.note) == (s.fingerprint, s.note)
    assert os.listdir(tmp_path) == ["love.safetensors"]             # no temporary file is left


def test_a_save_that_fails_leaves_the_old_file(love, tmp_path, monkeypatch):
    path = tmp_path / "love.safetensors"
    love.save(path)
    before = path.read_bytes()

    def full(*paths):
        raise OSError("disk full")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        (2 * love).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["love.safetensors"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100])
def test_rejects_files_that_are_not_safetensors(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="is not a steering vector"):
        Steer.load(tmp_path / "x")


def test_rejects_safetensors_files_that_hold_no_steer(love, tmp_path):
    path = tmp_path / "x.safetensors"
    good = '{"layer": 0, "start": 1, "coeff": 1, "fingerprint": "", "note": {}}'
    for tensors, metadata, reason in [
        ({"vector": love.vector}, None, "'steer'"),
        ({"vector": love.vector}, {"steer": "[1]"}, "list indices"),
        ({"vector": love.vector}, {"steer": "{"}, "Expecting property name"),
        ({"other": love.vector}, {"steer": good}, "vector"),
        ({"vector": love.vector}, {"steer": good.replace('"layer": 0', '"layer": -3')}, "layer must be"),
        ({"vector": love.vector * float("nan")}, {"steer": good}, "NaN or infinite"),
    ]:
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=f"is not a steering vector that ministeer saved: .*{reason}"):
            Steer.load(path)
    save_file({"vector": love.vector}, path, {"steer": good})
    assert torch.equal(Steer.load(path).vector, love.vector)
    with pytest.raises(FileNotFoundError, match="no file"):
        Steer.load(tmp_path / "missing.safetensors")


def test_rejects_a_vector_of_another_model_without_any_model(tiny, family, love, tmp_path):
    _, tokenizer = tiny
    other, _ = load(save_checkpoint(tmp_path / "other", hub_model(hub_config(family), seed=1)))
    ids = torch.tensor([tokenizer.encode("I love you because")])
    love.save(tmp_path / "love.safetensors")
    with pytest.raises(ValueError, match=f"made with another model .tiny-{family}."):
        other(ids, Steer.load(tmp_path / "love.safetensors"))
    other(ids, Steer.load(tmp_path / "love.safetensors", any_model=True))


def test_random_like_keeps_the_norm_of_each_row_but_not_its_direction(love):
    control = random_like(love, seed=0)
    torch.testing.assert_close(control.vector.norm(dim=-1), love.vector.norm(dim=-1))
    assert torch.cosine_similarity(control.vector, love.vector, dim=-1).abs().max() < 0.9
    for name in ("layer", "coeff", "start", "fingerprint"):
        assert getattr(control, name) == getattr(love, name)
    assert random_like(love, seed=0) == control
    assert random_like(love, seed=1) != control
    assert random_like(Steer(0, torch.ones(8)), 0).vector.shape == (8,)


def test_relative_norm_is_the_ratio_at_each_position(tiny, love):
    model, tokenizer = tiny
    prompt = "I love you because you are kind"
    ratio = relative_norm(model, tokenizer, -3 * love, prompt)
    ids = torch.tensor([tokenizer.encode(prompt)])
    stream = model(ids)[1][love.layer][0].norm(dim=-1)
    assert ratio.shape == (ids.shape[1],)
    assert ratio[0] == 0
    assert ratio[love.stop:].abs().max() == 0
    wanted = 3 * love.vector.norm(dim=-1) / stream[1:love.stop]
    torch.testing.assert_close(ratio[1:love.stop], wanted, rtol=1e-4, atol=1e-5)


def test_sink_share_of_hand_made_vectors():
    assert sink_share(torch.ones(8)) == 0.5                         # any 4 of 8
    assert sink_share(torch.tensor([0.0, -3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])) == pytest.approx(12 / 14)
    assert sink_share(torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 0.0])) == 1.0
    # The squared norms of the columns are 1, 1, 4, 4, 9 and 16, the four largest of which count.
    rows = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0, 4.0], [0.0, 1.0, -2.0, 0.0, 3.0, 0.0]])
    assert sink_share(rows) == pytest.approx(33 / 35)
    assert sink_share(rows, k=1) == pytest.approx(16 / 35)
    assert sink_share(rows[:1]) == sink_share(rows[0]) == 1.0
    assert sink_share(-7 * rows) == pytest.approx(33 / 35)


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (2, 3), (5, 1)])
def test_sink_share_of_four_dimensions_or_fewer_is_1(shape):
    assert sink_share(torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)) == 1.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("share", "warns"), [(0.0, False), (0.5, False), (0.51, True), (1.0, True)])
def test_warns_if_more_than_half_of_a_vector_is_a_sink(tiny, monkeypatch, share, warns):
    monkeypatch.setattr("ministeer.steering.sink_share", lambda vector: share)
    steering_vector(*tiny, "I love you", "I hate", layer=1)     # NARROW models give no warning
    monkeypatch.setattr("ministeer.steering.NARROW", 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steering_vector(*tiny, "I love you", "I hate", layer=1)
    assert len(caught) == warns
    if warns:
        about = "of the squared norm of 'I love you' - 'I hate' before block 1 lies in 4 of 32 dimensions"
        assert f"{share:.0%} {about}" in str(caught[0].message)
        assert caught[0].filename == __file__                   # the caller's line, not one of the package


def test_weddings_minus_space_is_a_sink_before_block_3_but_not_before_1(real):
    model, tokenizer = real
    with pytest.warns(UserWarning, match="of ' weddings' - ' ' before block 3 lies in 4 of 576 dimensions"):
        late = steering_vector(model, tokenizer, " weddings", " ", layer=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        early = steering_vector(model, tokenizer, " weddings", " ", layer=1)
        # A sweep over layers does not warn.
        assert steering_vectors(model, tokenizer, " weddings", " ", [1, 3]) == [early, late]
    assert sink_share(late.vector) > 0.9
    assert sink_share(early.vector) < 0.5
    # The slow way: square and sum one dimension at a time.
    energy = sorted(sum(row[i] ** 2 for row in late.vector.tolist()) for i in range(576))
    assert sink_share(late.vector) == pytest.approx(sum(energy[-4:]) / sum(energy), rel=1e-5)


def test_public_names():
    import ministeer
    assert set(ministeer.__all__) == {"load", "generate", "steering_vector", "Steer", "KVCache", "fast"}
    assert all(getattr(ministeer, name) for name in ministeer.__all__)
    assert set(ministeer.__all__) <= set(dir(ministeer))
    with pytest.raises(AttributeError, match="no 'steer'"):
        ministeer.steer  # noqa: B018


def test_submodules_are_imported_on_access():
    names = ["m.generation.stream.__name__", "m.generate.__name__", "m.evaluation.__name__"]
    code = f"import ministeer as m; print({', '.join(names)})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == ["stream", "generate", "ministeer.evaluation"]


@pytest.mark.parametrize("factor", [np.float32(2), np.float64(2), np.int64(2), torch.tensor(2.0), 2])
def test_any_number_scales_a_steer_that_can_then_be_saved(love, tmp_path, factor):
    for scaled in (factor * love, love * factor):
        assert type(scaled.coeff) is float
        assert scaled.coeff == 2
        scaled.save(tmp_path / "love.safetensors")
        assert Steer.load(tmp_path / "love.safetensors") == scaled


def test_an_array_gives_a_coeff_for_each_row(love):
    for scaled in (np.linspace(0, 2, 3) * love, love * np.linspace(0, 2, 3), torch.linspace(0, 2, 3) * love):
        assert isinstance(scaled, Steer)
        assert scaled.coeff.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="coeff must be one finite number for each row"):
        np.ones((2, 2)) * love


@pytest.mark.parametrize("combine", [
    lambda s: s + s,
    lambda s: s - s,
    lambda s: sum([s, s]),
    lambda s: s + 1,
])
def test_rejects_sums_of_steers(love, combine):
    with pytest.raises(TypeError, match=r"pass a list, steer=\[a, b\]"):
        combine(love)


def test_random_vectors_of_different_layers_and_seeds_point_elsewhere(tiny):
    steers = steering_vectors(*tiny, " love", " hate", [0, 1, 2, 3])
    controls = [random_like(s, seed) for s in steers for seed in (0, 1)]
    assert all(random_like(s, 0) == random_like(s, 0) for s in steers)
    directions = torch.stack([s.vector.flatten() / s.vector.norm() for s in controls])
    cosines = (directions @ directions.T).abs().fill_diagonal_(0)
    assert cosines.max() < 0.7              # 28 pairs in 32 dimensions; equal directions would give 1
    assert cosines.mean() < 0.25
    for s, control in zip(steers, controls[::2], strict=True):
        torch.testing.assert_close(control.vector.norm(dim=-1), s.vector.norm(dim=-1))


@pytest.mark.parametrize(("rows", "start", "where"), [
    (1, 1, "at position 1 before"),
    (3, 2, "at positions 2 to 4 before"),
    (None, 4, "at every position from 4 on before"),
])
def test_repr_shows_the_positions(rows, start, where):
    assert where in repr(Steer(2, torch.ones(rows, 8) if rows else torch.ones(8), start=start))


def test_a_layer_may_be_a_numpy_number_and_no_truth_value(tiny):
    wanted = steering_vector(*tiny, " love", " hate", layer=2)
    assert steering_vector(*tiny, " love", " hate", layer=np.int64(2)) == wanted
    for layer in (True, 2.0, "2"):
        with pytest.raises(ValueError, match="this model has blocks 0 … 3"):
            steering_vector(*tiny, " love", " hate", layer=layer)

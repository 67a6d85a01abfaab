"""Steer, steering_vector and the controls. For what the model does with them, see test_identities.py."""

import gc
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import hub_config, hub_model, save_checkpoint
from safetensors.torch import save_file

from ministeer import KVCache, Steer, load, steering_vector
from ministeer.steering import pad_together, random_like, relative_norm, sink_share, steering_vectors

NAN, INF, HUGE = float("nan"), float("inf"), 10 ** 400
ONES = torch.ones(2, 4)


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
    assert s.delta(None, torch.arange(2, 6)).tolist() == [[0, 0], [10, 20], [30, 40], [0, 0]]
    assert s.delta(None, torch.tensor([4])).tolist() == [[30, 40]]        # one new position, as in decoding
    assert s.stop == 5


def test_delta_of_one_row_goes_to_every_position_from_start():
    s = Steer(0, torch.tensor([1.0, 2.0]), coeff=2, start=1)
    assert s.delta(None, torch.arange(3)).tolist() == [[0, 0], [2, 4], [2, 4]]
    assert s.delta(None, torch.tensor([1000])).tolist() == [[2, 4]]
    assert s.stop is None


def test_delta_with_a_coefficient_for_each_row_of_the_batch():
    s = Steer(0, torch.ones(1, 2), coeff=torch.tensor([0.0, 2.0, -1.0]))
    assert s.delta(None, torch.arange(2)).tolist() == [[[0, 0], [0, 0]], [[0, 0], [2, 2]], [[0, 0], [-1, -1]]]
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


@pytest.mark.parametrize(("shape", "arguments", "message"), [
    ((3, 4), ("front", 3), "does not fit the front of a prompt of 3"),
    ((4,), ("back", 9), "cannot be aligned"),
    *(((3, 4), (where, 9), "possible: front, middle, back") for where in ("end", "x" * 10 ** 6, None, [], 1)),
    *(((3, 4), ("back", n), "n_prompt must be a whole number") for n in (0, -1, 2.5, "9", None, ONES, 1j))])
def test_align_rejects_bad_places_and_prompts(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        Steer(0, torch.ones(shape)).align(*arguments)


# Tensors whose numbers cannot be added, by what an error says of them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # torch says of some that they are new, and of others that they go
    ODD = {"torch.float8_e4m3fn": ONES.to(torch.float8_e4m3fn), "torch.complex64": ONES.to(torch.complex64),
           "on meta": ONES.to("meta"), "torch.sparse_coo": ONES.to_sparse(),
           "torch.sparse_csr": ONES.to_sparse_csr(), "given: Tensor": torch.nested.nested_tensor([ONES]),
           "torch.qint8": torch.quantize_per_tensor(ONES, 1, 0, torch.qint8), "torch.bool": ONES.bool(),
           "NaN or infinite": ONES * NAN, "beyond float32": ONES.double() * 1e300}
BAD = [
    *(({name: value}, f"{name} must be a whole number, from 0 to 2147483647") for name in ("layer", "start")
      for value in (-1, 1.0, True, "1", None, NAN, 1e300, 1j, HUGE, 2 ** 63, 2 ** 31)),
    *(({"vector": x}, f"vector must be a float tensor .*{says}") for says, x in {
        **ODD, "given: list": [1.0], r"given: torch.float32 \(2, 2, 2\)": torch.ones(2, 2, 2),
        r"\(\)": ONES[0, 0],
        "given: torch.int64": ONES.long(), r"\(0, 4\)": ONES[:0], "NaN": ONES * INF}.items()),
    *(({"coeff": c}, "coeff must be a finite number") for c in (
        NAN, -INF, "2", None, True, 1j, HUGE, -HUGE, [1.0], b"1", {}, np.array(["2"]), np.array([None]))),
    *(({"coeff": c}, f"coeff must be one finite number for each row.*{says}") for says, c in [
        *((says, x if says in ("torch.sparse_csr", "given: Tensor") else x[0]) for says, x in ODD.items()),
        *(("NaN or infinite", c) for c in (
            torch.tensor([1.0, NAN]), torch.tensor(NAN), torch.tensor(INF), np.array([1.0, NAN]))),
        (r"\(2, 4\)", ONES), (r"\(0,\)", ONES[0, :0]), ("torch.complex64", torch.tensor(1j)),
        ("torch.bool", torch.tensor(True)), ("on meta", torch.ones((), device="meta"))]),
    *(({name: value}, "fingerprint must be text and note a dict; given: ") for name, value in (
        ("fingerprint", None), ("fingerprint", 5), ("note", "ab"), ("note", [["a", "b"]]), ("note", None))),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_rejects_bad_steers(change, message):
    with pytest.raises(ValueError, match=message):
        Steer(**{"layer": 0, "vector": torch.ones(4), **change})


@pytest.mark.parametrize("operation", [
    lambda s, x: s * x, lambda s, x: x * s, lambda s, x: s / x, lambda s, x: s.scaled(x)])
@pytest.mark.parametrize("x", [change["coeff"] for change, _ in BAD if "coeff" in change] + ["x" * 99, Steer])
def test_rejects_odd_factors(operation, x):
    for coeff in (2.0, torch.ones(2)):
        with pytest.raises(ValueError, match="must be (a|one) finite number"):
            operation(Steer(0, torch.ones(4), coeff), x)


@pytest.mark.parametrize("operation", [
    lambda s: s / torch.zeros(2), lambda s: s / 0.0 / torch.ones(2), lambda s: 1e300 * (1e300 * s),
    lambda s: torch.ones(2) * (s * torch.ones(3)), lambda s: torch.ones(2) * s / torch.ones(3)])
def test_rejects_factors_that_give_no_coeff(operation):
    with pytest.raises(ValueError, match="finite number|do not fit"):
        operation(Steer(0, torch.ones(4), 2.0))


def test_accepts_numbers_of_numpy_and_torch():
    s = Steer(np.int64(1), torch.ones(4), coeff=np.float32(2), start=np.int32(3))
    assert (s.layer, s.coeff, s.start) == (1, 2.0, 3)
    assert type(s.layer) is type(s.start) is int
    assert Steer(0, torch.ones(4), coeff=torch.tensor(2.5)).coeff == 2.5


def test_equality_is_by_value():
    s, two = Steer(1, ONES), torch.ones(2)
    assert s == Steer(1, torch.ones(2, 4)) and s * two == s * torch.ones(2)
    for other in (Steer(2, ONES), 2 * s, Steer(1, 0 * ONES), Steer(1, torch.ones(3, 4)),
                  Steer(1, ONES, start=2), s * two, s * torch.ones(3), "s"):
        assert s != other and s * torch.ones(4) != other


def test_repr_is_one_line_without_the_numbers(love):
    assert "'I love you' - 'I hate'" in repr(love) and len(repr(love)) < 160
    for vector, start, where in ((ONES[:1], 1, "position 1"), (torch.ones(3, 4), 2, "positions 2 to 4"),
                                 (ONES[0], 4, "every position from 4 on")):
        assert f"at {where} before" in repr(Steer(2, vector, start=start))


@pytest.mark.parametrize("coeff", [2.5, torch.tensor([0.5, -1.0]), torch.ones(1).expand(3), "its vector"])
def test_save_and_load_give_the_same_steer(love, tmp_path, coeff):
    s = love.scaled(love.vector[:, 0] if coeff == "its vector" else coeff)
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


GOOD = {"layer": 0, "start": 1, "coeff": 1, "fingerprint": "", "note": {}}
BAD_FILES = [
    *((content, {}, "") for content in (b"", b"garbage", b"\xff" * 100, b"\0" * 7 + b"\x7f{}")),
    (None, {}, "'steer'"), ("[1]", {}, "list indices"), ("{", {}, "Expecting property"), ("[" * 9999, {}, ""),
    (GOOD, {"other": ONES, "vector": None}, "vector"), *(
        ({**GOOD, "coeff": c}, {}, "coeff must be") for c in (NAN, INF, True, None, "2", HUGE, [1])),
    *(({**GOOD, name: value}, {}, f"{name} must be") for name in ("layer", "start")
      for value in (-3, 1e300, HUGE, 2 ** 63, None, "1", True)),
    *(({**GOOD, "note": note}, {}, "note a dict") for note in ("ab", [["a", "b"]], None, 5)),
    ({**GOOD, "fingerprint": 5}, {}, "must be text"), *(
        ({name: x for name, x in GOOD.items() if name != key}, {}, f"'{key}'") for key in GOOD),
    *((GOOD, {"vector": x}, says) for says, x in {
        "float8_e4m3fn": ODD["torch.float8_e4m3fn"], "complex64": ODD["torch.complex64"], "bool": ONES.bool(),
        "NaN": ONES * NAN, "beyond": ONES.double() * 1e300, "int64": ONES.long()}.items()),
    *((GOOD, {"coeff": c}, "coeff must be one finite") for c in (
        ONES, torch.tensor([1.0, NAN]), torch.ones(0), torch.tensor([True]), torch.tensor([1j]))),
    ("\x1b[31m", {}, ""),
]


@pytest.mark.parametrize(("about", "tensors", "reason"), BAD_FILES)
def test_rejects_files_that_hold_no_steer(tmp_path, about, tensors, reason):
    path = tmp_path / "x.safetensors"
    if isinstance(about, bytes):
        path.write_bytes(about)
    else:
        about = json.dumps(about) if isinstance(about, dict) else about
        tensors = {name: x.clone() for name, x in ({"vector": ONES} | tensors).items() if x is not None}
        save_file(tensors, path, about and {"steer": about})
    says = f"is not a steering vector that ministeer saved, or .*{reason}"
    with pytest.raises(ValueError, match=says) as error:
        Steer.load(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_loads_a_file_written_by_hand_and_no_pipe(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"vector": ONES, "other": ODD["torch.float8_e4m3fn"]}, path, {"steer": json.dumps(GOOD)})
    assert Steer.load(path) == Steer(0, ONES)
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe", "."):
        with pytest.raises(FileNotFoundError, match="no file"):
            Steer.load(tmp_path / name)


def test_what_a_file_notes_is_shown_in_one_short_line(tiny, tmp_path):
    note = {"model": "\x1b[31m\n" + "x" * 10 ** 6, "plus": "\x1b\n" * 10 ** 6, "minus": ["y" * 10 ** 6]}
    Steer(0, torch.ones(32), fingerprint="f", note=note).save(tmp_path / "x")
    steer = Steer.load(tmp_path / "x")
    with pytest.raises(ValueError, match=r"made with another model \(·\[31m x+…\)") as error:
        tiny[0](torch.tensor([[0, 3]]), steer)
    for text in (str(error.value), repr(steer)):
        assert text.isprintable() and len(text) < 400


def test_a_cache_knows_its_model_even_after_that_is_gone(checkpoint):
    """A later model may get the id of one that is gone."""
    cache, ids = KVCache(9), torch.tensor([[0, 3]])
    model, _ = load(checkpoint)
    model(ids, cache=cache)
    del model
    gc.collect()
    models = [load(checkpoint)[0] for _ in range(3)]
    for other in models:
        with pytest.raises(ValueError, match="the cache was filled by another model"):
            other(ids, cache=cache)
    assert cache.model() is None


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
    with pytest.raises(ValueError, match="must be one finite number for each row"):
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


def test_a_layer_may_be_a_numpy_number_and_no_truth_value(tiny):
    wanted = steering_vector(*tiny, " love", " hate", layer=2)
    assert steering_vector(*tiny, " love", " hate", layer=np.int64(2)) == wanted
    for layer in (True, 2.0, "2"):
        with pytest.raises(ValueError, match="this model has blocks 0 … 3"):
            steering_vector(*tiny, " love", " hate", layer=layer)

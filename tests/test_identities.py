"""What holds for the residual stream, the addition and the cache whatever the weights, in every family.

"Equal" is bitwise where the same numbers are computed in the same order, and up to float32's rounding
where the order may differ.
"""

from dataclasses import replace

import pytest
import torch
from conftest import EVERY_FAMILY, hub_config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ministeer import KVCache, Steer, steering_vector
from ministeer.attention import attend, attention_pattern, causal_mask
from ministeer.checkpoints.config import parse_config
from ministeer.checkpoints.weights import FAMILIES as CLASSES
from ministeer.steering import pad_together

FAMILIES = EVERY_FAMILY
T, N_LAYER, D_MODEL = 12, 4, 32         # positions of most runs here; the sizes of the tiny models
FEW = settings(max_examples=15, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


def random_ids(batch=1, n=T, seed=0):
    return torch.randint(2, 300, (batch, n), generator=torch.Generator().manual_seed(seed))


def random_vector(n=3, seed=0):
    """(n, d_model), or (d_model,) for n None"""
    return torch.randn(*([n] if n else []), D_MODEL, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    """Equal to rounding: within 1e-5 of the largest number, which is about a hundred roundings of float32."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def all_close(run, other):
    """Equal logits and residuals, to rounding, of two (logits, resid)."""
    close(run[0], other[0])
    for a, b in zip(run[1], other[1], strict=True):
        close(a, b)


def all_equal(run, other):
    assert torch.equal(run[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(run[1], other[1], strict=True))


STEERS = st.builds(
    lambda layer, n, coeff, start, seed: Steer(layer, random_vector(n, seed), coeff, start),
    layer=st.integers(0, N_LAYER - 1),
    n=st.sampled_from([None, 1, 2, 5]),
    coeff=st.sampled_from([-3.0, 0.5, 1.0, 10.0]),
    start=st.integers(0, T - 5),
    seed=st.integers(0, 99),
)


# The stream


def test_resid_and_logits_are_embedding_blocks_and_unembedding(model):
    """resid[0] is the embedding, resid[l + 1] is block l of resid[l], the logits unembed resid[n_layer]."""
    ids, pos = random_ids(2), torch.arange(T)
    logits, resid = model(ids)
    assert isinstance(resid, list) and len(resid) == N_LAYER + 1
    assert {x.shape for x in resid} == {(2, T, D_MODEL)} and logits.shape == (2, T, model.config.n_vocab)
    assert torch.equal(resid[0], model.embed(ids, pos))
    for l, block in enumerate(model.blocks):
        assert torch.equal(resid[l + 1], block(resid[l], l, model.rope(pos)))
    assert torch.equal(logits, model.unembed(resid[-1]))


def test_later_tokens_change_no_earlier_position(model):
    """At every layer, position t depends on positions 0 … t only, and it does depend on position 0."""
    ids = random_ids()
    for t in (1, T // 2, T - 1):
        changed = ids.clone()
        changed[0, t] = 301
        for a, b in zip(model(ids)[1], model(changed)[1], strict=True):
            assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t], b[:, t])
    changed = ids.clone()
    changed[0, 0] = 301
    assert not torch.isclose(model(ids)[0][0, -1], model(changed)[0][0, -1]).all()


def test_last_only_gives_the_logits_of_the_last_position(model):
    logits, resid = model(random_ids(2))
    last, same = model(random_ids(2), last_only=True)
    assert last.shape == (2, 1, model.config.n_vocab)
    all_close((last, same), (logits[:, -1:], resid))


def test_a_batch_of_two_equals_two_runs(model):
    ids = random_ids(2)
    (logits, resid), (other_logits, other_resid) = model(ids[:1]), model(ids[1:])
    wanted = [torch.cat(pair) for pair in zip(resid, other_resid, strict=True)]
    all_close(model(ids), (torch.cat([logits, other_logits]), wanted))


def test_run_from_a_layer_equals_a_whole_pass(model):
    """From resid[l] of a plain pass, the blocks from l on give what a whole steered pass gives."""
    ids, pos = random_ids(2), torch.arange(T)
    logits, resid = model(ids)
    for l in range(N_LAYER):
        below = model.run(model.embed(ids, pos), pos, stop_layer=l)
        assert all(torch.equal(a, b) for a, b in zip(below, resid[:l + 1], strict=True))
        plus, minus = Steer(l, random_vector(), 4.0), Steer(l, random_vector(), -4.0)
        for steer in ([], [plus], [minus, Steer(N_LAYER - 1, random_vector(seed=1))]):
            wanted_logits, wanted = model(ids, steer)
            rest = model.run(resid[l], pos, steer, first_layer=l)
            assert all(torch.equal(a, b) for a, b in zip(rest, wanted[l:], strict=True))
            assert torch.equal(model.unembed(rest[-1]), wanted_logits)
        assert torch.equal(resid[l], below[-1])         # what the runs began from is unchanged
    middle = model.run(resid[1], pos, first_layer=1, stop_layer=3)
    assert all(torch.equal(a, b) for a, b in zip(middle, resid[1:4], strict=True))
    assert model.run(resid[-1], pos, first_layer=N_LAYER)[0] is resid[-1]


def test_accepts_int32_ids_and_a_single_steer(model):
    steer = Steer(1, random_vector())
    all_equal(model(random_ids().int(), steer), model(random_ids(), [steer]))


# The addition


@FEW
@given(steer=STEERS)
@example(steer=Steer(0, random_vector(), 2.0, start=0))
@example(steer=Steer(N_LAYER - 1, random_vector(5), 2.0, start=T - 5))
def test_addition_changes_its_layer_by_coeff_times_vector(model, steer):
    """steered[layer] - plain[layer] is coeff * vector at its positions and 0 elsewhere.

    Below the layer and before `start`, nothing changes.
    """
    ids = random_ids()
    plain_logits, plain = model(ids)
    logits, steered = model(ids, [steer])
    l, start = steer.layer, steer.start
    stop = T if steer.vector.ndim == 1 else start + len(steer.vector)
    added = torch.zeros(T, D_MODEL)
    added[start:stop] = steer.coeff * steer.vector
    assert torch.equal(steered[l][0], plain[l][0] + added)
    torch.testing.assert_close(steered[l][0] - plain[l][0], added, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(steered[:l], plain[:l], strict=True))
    assert all(torch.equal(a[:, :start], b[:, :start]) for a, b in zip(steered, plain, strict=True))
    assert torch.equal(logits[:, :start], plain_logits[:, :start])
    # Every position from `start` on changes: the steered ones directly, later ones through attention.
    assert (steered[-1] != plain[-1])[0, start:].any(dim=-1).all()


@FEW
@given(steer=STEERS)
def test_coeff_0_equals_no_steering(model, steer):
    """Bitwise. So is an addition whose positions all lie outside the run."""
    ids = random_ids()
    all_equal(model(ids, [0 * steer]), model(ids))
    elsewhere = replace(steer, start=T + 7)
    all_equal(model(ids, elsewhere, KVCache(T)), model(ids))


@FEW
@given(steer=STEERS)
def test_opposite_steers_cancel(model, steer):
    all_close(model(random_ids(), [steer, -steer]), model(random_ids()))


@FEW
@given(steer=STEERS)
def test_steers_at_one_layer_add_up(model, steer):
    """The same vector twice is twice the coeff. Overlapping vectors add up. The order does not matter."""
    ids = random_ids()
    all_close(model(ids, [steer, steer]), model(ids, [2 * steer]))
    a = Steer(steer.layer, random_vector(3), 2.0, start=2)
    b = Steer(steer.layer, random_vector(4, 1), -1.0, start=4)
    both = torch.zeros(6, D_MODEL)
    both[:3] += 2 * a.vector
    both[2:] -= b.vector
    all_close(model(ids, [a, b]), model(ids, [Steer(steer.layer, both, start=2)]))
    all_close(model(ids, [a, b]), model(ids, [b, a]))


def test_a_coeff_for_each_row(model):
    """One batch with a coeff for each row equals the runs one by one."""
    coeff = torch.tensor([0.0, 1.0, -4.0])
    ids = random_ids().expand(3, -1)
    for vector in (random_vector(), random_vector(None)):
        logits, resid = model(ids, [Steer(2, vector, coeff), Steer(0, vector, 0.5)])
        for row, c in enumerate(coeff.tolist()):
            one = model(ids[:1], [Steer(2, vector, c), Steer(0, vector, 0.5)])
            all_close((logits[row:row + 1], [x[row:row + 1] for x in resid]), one)


def test_one_vector_for_every_position(model):
    """A vector (d_model,) is added at every position from `start` on, those read later included."""
    steer, ids, cache = Steer(2, random_vector(None), 3.0, start=4), random_ids(), KVCache(T)
    plain = model(ids)[1][2]
    for t in range(T):
        _, resid = model(ids[:, t:t + 1], steer, cache)
        close(resid[2], plain[:, t:t + 1] + 3.0 * (t >= 4) * steer.vector)


def test_the_bos_row_of_a_pair_is_zero_and_left_out(tiny):
    """Position 0 is BOS in both prompts, so its difference is 0, is left out, and `start` is 1."""
    model, tokenizer = tiny
    ids = torch.tensor(pad_together(tokenizer, "I love you", "Hate"))
    assert ids[0, 0] == ids[1, 0] == tokenizer.bos_id
    _, resid = model(ids)
    for l in range(N_LAYER):
        plus, minus = resid[l]
        close(plus[0], minus[0])
        steer = steering_vector(model, tokenizer, "I love you", "Hate", layer=l)
        assert (steer.layer, steer.start, steer.coeff) == (l, 1, 1.0)
        close(steer.vector, (plus - minus)[1:])
        assert (steer.vector.norm(dim=-1) > 0).all()


def test_adding_the_difference_turns_minus_into_plus(tiny):
    """h- + 1 (h+ - h-) = h+: from the steered layer on, the minus prompt runs as the plus prompt does."""
    model, tokenizer = tiny
    plus, minus = torch.tensor(pad_together(tokenizer, "I love you", "Hate"))[:, None]
    for l in range(N_LAYER):
        logits, resid = model(minus, steering_vector(model, tokenizer, "I love you", "Hate", layer=l))
        wanted, wanted_resid = model(plus)
        all_close((logits, resid[l:]), (wanted, wanted_resid[l:]))


# The cache


def join(runs):
    """[(logits, resid), …] of one chunk after another -> (logits, resid) of all their positions."""
    logits, resid = zip(*runs, strict=True)
    return torch.cat(logits, dim=1), [torch.cat(parts, dim=1) for parts in zip(*resid, strict=True)]


def in_chunks(model, ids, cuts, steer=(), cache=None):
    """(logits, resid) of ids, read in chunks that begin at 0 and at each of `cuts`."""
    cache = cache or KVCache(ids.shape[1], batch=len(ids))
    runs = [model(ids[:, a:b], steer, cache) for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True)]
    assert len(cache) == ids.shape[1]
    return join(runs)


@pytest.mark.parametrize("steer", [
    pytest.param((), id="plain"),
    pytest.param(Steer(1, random_vector(5), 3.0, start=3), id="3 to 7"),
    pytest.param(Steer(0, random_vector(None), 2.0, start=5), id="from 5 on"),
    pytest.param((Steer(0, random_vector(1), 5.0, start=6), Steer(3, random_vector(8), -2.0, start=0)),
                 id="two"),
])
def test_cached_chunks_equal_one_pass(model, steer):
    """Two chunks cut at every place, three chunks, and token by token."""
    ids = random_ids(2)
    whole = model(ids, steer)
    for cuts in [[], *([t] for t in range(1, T)), [4, 5], [2, 9], list(range(1, T))]:
        all_close(in_chunks(model, ids, cuts, steer), whole)


@FEW
@given(cuts=st.sets(st.integers(1, T - 1)), steer=STEERS, spare=st.integers(0, 3))
def test_any_cached_chunks_equal_one_pass(model, cuts, steer, spare):
    ids = random_ids(2)
    all_close(in_chunks(model, ids, sorted(cuts), [steer], KVCache(T + spare, batch=2)), model(ids, [steer]))


def test_one_row_fills_every_row_of_a_cache(model):
    """A prompt read as one row and continued differently in three equals three runs of their own."""
    steer, cache = Steer(1, random_vector(6), 2.0, start=2), KVCache(T, batch=3)
    prompt, rest = random_ids(1, 5), random_ids(3, T - 5, seed=1)
    first = model(prompt, steer, cache)
    logits, resid = join([model(rest[:, :3], steer, cache), model(rest[:, 3:], steer, cache)])
    for row in range(3):
        one = logits[row:row + 1], [x[row:row + 1] for x in resid]
        all_close(join([first, one]), model(torch.cat([prompt, rest[row:row + 1]], dim=1), steer))


def test_a_cache_rejects_other_steering(model):
    """An equal steer continues a cache. Any other, or none, is rejected and leaves the cache as it was."""
    ids = random_ids()
    steer = Steer(1, random_vector(), 2.0, start=2)
    message = "the cache was filled under other steering. Pass the same steer list"
    for other in (
        (),
        -steer,
        [steer, steer],
        replace(steer, start=3),
        replace(steer, layer=2),
        replace(steer, vector=random_vector(seed=1)),
        replace(steer, vector=random_vector(None)),
    ):
        cache = KVCache(T)
        first = model(ids[:, :4], [steer], cache)
        with pytest.raises(ValueError, match=message):
            model(ids[:, 4:], other, cache)
        assert len(cache) == 4
        second = model(ids[:, 4:], (Steer(1, random_vector(), 2, start=2),), cache)
        all_close(join([first, second]), model(ids, steer))


def test_a_cache_rejects_other_coeffs_of_its_rows(model):
    ids, cache = random_ids(2), KVCache(T, batch=2)
    model(ids[:, :4], Steer(1, random_vector(), torch.tensor([1.0, 2.0])), cache)
    with pytest.raises(ValueError, match="filled under other steering"):
        model(ids[:, 4:], Steer(1, random_vector(), torch.tensor([2.0, 1.0])), cache)
    model(ids[:, 4:], Steer(1, random_vector(), torch.tensor([1.0, 2.0])), cache)


@pytest.mark.parametrize(("max_len", "batch", "first", "then", "message"), [
    (5, 1, None, (1, 6), "the cache holds 5 positions; 0 are read, 6 more do not fit"),
    (5, 1, (1, 4), (1, 2), "the cache holds 5 positions; 4 are read, 2 more do not fit"),
    (9, 3, None, (2, 4), "the cache is for a batch of 3, and ids has a batch of 2"),
    (9, 1, None, (2, 4), "the cache is for a batch of 1, and ids has a batch of 2"),
    # Only the first chunk may be a single row for all.
    (9, 2, (2, 4), (1, 1), "the cache is for a batch of 2, and ids has a batch of 1"),
    (9, 2, (1, 4), (3, 1), "the cache is for a batch of 2, and ids has a batch of 3"),
    (500, 1, (1, 190), (1, 3), "193 positions do not fit this model's context of 192"),
])
def test_rejects_a_cache_that_does_not_fit(model, max_len, batch, first, then, message):
    cache = KVCache(max_len, batch)
    if first:
        model(random_ids(*first), cache=cache)
    with pytest.raises(ValueError, match=message):
        model(random_ids(*then), cache=cache)
    assert len(cache) == (first[1] if first else 0)


def test_cache_can_be_filled_to_the_last_position(model):
    """So can the context. And an empty cache counts as true, so that `if cache` holds for the first chunk."""
    n = model.config.n_ctx
    cache = KVCache(n)
    assert cache and len(cache) == 0
    model(random_ids(1, n - 1), cache=cache)
    model(random_ids(1, 1), cache=cache)
    assert len(cache) == n


def test_attention_pattern_is_the_formula_and_attend_is_pattern_times_v():
    generator = torch.Generator().manual_seed(0)
    for T, S in ((1, 1), (7, 7), (1, 7), (3, 7)):
        q = torch.randn(2, 6, T, 8, generator=generator)
        k, v = torch.randn(2, 2, 2, S, 8, generator=generator)
        pattern = attention_pattern(q, k)
        for head in range(6):
            for t in range(T):
                n = S - T + t + 1       # the query sees the keys up to its own position
                scores = torch.tensor([float(q[0, head, t] @ k[0, head // 3, s]) / 8**0.5 for s in range(n)])
                close(pattern[0, head, t], torch.cat([scores.softmax(dim=0), torch.zeros(S - n)]))
        mask = causal_mask(T, S) if 1 < T < S else None
        close(attend(q, k, v, mask), pattern @ v.repeat_interleave(3, dim=1))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_scores_and_softmax_are_float32_in_every_dtype(dtype, limit):
    """As GPT-J asks. Rounded to 16 bits, these scores of up to 100 would move the results by more."""
    generator = torch.Generator().manual_seed(0)
    for T, S in ((60, 60), (20, 60)):
        q, k = (5 * torch.randn(2, 4, n, 16, generator=generator).to(dtype) for n in (T, S))
        v = torch.randn(2, 4, S, 16, generator=generator).to(dtype)
        wanted = attention_pattern(q.float(), k.float()) @ v.float()
        rounded = attention_pattern(q, k) @ v.float()
        ours = attend(q, k, v, causal_mask(T, S).to(q) if T < S else None)
        assert (ours - wanted).abs().max() < limit < (rounded - wanted).abs().max()


def test_the_mask_of_a_later_chunk_is_made_once_per_pass(model, monkeypatch):
    calls = []

    def recorded(*args):
        calls.append(args[:2])
        return causal_mask(*args)
    monkeypatch.setattr("ministeer.attention.causal_mask", recorded)
    in_chunks(model, random_ids(), [1, 4, 9])
    assert calls == [(3, 4), (5, 9), (3, 12)]


def test_a_cache_cannot_be_continued_with_another_model(model):
    cache = KVCache(T)
    model(random_ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="the cache was filled by another model. Start a new cache"):
        model.shared_copy()(random_ids(1, 4), cache=cache)
    assert len(cache) == 4


def test_a_cache_grows_with_the_positions_read():
    """A cache for 131,072 positions takes memory for those that were read, and keeps them when it grows."""
    cache = KVCache(131_072)
    stored = []
    for T in (3, 255, 1, 300):
        k = torch.randn(1, 2, T, 4, generator=torch.Generator().manual_seed(T))
        stored.append(k)
        keys, values = cache.extend(0, k, -k)
        cache.length += T
        assert torch.equal(keys, torch.cat(stored, dim=2))
        assert torch.equal(values, -torch.cat(stored, dim=2))
    assert cache.layers[0][0].shape[2] < 1200
    small = KVCache(9)
    for end in (4, 8, 9):                       # it never takes more than it may need
        keys, _ = small.extend(0, k[:, :, small.length:end], k[:, :, small.length:end])
        small.length = end
        assert torch.equal(keys, k[:, :, :end])
    assert small.layers[0][0].shape[2] == 9


def test_residuals_equal_those_of_a_whole_pass(model):
    ids, steer = random_ids(2), Steer(1, random_vector(), 2.0)
    _, resid = model(ids, steer)
    for stop in (None, 0, 2, N_LAYER):
        wanted = resid if stop is None else resid[:stop + 1]
        given = model.residuals(ids, steer, stop_layer=stop)
        if stop is not None and stop <= 1:
            wanted = model(ids)[1][:stop + 1]       # block 1, which adds, is not reached
        assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    with pytest.raises(ValueError, match="not in this model's vocabulary"):
        model.residuals(torch.tensor([[9999]]))


def test_a_model_made_by_hand_has_a_name_and_a_device(model):
    fresh = type(model)(model.config)
    assert fresh.name == "unnamed"
    assert fresh.device == torch.device("cpu")
    with torch.device("meta"):
        assert type(model)(model.config).device == torch.device("meta")


def test_a_shared_copy_shares_memory_but_not_parameters(model):
    other = model.shared_copy()
    assert torch.equal(other(random_ids())[0], model(random_ids())[0])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a is not b
        assert a.data_ptr() == b.data_ptr()
    other.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# What is refused


@pytest.mark.parametrize(("ids", "message"), [
    ([[1, 2]], "ids must be a .B, T. int64 tensor of token numbers, B and T at least 1; given: list"),
    (torch.tensor([1, 2]), r"given: torch.int64 \(2,\)"),
    (torch.ones(1, 2, 3, dtype=torch.int64), r"given: torch.int64 \(1, 2, 3\)"),
    (torch.tensor([[1.0, 2.0]]), r"given: torch.float32 \(1, 2\)"),
    (torch.tensor([[True]]), r"given: torch.bool \(1, 1\)"),
    (torch.empty(1, 0, dtype=torch.int64), r"given: torch.int64 \(1, 0\)"),
    (torch.empty(0, 3, dtype=torch.int64), r"given: torch.int64 \(0, 3\)"),
    (torch.tensor([[3, 384]]),
     "ids 3 … 384 are not in this model's vocabulary, 0 … 383. Were they made with another tokenizer?"),
    (torch.tensor([[-1, 3]]), "ids -1 … 3 are not in this model's vocabulary, 0 … 383"),
    (random_ids(1, 193), "193 positions do not fit this model's context of 192"),
])
def test_rejects_bad_ids(model, ids, message):
    with pytest.raises(ValueError, match=message):
        model(ids)


WIDE = torch.ones(3, 33)
UNKNOWN = "0123456789abcdef"       # the fingerprint of no model here


@pytest.mark.parametrize(("steer", "message"), [
    (Steer(4, random_vector()),
     r"layer 4: this model has blocks 0 … 3 \(layer = the block that reads the changed stream\)\."),
    (Steer(30, random_vector()), "layer 30: this model has blocks 0 … 3"),
    (Steer(0, WIDE),
     r"the vector is 33 wide, this model's residual stream 32\. Was it made with another model\?"),
    (Steer(0, WIDE[0]), "the vector is 33 wide"),
    (Steer(0, random_vector(), torch.tensor([1.0, 2.0, 3.0])),
     "coeff has 3 values, one for each row of a batch, but the batch has 2 rows"),
    (Steer(0, random_vector(), torch.tensor([1.0])),
     "coeff has 1 values, one for each row of a batch, but the batch has 2 rows"),
    (Steer(0, random_vector(5)), r"the steered positions 1 … 5 do not fit a prompt of 3 tokens\."),
    (Steer(0, random_vector(1), start=3), "the steered positions 3 … 3 do not fit a prompt of 3 tokens"),
    (Steer(0, random_vector(), fingerprint=UNKNOWN),
     r"the vector was made with another model \(0123456789abcdef\)"),
    (Steer(0, random_vector(), fingerprint=UNKNOWN, note={"model": "gpt5"}),
     r"made with another model \(gpt5\).*any_model=True"),
])
def test_rejects_steers_that_do_not_fit(model, steer, message):
    """Wherever in the list it stands."""
    good = Steer(0, random_vector(1))
    for steers in (steer, [steer, good], [good, steer]):
        with pytest.raises(ValueError, match=message):
            model(random_ids(2, 3), steers)


@pytest.mark.parametrize(("given", "message"), [
    ({"steer": random_vector()}, "steer must be a Steer or a list of them; given: Tensor"),
    ({"steer": [Steer(0, random_vector(1)), 3.0]}, "steer must be a Steer or a list of them; given: float"),
    ({"steer": None}, "steer must be a Steer or a list of them; given: NoneType"),
    # What transformers calls past_key_values; an empty tuple is false and would pass for no cache.
    ({"cache": ()}, "cache must be a KVCache or None; given: tuple"),
])
def test_rejects_arguments_of_another_type(model, given, message):
    with pytest.raises(ValueError, match=message):
        model(random_ids(), **given)


@pytest.mark.parametrize("sizes", [(0,), (5, 0), (-1,), (2.5,), ("5",), (True,)])
def test_rejects_cache_sizes_below_1(sizes):
    with pytest.raises(ValueError, match="(max_len|batch) must be a whole number, 1 or more; given: "):
        KVCache(*sizes)


def test_accepts_steers_that_just_fit(model):
    for steer in (
        Steer(3, random_vector(2)),
        Steer(0, random_vector(1), torch.ones(2)),
        Steer(0, random_vector(3), start=0),
        Steer(0, random_vector(None), start=7),
    ):
        model(random_ids(2, 3), replace(steer, fingerprint=model.fingerprint))
    # With a cache, more tokens will follow, so a vector may reach beyond the first chunk.
    model(random_ids(2, 3), Steer(0, random_vector(9)), KVCache(20, batch=2))


# Gradients


def test_loaded_models_have_no_gradients(model):
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    logits, resid = model(random_ids())
    assert not logits.requires_grad and not any(x.requires_grad for x in resid)


def test_a_vector_can_be_trained(model):
    """The gradient passes a model that has none of its own, and a step against it lowers the loss."""
    ids, vector = random_ids(), random_vector().requires_grad_()

    def loss(vector):
        return -model(ids, Steer(1, vector))[0][0, -1].log_softmax(dim=-1)[7]

    loss(vector).backward()
    with torch.no_grad():
        assert loss(vector - 0.1 * vector.grad / vector.grad.norm()) < loss(vector)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_can_be_trained(family, tied):
    """Made by hand from a Config, every parameter gets a gradient, and a few steps learn a sequence."""
    config = replace(parse_config(hub_config(family).to_diff_dict()), tied=tied)
    model = CLASSES[config.family](config).initialise(seed=0)
    weights = model.get_parameter(model.embedding_name)
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(p.unique().tolist() in ([0], [1]) for p in model.parameters() if p.ndim == 1)
    again, other = (type(model)(config).initialise(seed) for seed in (0, 1))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.ndim == 1 or not torch.equal(a, b)
    ids = random_ids(2)
    losses = []
    for _ in range(25):
        logits, resid = model(ids)
        assert logits.requires_grad and resid[-1].requires_grad
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad.sign()       # by hand, because torch's optimizers take long to import
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_rejects_a_cache_for_part_of_the_blocks(tiny):
    model, _ = tiny
    pos = torch.arange(3)
    x = model.embed(torch.zeros(1, 3, dtype=torch.int64), pos)
    for part in ({"first_layer": 1}, {"stop_layer": 2}):
        with pytest.raises(ValueError, match="a cache needs all blocks"):
            model.run(x, pos, cache=KVCache(3), **part)

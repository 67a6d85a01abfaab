"""Sampling and generation against slow recomputations that share no code with them."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode

from ministeer import KVCache, Steer, generate, steering_vector
from ministeer.checkpoints.tokenizer import Tokenizer
from ministeer.generation import (
    TOO_FEW,
    Completion,
    Sampling,
    decode_step,
    nucleus,
    prefill,
    sample,
    sample_token,
    stream,
    uniforms,
)

PROMPT = "I went up to my friend and said"
PAPER = {"temperature": 1.0, "top_p": 0.3, "freq_penalty": 1.0}


@pytest.fixture
def love(tiny):
    return steering_vector(*tiny, "I love you", "I hate", layer=1)


def slow_choice(logits, ids, u, temperature, top_p, top_k, freq_penalty):
    """The paper's rule for one row, in plain Python: scale, penalise, sort, cut, draw."""
    scores = [float(x) / temperature - freq_penalty * ids.count(i) for i, x in enumerate(logits)]
    top = max(scores)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k or None]
    total = sum(math.exp(scores[i] - top) for i in order)
    kept, before = [], 0.0
    for i in order:
        if before > top_p:
            break
        p = math.exp(scores[i] - top) / total
        kept.append((i, p))
        before += p
    if top_p == 1 and not top_k:
        kept.sort()                         # nothing is cut, so the tokens stay in the order of their ids
    target, reached = u * sum(p for _, p in kept), 0.0
    for i, p in kept:
        reached += p
        if reached > target:
            return i
    return kept[-1][0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6),
       spread=st.sampled_from([0.1, 1.0, 5.0]),
       temperature=st.sampled_from([0.3, 1.0, 2.0]),
       top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
       top_k=st.sampled_from([None, 1, 3, 500]),
       penalty=st.sampled_from([0.0, 1.0, -0.5]))
def test_sample_token_follows_the_papers_rule(seed, spread, temperature, top_p, top_k, penalty):
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(0, spread, (3, 300)), dtype=torch.float32)
    ids = torch.tensor(rng.integers(0, 300, (3, 20)))
    u = torch.tensor(rng.random(3), dtype=torch.float32)
    sampling = Sampling(temperature, top_p, top_k, penalty)
    got = sample_token(logits, ids, u, sampling, candidates=300)
    wanted = [slow_choice(logits[b], ids[b].tolist(), float(u[b]), temperature, top_p, top_k, penalty)
              for b in range(3)]
    assert got.tolist() == wanted


def test_the_token_that_crosses_top_p_is_kept():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = [int((nucleus(logits, p)[0] > 0).sum()) for p in (0.0, 0.3, 0.49, 0.6, 0.79, 0.9)]
    assert kept == [1, 1, 1, 2, 2, 3]


def test_a_flat_distribution_is_drawn_from_more_candidates():
    flat = torch.zeros(2, 5000)
    assert nucleus(flat, 0.9)[2].tolist() == [False, False]
    p, ids, enough = nucleus(flat, 0.9, candidates=5000)
    assert enough.all()
    assert (p > 0).sum(dim=-1).tolist() == pytest.approx([4501, 4501], abs=2)
    assert len(set(ids[0].tolist())) == ids.shape[1]
    u = torch.tensor([0.0, 0.999])
    sampling = Sampling(top_p=0.9, max_new_tokens=1)
    assert sample_token(flat, ids[:, :1], u, sampling).tolist() == [TOO_FEW, TOO_FEW]
    (drawn,) = sample(lambda ids: flat, ids[:, :1], u[:, None], sampling)
    assert drawn == sample_token(flat, ids[:, :1], u, sampling, candidates=5000).tolist()


def test_penalty_counts_every_token_of_the_row_and_keeps_the_logits():
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    before = logits.clone()
    greedy = Sampling(temperature=0, freq_penalty=1.0)
    for ids, wanted in (
        ([2], 0),
        ([0], 1),
        ([0, 1, 1], 0),         # the logits are 0.0, -1.1 and 0.0: the first of equals is taken
    ):
        assert sample_token(logits, torch.tensor([ids]), torch.zeros(1), greedy).item() == wanted
    assert torch.equal(logits, before)


def test_draws_are_as_frequent_as_their_probabilities():
    p = torch.tensor([0.5, 0.25, 0.2, 0.05])
    u = torch.tensor(np.random.default_rng(0).random(20000), dtype=torch.float32)
    logits, no_ids = p.log().expand(20000, -1), torch.zeros(20000, 0, dtype=torch.int64)
    for top_p, wanted in [(1.0, p), (0.6, torch.tensor([2 / 3, 1 / 3, 0, 0]))]:
        ids = sample_token(logits, no_ids, u, Sampling(top_p=top_p))
        # 0.012 is more than three standard errors.
        assert ids.bincount(minlength=4) / 20000 == pytest.approx(wanted, abs=0.012)


def test_uniforms_depend_on_seed_prompt_and_completion_only():
    def draws(seed=0, ids=(0, 7), k=0, n=5):
        return uniforms(Sampling(seed=seed, max_new_tokens=n), ids, k).tolist()
    assert draws() == draws(n=9)[:5]
    for change in ({"seed": 1}, {"ids": (0, 8)}, {"k": 1}):
        assert draws(**change) != draws()


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("how", [{"temperature": 0}, PAPER, {"temperature": 0.7, "top_k": 5}, {}])
def test_generation_equals_a_slow_run_without_cache(tiny, love, steered, how):
    model, tokenizer = tiny
    steer = [3 * love] if steered else []
    n, new = 3, 12
    got = generate(model, tokenizer, PROMPT, n, new, steer, **how)
    full = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "freq_penalty": 0.0, **how}
    prompt = tokenizer.encode(PROMPT)
    for k in range(n):
        ids, draws = list(prompt), uniforms(Sampling(seed=0, max_new_tokens=new), prompt, k)
        for t in range(new):
            logits = model(torch.tensor([ids]), steer)[0][0, -1]
            if full["temperature"] == 0:
                token = int(logits.argmax())
            else:
                token = slow_choice(logits, ids, float(draws[t]), **full)
            if token in tokenizer.eos_ids:
                break
            ids.append(token)
        assert got[k] == tokenizer.decode(ids)[len(PROMPT):]


def test_steered_and_unsteered_runs_share_their_draws(tiny, love):
    model, tokenizer = tiny
    plain = generate(model, tokenizer, PROMPT, 4, **PAPER)
    assert generate(model, tokenizer, PROMPT, 4, steer=0 * love, **PAPER) == plain
    assert generate(model, tokenizer, PROMPT, 4, steer=40 * love, **PAPER) != plain
    assert generate(model, tokenizer, PROMPT, 4, seed=1, **PAPER) != plain


def test_a_completion_does_not_depend_on_n_batch_or_other_prompts(tiny, love):
    model, tokenizer = tiny
    prompts = ["The harbour wakes before", "I hate you because",
               "We talk about weddings all day", "I love you because"]
    assert len({len(tokenizer.encode(prompt)) for prompt in prompts}) > 1

    def steered(prompts, n=3, new=10, **how):
        return generate(model, tokenizer, prompts, n, new, [2 * love], **PAPER, **how)
    together = steered(prompts)
    assert together == [steered(prompt) for prompt in prompts]
    assert steered(prompts, n=1) == [texts[:1] for texts in together]
    assert steered(prompts, max_batch_tokens=50) == together
    for longer_texts, texts in zip(steered(prompts, new=15), together, strict=True):
        for longer, text in zip(longer_texts, texts, strict=True):
            assert longer.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_a_coeff_for_each_completion(tiny, love):
    model, tokenizer = tiny
    prompts = ["I went up to", "The bride was late for her"]
    coeffs = torch.tensor([0.0, 4.0, 1.0, -9.0])        # two for each prompt
    got = generate(model, tokenizer, prompts, 2, 10, [coeffs * love], **PAPER)
    for i, c in enumerate(coeffs):
        p, k = divmod(i, 2)
        assert got[p][k] == generate(model, tokenizer, prompts[p], 2, 10, [float(c) * love], **PAPER)[k]
    with pytest.raises(ValueError, match="coeff has 4 values"):
        generate(model, tokenizer, prompts, 3, 10, [coeffs * love])


def test_a_completion_ends_at_eos(tiny):
    model, tokenizer = tiny
    row = Completion(tokenizer, [0], ())
    before, after = (tokenizer.encode(text, bos=False) for text in ("love", "hate"))
    for token in [*before, tokenizer.eos_ids[0], *after]:
        row.add(token)
    assert row.ended
    assert row.text == "love"


def test_generation_stops_when_every_row_has_ended(tiny, monkeypatch):
    model, tokenizer = tiny
    calls, done = [], []

    def draw_eos(logits, ids, *rest):
        calls.append(1)
        return torch.full((len(ids),), tokenizer.eos_ids[0])
    monkeypatch.setattr("ministeer.generation.sample_token", draw_eos)
    assert generate(model, tokenizer, PROMPT, 5, 30, progress=done.append) == [""] * 5
    assert len(calls) == 1
    assert sum(done) == 5 * 30


def test_texts_end_before_the_first_stop_string(tiny):
    model, tokenizer = tiny
    whole = generate(model, tokenizer, PROMPT, 4, 20, **PAPER)
    stop = whole[0][5:8]
    stopped = generate(model, tokenizer, PROMPT, 4, 20, stop=stop, **PAPER)
    assert stopped == [text.partition(stop)[0] for text in whole]
    both = [stop, whole[1][3:6]]
    cut = [min((text[:text.find(s)] for s in both if s in text), key=len, default=text) for text in whole]
    assert generate(model, tokenizer, PROMPT, 4, 20, stop=both, **PAPER) == cut


@pytest.mark.parametrize("how", [
    {"temperature": 0}, PAPER, {**PAPER, "seed": 3}, {"top_p": 0.9, "stop": ["e", "the wo"]},
    {"stop": ["x" * 10**6]},
])
def test_streamed_pieces_join_to_the_generated_text(tiny, love, how):
    pieces = list(stream(*tiny, PROMPT, 30, [2 * love], **how))
    assert "".join(pieces) == generate(*tiny, PROMPT, 1, 30, [2 * love], **how)[0]
    assert all(pieces)


def test_unsure_covers_partial_characters_and_stop_strings(tiny):
    _, tokenizer = tiny
    row = Completion(tokenizer, [0], ["the end"])
    for token in tokenizer.encode("é the e", bos=False):
        row.add(token)
    assert row.text[:len(row.text) - row.unsure] == "é "
    row = Completion(tokenizer, [0], ())
    row.add(tokenizer.encode("é", bos=False)[0])
    assert row.unsure == len(row.text) == 1


def test_leaving_a_stream_early_changes_nothing(tiny):
    how = {"temperature": 0, "max_new_tokens": 3}
    before = generate(*tiny, PROMPT, **how)
    for _ in stream(*tiny, PROMPT, 100):
        break
    assert generate(*tiny, PROMPT, **how) == before


def test_a_vector_for_every_position_steers_generated_tokens(tiny):
    model, tokenizer = tiny
    torch.manual_seed(0)
    s = Steer(2, torch.randn(32), coeff=20)
    ids = tokenizer.encode(PROMPT)
    greedy = generate(model, tokenizer, PROMPT, 1, 8, s, temperature=0)[0]
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]), s)[0][0, -1].argmax()))
    assert greedy == tokenizer.decode(ids)[len(PROMPT):]


def test_an_empty_prompt_is_continued_but_cannot_be_steered(tiny, love):
    model, tokenizer = tiny
    assert len(generate(model, tokenizer, "", 2, 5)) == 2
    assert generate(model, tokenizer, [], 2, 5) == []
    with pytest.raises(ValueError, match="do not fit a prompt of 1 token"):
        generate(model, tokenizer, "", 2, 5, love)


NAN, INF = float("nan"), float("inf")
# What the error says, and the values of a setting that it answers.
BAD = [
    ("n", "n must be", [0, 1.5, True, "2", None, 10**9]),
    ("max_new_tokens", "max_new_tokens must be", [0, 1.5, None]),
    ("max_new_tokens", "context of 192", [500, 10**9]),
    ("temperature", "temperature must be", [-1, NAN, INF, 10**400, None, "1"]),
    ("top_p", "top_p must be", [1.1, -0.1, NAN, None]),
    ("top_k", "top_k must be", [-1, 1.5, False, ""]),
    ("freq_penalty", "freq_penalty must be", [INF, 1e300, -1e38]),
    ("seed", "seed must be", [-1, None, 1.0, True]),
    ("stop", "must not be empty", ["", ["a", ""]]),
    ("stop", "stop must be a text or a list of texts", [None, 5, [1], b"a"]),
    ("max_batch_tokens", "max_batch_tokens must be", [0, 1.5]),
    ("prompts", "prompts must be a text or a list of texts", [None, 5, b"a", [1], ["a", b"b"], [["a"]]]),
    ("prompts", "context of 192", ["a" * 10**6]),
    ("prompts", "surrogate", ["\ud800", ["a", "\udcff"]]),
]


@pytest.mark.parametrize(("name", "message", "value"), [
    (name, message, value) for name, message, values in BAD for value in values
], ids=lambda given: str(given)[:30])
def test_rejects_bad_settings(tiny, name, message, value):
    with pytest.raises(ValueError, match=message) as info:
        generate(*tiny, **{"prompts": PROMPT, name: value})
    assert len(str(info.value)) < 150
    if name not in ("n", "max_batch_tokens", "prompts"):
        with pytest.raises(ValueError, match=message):
            stream(*tiny, PROMPT, **{name: value})          # at the call, not at the first piece


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-45, 1e-38, 1e-10])
@pytest.mark.parametrize("how", [{}, {"top_p": 0.3}, {"top_k": 5}])
def test_a_tiny_temperature_takes_the_likeliest_token(tiny, temperature, how):
    assert generate(*tiny, PROMPT, 1, 8, temperature=temperature, **how) == \
        generate(*tiny, PROMPT, 1, 8, temperature=0)


def test_settings_of_other_number_types_are_those_of_python(tiny):
    how = {"n": np.int8(100), "max_new_tokens": np.int8(40), "seed": np.uint8(3), "top_p": np.float16(0.5),
           "temperature": Fraction(1, 2)}
    wanted = generate(*tiny, "I", 100, 40, seed=3, top_p=0.5, temperature=0.5)
    assert generate(*tiny, "I", **how) == wanted
    assert generate(*tiny, "I", 1, 5, seed=10**20) != generate(*tiny, "I", 1, 5)


def test_rejects_steers_that_do_not_fit_before_running(tiny, love, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(model, "run", lambda *rest: pytest.fail("must not run"))
    with pytest.raises(ValueError, match="the steered positions 1 … [0-9]+ do not fit a prompt of 2 tokens"):
        generate(model, tokenizer, [PROMPT, "I"], 1, 5, love)
    with pytest.raises(ValueError, match="layer 9: this model has blocks 0 … 3"):
        stream(model, tokenizer, PROMPT, 5, Steer(9, love.vector))


def test_overflowing_logits_raise(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="not finite any more. Lower the coeff"):
        generate(model, tokenizer, PROMPT, 1, 3, Steer(0, torch.full((1, 32), 1e38), coeff=10.0))


def test_returned_ids_reproduce_the_residual_stream(tiny, love, monkeypatch):
    """With return_ids, model(ids, steer)[1] is the stream that the steps of generation computed."""
    model, tokenizer = tiny
    steps, read = [], model.read

    def spy(*arguments, **options):
        logits, resid = read(*arguments, **options)
        steps.append(resid)
        return logits, resid
    monkeypatch.setattr(model, "read", spy)
    (text,), (ids,) = generate(model, tokenizer, PROMPT, 1, 12, 3 * love, return_ids=True, **PAPER)
    monkeypatch.undo()
    assert tokenizer.decode(ids)[len(PROMPT):] == text
    assert ids[:len(tokenizer.encode(PROMPT))] == tokenizer.encode(PROMPT)
    _, resid = model(torch.tensor([ids]), 3 * love)
    for l, x in enumerate(resid):
        generated = torch.cat([step[l] for step in steps], dim=1)
        n = min(x.shape[1], generated.shape[1])         # nothing reads the last token
        assert n >= len(ids) - 1
        torch.testing.assert_close(generated[:, :n], x[:, :n], rtol=1e-4, atol=1e-4)


def test_returned_ids_are_nested_like_the_texts(tiny):
    model, tokenizer = tiny
    texts, ids = generate(model, tokenizer, ["I love you", "I"], 3, 5, return_ids=True)
    assert texts == generate(model, tokenizer, ["I love you", "I"], 3, 5)
    for prompt, row, numbers in zip(["I love you", "I"], texts, ids, strict=True):
        assert [tokenizer.decode(one)[len(prompt):] for one in numbers] == row
    whole, ids = generate(model, tokenizer, PROMPT, 1, 20, stop="e", return_ids=True, **PAPER)
    assert tokenizer.decode(ids[0])[len(PROMPT):].startswith(whole[0])


class Synchronisations:
    """Counts the calls that bring numbers back from a tensor, each of which would wait for a GPU."""
    METHODS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, monkeypatch):
        self.n = 0
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(*arguments, **options):
            self.n += 1
            return method(*arguments, **options)
        return call


@pytest.mark.parametrize("how", [PAPER, {}, {"temperature": 0}, {"top_k": 5}])
@pytest.mark.parametrize("n", [1, 4])
def test_each_step_brings_back_the_drawn_tokens_and_no_more(tiny, love, how, n, monkeypatch):
    counts = []
    for new in (10, 30):
        with monkeypatch.context() as patch:
            synchronisations = Synchronisations(patch)
            texts = generate(*tiny, PROMPT, n, new, 3 * love, **how)
            counts.append(synchronisations.n)
        assert any(texts)
    # 20 more tokens: drawing waits for each, and so does the decoder while rows are equal. Copies to a device
    # are not counted. A flat distribution asks for more candidates, 1024 after 64, at most twice in a run.
    assert counts[1] - counts[0] <= (20 if n == 1 else 2 * 20) + 2


@pytest.mark.parametrize("how", [PAPER, {"temperature": 0}])
@pytest.mark.parametrize("coeffs", [3.0, [0.0, 9.0, 0.0, 9.0, -9.0, 9.0]])
def test_rows_that_are_equal_so_far_are_read_as_one(tiny, love, how, coeffs, monkeypatch):
    model, _ = tiny
    steer = love.scaled(coeffs if isinstance(coeffs, float) else torch.tensor(coeffs))
    read = []

    def recorded(model, ids, *arguments):
        read.append(len(ids))
        return decode_step(model, ids, *arguments)

    def every_row(model, steer, batch, max_len):
        cache = KVCache(max_len, batch)
        return lambda ids: (decode_step if len(cache) else prefill)(model, ids, steer, cache)
    monkeypatch.setattr("ministeer.generation.decode_step", recorded)
    _, ids = found = generate(*tiny, PROMPT, 6, 20, steer, return_ids=True, **how)
    monkeypatch.setattr("ministeer.generation.decoder", every_row)
    assert found == generate(*tiny, PROMPT, 6, 20, steer, return_ids=True, **how)
    # In these 20 tokens no row ends.
    kinds = [coeffs] * 6 if isinstance(coeffs, float) else coeffs
    start = len(ids[0]) - 20
    assert read == [len({(kind, *row[:end]) for kind, row in zip(kinds, ids, strict=True)})
                    for end in range(start + 1, start + 20)]
    assert read[-1] > 1 or how == {"temperature": 0}


def test_generation_uses_no_float64_tensor(tiny, love):
    """Some devices (Apple's MPS) have no float64."""
    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            for value in result if isinstance(result, tuple) else (result,):
                assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64, function
            return result
    with NoFloat64():
        for how in (PAPER, {}, {"top_k": 5, "temperature": 0.7}):
            generate(*tiny, PROMPT, 2, 5, 3 * love, **how)


def test_uniforms_stay_below_1_in_float32(monkeypatch):
    class Highest:
        def random(self, n):
            return np.full(n, 1 - 2**-53)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Highest())
    u = uniforms(Sampling(max_new_tokens=3), [0], 0)
    assert u.dtype == np.float32
    assert (u < 1).all()
    p = torch.tensor([[0.25, 0.75, 0.0]])
    drawn = sample_token(p.log(), torch.zeros(1, 0, dtype=torch.int64), torch.from_numpy(u[:1]), Sampling())
    assert drawn.tolist() == [1]


@pytest.fixture(scope="module")
def tiny_tokens():
    """A tokenizer, and its token for each byte."""
    backend, of_byte = tiny_tokenizer(), {}
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in "aä €𝄞":
        pieces = "".join(piece for piece, _ in letters.pre_tokenize_str(character))
        of_byte |= dict(zip(character.encode(), map(backend.token_to_id, pieces), strict=True))
    return Tokenizer(backend, 0, (1,)), of_byte


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data(), words=st.lists(st.text("aä €𝄞", max_size=4), min_size=1, max_size=6),
       stops=st.lists(st.text("aä €𝄞", min_size=1, max_size=3), max_size=2))
def test_streamed_pieces_join_to_the_text_for_any_stops_and_splits(tiny_tokens, data, words, stops):
    """Each token is one byte of UTF-8, so characters and stop strings arrive in parts; some are cut off."""
    tokenizer, of_byte = tiny_tokens
    encoded = "".join(words).encode()
    tokens = [of_byte[byte] for byte in encoded[data.draw(st.integers(0, 1)):]]
    if not tokens:
        return
    model = SimpleNamespace(device="cpu", config=SimpleNamespace(n_ctx=999), check_steer=lambda *given: ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ministeer.generation.sample", lambda *given: iter([[token] for token in tokens]))
        pieces = list(stream(model, tokenizer, "x", len(tokens), stop=stops))
        (whole,) = generate(model, tokenizer, "x", 1, len(tokens), stop=stops)
    assert "".join(pieces) == whole
    assert all(pieces)

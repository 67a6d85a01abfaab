"""The measurements of measure.py against their definitions: numbers made by hand, slow loops over logits."""

import math

import pytest
import torch
from conftest import TEXT

from ministeer import Steer, steering_vector
from ministeer.evaluation.measure import (
    disfluency,
    logprobs,
    next_logprobs,
    perplexity_ratio,
    precision_at,
    ranks,
    sweep,
    token_shifts,
)


def slow_logprobs(model, ids, steer=()):
    """log p of every token at every position of one text, (T, n_vocab), in float64 from the model's logits"""
    return model(torch.tensor([ids]), steer)[0][0].double().log_softmax(dim=-1)


def slow_logprobs_of(model, tokenizer, text, steer=(), prompt=""):
    """log p of each token of `text` after BOS and `prompt`, one by one."""
    head, tail = tokenizer.encode(prompt), tokenizer.encode(text, bos=False)
    p = slow_logprobs(model, head + tail, steer)
    return [p[len(head) - 1 + t, token].item() for t, token in enumerate(tail)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Log-probabilities

@pytest.mark.parametrize("max_batch_tokens", [1, 40, 1024])
def test_logprobs_are_those_of_each_text_alone(tiny, max_batch_tokens):
    model, tokenizer = tiny
    steer = [3 * steering_vector(model, tokenizer, "I love you", "I hate", layer=1)]
    for steered in ((), steer):
        rows = logprobs(model, tokenizer, TEXT, steered, max_batch_tokens=max_batch_tokens)
        for text, row in zip(TEXT, rows, strict=True):
            expected = slow_logprobs_of(model, tokenizer, text, steered)
            assert row.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
            assert len(row) == len(tokenizer.encode(text)) - 1
            assert row.dtype == torch.float32
    assert logprobs(model, tokenizer, []) == []


@pytest.mark.parametrize("max_batch_tokens", [1, 1024])
def test_prompts_come_before_the_texts_and_are_left_out(tiny, max_batch_tokens):
    model, tokenizer = tiny
    prompts = ["We talk about weddings", "", "I hate y", " "]
    texts = [" all day", "I love you", "ou because", TEXT[0]]
    # "I hate y" + "ou" would be " you" in one piece: prompt and text keep tokens of their own.
    assert tokenizer.encode(prompts[2] + texts[2]) != \
        tokenizer.encode(prompts[2]) + tokenizer.encode(texts[2], bos=False)
    steer = 3 * steering_vector(model, tokenizer, "I", "We", layer=1)
    for steered in ((), steer):
        rows = logprobs(model, tokenizer, texts, steered, max_batch_tokens=max_batch_tokens, prompts=prompts)
        for prompt, text, row in zip(prompts, texts, rows, strict=True):
            expected = slow_logprobs_of(model, tokenizer, text, steered, prompt)
            assert row.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    without = logprobs(model, tokenizer, texts[:1], steer)
    assert abs(rows[0][0].item() - without[0][0].item()) > 1e-3


def test_one_prompt_serves_all_texts_and_an_empty_one_is_none(tiny):
    one = logprobs(*tiny, TEXT, prompts="I hate")
    assert equal(one, logprobs(*tiny, TEXT, prompts=["I hate"] * 4))
    assert not equal(one, logprobs(*tiny, TEXT, prompts=["I hate"] * 3 + ["I love"]))
    assert equal(logprobs(*tiny, TEXT), logprobs(*tiny, TEXT, prompts=""))
    assert equal(logprobs(*tiny, TEXT), logprobs(*tiny, TEXT, prompts=[""] * 4))
    # A text that brings a BOS of its own is the same text.
    assert equal(logprobs(*tiny, TEXT), logprobs(*tiny, ["<|endoftext|>" + text for text in TEXT]))


@pytest.mark.parametrize(("skip", "prompts"), [(2, ""), (3, ["I hate", "", "We talk about weddings", " "])])
def test_skip_counts_from_the_beginning_of_each_text(tiny, skip, prompts):
    whole, cut = logprobs(*tiny, TEXT, prompts=prompts), logprobs(*tiny, TEXT, skip=skip, prompts=prompts)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a[skip:], b)


@pytest.mark.parametrize(("texts", "options", "message"), [
    ([TEXT[0], "I"], {"skip": 1}, "no prediction is left of 'I' after skipping 1"),
    ([""], {}, "no prediction is left of ''"),
    ([TEXT[0], "I"], {"steer": Steer(0, torch.ones(2, 32))}, "do not fit a prompt of 2 tokens"),
    (TEXT, {"steer": Steer(0, torch.ones(2, 32), torch.ones(4))}, "coeff has 4 values"),
    ([TEXT[0], ""], {"prompts": "I hate"}, "no prediction is left of '' after skipping 0"),
    ([" you"], {"skip": 1, "prompts": "I hate"}, "no prediction is left of ' you' after skipping 1"),
    (TEXT[:2], {"prompts": ["I hate"]}, "1 prompts do not fit 2 texts"),
    (TEXT[:2], {"prompts": ["I hate"] * 3}, "3 prompts do not fit 2 texts"),
    (TEXT[:2], {"prompts": []}, "0 prompts do not fit 2 texts"),
    (TEXT, {"prompts": " you" * 190}, "context of 192"),
    ([" you", TEXT[0]], {"steer": Steer(0, torch.ones(4, 32)), "prompts": "I love"},
     "do not fit a prompt of 4 tokens"),
    ("abc", {}, "texts must be a list of texts; given: 'abc'"),
    ([5], {}, "texts must be"),
    (TEXT, {"prompts": 5}, "prompts must be a list of texts"),
    (TEXT, {"skip": -1}, "skip must be a whole number, 0 or more"),
    (TEXT, {"skip": 1.5}, "skip must be"),
    (TEXT, {"max_batch_tokens": 0}, "max_batch_tokens must be"),
    (TEXT, {"steer": Steer(0, torch.full((32,), 1e38), 10.0)}, "the logits are not finite"),
])
def test_logprobs_rejects_what_does_not_fit(tiny, texts, options, message):
    with pytest.raises(ValueError, match=message):
        logprobs(*tiny, texts, **options)


def test_a_steer_may_reach_to_the_end_of_prompt_and_text(tiny):
    steer = Steer(0, torch.ones(4, 32))
    assert [len(row) for row in logprobs(*tiny, [" you"], steer, prompts="I love you")] == [1]


def test_logits_are_never_held_for_the_whole_batch(tiny, monkeypatch):
    model, tokenizer = tiny
    seen, unembed = [], model.unembed
    monkeypatch.setattr(model, "unembed", lambda x: seen.append(x[..., 0].numel()) or unembed(x))
    rows = logprobs(model, tokenizer, [TEXT[0] * 5] * 6, max_batch_tokens=10**6)
    assert max(seen) <= 256 < sum(seen)
    ids = torch.tensor([tokenizer.encode(TEXT[0] * 5)] * 6)
    torch.testing.assert_close(next_logprobs(model, ids), torch.stack(rows))


# A sweep

@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [3, 1], [2]])
def test_a_sweep_equals_one_steered_run_for_each_cell(tiny, layers):
    model, tokenizer = tiny
    coeffs = [0.0, 30.0, -50.0]
    logits = sweep(model, tokenizer, TEXT[0], "I love you", "I hate", layers, coeffs)
    assert logits.shape == (len(layers), 3, model.config.n_vocab)
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    for i, l in enumerate(layers):
        for j, c in enumerate(coeffs):
            steer = c * steering_vector(model, tokenizer, "I love you", "I hate", l)
            torch.testing.assert_close(logits[i, j], model(ids, steer)[0][0, -1], rtol=1e-4, atol=1e-5)
    assert (logits[:, 1] - logits[:, 0]).abs().max() > 0.01


def test_a_sweep_runs_no_block_for_a_row_that_does_not_differ_there(tiny, monkeypatch):
    model, tokenizer = tiny
    rows = []
    for block in model.blocks:
        monkeypatch.setattr(block, "forward", lambda x, *rest, forward=block.forward:
                            rows.append(len(x)) or forward(x, *rest))
    sweep(model, tokenizer, TEXT[0], "I love you", "I hate", [1, 3], [1.0, 2.0, 3.0])
    # The pair up to block 3; then the prompt, with three more rows at 1 and at 3.
    assert rows == [2, 2, 2, 1, 4, 4, 7]


@pytest.mark.parametrize(("layers", "coeffs", "message"), [
    ([], [1.0], "one or more layers"), ([1, 1], [1.0], "each once"), ([1], [], "one or more finite numbers"),
    ([4], [1.0], "blocks 0 … 3"), ([1], [math.nan], "finite"), ([1.5], [1.0], "layer 1.5"),
    ("12", [1.0], "layers must be a list"), ([1], "12", "finite numbers"), ([1], [1e39], "finite"),
])
def test_rejects_a_sweep_without_meaning(tiny, layers, coeffs, message):
    with pytest.raises(ValueError, match=message):
        sweep(*tiny, TEXT[0], "I love you", "I hate", layers, coeffs)


# Perplexity ratios and shifts of tokens

PLAIN = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
STEERED = [torch.tensor([-0.5, -1.0]), torch.tensor([-4.0])]         # differences 0.5, 1 and -1


def test_the_perplexity_ratio_of_numbers_made_by_hand():
    assert perplexity_ratio(PLAIN, STEERED) == pytest.approx(math.exp(-0.5 / 3))
    assert perplexity_ratio(PLAIN, STEERED, mean_of="texts") == pytest.approx(math.exp(-(0.75 - 1) / 2))
    for mean_of in ("tokens", "texts"):
        assert perplexity_ratio(PLAIN, PLAIN, mean_of) == 1.0
        both_ways = perplexity_ratio(PLAIN, STEERED, mean_of) * perplexity_ratio(STEERED, PLAIN, mean_of)
        assert both_ways == pytest.approx(1.0)


def test_the_perplexity_ratio_is_taken_in_float64():
    assert perplexity_ratio([torch.tensor([-2.0 ** -30])], [torch.tensor([-1.0])]) == math.exp(1 - 2.0 ** -30)


@pytest.mark.parametrize(("plain", "steered", "message"), [
    (PLAIN, STEERED[:1], "of the same texts"), ([], [], "one or more"),
    (PLAIN, [STEERED[0], STEERED[0]], r"given: rows of \[2, 1\] and .*\[2, 2\] numbers"),
    ([torch.tensor([math.nan])], [torch.tensor([1.0])], "finite numbers in a row"),
    ([torch.tensor([])], [torch.tensor([])], "one or more finite numbers"),
    ("ab", "cd", "must be a list"), (["a"], ["b"], "finite numbers"), (None, None, "must be a list"),
])
def test_figures_need_numbers_for_the_same_tokens(plain, steered, message):
    for figure in (perplexity_ratio, lambda *both: token_shifts(both[0], *both)):
        with pytest.raises(ValueError, match=message):
            figure(plain, steered)


def test_the_perplexity_ratio_knows_two_means_and_has_no_largest_value():
    with pytest.raises(ValueError, match="mean_of 'words'; possible: 'tokens', 'texts'"):
        perplexity_ratio(PLAIN, STEERED, mean_of="words")
    assert perplexity_ratio([[0.0]], [[-1000.0]]) == math.inf


def test_token_shifts_of_numbers_made_by_hand():
    ids = [[7, 5, 7], torch.tensor([7, 9])]
    plain = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-5.0, -8.0])]
    steered = [torch.tensor([-0.5, -2.25, -3.0]), torch.tensor([-4.0, -9.0])]
    everything = {5: (1, -0.25, -2.0), 7: (3, 0.5, -3.0), 9: (1, -1.0, -8.0)}
    assert token_shifts(ids, plain, steered, more_than=0) == everything
    assert token_shifts(ids, plain, steered, more_than=2) == {7: (3, 0.5, -3.0)}
    assert token_shifts(ids, plain, steered) == {}


def test_a_token_counts_if_it_occurs_more_than_twenty_times():
    n = {3: 20, 8: 21, 300: 22}
    ids = [[token] * k for token, k in n.items()]
    plain = [torch.full((k,), -2.0) for k in n.values()]
    shifts = token_shifts(ids, plain, [p + 0.5 for p in plain])
    assert shifts == {8: (21, 0.5, -2.0), 300: (22, 0.5, -2.0)}


def test_token_shifts_are_summed_in_float64():
    # In float32 the small differences would be lost in a sum.
    plain = torch.tensor([-4096.0] + [-1.0] * 4095)
    steered = plain + torch.tensor([1024.0] + [2.0 ** -20] * 4095)
    shifts = token_shifts([[1] * 4096], [plain], [steered], more_than=0)
    assert shifts[1] == (4096, (1024 + 4095 * 2.0 ** -20) / 4096, -(4096 + 4095) / 4096)
    # Nor is the difference itself rounded to float32.
    shifts = token_shifts([[1]], [torch.tensor([-2.0 ** -30])], [torch.tensor([-1.0])], more_than=0)
    assert shifts[1][1] == 2.0 ** -30 - 1


def test_token_shifts_of_a_model_are_its_log_probabilities(tiny):
    model, tokenizer = tiny
    steer = 5 * steering_vector(model, tokenizer, "I", "We", layer=1)
    texts, seen = TEXT * 2, {}
    for text in texts:
        ids = tokenizer.encode(text)
        plain, steered = slow_logprobs(model, ids), slow_logprobs(model, ids, steer)
        for t, token in enumerate(ids[1:]):
            before = plain[t, token].item()
            seen.setdefault(token, []).append((steered[t, token].item() - before, before))
    shifts = token_shifts([tokenizer.encode(text)[1:] for text in texts], logprobs(model, tokenizer, texts),
                          logprobs(model, tokenizer, texts, steer), more_than=3)
    assert set(shifts) == {token for token, rows in seen.items() if len(rows) > 3}
    for token, (n, *means) in shifts.items():
        assert n == len(seen[token])
        expected = [sum(column) / n for column in zip(*seen[token], strict=True)]
        assert means == pytest.approx(expected, abs=1e-4)


# Ranks

# Prompt, answer, and whether the answer has a rank. It has none if it is more than one token, if nothing
# stands before it, or if it is empty.
QUESTIONS = [("I hate", " you", True), (TEXT[0][:40], " and", True), ("We talk about wed", "dings", True),
             ("I love you because you are", " kind", True), ("I", " love", True), ("", "The", False),
             ("We talk about", " wed", False), ("We talk all day long", "; the", False), ("", "", False),
             ("I hate", " xyzzy", False)]


def slow_rank(model, tokenizer, prompt, answer, steer=()):
    """Count the tokens that the model finds likelier than the last one, one by one."""
    ids = tokenizer.encode(prompt + answer)
    p = slow_logprobs(model, ids[:-1], steer)[-1].tolist()
    return sum(other > p[ids[-1]] for other in p)


@pytest.mark.parametrize("max_batch_tokens", [1, 30, 1024])
def test_ranks_are_those_of_each_row_alone(tiny, max_batch_tokens):
    model, tokenizer = tiny
    prompts, answers, ranked = zip(*QUESTIONS, strict=True)
    steer = 4 * steering_vector(model, tokenizer, "I", "We", layer=1)
    results = []
    for steered in ((), steer):
        result = ranks(model, tokenizer, prompts, answers, steered, max_batch_tokens=max_batch_tokens)
        assert [rank is not None for rank in result] == list(ranked)
        for prompt, answer, rank in zip(prompts, answers, result, strict=True):
            if rank is not None:
                assert type(rank) is int
                assert rank == slow_rank(model, tokenizer, prompt, answer, steered)
        results.append(result)
    assert results[0] != results[1]


def test_ranks_do_not_depend_on_the_other_rows(tiny):
    model, tokenizer = tiny
    steer = 4 * steering_vector(model, tokenizer, "I", "We", layer=1)
    questions = [(prompt, answer) for prompt, answer, ranked in QUESTIONS if ranked]

    def ranks_of(rows, steer):
        return ranks(model, tokenizer, *zip(*rows, strict=True), steer)

    alone = [ranks_of([row], steer)[0] for row in questions]
    long = (" ".join(TEXT), " you")
    assert ranks_of(questions, steer) == alone
    assert ranks_of([*questions, long], steer)[:-1] == ranks_of([long, *questions], steer)[1:] == alone
    # Nor does it depend on them what is rejected.
    for rows in ([("I", " love")], [("I", " love"), long]):
        with pytest.raises(ValueError, match="do not fit a prompt of 3 tokens"):
            ranks_of(rows, Steer(0, torch.ones(3, 32)))


def test_the_likeliest_token_has_rank_0_and_the_least_likely_the_last(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("I love")
    p = slow_logprobs(model, ids)[-1]
    # Those that are still one token behind "I love", likeliest first.
    single = [t for t in p.argsort(descending=True).tolist()
              if tokenizer.encode("I love" + tokenizer.pieces([t])[0]) == [*ids, t]]
    result = ranks(model, tokenizer, "I love", [tokenizer.pieces([t])[0] for t in single])
    assert result == sorted(result)
    assert result == [int((p > p[t]).sum()) for t in single]
    assert 0 <= result[0] < result[-1] < model.config.n_vocab


def test_precision_at_k_is_the_share_of_ranks_below_k():
    assert precision_at([0, 3, None, 9, 10], [1, 3, 4, 10, 11]) == [0.25, 0.25, 0.5, 0.75, 1.0]
    assert precision_at([5], [5, 6]) == [0.0, 1.0]
    assert precision_at([0, 5], [10**400]) == [1.0]


@pytest.mark.parametrize(("ranks", "ks", "message"), [
    ([None, None], [1], "no row has a rank"), ([], [1], "no row has a rank"),
    ([math.nan], [1], "a rank must be a whole number"), ("12", [1], "ranks must be a list"),
    ([1], [0], "K must be a whole number, 1 or more"), ([1], "5", "ks must be a list"), ([1], 5, "a list"),
])
def test_precision_needs_whole_numbers(ranks, ks, message):
    with pytest.raises(ValueError, match=message):
        precision_at(ranks, ks)


def test_ranks_of_logits_that_are_not_finite_are_refused(tiny):
    with pytest.raises(ValueError, match="the logits are not finite"):
        ranks(*tiny, ["I"], [" love"], Steer(0, torch.full((32,), 1e38), 10.0))


# Disfluency

def test_disfluency_leaves_out_the_first_token_of_a_continuation(tiny):
    model, tokenizer = tiny
    prompts = ["I hate", "", "We talk about wed", "I love you because", "I", "I hate you because"]
    continuations = [" you because you are", "I love you", "dings all day long", "", " love", TEXT[0]]
    pairs = disfluency(model, tokenizer, prompts, continuations)
    for prompt, text, (loss, n) in zip(prompts, continuations, pairs, strict=True):
        slow = slow_logprobs_of(model, tokenizer, text, (), prompt)[1:]
        assert (loss, n) == (pytest.approx(-sum(slow), rel=1e-4, abs=1e-6), len(slow))
    assert pairs[3] == pairs[4] == (0.0, 0)
    assert disfluency(model, tokenizer, [], []) == []
    assert disfluency(model, tokenizer, ["I"] * 2, ["", " love"]) == [(0.0, 0)] * 2


def test_one_prompt_serves_all_continuations(tiny):
    assert disfluency(*tiny, "I hate", TEXT) == disfluency(*tiny, ["I hate"] * 4, TEXT)
    assert disfluency(*tiny, "I hate", TEXT) != disfluency(*tiny, "I love", TEXT)
    for prompts in (["I hate"] * 3, ["I hate"] * 5):
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts do not fit 4 continuations"):
            disfluency(*tiny, prompts, TEXT)

"""The measurements of measure.py against their definitions: numbers made by hand, and slow loops over the model's own logits."""

import math

import pytest
import torch
from conftest import TEXT

from ministeer import Steer, steering_vector
from ministeer.evaluation.judges import WEDDING_WORDS, count_words
from ministeer.evaluation.measure import (
    disfluency,
    divergence,
    logprobs,
    partial,
    perplexity_ratio,
    precision_at,
    ranks,
    sentences,
    sweep,
    tails,
    token_shifts,
    word_frequency,
)


def slow_logprobs(model, tokenizer, text, steer=()):
    ids = tokenizer.encode(text)
    logits, _ = model(torch.tensor([ids]), steer)
    return torch.stack([logits[0, t].log_softmax(dim=-1)[ids[t + 1]] for t in range(len(ids) - 1)])


@pytest.mark.parametrize("tokens", [1, 40, 1024])
def test_logprobs_are_those_of_each_text_alone(tiny, tokens):
    model, tokenizer = tiny
    steer = [3 * steering_vector(model, tokenizer, "I love you", "I hate", layer=1)]
    for steered in ((), steer):
        for text, got in zip(TEXT, logprobs(model, tokenizer, TEXT, steered, tokens=tokens), strict=True):
            torch.testing.assert_close(got, slow_logprobs(model, tokenizer, text, steered), rtol=1e-4, atol=1e-4)
            assert len(got) == len(tokenizer.encode(text)) - 1
            assert got.dtype == torch.float32


def test_skip_leaves_out_the_first_predictions(tiny):
    for whole, cut in zip(logprobs(*tiny, TEXT), logprobs(*tiny, TEXT, skip=2), strict=True):
        torch.testing.assert_close(whole[2:], cut)


def test_logprobs_refuse_what_does_not_fit(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="no prediction is left of 'I' after skipping 1"):
        logprobs(model, tokenizer, [TEXT[0], "I"], skip=1)
    with pytest.raises(ValueError, match="no prediction is left of ''"):
        logprobs(model, tokenizer, [""])
    with pytest.raises(ValueError, match="do not fit a prompt of 2 tokens"):
        logprobs(model, tokenizer, [TEXT[0], "I"], Steer(0, torch.ones(2, 32)))
    with pytest.raises(ValueError, match="coeff has 4 values"):
        logprobs(model, tokenizer, TEXT, Steer(0, torch.ones(2, 32), torch.ones(4)))
    assert logprobs(model, tokenizer, []) == []


def after(model, ids, steer=()):
    """log p of every token at every position of one text, (T, n_vocab) in float64, from the model's logits."""
    return model(torch.tensor([ids]), steer)[0][0].double().log_softmax(dim=-1)


def slow_after_prompt(model, tokenizer, prompt, text, steer=()):
    """log p of each token of `text` after BOS and `prompt`, one by one."""
    head, tail = tokenizer.encode(prompt), tokenizer.encode(text, bos=False)
    p = after(model, head + tail, steer)
    return [p[len(head) - 1 + t, token].item() for t, token in enumerate(tail)]


@pytest.mark.parametrize("tokens", [1, 1024])
def test_prompts_come_before_the_texts_and_are_left_out(tiny, tokens):
    model, tokenizer = tiny
    prompts = ["We talk about weddings", "", "I hate y", " "]
    texts = [" all day", "I love you", "ou because", TEXT[0]]
    # "I hate y" + "ou" would be " you" in one piece: prompt and text keep tokens of their own.
    assert tokenizer.encode(prompts[2] + texts[2]) != tokenizer.encode(prompts[2]) + tokenizer.encode(texts[2], bos=False)
    steer = 3 * steering_vector(model, tokenizer, "I", "We", layer=1)
    for steered in ((), steer):
        got = logprobs(model, tokenizer, texts, steered, tokens=tokens, prompts=prompts)
        for prompt, text, some in zip(prompts, texts, got, strict=True):
            assert some.tolist() == pytest.approx(slow_after_prompt(model, tokenizer, prompt, text, steered), rel=1e-4, abs=1e-4)
    assert abs(got[0][0].item() - logprobs(model, tokenizer, texts[:1], steer)[0][0].item()) > 1e-3


def test_one_prompt_is_for_all_texts_and_an_empty_one_is_none(tiny):
    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    one = logprobs(*tiny, TEXT, prompts="I hate")
    assert equal(one, logprobs(*tiny, TEXT, prompts=["I hate"] * 4))
    assert not equal(one, logprobs(*tiny, TEXT, prompts=["I hate"] * 3 + ["I love"]))
    assert equal(logprobs(*tiny, TEXT), logprobs(*tiny, TEXT, prompts=""))
    assert equal(logprobs(*tiny, TEXT), logprobs(*tiny, TEXT, prompts=[""] * 4))
    # A text that brings a BOS of its own is the same text.
    assert equal(logprobs(*tiny, TEXT), logprobs(*tiny, ["<|endoftext|>" + text for text in TEXT]))


def test_skip_counts_from_the_text_and_not_from_the_prompt(tiny):
    prompts = ["I hate", "", "We talk about weddings", " "]
    for whole, cut in zip(logprobs(*tiny, TEXT, prompts=prompts), logprobs(*tiny, TEXT, skip=3, prompts=prompts), strict=True):
        assert len(whole) == len(cut) + 3
        torch.testing.assert_close(whole[3:], cut)


def test_logprobs_refuse_prompts_that_do_not_fit(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="no prediction is left of '' after skipping 0"):
        logprobs(model, tokenizer, [TEXT[0], ""], prompts="I hate")
    with pytest.raises(ValueError, match="no prediction is left of ' you' after skipping 1"):
        logprobs(model, tokenizer, [" you"], skip=1, prompts="I hate")
    for prompts in (["I hate"], ["I hate"] * 3, []):
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts do not fit 2 texts"):
            logprobs(model, tokenizer, TEXT[:2], prompts=prompts)
    with pytest.raises(ValueError, match="context of 192"):
        logprobs(model, tokenizer, TEXT, prompts=" you" * 190)
    four = Steer(0, torch.ones(4, 32))
    with pytest.raises(ValueError, match="do not fit a prompt of 4 tokens"):
        logprobs(model, tokenizer, [" you", TEXT[0]], four, prompts="I love")
    assert [len(some) for some in logprobs(model, tokenizer, [" you"], four, prompts="I love you")] == [1]


def test_logits_are_never_held_for_the_whole_batch(tiny, monkeypatch):
    model, tokenizer = tiny
    seen = []
    monkeypatch.setattr(model, "unembed", lambda x, unembed=model.unembed: seen.append(x[..., 0].numel()) or unembed(x))
    logprobs(model, tokenizer, [TEXT[0] * 5] * 6, tokens=10**6)
    assert max(seen) <= 256 < sum(seen)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [3, 1], [2]])
def test_a_sweep_equals_one_steered_run_for_each_cell(tiny, layers):
    model, tokenizer = tiny
    coeffs = [0.0, 30.0, -50.0]
    got = sweep(model, tokenizer, TEXT[0], "I love you", "I hate", layers, coeffs)
    assert got.shape == (len(layers), 3, model.config.n_vocab)
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    for i, l in enumerate(layers):
        for j, c in enumerate(coeffs):
            steer = c * steering_vector(model, tokenizer, "I love you", "I hate", l)
            torch.testing.assert_close(got[i, j], model(ids, steer)[0][0, -1], rtol=1e-4, atol=1e-5)
    assert (got[:, 1] - got[:, 0]).abs().max() > 0.01


def test_a_sweep_runs_no_block_for_a_row_that_does_not_differ_there(tiny, monkeypatch):
    model, tokenizer = tiny
    rows = []
    for block in model.blocks:
        monkeypatch.setattr(block, "forward", lambda x, *rest, forward=block.forward: rows.append(len(x)) or forward(x, *rest))
    sweep(model, tokenizer, TEXT[0], "I love you", "I hate", [1, 3], [1.0, 2.0, 3.0])
    assert rows == [2, 2, 2, 1, 4, 4, 7]       # the pair up to block 3; then the prompt with three more rows at 1 and at 3


@pytest.mark.parametrize(("layers", "coeffs", "says"), [
    ([], [1.0], "one or more layers"), ([1, 1], [1.0], "each once"), ([1], [], "one or more coeffs"), ([4], [1.0], "blocks 0 … 3"),
    ([1], [float("nan")], "finite"),
])
def test_sweeps_without_meaning(tiny, layers, coeffs, says):
    with pytest.raises(ValueError, match=says):
        sweep(*tiny, TEXT[0], "I love you", "I hate", layers, coeffs)


PLAIN = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
STEERED = [torch.tensor([-0.5, -1.0]), torch.tensor([-4.0])]         # differences 0.5, 1 and -1


def test_the_perplexity_ratio_of_hand_made_numbers():
    assert perplexity_ratio(PLAIN, STEERED) == pytest.approx(math.exp(-0.5 / 3))
    assert perplexity_ratio(PLAIN, STEERED, mean_of="texts") == pytest.approx(math.exp(-(0.75 - 1) / 2))
    for mean_of in ("tokens", "texts"):
        assert perplexity_ratio(PLAIN, PLAIN, mean_of) == 1.0
        assert perplexity_ratio(PLAIN, STEERED, mean_of) * perplexity_ratio(STEERED, PLAIN, mean_of) == pytest.approx(1.0)


def test_the_perplexity_ratio_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="mean_of 'words'; possible: 'tokens', 'texts'"):
        perplexity_ratio(PLAIN, STEERED, mean_of="words")
    with pytest.raises(ValueError, match="argument"):
        perplexity_ratio(PLAIN, STEERED[:1])


def test_word_frequency_splits_at_white_space_alone():
    words = {"wedding", "bride"}
    assert word_frequency("A wedding, a Wedding\nand  a BRIDE.", words) == 1 / 7        # "wedding," and "bride." do not count
    assert word_frequency("wedding bride wedding", words) == 1.0
    assert word_frequency("weddings brides", words) == 0.0
    assert word_frequency("", words) == word_frequency(" \n", words) == 0.0


@pytest.mark.parametrize(("text", "parts"), [
    ("He left. She stayed! Why?  Nobody\nknows", ["He left.", "She stayed!", "Why?", "Nobody\nknows"]),
    ('"Go." She went. (He did not.) So', ['"Go."', "She went.", "(He did not.)", "So"]),
    ("“Go.” She said ‘No!’ Then [sic.] nothing", ["“Go.”", "She said ‘No!’", "Then [sic.]", "nothing"]),
    ("It costs 3.50 at example.org, e.g., today.", ["It costs 3.50 at example.org, e.g., today."]),
    ("Wait... what?! Yes.\n\nNo.", ["Wait...", "what?!", "Yes.", "No."]),
    ("  One.  ", ["One."]), ("", []), (" \n ", []),
])
def test_sentences(text, parts):
    assert sentences(text) == parts


def test_token_shifts_of_hand_made_numbers():
    ids = [[7, 5, 7], torch.tensor([7, 9])]
    plain = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-5.0, -8.0])]
    steered = [torch.tensor([-0.5, -2.25, -3.0]), torch.tensor([-4.0, -9.0])]
    assert token_shifts(ids, plain, steered, more_than=0) == {5: (1, -0.25, -2.0), 7: (3, 0.5, -3.0), 9: (1, -1.0, -8.0)}
    assert token_shifts(ids, plain, steered, more_than=2) == {7: (3, 0.5, -3.0)}
    assert token_shifts(ids, plain, steered) == {}


def test_a_token_counts_if_it_occurs_more_than_twenty_times():
    n = {3: 20, 8: 21, 300: 22}
    ids = [[token] * k for token, k in n.items()]
    plain = [torch.full((k,), -2.0) for k in n.values()]
    got = token_shifts(ids, plain, [p + 0.5 for p in plain])
    assert got == {8: (21, 0.5, -2.0), 300: (22, 0.5, -2.0)}


def test_token_shifts_are_summed_in_float64():
    plain = torch.tensor([-4096.0] + [-1.0] * 4095)
    steered = plain + torch.tensor([1024.0] + [2.0 ** -20] * 4095)      # in float32 the small ones would be lost in a sum
    n, shift, before = token_shifts([[1] * 4096], [plain], [steered], more_than=0)[1]
    assert (n, shift, before) == (4096, (1024 + 4095 * 2.0 ** -20) / 4096, -(4096 + 4095) / 4096)
    # Nor is the difference itself rounded to float32.
    assert token_shifts([[1]], [torch.tensor([-2.0 ** -30])], [torch.tensor([-1.0])], more_than=0)[1][1] == 2.0 ** -30 - 1


def test_token_shifts_of_a_model_are_its_log_probabilities(tiny):
    model, tokenizer = tiny
    steer = 5 * steering_vector(model, tokenizer, "I", "We", layer=1)
    seen = {}
    for text in TEXT * 2:
        ids = tokenizer.encode(text)
        a, b = after(model, ids), after(model, ids, steer)
        for t, token in enumerate(ids[1:]):
            seen.setdefault(token, []).append((b[t, token].item() - a[t, token].item(), a[t, token].item()))
    got = token_shifts([tokenizer.encode(text)[1:] for text in TEXT * 2], logprobs(model, tokenizer, TEXT * 2),
                       logprobs(model, tokenizer, TEXT * 2, steer), more_than=3)
    assert set(got) == {token for token, some in seen.items() if len(some) > 3}
    for token, (n, shift, before) in got.items():
        assert n == len(seen[token])
        assert shift == pytest.approx(sum(some[0] for some in seen[token]) / n, abs=1e-4)
        assert before == pytest.approx(sum(some[1] for some in seen[token]) / n, abs=1e-4)


def normal(n):
    """n numbers at the quantiles of a standard normal distribution."""
    return torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def test_the_tails_of_a_normal_sample_are_one():
    generator = torch.Generator().manual_seed(0)
    for values in (normal(10001), 3 * normal(10001) - 70, (torch.randn(50000, generator=generator) / 9 + 2).tolist()):
        assert tails(values) == (pytest.approx(1, abs=0.05), pytest.approx(1, abs=0.05))
    assert tails(normal(10001), part=0.1) == (pytest.approx(1, abs=0.01), pytest.approx(1, abs=0.01))


def test_a_heavy_tail_is_seen_on_its_own_side():
    right = torch.where(normal(10001) > 1.5, 2 * normal(10001), normal(10001))      # reaches twice as far, and the quartiles stay
    assert tails(right) == (pytest.approx(1, abs=0.01), pytest.approx(2, abs=0.02))
    assert tails(-right) == (pytest.approx(2, abs=0.02), pytest.approx(1, abs=0.01))
    left, both = tails(normal(10001) ** 3)
    assert left == pytest.approx(both)
    assert left > 3


def test_tails_of_values_that_have_none():
    assert all(x > 0 for x in tails([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(ValueError, match="tails need 4 values or more; given: 3"):
        tails([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="half of the values are 0.0"):
        tails([0.0] * 30 + [1.0])


# The answer is one token, or part of one; and the rows that have no rank: more tokens than one, nothing before it, not there at all.
QUESTIONS = [("I hate", " you"), (TEXT[0][:40], " and"), ("We talk about wed", "dings"), ("I love you because you are", " kind"),
             ("We talk about", " wed"), ("I", " love"), ("We talk all day long", "; the"), ("", "The"), ("I hate", " xyzzy"), ("", "")]
RANKED = [True, True, True, True, False, True, False, False, False, False]


def slow_rank(model, tokenizer, prompt, answer, steer=()):
    """Count the tokens that the model finds likelier than the last one, one by one."""
    ids = tokenizer.encode(prompt + answer)
    p = after(model, ids[:-1], steer)[-1].tolist()
    return sum(other > p[ids[-1]] for other in p)


@pytest.mark.parametrize("tokens", [1, 30, 1024])
def test_ranks_are_those_of_each_row_alone(tiny, tokens):
    model, tokenizer = tiny
    prompts, answers = zip(*QUESTIONS, strict=True)
    steer = 4 * steering_vector(model, tokenizer, "I", "We", layer=1)
    plain, steered = (ranks(model, tokenizer, list(prompts), list(answers), s, tokens=tokens) for s in ((), steer))
    assert plain != steered
    for s, got in (((), plain), (steer, steered)):
        assert [rank is not None for rank in got] == RANKED
        assert all(type(rank) is int for rank in got if rank is not None)
        for (prompt, answer), rank in zip(QUESTIONS, got, strict=True):
            assert rank is None or rank == slow_rank(model, tokenizer, prompt, answer, s)


def test_ranks_do_not_depend_on_the_rows_beside_them(tiny):
    model, tokenizer = tiny
    steer = 4 * steering_vector(model, tokenizer, "I", "We", layer=1)
    some = [row for row, ranked in zip(QUESTIONS, RANKED, strict=True) if ranked]
    alone = [ranks(model, tokenizer, [prompt], [answer], steer)[0] for prompt, answer in some]
    long = (" ".join(TEXT), " you")
    for rows in (some, [*some, long], [long, *some]):
        got = ranks(model, tokenizer, [prompt for prompt, _ in rows], [answer for _, answer in rows], steer)
        assert [rank for row, rank in zip(rows, got, strict=True) if row != long] == alone
    # Nor does it depend on them what is refused.
    three = Steer(0, torch.ones(3, 32))
    for rows in ([("I", " love")], [("I", " love"), long]):
        with pytest.raises(ValueError, match="do not fit a prompt of 3 tokens"):
            ranks(model, tokenizer, [prompt for prompt, _ in rows], [answer for _, answer in rows], three)


def test_the_likeliest_token_has_rank_0_and_the_least_likely_the_last(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("I love")
    p = after(model, ids)[-1]
    # Those that are still one token behind "I love", likeliest first.
    single = [t for t in p.argsort(descending=True).tolist() if tokenizer.encode("I love" + tokenizer.pieces([t])[0]) == [*ids, t]]
    got = ranks(model, tokenizer, ["I love"] * len(single), [tokenizer.pieces([t])[0] for t in single])
    assert got == sorted(got)
    assert got == [int((p > p[t]).sum()) for t in single]
    assert 0 <= got[0] < got[-1] < model.config.n_vocab


def test_precision_at():
    assert precision_at([0, 3, None, 9, 10], [1, 3, 4, 10, 11]) == [0.25, 0.25, 0.5, 0.75, 1.0]
    assert precision_at([5], [5, 6]) == [0.0, 1.0]
    for some in ([None, None], []):
        with pytest.raises(ValueError, match="no row has a rank"):
            precision_at(some, [1])


def slow_divergence(model, tokenizer, text, steer, skip):
    """KL and entropy by their formulas, one position and one token at a time."""
    ids = tokenizer.encode(text)
    p, q = after(model, ids).tolist(), after(model, ids, steer).tolist()
    kl = entropy = 0.0
    for t in range(skip, len(ids)):
        for a, b in zip(p[t], q[t], strict=True):
            kl += math.exp(a) * (a - b)
            entropy -= math.exp(a) * a
    return kl / (len(ids) - skip), entropy / (len(ids) - skip)


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("vector", ["pair", "everywhere"])
def test_divergence_is_its_formula(tiny, vector, skip):
    model, tokenizer = tiny
    pair = steering_vector(model, tokenizer, "I love", "We", layer=1)
    steer = 4 * pair if vector == "pair" else Steer(2, pair.vector[0])
    got = divergence(model, tokenizer, TEXT[1:], steer, skip=skip)
    assert len(got) == 3
    for text, (kl, entropy) in zip(TEXT[1:], got, strict=True):
        slow = slow_divergence(model, tokenizer, text, steer, skip)
        assert (kl, entropy) == (pytest.approx(slow[0], rel=1e-3, abs=1e-7), pytest.approx(slow[1], rel=1e-3))
        assert kl > 1e-5
        assert 0 < entropy <= math.log(model.config.n_vocab)
    for a, b in zip(got, divergence(model, tokenizer, TEXT[1:], steer, skip=skip, rows=3), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_nothing_diverges_without_steering(tiny):
    model, tokenizer = tiny
    steer = 0 * steering_vector(model, tokenizer, "I love", "We", layer=1)
    for some in (steer, ()):
        assert [kl for kl, _ in divergence(model, tokenizer, TEXT, some)] == [0.0] * 4


def test_divergence_refuses_a_text_with_no_position_left(tiny):
    model, tokenizer = tiny
    assert len(divergence(model, tokenizer, ["I hate"], (), skip=2)) == 1
    with pytest.raises(ValueError, match="no position is left of 'I hate' after skipping 3"):
        divergence(model, tokenizer, [TEXT[0], "I hate"], (), skip=3)
    with pytest.raises(ValueError, match="do not fit a prompt of 3 tokens"):
        divergence(model, tokenizer, [TEXT[0], "I hate"], Steer(0, torch.ones(3, 32)))


def test_disfluency_leaves_out_the_first_token_of_a_continuation(tiny):
    model, tokenizer = tiny
    prompts = ["I hate", "", "We talk about wed", "I love you because", "I", "I hate you because"]
    continuations = [" you because you are", "I love you", "dings all day long", "", " love", TEXT[0]]
    got = disfluency(model, tokenizer, prompts, continuations)
    for prompt, text, (loss, n) in zip(prompts, continuations, got, strict=True):
        slow = slow_after_prompt(model, tokenizer, prompt, text)[1:]
        assert (loss, n) == (pytest.approx(-sum(slow), rel=1e-4, abs=1e-6), len(slow))
    assert got[3] == got[4] == (0.0, 0)
    assert disfluency(model, tokenizer, [], []) == []
    assert disfluency(model, tokenizer, ["I"] * 2, ["", " love"]) == [(0.0, 0)] * 2


def test_one_prompt_is_for_all_continuations(tiny):
    model, tokenizer = tiny
    assert disfluency(model, tokenizer, "I hate", TEXT) == disfluency(model, tokenizer, ["I hate"] * 4, TEXT)
    assert disfluency(model, tokenizer, "I hate", TEXT) != disfluency(model, tokenizer, "I love", TEXT)
    for prompts in (["I hate"] * 3, ["I hate"] * 5):
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts do not fit 4 continuations"):
            disfluency(model, tokenizer, prompts, TEXT)


def test_a_partial_steer_keeps_the_first_dimensions():
    steer = Steer(2, torch.arange(1.0, 17.0).view(2, 8), coeff=3.0, start=4)
    for fraction, n in ((0, 0), (0.25, 2), (0.5, 4), (0.9, 7), (1, 8)):
        got = partial(steer, fraction)
        assert got.vector.tolist() == [[*row[:n], *[0.0] * (8 - n)] for row in steer.vector.tolist()]
        assert (got.layer, got.coeff, got.start) == (2, 3.0, 4)
    assert steer.vector.min() == 1
    assert partial(Steer(0, torch.ones(4)), 0.5).vector.tolist() == [1, 1, 0, 0]
    assert partial(Steer(0, torch.ones(4, dtype=torch.bfloat16)), 0.5).vector.dtype == torch.bfloat16
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction must be from 0 to 1"):
            partial(steer, fraction)


def test_the_nine_wedding_words_are_matched_exactly():
    assert len(WEDDING_WORDS) == 9
    assert count_words("The Bride's wedding, a WEDDING; wed/married") == 5
    assert count_words("weddingcake brides unmarried wed_ding") == 0
    assert count_words("") == 0

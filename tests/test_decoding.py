"""The rivals: each formula against float64, its limit cases, and generation against reading everything anew for every token."""

import copy
import math

import pytest
import torch
from conftest import TEXT

import ministeer
from ministeer import KVCache
from ministeer.baselines import logits as decoding
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.baselines.logits import LogitMixer, Branch, generate
from ministeer.generation import Sampling, choose, uniforms
from ministeer.steering import steering_vector

PROMPTS = ["I love you", "The gulls and the harbour", "We talk all day"]
PREFIX = "The bride was late:"
LONG = {"max_new_tokens": 8, "n": 2, "seed": 3}


@pytest.fixture(scope="module")
def logps():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 50, generator=generator, dtype=torch.float64).mul(2).log_softmax(dim=-1) for _ in range(4)]


@pytest.fixture(scope="module")
def classifier(tiny):
    torch.manual_seed(0)
    model = PrefixClassifier(tiny[0].config.n_vocab, 8, 12).requires_grad_(False)
    for p in model.parameters():
        p.mul_(4)
    return model


def unlike(model):
    """Another model with the same tokenizer."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for p in changed.parameters():
        p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return changed


def methods(tiny, classifier):
    steer = steering_vector(*tiny, " love", " hate", 1)
    everywhere = ministeer.Steer(2, 3 * steer.vector[0])
    return {"unsteered": decoding.unsteered(), "prompted": decoding.prompted(PREFIX), "preadd": decoding.preadd(PREFIX),
            "lma": decoding.lma(PREFIX, base="A letter"), "weighted": decoding.weighted([Branch(), Branch(PREFIX), Branch("No")], [2, -0.5, -0.5]),
            "self_debias": decoding.self_debias(PREFIX, 10, 0), "six": decoding.self_debias(), "fudge": decoding.fudge(classifier, 3, toward=0),
            "lma_classifier": decoding.lma_classifier(PREFIX, classifier, 9, 2, top=7), "act_add": decoding.act_add(steer),
            "act_add at every position": decoding.preadd(PREFIX).steered([everywhere]),
            "another model": decoding.weighted([Branch(), Branch(PREFIX, model=unlike(tiny[0]))], [1, 1]),
            "both": decoding.lma(PREFIX).steered(steer)}


NAMES = ["unsteered", "prompted", "preadd", "lma", "weighted", "self_debias", "six", "fudge", "lma_classifier",
                                             "act_add", "act_add at every position", "another model", "both"]


def log_c(guide, ids):
    score = guide.classifier.score(guide.classifier.read(torch.tensor([ids])))
    return torch.nn.functional.logsigmoid(score if guide.toward else -score)


def slowly(model, tokenizer, prompt, k, method, sampling):
    """The tokens of continuation k, every stream read from its beginning for every token, no cache and no batch."""
    ids = tokenizer.encode(prompt)
    draws = torch.from_numpy(uniforms(sampling, ids, k))
    for t in range(sampling.max_new_tokens):
        logps = []
        for stream in method.streams:
            whole = tokenizer.encode(stream.prefix + "\n" if stream.prefix else "") + ids[1:]
            logits, _ = (stream.model or model)(torch.tensor([whole]), stream.steer)
            logps.append(logits[:, -1].float().log_softmax(dim=-1))
        combined = method.combine(logps)
        if method.guide:
            for i in combined[0].topk(method.guide.top).indices.tolist():
                combined[0, i] += method.guide.strength * (log_c(method.guide, [*ids, i]) - log_c(method.guide, ids)).item()
        ids.append(int(choose(combined, torch.tensor([ids]), draws[t:t + 1], sampling)))
    return ids


@pytest.mark.parametrize("name", NAMES)
def test_cached_and_batched_is_the_slow_way_token_for_token(name, tiny, classifier):
    model, tokenizer = tiny
    method = methods(tiny, classifier)[name]
    sampling = Sampling(top_p=0.9, freq_penalty=0.5, max_new_tokens=8, seed=3)
    texts = generate(model, tokenizer, PROMPTS, method, top_p=0.9, freq_penalty=0.5, **LONG)
    for prompt, row in zip(PROMPTS, texts, strict=True):
        for k, text in enumerate(row):
            ids = slowly(model, tokenizer, prompt, k, method, sampling)
            new = ids[len(tokenizer.encode(prompt)):]
            end = next((i for i, token in enumerate(new) if token in tokenizer.eos_ids), None)
            assert text == tokenizer.decode(tokenizer.encode(prompt) + new[:end])[len(tokenizer.decode(tokenizer.encode(prompt))):]


def test_the_list_of_names_is_whole(tiny, classifier):
    assert list(methods(tiny, classifier)) == NAMES


@pytest.mark.parametrize("name", ["unsteered", "act_add"])
def test_without_a_second_stream_it_is_the_generation_of_the_package(name, tiny, classifier):
    model, tokenizer = tiny
    method = methods(tiny, classifier)[name]
    steer = method.streams[0].steer
    assert generate(model, tokenizer, PROMPTS, method, **LONG) == ministeer.generate(model, tokenizer, PROMPTS, 2, 8, steer, seed=3)


@pytest.mark.parametrize("make", [lambda s: decoding.preadd(PREFIX, s), lambda s: decoding.lma(PREFIX, s),
                                  lambda s: decoding.self_debias(PREFIX, s, 0.01), lambda s: decoding.self_debias(strength=s),
                                  lambda s: decoding.weighted([Branch(), Branch(PREFIX)], [1, s])])
def test_strength_0_is_exactly_unsteered(make, tiny, logps):
    plain = generate(*tiny, PROMPTS, decoding.unsteered(), **LONG)
    method = make(0.0)
    assert generate(*tiny, PROMPTS, method, **LONG) == plain
    some = (logps * 2)[:len(method.streams)]
    assert torch.equal(method.combine(some), some[0])


def test_a_guide_of_strength_0_is_exactly_unsteered(tiny, classifier):
    plain = generate(*tiny, PROMPTS, decoding.unsteered(), **LONG)
    assert generate(*tiny, PROMPTS, decoding.fudge(classifier, 0.0), **LONG) == plain
    assert generate(*tiny, PROMPTS, decoding.fudge(classifier, 9.0), **LONG) != plain


@pytest.mark.parametrize("make", [decoding.preadd, decoding.lma, decoding.self_debias])
def test_the_same_prefix_twice_is_exactly_that_prefix(make, tiny):
    assert generate(*tiny, PROMPTS, make(PREFIX, base=PREFIX), **LONG) == generate(*tiny, PROMPTS, decoding.prompted(PREFIX), **LONG)
    assert generate(*tiny, PROMPTS, make(""), **LONG) == generate(*tiny, PROMPTS, decoding.unsteered(), **LONG)


def test_each_formula_in_float64(logps):
    p, q, r, _ = logps
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(decoding.preadd("x", 1.5).combine([p, q]), (p - 0.6 * q) / 0.4, **close)
    torch.testing.assert_close(decoding.lma("x", 24).combine([p, q]), (p - 0.96 * torch.maximum(p, q)) / 0.04, **close)
    torch.testing.assert_close(decoding.lma("x", 9).combine([p, q]), (p - 0.9 * torch.maximum(p, q)) / 0.1, **close)
    torch.testing.assert_close(decoding.self_debias("x", 10, 0).combine([p, q]), p + 10 * (p.exp() - q.exp()).clamp(max=0), **close)
    torch.testing.assert_close(decoding.weighted([Branch()] * 3, [1, 2, -1]).combine([p, q, r]), (p + 2 * q - r) / 2, **close)
    for b in range(3):          # Schick et al., equations 3 and 4, one token after the other
        wanted = []
        for t in range(50):
            pt, worst = p[b, t].exp().item(), max(q[b, t].exp().item(), r[b, t].exp().item())
            wanted.append(pt * max(1.0 if pt >= worst else math.exp(-50 * (worst - pt)), 0.01))
        given = decoding.self_debias(["x", "y"]).combine([p, q, r])[b].exp()
        torch.testing.assert_close(given, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_a_guide_changes_the_likeliest_tokens_by_bayes_rule_and_no_other(tiny, classifier):
    ids = torch.tensor([tiny[1].encode(PROMPTS[0]), tiny[1].encode(PROMPTS[0])[::-1]])
    logits = torch.randn(2, tiny[0].config.n_vocab, generator=torch.Generator().manual_seed(1))
    for toward in (0, 1):
        guide = decoding.Guide(classifier, 2.0, 5, toward)
        changed = guide.change(logits, classifier.read(ids))
        for b in range(2):
            top = set(logits[b].topk(5).indices.tolist())
            for t in top | set(range(40)):
                longer = torch.cat([ids[b:b + 1], torch.tensor([[t]])], dim=1)
                c = [torch.sigmoid(classifier.score(classifier.read(some))).item() for some in (ids[b:b + 1], longer)]
                c = c if toward else [1 - x for x in c]
                wanted = logits[b, t] + (2 * math.log(c[1] / c[0]) if t in top else 0)
                assert changed[b, t].item() == pytest.approx(wanted.item(), abs=1e-3)


def test_a_classifier_goes_on_from_its_state(classifier):
    ids = torch.tensor([[0, 5, 6, 7], [0, 9, 8, 7]])
    whole = classifier.read(ids)
    torch.testing.assert_close(classifier.read(ids[:, 2:], classifier.read(ids[:, :2])), whole)
    scores = classifier.score_next(whole, torch.tensor([[1, 2, 3], [3, 2, 1]]))
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores[1, 0], classifier.score(classifier.read(torch.tensor([[0, 9, 8, 7, 3]])))[0])


def test_two_streams_run_as_one_batch(tiny):
    model, _ = tiny
    calls = []
    handle = model.blocks[0].register_forward_hook(lambda module, given, result: calls.append(tuple(given[0].shape[:2])))
    generate(*tiny, PROMPTS[0], decoding.preadd(PREFIX), n=3, max_new_tokens=4)
    handle.remove()
    assert [rows for rows, T in calls if T == 1] == [6, 6, 6]
    assert len(calls) == 5              # the two prompts, once each, and three steps


def test_prompts_of_every_length_run_as_one_batch_and_no_more_than_fit(tiny):
    model, _ = tiny
    calls = []
    handle = model.blocks[0].register_forward_hook(lambda module, given, result: calls.append(tuple(given[0].shape[:2])))
    method = decoding.preadd(PREFIX)
    all_at_once = generate(*tiny, PROMPTS, method, **LONG)
    assert [rows for rows, T in calls if T == 1] == [12] * 7
    calls.clear()
    assert generate(*tiny, PROMPTS, method, tokens=60, **LONG) == all_at_once
    handle.remove()
    assert {rows for rows, T in calls if T == 1} == {4}            # two rows of one length, two streams


def test_caches_of_different_lengths_attend_apart(tiny):
    """Row by row what each cache gives alone."""
    generator = torch.Generator().manual_seed(0)
    pairs = [[KVCache(9, batch=2), KVCache(5, batch=1)] for _ in "ab"]
    for i, T in enumerate((6, 2)):
        k = torch.randn(2 - i, 2, T, 8, generator=generator)
        for pair in pairs:
            pair[i].extend(0, k, -k)
            pair[i].length = T
    q, k = torch.randn(3, 4, 1, 8, generator=generator), torch.randn(3, 2, 1, 8, generator=generator)
    together = decoding.Caches(pairs[0]).attend(0, q, k, 2 * k)
    alone = [pairs[1][i].attend(0, q[rows], k[rows], 2 * k[rows]) for i, rows in enumerate((slice(2), slice(2, 3)))]
    torch.testing.assert_close(together, torch.cat(alone))


def test_faults_say_what_is_possible(tiny, classifier):
    model, tokenizer = tiny
    steer = steering_vector(model, tokenizer, " love", " hate", 1)
    with pytest.raises(ValueError, match="n must be a whole number, 1 or more; given: 0"):
        generate(model, tokenizer, "x", decoding.unsteered(), n=0)
    for prefixes, epsilon in (((), 0.01), ("x", -1), ("x", 2)):
        with pytest.raises(ValueError, match="one or more prefixes and an epsilon from 0 to 1"):
            decoding.self_debias(prefixes, epsilon=epsilon)
    with pytest.raises(ValueError, match="as many as streams"):
        decoding.weighted([Branch()], [1, 2])
    with pytest.raises(ValueError, match="a sum above 0"):
        decoding.weighted([Branch(), Branch()], [1, -1])
    with pytest.raises(ValueError, match="do not fit a context of"):
        generate(model, tokenizer, "x", decoding.prompted(" ".join(TEXT)), max_new_tokens=150)
    with pytest.raises(ValueError, match="do not fit a prompt of"):
        generate(model, tokenizer, "", decoding.act_add(steer), max_new_tokens=2)
    with pytest.raises(ValueError, match="a number as coeff"):
        generate(model, tokenizer, "x y z", decoding.act_add(steer.scaled(torch.ones(1))), max_new_tokens=2)
    with pytest.raises(ValueError, match="the classifier reads 9 tokens"):
        generate(model, tokenizer, "x", decoding.fudge(PrefixClassifier(9, 2, 2)), max_new_tokens=2)
    other = type(model)(model.config.__class__(**{**vars(model.config), "n_vocab": 300}))
    with pytest.raises(ValueError, match="share a tokenizer"):
        generate(model, tokenizer, "x", LogitMixer((Branch(), Branch(model=other)), lambda logps: logps[0]), max_new_tokens=2)


def test_progress_stop_and_a_single_prompt(tiny):
    model, tokenizer = tiny
    done = []
    texts = generate(model, tokenizer, PROMPTS[0], decoding.preadd(PREFIX), n=3, max_new_tokens=5, stop="e", progress=done.append)
    assert len(texts) == 3
    assert not any("e" in text for text in texts)
    assert sum(done) == 15

"""The baselines: formulas against float64, limit cases, and generation against a slow run without cache."""

import copy
import inspect
import math
from dataclasses import replace

import pytest
import torch
from conftest import TEXT

import ministeer
from ministeer.baselines import logits as mixers
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.baselines.logits import Branch, LogitMixer, generate
from ministeer.generation import Sampling, sample_token, uniforms
from ministeer.steering import steering_vector

PROMPTS = ["I love you", "The gulls and the harbour", "We talk all day"]
PREFIX = "The bride was late:"
LONG = {"max_new_tokens": 8, "n": 2, "seed": 4}


@pytest.fixture(scope="module")
def logps():
    """Four log-probabilities (3, 50) in float64."""
    generator = torch.Generator().manual_seed(0)
    return list((2 * torch.randn(4, 3, 50, generator=generator, dtype=torch.float64)).log_softmax(dim=-1))


@pytest.fixture(scope="module")
def classifier(tiny):
    torch.manual_seed(0)
    model = PrefixClassifier(tiny[0].config.n_vocab, 8, 12).requires_grad_(False)
    for p in model.parameters():
        p.mul_(4)
    return model


def perturbed(model):
    """Another model with the same tokenizer."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for p in changed.parameters():
        p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return changed


def mixers_to_try(tiny, classifier):
    steer = steering_vector(*tiny, " love", " hate", 1)
    everywhere = ministeer.Steer(2, 3 * steer.vector[0])
    return {
        "unsteered": mixers.unsteered(),
        "prompted": mixers.prompted(PREFIX),
        "preadd": mixers.preadd(PREFIX),
        "lma": mixers.lma(PREFIX, base="A letter"),
        "weighted": mixers.weighted([Branch(), Branch(PREFIX), Branch("No")], [2, -0.5, -0.5]),
        "self_debias": mixers.self_debias(PREFIX, 10, 0),
        "self_debias with six prefixes": mixers.self_debias(),
        "fudge": mixers.fudge(classifier, 3, toward=0),
        "lma_classifier": mixers.lma_classifier(PREFIX, classifier, 9, 2, top=7),
        "act_add": mixers.act_add(steer),
        "preadd, steered at every position": mixers.preadd(PREFIX).steered([everywhere]),
        "another model": mixers.weighted([Branch(), Branch(PREFIX, model=perturbed(tiny[0]))], [1, 1]),
        "lma, steered": mixers.lma(PREFIX).steered(steer),
    }


NAMES = ["unsteered", "prompted", "preadd", "lma", "weighted", "self_debias", "self_debias with six prefixes",
         "fudge", "lma_classifier", "act_add", "preadd, steered at every position", "another model",
         "lma, steered"]


def log_of_classifier(guide, ids):
    score = guide.classifier.score(guide.classifier.read(torch.tensor([ids])))
    return torch.nn.functional.logsigmoid(score if guide.toward else -score)


def slowly(model, tokenizer, prompt, k, mixer, sampling):
    """The ids of continuation k, where every branch is read from its beginning for every token."""
    ids = tokenizer.encode(prompt)
    draws = torch.from_numpy(uniforms(sampling, ids, k))
    for t in range(sampling.max_new_tokens):
        logps = []
        for branch in mixer.branches:
            prefix = tokenizer.encode(branch.prefix + "\n" if branch.prefix else "")
            logits, _ = (branch.model or model)(torch.tensor([prefix + ids[1:]]), branch.steer)
            logps.append(logits[:, -1].float().log_softmax(dim=-1))
        combined, guide = mixer.combine(logps), mixer.guide
        if guide:
            before = log_of_classifier(guide, ids)
            for i in combined[0].topk(guide.top).indices.tolist():
                combined[0, i] += guide.strength * (log_of_classifier(guide, [*ids, i]) - before).item()
        ids.append(int(sample_token(combined, torch.tensor([ids]), draws[t:t + 1], sampling, 384)))
    return ids


@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_a_slow_run_without_cache_and_batch(name, tiny, classifier):
    model, tokenizer = tiny
    mixer = mixers_to_try(tiny, classifier)[name]
    sampling = Sampling(top_p=0.9, freq_penalty=0.5, max_new_tokens=8, seed=4)
    texts = generate(model, tokenizer, PROMPTS, mixer, top_p=0.9, freq_penalty=0.5, **LONG)
    for prompt, row in zip(PROMPTS, texts, strict=True):
        n = len(tokenizer.encode(prompt))
        for k, text in enumerate(row):
            ids = slowly(model, tokenizer, prompt, k, mixer, sampling)
            end = next((i for i, token in enumerate(ids) if i >= n and token in tokenizer.eos_ids), None)
            assert tokenizer.decode(ids[:n]) + text == tokenizer.decode(ids[:end])


def test_every_mixer_is_tried(tiny, classifier):
    assert list(mixers_to_try(tiny, classifier)) == NAMES


@pytest.mark.parametrize("name", ["unsteered", "act_add"])
def test_one_branch_equals_ministeer_generate(name, tiny, classifier):
    model, tokenizer = tiny
    mixer = mixers_to_try(tiny, classifier)[name]
    wanted = ministeer.generate(model, tokenizer, PROMPTS, 2, 8, mixer.branches[0].steer, seed=4)
    assert generate(model, tokenizer, PROMPTS, mixer, **LONG) == wanted


@pytest.mark.parametrize("make", [
    lambda strength: mixers.preadd(PREFIX, strength),
    lambda strength: mixers.lma(PREFIX, strength),
    lambda strength: mixers.self_debias(PREFIX, strength, 0.01),
    lambda strength: mixers.self_debias(strength=strength),
    lambda strength: mixers.weighted([Branch(), Branch(PREFIX)], [1, strength]),
])
def test_strength_0_equals_unsteered(make, tiny, logps):
    plain = generate(*tiny, PROMPTS, mixers.unsteered(), **LONG)
    mixer = make(0.0)
    assert generate(*tiny, PROMPTS, mixer, **LONG) == plain
    of_branches = (logps * 2)[:len(mixer.branches)]
    assert torch.equal(mixer.combine(of_branches), of_branches[0])
    assert not torch.equal(make(5.0).combine(of_branches), of_branches[0])


def test_a_guide_of_strength_0_equals_unsteered(tiny, classifier):
    plain = generate(*tiny, PROMPTS, mixers.unsteered(), **LONG)
    assert generate(*tiny, PROMPTS, mixers.fudge(classifier, 0.0), **LONG) == plain
    assert generate(*tiny, PROMPTS, mixers.fudge(classifier, 9.0), **LONG) != plain


@pytest.mark.parametrize("make", [mixers.preadd, mixers.lma, mixers.self_debias])
def test_prefix_and_base_equal_give_the_prompted_texts(make, tiny):
    def texts(mixer):
        return generate(*tiny, PROMPTS, mixer, **LONG)
    assert texts(make(PREFIX, base=PREFIX)) == texts(mixers.prompted(PREFIX))
    assert texts(make("")) == texts(mixers.unsteered())


def test_formulas_in_float64(logps):
    p, q, r, _ = logps
    higher = torch.maximum(p, q)
    for mixer, given, wanted in (
        (mixers.preadd("x", 1.5), [p, q], (p - 0.6 * q) / 0.4),
        (mixers.lma("x", 24), [p, q], (p - 0.96 * higher) / 0.04),
        (mixers.lma("x", 9), [p, q], (p - 0.9 * higher) / 0.1),
        (mixers.self_debias("x", 10, 0), [p, q], p + 10 * (p.exp() - q.exp()).clamp(max=0)),
        (mixers.weighted([Branch()] * 3, [1, 2, -1]), [p, q, r], (p + 2 * q - r) / 2),
    ):
        torch.testing.assert_close(mixer.combine(given), wanted, rtol=1e-12, atol=1e-12)
    for b in range(3):          # Schick et al., equations 3 and 4, one token after the other
        wanted = []
        for t in range(50):
            pt, worst = p[b, t].exp().item(), max(q[b, t].exp().item(), r[b, t].exp().item())
            wanted.append(pt * max(1.0 if pt >= worst else math.exp(-50 * (worst - pt)), 0.01))
        given = mixers.self_debias(["x", "y"]).combine([p, q, r])[b].exp()
        torch.testing.assert_close(given, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_a_guide_changes_only_the_likeliest_tokens_by_bayes_rule(tiny, classifier):
    ids = torch.tensor([tiny[1].encode(PROMPTS[0]), tiny[1].encode(PROMPTS[0])[::-1]])
    logits = torch.randn(2, tiny[0].config.n_vocab, generator=torch.Generator().manual_seed(1))
    for toward in (0, 1):
        guide = mixers.Guide(classifier, 2.0, 5, toward)
        changed = guide.change(logits, classifier.read(ids))
        for b in range(2):
            top = set(logits[b].topk(5).indices.tolist())
            for t in top | set(range(40)):
                longer = torch.cat([ids[b:b + 1], torch.tensor([[t]])], dim=1)
                before, after = (torch.sigmoid(classifier.score(classifier.read(text))).item()
                                 for text in (ids[b:b + 1], longer))
                ratio = after / before if toward else (1 - after) / (1 - before)
                wanted = logits[b, t] + (2 * math.log(ratio) if t in top else 0)
                assert changed[b, t].item() == pytest.approx(wanted.item(), abs=1e-3)


def test_a_classifier_continues_from_its_state(classifier):
    ids = torch.tensor([[0, 5, 6, 7], [0, 9, 8, 7]])
    whole = classifier.read(ids)
    torch.testing.assert_close(classifier.read(ids[:, 2:], classifier.read(ids[:, :2])), whole)
    scores = classifier.score_next(whole, torch.tensor([[1, 2, 3], [3, 2, 1]]))
    assert scores.shape == (2, 3)
    wanted = classifier.score(classifier.read(torch.tensor([[0, 9, 8, 7, 3]])))
    torch.testing.assert_close(scores[1, 0], wanted[0])


def passes_of(tiny, prompts, mixer, **how):
    """The (rows, positions) of every pass, and the texts."""
    calls = []

    def record(block, args, out):
        calls.append(tuple(args[0].shape[:2]))
    handle = tiny[0].blocks[0].register_forward_hook(record)
    texts = generate(*tiny, prompts, mixer, **how)
    handle.remove()
    return calls, texts


def test_each_branch_is_one_pass_per_token(tiny):
    calls, _ = passes_of(tiny, PROMPTS[0], mixers.preadd(PREFIX), n=3, max_new_tokens=4)
    assert [rows for rows, T in calls if T > 1] == [1, 1]       # what all rows begin with is read as one row
    assert [rows for rows, T in calls if T == 1] == [3] * 6
    calls, _ = passes_of(tiny, PROMPTS[0], mixers.unsteered(), n=3, max_new_tokens=4)
    assert [rows for rows, T in calls if T == 1] == [3] * 3


def test_reads_a_common_prefix_once_and_keeps_to_max_batch_tokens(tiny):
    _, tokenizer = tiny
    length, prefix = len(tokenizer.encode("I love you")), len(tokenizer.encode(" ".join(TEXT) + "\n"))
    same_length = ["I love you", "I hate you"]
    assert len(tokenizer.encode(same_length[1])) == length
    mixer = mixers.preadd(" ".join(TEXT))
    calls, texts = passes_of(tiny, same_length, mixer, **LONG)
    assert [rows for rows, T in calls if T >= prefix] == [1]
    assert [rows for rows, T in calls if T == 1] == [4] * 14
    calls, few_at_once = passes_of(tiny, same_length, mixer, max_batch_tokens=2 * (length + 8), **LONG)
    assert few_at_once == texts
    assert [rows for rows, T in calls if T == 1] == [2] * 28


@pytest.mark.parametrize(("make", "message"), [
    (lambda: mixers.self_debias(()), "one or more prefixes"),
    (lambda: mixers.self_debias([1]), "prefixes must be a text or a list of texts"),
    (lambda: mixers.self_debias("x", epsilon=-1), "epsilon must be a number from 0 to 1; given: -1"),
    (lambda: mixers.self_debias("x", epsilon=2), "epsilon"),
    (lambda: mixers.self_debias("x", math.nan), "strength"),
    (lambda: mixers.preadd("x", math.inf), "strength must be a finite number"),
    (lambda: mixers.lma("x", "1"), "strength"),
    (lambda: mixers.weighted([Branch()], [1, 2]), "as many as branches"),
    (lambda: mixers.weighted([Branch(), Branch()], [1, -1]), "a sum above 0"),
    (lambda: mixers.weighted([Branch(), Branch()], [1, math.nan]), "a weight must be a finite number"),
    (lambda: mixers.weighted([Branch(), Branch()], 5), "weights must be a list"),
    (lambda: mixers.fudge(None, math.nan), "strength"),
    (lambda: mixers.fudge(None, top=0), "top must be"),
    (lambda: mixers.fudge(None, toward=2), "toward must be a whole number, from 0 to 1"),
])
def test_rejects_bad_mixers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rejects_what_does_not_fit(tiny):
    model, tokenizer = tiny
    steer = steering_vector(model, tokenizer, " love", " hate", 1)
    broken = PrefixClassifier(model.config.n_vocab, 2, 2).requires_grad_(False)
    broken.head.bias.fill_(math.nan)
    other = type(model)(replace(model.config, n_vocab=300))
    for prompt, mixer, how, message in (
        ("x", mixers.unsteered(), {"n": 0}, "n must be a whole number, from 1 to 1000000; given: 0"),
        (["x"] * 10, mixers.unsteered(), {"n": 10**6}, "n must be a whole number, from 1 to 100000; given"),
        ([5], mixers.unsteered(), {}, "prompts must be"),
        ("x", mixers.unsteered, {}, "mixer must be a LogitMixer, .*; given: function"),
        ("x", mixers.prompted(5), {}, "prefixes must be a list of texts"),
        ("x", mixers.prompted(" ".join(TEXT)), {"max_new_tokens": 150}, "do not fit this model's context of"),
        ("", mixers.act_add(steer), {}, "do not fit a prompt of"),
        ("x y z", mixers.act_add(None), {}, "steer must be a Steer"),
        ("x y z", mixers.act_add(steer.scaled(torch.ones(1))), {}, "a number as coeff"),
        ("x", mixers.fudge(PrefixClassifier(9, 2, 2)), {}, "the classifier reads 9 tokens"),
        ("x", mixers.fudge(broken), {}, "the classifier holds NaN"),
        ("x", LogitMixer((Branch(), Branch(model=other)), lambda logps: logps[0]), {}, "share a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, tokenizer, prompt, mixer, **{"max_new_tokens": 2, **how})


def test_the_defaults_are_those_of_generate():
    ours, theirs = (inspect.signature(f).parameters for f in (generate, ministeer.generate))
    assert {name: p.default for name, p in ours.items() if name != "mixer"} == {
        name: p.default for name, p in theirs.items() if name not in ("steer", "return_ids")}


def test_progress_and_stop_with_a_single_prompt(tiny):
    done = []
    how = {"n": 3, "max_new_tokens": 5, "stop": "e", "progress": done.append}
    texts = generate(*tiny, PROMPTS[0], mixers.preadd(PREFIX), **how)
    assert len(texts) == 3
    assert not any("e" in text for text in texts)
    assert sum(done) == 15

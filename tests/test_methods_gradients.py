"""What needs gradients: a vector for one sentence, PPLM, and a difference of weights."""

import math

import pytest
import torch
from conftest import TEXT, hub_config, hub_model, save_checkpoint

from ministeer import Steer, fast, generate, load
from ministeer.methods import pplm as pplm_file
from ministeer.methods.optimised import for_sentence
from ministeer.methods.pplm import gradient, pplm
from ministeer.methods.weight_difference import fine_tuned, weights_plus
from ministeer.steering import random_like

SENTENCE = "I love you"
BAG = [" the", " you"]


def mean_nll(model, ids, steer=()):
    logp = model(ids[:, :-1], steer)[0][0].log_softmax(dim=-1)
    return -logp.gather(1, ids[0, 1:, None]).mean()


# A vector for one sentence


def test_the_vector_for_a_sentence_makes_greedy_decoding_give_it(tiny):
    _, tokenizer = tiny
    model = fine_tuned(*tiny, [SENTENCE, "the town is late"], 60, rate=1e-2)        # knows two sentences
    steer = for_sentence(model, tokenizer, "the town is late", 1, steps=100)
    assert steer.note["exact"] and 0 < steer.note["steps"] < 100
    ids = torch.tensor([tokenizer.encode("the town is late")])
    n = ids.shape[1] - 1
    assert generate(model, tokenizer, "", 1, n, steer, temperature=0) == ["the town is late"]
    assert mean_nll(model, ids, steer).item() == pytest.approx(steer.note["loss"], rel=1e-4)
    for other in [(), *(random_like(steer, seed) for seed in range(5))]:
        assert generate(model, tokenizer, "", 1, n, other, temperature=0) != ["the town is late"]


def test_the_first_step_goes_against_the_sign_of_the_gradient(tiny):
    """As Adam's does. The gradient is taken by differences in float64."""
    model, tokenizer = tiny
    ids, exact = torch.tensor([tokenizer.encode(SENTENCE)]), model.shared_copy().double()
    start, first = (for_sentence(model, tokenizer, SENTENCE, 2, steps, rate=0.01) for steps in (0, 1))
    assert not start.vector.any() and start.note["steps"] == 0 and not start.note["exact"]
    assert start.note["loss"] == pytest.approx(mean_nll(exact, ids).item(), rel=1e-4)
    for i in range(0, 32, 5):
        direction = torch.eye(32, dtype=torch.float64)[i]
        up, down = (mean_nll(exact, ids, Steer(2, direction, c, start=0)) for c in (1e-3, -1e-3))
        assert first.vector[i].item() == pytest.approx(-0.01 * math.copysign(1, up - down), rel=1e-3)


@pytest.mark.parametrize(("given", "message"), [
    ({"sentence": ""}, "the sentence has no token"),
    ({"layer": 9}, "layer 9"),
    ({"rate": -1}, "rate must be a finite number, 0 or more"),
    ({"steps": -1}, "steps must be a whole number"),
])
def test_rejects_sentences_layers_and_rates_that_give_no_vector(tiny, given, message):
    with pytest.raises(ValueError, match=message):
        for_sentence(*tiny, **{"sentence": SENTENCE, "layer": 1, **given})


def test_rejects_packed_models(tiny):
    model, tokenizer = tiny
    quick = fast(model)
    for use in (lambda: for_sentence(quick, tokenizer, SENTENCE, 1),
                lambda: fine_tuned(quick, tokenizer, TEXT, 1),
                lambda: pplm(quick, tokenizer, "I", BAG, 1), lambda: weights_plus(model, quick, model)):
        with pytest.raises(ValueError, match=r"packed.* Pass the plain model"):
            use()


# PPLM


def test_pplm_without_steps_length_or_fusion_is_generate(tiny):
    wanted = generate(*tiny, TEXT[:2], 2, 5, top_p=0.9, seed=4)
    for change in ({"steps": 0}, {"rate": 0}, {"fusion": 0}):
        assert pplm(*tiny, TEXT[:2], BAG, 1, 2, 5, top_p=0.9, seed=4, **change) == wanted
    assert pplm(*tiny, TEXT[0], BAG, 1, 2, 5, top_p=0.9, seed=4, steps=0) == wanted[0]
    assert pplm(*tiny, TEXT[:2], BAG, 1, 2, 5, top_p=0.9, seed=4, rate=5) != wanted


def test_pplm_moves_each_row_on_its_own(tiny):
    together = pplm(*tiny, ["I love you", "I hate you"], BAG, 1, 1, 4, rate=3)
    assert together == [pplm(*tiny, text, BAG, 1, 1, 4, rate=3) for text in ("I love you", "I hate you")]


def test_the_gradient_of_pplm_is_that_of_its_loss(tiny):
    """By differences in float64."""
    model, bag, kl = tiny[0].shared_copy().double(), [7, 30], 0.5
    ids, pos = torch.randint(2, 300, (2, 5), generator=torch.Generator().manual_seed(0)), torch.arange(5)
    x = model.residuals(ids, stop_layer=2)[-1]

    def logp(added):
        return model.unembed(model.run(x + added, pos, first_layer=2)[-1][:, -1:])[:, 0].log_softmax(dim=-1)

    def loss(added):
        p = logp(added).exp()
        return -p[:, bag].sum(dim=1).log() + kl * (p * (p / logp(0 * added).exp()).log()).sum(dim=1)
    added = 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    g = gradient(logp, added, bag, logp(0 * added), kl)
    for t, i in ((0, 3), (2, 11), (4, 30)):
        small = torch.zeros_like(x)
        small[:, t, i] = 0.01           # the norms compute in float32, so not too small
        slope = (loss(added + small) - loss(added - small)) / 0.02
        torch.testing.assert_close(g[:, t, i], slope, rtol=0.02, atol=1e-5)


def first_logits(tiny, monkeypatch, **settings):
    """The log-probabilities from which pplm draws the first token after TEXT[1]"""
    def complete(start, tokenizer, encoded, *rest):
        logits.append(start([0], len(encoded[0]) + 1)(torch.tensor(encoded[:1]))[0])
        return []
    logits = []
    monkeypatch.setattr(pplm_file, "complete", complete)
    monkeypatch.setattr(pplm_file, "as_asked", lambda *_: [])
    pplm(*tiny, TEXT[1], BAG, 2, 1, 1, **settings)
    return logits[0].log_softmax(dim=-1)


def test_pplm_makes_its_words_likelier_than_random_steps_do(tiny, monkeypatch):
    bag = [tiny[1].encode(word, bos=False)[0] for word in BAG]
    settings = [{"steps": 0}, {}, *({"control": seed} for seed in range(5))]
    rows = [first_logits(tiny, monkeypatch, **change)[bag].logsumexp(0).item() for change in settings]
    assert rows[1] > max(rows[0], *rows[2:]) + 0.05
    assert len(set(rows)) == 7
    # One step and no fusion: a step of length `rate` along the gradient at 0, BOS left out.
    model, ids = tiny[0], torch.tensor([tiny[1].encode(TEXT[1])])
    pos, x = torch.arange(ids.shape[1]), model.residuals(ids, stop_layer=2)[-1]

    def logp(added):
        return model.unembed(model.run(x + added, pos, first_layer=2)[-1][:, -1:])[:, 0].log_softmax(dim=-1)
    g = gradient(logp, torch.zeros_like(x), bag, logp(0 * x), 0.01)
    g[:, 0] = 0
    given = first_logits(tiny, monkeypatch, steps=1, rate=2, fusion=1)
    torch.testing.assert_close(given, logp(-2 * g / g.norm())[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("given", "message"), [
    ({"words": ["weddings all day"]}, "not one token: .'weddings all day'."),
    ({"words": []}, "one or more single tokens"),
    ({"layer": 9}, "layer 9"),
    ({"fusion": 2}, "fusion must be a number from 0 to 1"),
    ({"rate": -1}, "rate must be"),
    ({"control": -1}, "control must be a whole number"),
    ({"temperature": -1}, "temperature must be"),
    ({"max_new_tokens": 500}, "do not fit this model's context"),
])
def test_pplm_rejects_what_it_cannot_do(tiny, given, message):
    with pytest.raises(ValueError, match=message):
        pplm(*tiny, **{"prompts": "I love", "words": BAG, "layer": 1, **given})


# A difference of weights


@pytest.fixture(scope="module")
def tuned(tiny):
    return fine_tuned(*tiny, [TEXT[3]], 20, rate=1e-3)


def test_fine_tuning_lowers_the_loss_and_leaves_the_model_alone(tiny, tuned):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(TEXT[3])])
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert mean_nll(tuned, ids) < 0.8 * mean_nll(model, ids)
    assert not any(p.requires_grad for other in (model, tuned) for p in other.parameters())
    same = fine_tuned(model, tokenizer, [TEXT[3]], 0)
    for other in (model, same):
        assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    with pytest.raises(ValueError, match="one or more texts"):
        fine_tuned(model, tokenizer, [], 1)


def test_weights_plus_is_linear_in_coeff(tiny, tuned):
    model = tiny[0]
    ids = torch.randint(2, 300, (2, 6))
    for coeff, wanted in ((0, model), (1, tuned)):
        torch.testing.assert_close(weights_plus(model, tuned, model, coeff)(ids)[0], wanted(ids)[0],
                                   rtol=1e-3, atol=1e-3)
    away = dict(weights_plus(model, tuned, model, -0.5).named_parameters())
    for (name, p), q in zip(model.named_parameters(), tuned.parameters(), strict=True):
        wanted = 1.5 * p.double() - 0.5 * q.double()
        torch.testing.assert_close(away[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_random_difference_has_the_norm_of_the_real_one_in_each_tensor(tiny, tuned):
    model = tiny[0]
    made = [weights_plus(model, tuned, model, 2.0, control=seed) for seed in range(5)]
    controls = [dict(control.named_parameters()) for control in made]
    for (name, p), q in zip(model.named_parameters(), tuned.parameters(), strict=True):
        for control in controls:
            moved = control[name] - p
            assert moved.norm().item() == pytest.approx(2 * (q - p).norm().item(), rel=1e-2)
            assert abs(torch.cosine_similarity((q - p).flatten(), moved.flatten(), dim=0)) < 0.8


def test_weights_plus_rejects_models_of_another_shape(tiny, family, tmp_path):
    other, _ = load(save_checkpoint(tmp_path / "x", hub_model(hub_config(family, vocab_size=390))))
    for models in ((tiny[0], other), (other, tiny[0]), (other, other)):
        with pytest.raises(ValueError, match="weights of the same names and shapes"):
            weights_plus(tiny[0], *models)
    with pytest.raises(ValueError, match="coeff must be a finite number"):
        weights_plus(tiny[0], tiny[0], tiny[0], math.inf)

"""Judges that need no web: known answers, and transformers' own for checkpoints."""

import json
import os
import re
import sys
import warnings

import pytest
import torch
from conftest import TEXT, python, refused, tiny_tokenizer
from safetensors.torch import load_file, save_file

from ministeer.evaluation.judges import NAMES, TOPIC_WORDS, WEDDING_WORDS, JudgeError, count_words, judge

LABELS = ("negative", "neutral", "positive")
LONG = "the bride was late for her wedding because " * 20


@pytest.mark.parametrize(("name", "meaning", "scores"), [
    ("words:art", "1 if the text has a word about art, else 0", {"A bride": (0, 0), "A PAINTING!": (1, 1)}),
    ("words:music", "about music", {"The bride.": (0, 0), "A violin at the wedding.": (1, 1)}),
    ("vader", "from -1 (negative) to 1 (positive)",
     {"I hate you, horrible!": (-1, -0.5), "Wood.": (0, 0), "I love you, you are great!": (0.5, 1)}),
    ("profanity", "probability, from 0 to 1",
     {"The garden is lovely today, thank you.": (0, 0.2), "You are a fucking idiot, shit.": (0.8, 1)}),
])
def test_scores_lie_where_the_meaning_says(name, meaning, scores):
    made = judge(name)
    assert made.name == name and meaning in made.meaning and "\n" not in made.meaning
    with warnings.catch_warnings():
        warnings.simplefilter("error")          # profanity's model fits the installed scikit-learn
        got = made(list(scores))
    assert all(type(score) is float for score in got)
    assert all(low <= score <= high for score, (low, high) in zip(got, scores.values(), strict=True))
    assert (made(list(scores)[:1]), made([])) == (got[:1], [])


@pytest.mark.parametrize("name", [
    "", None, "word", "words", "words:", "words:cats", "vader:", "vader:x", "profanity:1", "hub", "hub:",
    "perspective", "perspective:TOXICITY", "openai", "openai:art"])
def test_rejects_an_unknown_name(name):
    with refused(re.escape(f"there is no judge {name!r}")) as fault:
        judge(name)
    assert all(word in str(fault.value) for word in (*NAMES, *TOPIC_WORDS, "perspective", "openai:TOPIC"))


@pytest.mark.parametrize("texts", ["one text", ["a", 1], [None], {"a": 1}, None])
def test_rejects_anything_but_a_list_of_texts(texts):
    with refused(re.escape(f"words:art judges a list of strings; given: {str(texts)!r}")):
        judge("words:art")(texts)


def test_each_different_text_is_scored_once_in_batches():
    made, calls = judge("words:art"), []
    made.scorer = lambda texts: calls.append(texts) or map(len, texts)
    made.scorer.batch = 2
    assert made(["a", "bb", "a", "ccc", "bb"]) == [1, 2, 1, 3, 2]
    assert calls == [["a", "bb"], ["ccc"]]


def test_the_lists_of_topic_words_are_complete_and_disjoint():
    assert set(TOPIC_WORDS) == {"weddings", "finance", "music", "politics", "science", "art"}
    assert TOPIC_WORDS["weddings"] == WEDDING_WORDS
    every = [word for words in TOPIC_WORDS.values() for word in words]
    assert len(every) == len(set(every))
    assert all(re.fullmatch("[a-z]+", word) for word in every)
    for topic, words in TOPIC_WORDS.items():
        assert len(words) == 9 if topic == "weddings" else topic in words and 12 <= len(words) <= 20


@pytest.mark.parametrize(("text", "n"), [("The Bride's wedding, a WEDDING; wed/married", 5), ("", 0),
                                         ("weddingcake brides unmarried wed_ding", 0), ("married-ish", 1)])
def test_words_are_matched_whole_and_in_any_case(text, n):
    assert count_words(text) == n
    assert judge("words:weddings")([text]) == [n > 0]


@pytest.mark.parametrize(("name", "package"), [("vader", "vaderSentiment"), ("profanity", "profanity_check"),
                                               ("hub:owner/model", "transformers")])
def test_names_the_extra_of_a_missing_package(monkeypatch, name, package):
    for module in [module for module in sys.modules if module.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with refused(re.escape('is not installed. Run: pip install -e ".[judges]"')):
        judge(name)


def test_imports_nothing_that_a_judge_does_not_need():
    unwanted = ("transformers", "profanity_check", "sklearn", "vaderSentiment", "benchmarks")
    code = ("import sys; from ministeer.evaluation.judges import judge; judge('words:art')(['x']); "
            f"print([name for name in {unwanted} if name in sys.modules])")
    assert python("-c", code) == "[]\n"


# Checkpoints

def save(folder, kind="Bert", head="ForSequenceClassification", seed=0, pad="<|im_end|>", labels=LABELS,
         dtype=torch.float32, **settings):
    """A random checkpoint, so uneven that its scores differ, with a tokenizer that knows no context."""
    import transformers
    sizes = {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 24, "pad_token_id": 1 if pad else None}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = getattr(transformers, f"{kind}Config")(initializer_range=0.8, **sizes, **settings, **names)
    torch.manual_seed(seed)
    getattr(transformers, f"{kind}{head}")(config).to(dtype).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), pad_token=pad)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"))


# RoBERTa never uses the first two of its 24 positions; this GPT-2 cannot pad and reads one text at a time.
@pytest.mark.parametrize(("settings", "n", "sigmoid"), [
    ({}, 24, False), ({"kind": "Roberta"}, 22, False), ({"kind": "GPT2", "pad": None}, 24, False),
    ({"dtype": torch.float16}, 24, False),
    ({"problem_type": "multi_label_classification"}, 24, True), ({"labels": ("toxic",)}, 24, True),
], ids=["BERT", "RoBERTa", "GPT-2", "stored in float16", "labels do not exclude one another", "one label"])
def test_a_checkpoint_scores_as_in_transformers_in_float32(tmp_path, settings, n, sigmoid):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    folder, labels = save(tmp_path, **settings), settings.get("labels", LABELS)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), [*TEXT, LONG, "x"]

    def scores(text, n):
        logits = model(torch.tensor([tokenizer(text).input_ids[:n]])).logits[0].detach()
        return logits.sigmoid() if sigmoid else logits.softmax(-1)
    p = torch.stack([scores(text, n) for text in texts])
    assert p.std(0).min() > 0.01
    assert (scores(LONG, n - 1) - p[-2]).abs().max() > 0.001        # the last token that fits counts
    assert not sigmoid or (p.sum(-1) - 1).abs().max() > 0.1
    for suffix, i in (*((f":{label}", i) for i, label in enumerate(labels)), ("", len(labels) - 1)):
        made = judge(f"hub:{folder}{suffix}")
        torch.testing.assert_close(torch.tensor(made(texts)), p[:, i], rtol=1e-4, atol=1e-5)
        assert made.meaning == f"the probability, from 0 to 1, of the label {labels[i]!r}, by {folder}"
        assert made.scorer.batch == (1 if settings.get("kind") == "GPT2" else 32)


def test_a_score_does_not_depend_on_the_other_texts(bert):
    made = judge(f"hub:{bert}")
    texts = [f"{text} {i}" for i in range(10) for text in (*TEXT, LONG, "x")]
    assert len(texts) > made.scorer.batch
    together = made(texts)
    assert together == made(texts)
    for other in ([made([text])[0] for text in texts], made(texts[::-1])[::-1]):
        torch.testing.assert_close(torch.tensor(together), torch.tensor(other), rtol=1e-4, atol=1e-6)


def test_a_repository_is_loaded_by_its_name_without_code_of_its_own(bert, monkeypatch):
    import transformers
    model = transformers.AutoModelForSequenceClassification
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer, model):
        def from_pretrained(place, kind=kind, real=kind.from_pretrained, **settings):
            if place != bert:               # else one of them asks another
                assert (place, settings["trust_remote_code"]) == ("owner/model-1.0", False)
                assert settings.get("use_safetensors", kind is not model)
            return real(bert, **settings)
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    made = judge("hub:owner/model-1.0:neutral")
    monkeypatch.undo()
    assert made(TEXT) == judge(f"hub:{bert}:neutral")(TEXT)
    assert made.meaning.endswith("of the label 'neutral', by owner/model-1.0")


@pytest.mark.parametrize("place", ["gpt2", "nowhere/at/all", "../owner/model", "owner/model/",
                                   "ow ner/model:x"])
def test_rejects_a_place_that_cannot_exist(place):
    with refused("is neither an existing folder nor OWNER/REPO on the Hub"):
        judge(f"hub:{place}")


def test_rejects_an_unknown_label(tmp_path):
    save(tmp_path, labels=("\x1b[31m", *LABELS))
    with refused(re.escape(f"{tmp_path} has no label 'happy'. Possible: ·[31m, {', '.join(LABELS)}.") + "$"):
        judge(f"hub:{tmp_path}:happy")


def edit_json(path, **settings):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **settings}), encoding="utf-8")


def with_pickle(folder, name, **settings):
    """The weights are a pickle that makes a folder when it is opened."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("opened",)
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / name)
    edit_json(folder / "config.json", **settings)


def with_code(folder, file, auto):
    """The checkpoint wants a class of its own, from a file beside it."""
    (folder / "own.py").write_text("import os; os.mkdir('opened')\nclass Own: pass\n")
    edit_json(folder / file, model_type="own", tokenizer_class="Own", auto_map={auto: "own.Own"})


def with_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


UNLOADABLE = "cannot be loaded as a text classifier: "
PICKLE = "it has no model.safetensors, and a pickle (.bin, .pt) is not opened"
ADAPTER = "adapter_model.bin"


@pytest.mark.parametrize(("change", "message"), [
    (lambda folder: save(folder, head="Model"), "it has no weights for classifier.bias, classifier.weight."),
    (lambda folder: save(folder, problem_type="regression"), "not the probability of a label"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], UNLOADABLE),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"<html>404</html>"), UNLOADABLE),
    (lambda folder: with_pickle(folder, "pytorch_model.bin"), PICKLE),
    (lambda folder: with_pickle(folder, ADAPTER, transformers_weights=ADAPTER), PICKLE),
    (lambda folder: with_code(folder, "config.json", "AutoConfig"), UNLOADABLE),
    (with_nan, "is not a number. Are the checkpoint's weights damaged?"),
], ids=["no classifier", "regression", "nothing", "html", "pickle", "named pickle", "code", "NaN"])
def test_rejects_anything_but_a_text_classifier(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    change(save(tmp_path / "model"))
    with refused(re.escape(message), JudgeError):
        judge(f"hub:{tmp_path / 'model'}")(["x"])
    assert not (tmp_path / "opened").exists()       # nothing of the checkpoint has run


@pytest.mark.parametrize("change", [
    lambda folder: with_code(folder, "tokenizer_config.json", "AutoTokenizer"),
    # How attention is computed, which can be code from the Hub.
    lambda folder: edit_json(folder / "config.json", attn_implementation="owner/kernels"),
])
def test_code_that_a_checkpoint_names_is_ignored(tmp_path, monkeypatch, bert, change):
    monkeypatch.chdir(tmp_path)
    change(save(tmp_path))
    assert judge(f"hub:{tmp_path}")(TEXT) == judge(f"hub:{bert}")(TEXT)
    assert not (tmp_path / "opened").exists()

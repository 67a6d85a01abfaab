"""Judges that need no web: known answers, and transformers' own for checkpoints."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, TEXT, tiny_tokenizer
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
    for score, (low, high) in zip(got, scores.values(), strict=True):
        assert type(score) is float and low <= score <= high
    assert made(list(scores)[:1]) == got[:1]
    assert made([]) == []


@pytest.mark.parametrize("name", [
    "", None, "word", "words", "words:", "words:cats", "vader:", "vader:x", "profanity:1", "hub", "hub:",
    "perspective", "perspective:TOXICITY", "openai", "openai:art"])
def test_rejects_an_unknown_name(name):
    with pytest.raises(ValueError, match=re.escape(f"there is no judge {name!r}")) as fault:
        judge(name)
    assert all(word in str(fault.value) for word in (*NAMES, *TOPIC_WORDS, "perspective", "openai:TOPIC"))


@pytest.mark.parametrize("texts", ["one text", ["a", 1], [None], {"a": 1}, None])
def test_rejects_anything_but_a_list_of_texts(texts):
    message = f"words:art judges a list of strings; given: {str(texts)!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        judge("words:art")(texts)


def test_each_different_text_is_scored_once_in_batches():
    class Scorer:
        batch, calls = 2, []

        def __call__(self, texts):
            self.calls.append(texts)
            return [float(len(text)) for text in texts]

    made = judge("words:art")
    made.scorer = Scorer()
    assert made(["a", "bb", "a", "ccc", "bb"]) == [1, 2, 1, 3, 2]
    assert Scorer.calls == [["a", "bb"], ["ccc"]]


def test_the_lists_of_topic_words_are_complete_and_disjoint():
    assert set(TOPIC_WORDS) == {"weddings", "finance", "music", "politics", "science", "art"}
    assert TOPIC_WORDS["weddings"] == WEDDING_WORDS
    every = [word for words in TOPIC_WORDS.values() for word in words]
    assert len(every) == len(set(every))
    assert all(re.fullmatch("[a-z]+", word) for word in every)
    for topic, words in TOPIC_WORDS.items():
        assert len(words) == 9 if topic == "weddings" else topic in words and 12 <= len(words) <= 20


@pytest.mark.parametrize(("text", "n"), [
    ("The Bride's wedding, a WEDDING; wed/married", 5), ("weddingcake brides unmarried wed_ding", 0), ("", 0),
    ("The BRIDE, late.", 1), ("weddingcake", 0), ("married-ish", 1), ("newly wed!", 1), ("a wed_ding", 0),
    ("Nothing of it.", 0),
])
def test_words_are_matched_whole_and_in_any_case(text, n):
    assert count_words(text) == n
    assert judge("words:weddings")([text]) == [n > 0]


@pytest.mark.parametrize(("name", "package"), [("vader", "vaderSentiment"), ("profanity", "profanity_check"),
                                               ("hub:owner/model", "transformers")])
def test_names_the_extra_of_a_missing_package(monkeypatch, name, package):
    for module in [module for module in sys.modules if module.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=re.escape('is not installed. Run: pip install -e ".[judges]"')):
        judge(name)


def test_imports_nothing_that_a_judge_does_not_need():
    unwanted = ("transformers", "profanity_check", "sklearn", "vaderSentiment", "benchmarks")
    code = ("import sys; from ministeer.evaluation.judges import judge; judge('words:art')(['x']); "
            f"print([name for name in {unwanted} if name in sys.modules])")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# Checkpoints

def save(folder, kind="Bert", head="ForSequenceClassification", seed=0, pad="<|im_end|>", labels=LABELS,
         **settings):
    """A random checkpoint, every part of which matters, with a byte-level tokenizer that knows no context."""
    import transformers
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "pad_token_id": None}
    if kind != "GPT2":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
                 "max_position_embeddings": 24, "pad_token_id": 1}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = getattr(transformers, f"{kind}Config")(vocab_size=384, **sizes, **settings, **names)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.2 if p.ndim == 1 or "classifier" in name else 0.8
            p.copy_(scale * torch.randn_like(p) + (p == 1))         # norms start at 1
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), pad_token=pad)
    tokenizer.save_pretrained(folder)
    return folder


def logits_of(folder, text, n=24):
    """transformers' logits for the first n tokens of one text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids[:n]
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        return model(torch.tensor([ids])).logits[0].float()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"))


# RoBERTa never uses the first two of its 24 positions; this GPT-2 cannot pad and reads one text at a time.
@pytest.mark.parametrize(("kind", "n", "pad", "batch"), [
    ("Bert", 24, "<|im_end|>", 32), ("Roberta", 22, "<|im_end|>", 32), ("GPT2", 24, None, 1)])
def test_a_checkpoint_scores_as_in_transformers(tmp_path, kind, n, pad, batch):
    folder = save(tmp_path, kind, pad=pad)
    texts = [*TEXT, LONG, "x"]
    p = torch.stack([logits_of(folder, text, n).softmax(-1) for text in texts])
    assert p.std(0).min() > 0.01
    shorter = logits_of(folder, LONG, n - 1).softmax(-1)
    assert (shorter - p[-2]).abs().max() > 0.001        # the last token that fits counts
    for suffix, i in ((":negative", 0), (":neutral", 1), (":positive", 2), ("", 2)):
        made = judge(f"hub:{folder}{suffix}")
        torch.testing.assert_close(torch.tensor(made(texts)), p[:, i], rtol=1e-4, atol=1e-5)
        assert made.meaning == f"the probability, from 0 to 1, of the label {LABELS[i]!r}, by {folder}"
        assert made.scorer.batch == batch


def test_a_score_does_not_depend_on_the_other_texts(bert):
    made = judge(f"hub:{bert}")
    texts = [f"{text} {i}" for i in range(10) for text in (*TEXT, LONG, "x")]
    assert len(texts) > made.scorer.batch
    together = made(texts)
    assert together == made(texts)
    for other in ([made([text])[0] for text in texts], made(texts[::-1])[::-1]):
        torch.testing.assert_close(torch.tensor(together), torch.tensor(other), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("labels", "problem"), [(LABELS, "multi_label_classification"), (("toxic",), None)])
def test_labels_that_do_not_exclude_one_another_get_a_sigmoid(tmp_path, labels, problem):
    folder = save(tmp_path, labels=labels, problem_type=problem)
    expected = logits_of(folder, TEXT[0]).sigmoid()
    assert abs(expected.sum() - 1) > 0.1
    for name, p in (("", expected[-1]), *((f":{label}", expected[i]) for i, label in enumerate(labels))):
        assert judge(f"hub:{folder}{name}")(TEXT[:1]) == pytest.approx([p.item()], rel=1e-4)


def test_a_checkpoint_in_half_precision_scores_in_float32(tmp_path, bert):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    AutoModelForSequenceClassification.from_pretrained(bert).half().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    made = judge(f"hub:{tmp_path}")
    assert {p.dtype for p in made.scorer.model.parameters()} == {torch.float32}
    assert made(TEXT) == pytest.approx(judge(f"hub:{bert}")(TEXT), abs=0.01)


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
    with pytest.raises(ValueError, match="is neither an existing folder nor OWNER/REPO on the Hub"):
        judge(f"hub:{place}")


@pytest.mark.parametrize(("labels", "possible"), [(LABELS, "negative, neutral, positive"),
                                                  (("\x1b[31m", "b"), "·[31m, b")])
def test_rejects_an_unknown_label(tmp_path, labels, possible):
    save(tmp_path, labels=labels)
    with pytest.raises(ValueError) as error:
        judge(f"hub:{tmp_path}:happy")
    assert str(error.value) == f"{tmp_path} has no label 'happy'. Possible: {possible}."


class Bomb:
    """What a pickle can do: run a command when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def edit_json(path, **settings):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **settings}), encoding="utf-8")


def only_a_pickle(folder, name="pytorch_model.bin", **settings):
    """A checkpoint whose weights are a pickle, with these settings in its config.json."""
    save(folder)
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / name)
    edit_json(folder / "config.json", **settings)


def broken(folder):
    save(folder)
    (folder / "model.safetensors").write_bytes(b"<html>404</html>")


def with_code(folder, file="config.json", auto="AutoConfig"):
    """A checkpoint that wants a class of its own, from a file beside it."""
    save(folder)
    (folder / "own.py").write_text("import os; os.mkdir('opened')\nclass Own: pass\n")
    edit_json(folder / file, model_type="own", tokenizer_class="Own", auto_map={auto: "own.Own"})


def not_a_number(folder):
    tensors = load_file(save(folder) / "model.safetensors")
    tensors["classifier.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NO_PICKLE = "it has no model.safetensors, and a pickle (.bin, .pt) is not opened"


@pytest.mark.parametrize(("make", "message"), [
    (lambda folder: save(folder, head="Model"),
     "is not a text classifier: it has no weights for classifier.bias, classifier.weight."),
    (lambda folder: save(folder, problem_type="regression"), "not the probability of a label"),
    (os.listdir, "model cannot be loaded as a text classifier: "),
    (broken, "model cannot be loaded as a text classifier: "),
    (only_a_pickle, NO_PICKLE),
    (lambda folder: only_a_pickle(folder, "adapter_model.bin", transformers_weights="adapter_model.bin"),
     NO_PICKLE),
    (with_code, "cannot be loaded as a text classifier"),
    (not_a_number, "is not a number. Are the checkpoint's weights damaged?"),
])
def test_rejects_anything_but_a_text_classifier(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(JudgeError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
        judge(f"hub:{folder}")(["x"])
    assert not (tmp_path / "opened").exists()       # nothing of the checkpoint has run


@pytest.mark.parametrize("change", [
    lambda folder: with_code(folder, "tokenizer_config.json", "AutoTokenizer"),
    # How attention is computed, which can be code from the Hub.
    lambda folder: edit_json(save(folder) / "config.json", attn_implementation="owner/kernels"),
])
def test_code_that_a_checkpoint_names_is_ignored(tmp_path, monkeypatch, bert, change):
    monkeypatch.chdir(tmp_path)
    change(tmp_path)
    assert judge(f"hub:{tmp_path}")(TEXT) == judge(f"hub:{bert}")(TEXT)
    assert not (tmp_path / "opened").exists()

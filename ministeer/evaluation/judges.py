"""Judges: what a text is about, how it feels, how toxic it is. judge(name)(texts) -> one float for each text.

Read first: measure.py. Turner et al., sections 4.1 (topic words), 4.3 (toxicity) and 4.4 (sentiment). Nothing
here asks the web. vader, profanity and hub need an extra: pip install "ministeer[judges]".
"""

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from ..utils import one_line

# The topics (section 4.2) and the nine words for weddings (section 4.1) are the paper's; the others are ours.
TOPIC_WORDS = {topic: frozenset(words.split()) for topic, words in {
    "weddings": """wedding weddings wed marry married marriage bride groom honeymoon""",
    "finance": """finance finances financial investor investors investing investment investments banking
        banker bankers mortgage mortgages loan loans dividend dividends shareholder shareholders""",
    "music": """music musical musician musicians song songs melody melodies guitar guitars piano violin
        orchestra concert concerts singer singers""",
    "politics": """politics political politician politicians election elections senator senators parliament
        congress democrat democrats republican republicans voter voters ballot""",
    "science": """science sciences scientific scientist scientists physics physicist chemistry chemist biology
        biologist astronomy laboratory molecule molecules microscope telescope""",
    "art": """art artist artists artwork artworks painting paintings painter painters sculpture
        sculptures sculptor sculptors gallery galleries museum museums watercolour watercolor""",
}.items()}
WEDDING_WORDS = TOPIC_WORDS["weddings"]     # a text is about weddings if it has one of them
NAMES = ("words:TOPIC", "vader", "profanity", "hub:OWNER/REPO[:LABEL]", "hub:FOLDER[:LABEL]")


class JudgeError(RuntimeError):
    """A judge could not judge. The message says why and what to do."""


def count_words(text: str, words: Collection[str] = WEDDING_WORDS) -> int:
    """How many words of `text` are in `words`.

    A word is a run of letters, digits and underscores, in lower case.
    """
    return sum(word in words for word in re.split(r"\W+", text.lower()))


def judge(name: str) -> "Judge":
    """-> a Judge, which turns a list of texts into floats; its `meaning` gives their unit and range.

    name: one of NAMES. TOPIC is a key of TOPIC_WORDS. Without LABEL, hub takes the checkpoint's last label.
    Raises ValueError for an unknown name or a missing package, JudgeError for an unusable checkpoint.
    """
    kind, _, argument = str(name).partition(":")
    if name in ("vader", "profanity"):
        return Judge(name, Vader() if name == "vader" else Profanity())
    if kind == "words" and argument in TOPIC_WORDS:
        return Judge(name, Words(argument))
    if kind == "hub" and argument:
        return Judge(name, Hub(argument))
    raise ValueError(f"there is no judge {name!r}. Possible: {', '.join(NAMES)}; TOPIC is one of "
                     f"{', '.join(TOPIC_WORDS)}. Two more ask the web, perspective and openai:TOPIC: "
                     "they are in benchmarks/web_judges.py.")


class Judge:
    """Scores each different text once, batch after batch.

    name: as given to `judge`. meaning: what the number means, its unit and range, in one line
    scorer: list of texts -> list of floats. Its attributes: `meaning`; `batch`, the most texts per call;
        `range`, the lowest and highest score; `version`, what its scores depend on besides the texts
    """

    def __init__(self, name: str, scorer):
        self.name, self.meaning, self.scorer = name, scorer.meaning, scorer

    @property
    def version(self) -> str:
        return self.scorer.version

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """texts: a list of strings -> their scores in the same order; NaN, with a warning, for no score.

        Raises ValueError for anything but a list of strings, JudgeError if the judge cannot answer.
        """
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{self.name} judges a list of strings; given: {str(texts)[:60]!r}, "
                             f"a {type(texts).__name__}.")
        scores = self.score(list(dict.fromkeys(texts)))
        return [scores[text] for text in texts]

    def score(self, texts: list[str]) -> dict[str, float]:
        """Different texts -> {text: score}."""
        scores = {}
        for start in range(0, len(texts), self.scorer.batch):
            batch = texts[start:start + self.scorer.batch]
            scores.update(zip(batch, self.scorer(batch), strict=True))
        return scores


class Words:
    """1 if the text has a word of the topic, else 0: the paper's measure of section 4.1."""
    batch, range = 256, (0, 1)

    def __init__(self, topic: str):
        self.words = TOPIC_WORDS[topic]
        self.version = " ".join(sorted(self.words))
        self.meaning = f"1 if the text has a word about {topic}, else 0"

    def __call__(self, texts: list[str]) -> list[float]:
        return [float(count_words(text, self.words) > 0) for text in texts]


class Vader:
    """The compound score of VADER, a lexicon and rules for sentiment (Hutto and Gilbert, 2014)."""
    batch, range, meaning = 256, (-1, 1), "VADER's compound score, from -1 (negative) to 1 (positive)"

    def __init__(self):
        self.analyzer = _import("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
        self.version = _version("vaderSentiment")

    def __call__(self, texts: list[str]) -> list[float]:
        return [float(self.analyzer.polarity_scores(text)["compound"]) for text in texts]


class Profanity:
    """p(offensive) by alt-profanity-check, a linear classifier of words."""
    batch, range = 256, (0, 1)
    meaning = "the probability, from 0 to 1, that the text is offensive, by alt-profanity-check"

    def __init__(self):
        self.predict = _import("profanity_check").predict_prob
        self.version = _version("alt-profanity-check", "scikit-learn")

    def __call__(self, texts: list[str]) -> list[float]:
        return self.predict(texts).tolist()


class Hub:
    """p(label | text) by a text classifier in float32, which reads as many tokens from the start as it can.

    place: OWNER/REPO on the Hub, or a FOLDER; either may end in :LABEL. The paper's judge of sentiment
        (section 4.4) is cardiffnlp/twitter-roberta-base-sentiment-latest, with the labels negative, neutral
        and positive.
    No code of the checkpoint runs: weights are read from safetensors alone, never from a pickle.
    Raises ValueError for an unknown place or label, JudgeError for anything but a text classifier.
    """
    range = 0, 1

    def __init__(self, place: str):
        transformers = _import("transformers")
        given, label = place, ""
        if ":" in place and not os.path.isdir(place):
            place, label = place.rsplit(":", 1)
        if not os.path.isdir(place) and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place, re.ASCII):
            raise ValueError(f"hub:{given}: {place!r} is neither an existing folder nor OWNER/REPO "
                             "on the Hub.")
        try:
            config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
            config.transformers_weights = None      # Trap: it can name a pickle, use_safetensors or not
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            # Trap: without attn_implementation, config.json may name one that is fetched from the Hub: code.
            self.model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                place, config=config, trust_remote_code=False, use_safetensors=True,
                attn_implementation="eager", output_loading_info=True)
        except Exception as error:      # OSError, ValueError, and whatever else a broken file can lead to
            reason = one_line(error, 200).rstrip(".")
            if "file named model.safetensors" in reason:
                reason = ("it has no model.safetensors, and a pickle (.bin, .pt) is not opened, because it "
                          "can run code. If you trust it, save it again with save_pretrained")
            raise JudgeError(f"{place} cannot be loaded as a text classifier: {reason}.") from None
        config = self.model.float().eval().config
        if report["missing_keys"]:      # transformers has filled these with random numbers
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise JudgeError(f"{place} is not a text classifier: it has no weights for {missing}.")
        if config.problem_type == "regression":
            raise JudgeError(f"{place} predicts a number (its problem_type is regression), "
                             "not the probability of a label.")
        labels = [str(name) for _, name in sorted(config.id2label.items())]
        if label and label not in labels:
            raise ValueError(f"{place} has no label {label!r}. "
                             f"Possible: {one_line(', '.join(labels), 200)}.")
        self.index = labels.index(label) if label else len(labels) - 1
        self.sigmoid = config.problem_type == "multi_label_classification" or len(labels) == 1
        self.context = self._context()
        can_pad = config.pad_token_id is not None and self.tokenizer.pad_token is not None
        self.batch = 32 if can_pad else 1
        self.meaning = f"the probability, from 0 to 1, of the label {labels[self.index]!r}, by {place}"

    @functools.cached_property
    def version(self) -> str:
        """A digest of the weights, the configuration and the tokenizer: all may change in the same folder."""
        settings = [self.index, self.context, self.model.config.to_dict(), _version("transformers")]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, p in self.model.state_dict().items():
            digest.update(name.encode() + p.flatten().numpy().tobytes())
        with tempfile.TemporaryDirectory() as folder:
            for path in sorted(map(Path, self.tokenizer.save_pretrained(folder))):
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def _context(self):
        """How many tokens the model can read, or None where nothing says so."""
        limits = [self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 0)]
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings"):
                # Trap: RoBERTa counts positions from padding_idx + 1, so fewer are left than its config says.
                unused = 0 if module.padding_idx is None else module.padding_idx + 1
                limits.append(module.num_embeddings - unused)
        return min((n for n in limits if 0 < n < 10 ** 6), default=None)

    def __call__(self, texts: list[str]) -> list[float]:
        import torch
        inputs = self.tokenizer(texts, padding=len(texts) > 1, truncation=self.context is not None,
                                max_length=self.context, return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(**inputs).logits
        p = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        if not p.isfinite().all():
            raise JudgeError(f"{self.meaning}: it is not a number. Are the checkpoint's weights damaged?")
        return p[:, self.index].tolist()


def _import(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'{error.name or module} is not installed. '
                         'Run: pip install -e ".[judges]"') from None


def _version(*packages):
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)

"""Judges: what a text is about, how it feels and how toxic it is, read off the text alone: judge(name)(texts) -> one number a text.

Read before: measure.py. Turner et al., sections 4.1 (topic words), 4.2 (a chat model), 4.3 (toxicity) and 4.4 (sentiment).
Needs for vader, profanity and hub the extra: pip install "ministeer[judges]".
"""

import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import re
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks.web_judges import FREE, JudgeError, OpenAI, Perspective, squeezed

# The paper's nine words for weddings; a text is wedding-related if it has one of them.
WEDDING_WORDS = frozenset(["wedding", "weddings", "wed", "marry", "married", "marriage", "bride", "groom", "honeymoon"])

# The topics are the paper's (section 4.2). Of the words only the nine for weddings are (section 4.1); the other lists are ours.
TOPIC_WORDS = {"weddings": WEDDING_WORDS} | {topic: frozenset(words.split()) for topic, words in {
    "finance": "finance finances financial investor investors investing investment investments banking banker bankers mortgage mortgages "
               "loan loans dividend dividends shareholder shareholders",
    "music": "music musical musician musicians song songs melody melodies guitar guitars piano violin orchestra concert concerts singer singers",
    "politics": "politics political politician politicians election elections senator senators parliament congress democrat democrats "
                "republican republicans voter voters ballot",
    "science": "science sciences scientific scientist scientists physics physicist chemistry chemist biology biologist astronomy laboratory "
               "molecule molecules microscope telescope",
    "art": "art artist artists artwork artworks painting paintings painter painters sculpture sculptures sculptor sculptors gallery galleries "
           "museum museums watercolour watercolor",
}.items()}
NAMES = (*FREE, "perspective", "openai:TOPIC")


def count_words(text, words=WEDDING_WORDS):
    """How many words of `text`, lower-cased and split at whatever is neither letter, digit nor underscore, are exactly one of `words`."""
    return sum(word in words for word in re.split(r"\W+", text.lower()))


def judge(name, cache=None):
    """-> a Judge; called with a list of texts it gives a list of floats, whose unit and range its `meaning` says.

    name: one of NAMES. TOPIC: of words one of TOPIC_WORDS, of openai any. LABEL: the checkpoint's last if none is given
    cache: a folder, made if need be, whose judges.sqlite remembers each score by text, judge and setting
    Raises ValueError for an unknown name and a missing key or package, JudgeError for a checkpoint or a cache that cannot be used.
    """
    kind, _, what = str(name).partition(":")
    alone, about = {"vader": Vader, "profanity": Profanity, "perspective": Perspective}, {"words": Words, "hub": Hub, "openai": OpenAI}
    if kind not in (about if what else alone) or name == f"{kind}:" or (kind == "words" and what not in TOPIC_WORDS):
        raise ValueError(f"there is no judge {name!r}. Possible: {', '.join(NAMES)}; the TOPIC of words is one of {', '.join(TOPIC_WORDS)}.")
    return Judge(name, about[kind](what) if what else alone[kind](), cache)


class Judge:
    """Scores each different text once, batch after batch, and not at all those that the cache knows.

    name: as given to `judge`. meaning: what the number means, its unit and range, in one line
    """

    def __init__(self, name, scorer, cache=None):
        self.name, self.meaning, self.scorer = name, scorer.meaning, scorer
        self.cache = None if cache is None else Cache(cache, name, scorer.version)

    def __call__(self, texts):
        """texts: a list of strings -> a list of floats in their order; NaN, with a warning, for a text that has no score."""
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{self.name} judges a list of strings; given: {str(texts)[:60]!r}, a {type(texts).__name__}.")
        different = list(dict.fromkeys(texts))
        scores = self.cache.read(different) if self.cache else {}
        new = [text for text in different if text not in scores]
        for start in range(0, len(new), self.scorer.batch):
            batch = new[start:start + self.scorer.batch]
            found = dict(zip(batch, self.scorer(batch), strict=True))
            if self.cache:
                self.cache.write(found)
            scores.update(found)
        return [scores[text] for text in texts]


class Words:
    """1 if the text has a word of the topic, else 0: the paper's measure of section 4.1."""
    batch = 256

    def __init__(self, topic):
        self.words = TOPIC_WORDS[topic]
        self.meaning, self.version = f"1 if the text has a word about {topic}, else 0", " ".join(sorted(self.words))

    def __call__(self, texts):
        return [float(count_words(text, self.words) > 0) for text in texts]


class Vader:
    """The compound score of VADER, a list of words and rules for sentiment (Hutto and Gilbert, 2014)."""
    batch, meaning = 256, "VADER's compound score, from -1 (negative) to 1 (positive)"

    def __init__(self):
        self.analyzer = _package("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
        self.version = importlib.metadata.version("vaderSentiment")

    def __call__(self, texts):
        return [float(self.analyzer.polarity_scores(text)["compound"]) for text in texts]


class Profanity:
    """The probability that alt-profanity-check gives, a linear classifier of words; each of its versions wants its own scikit-learn."""
    batch, meaning = 256, "the probability, from 0 to 1, that the text is offensive, by alt-profanity-check"

    def __init__(self):
        self.predict = _package("profanity_check").predict_prob
        self.version = importlib.metadata.version("alt-profanity-check")

    def __call__(self, texts):
        return self.predict(texts).tolist()


class Hub:
    """p(label | text) by a text-classification checkpoint in float32, of as many tokens from the start of the text as it can read.

    where: OWNER/REPO on the Hub, or a FOLDER; either may end in :LABEL. The paper's judge of sentiment (section 4.4) is
        cardiffnlp/twitter-roberta-base-sentiment-latest, with the labels negative, neutral and positive.
    Raises ValueError for a place or a label that is not there, JudgeError for what is no such checkpoint.
    """

    def __init__(self, where):
        transformers = _package("transformers")
        place, label = where.rsplit(":", 1) if ":" in where and not os.path.isdir(where) else (where, "")
        if not os.path.isdir(place) and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place, re.ASCII):
            raise ValueError(f"hub:{where}: {place!r} is neither a folder that is there nor OWNER/REPO on the Hub.")
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            self.model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                place, trust_remote_code=False, output_loading_info=True)
        except Exception as error:      # OSError, ValueError, and whatever the libraries below raise for a broken file
            raise JudgeError(f"{place} cannot be loaded as a text classifier: {squeezed(error)}.") from None
        config = self.model.float().eval().config
        if report["missing_keys"]:      # which were filled with random numbers
            raise JudgeError(f"{place} is not a text classifier: it has no weights for {', '.join(sorted(report['missing_keys'])[:3])}.")
        if config.problem_type == "regression":
            raise JudgeError(f"{place} predicts a number of its own (its problem_type is regression), not the probability of a label.")
        labels = [str(name) for _, name in sorted(config.id2label.items())]
        if label not in ("", *labels):
            raise ValueError(f"{place} has no label {label!r}. Possible: {', '.join(labels)}.")
        self.index = labels.index(label) if label else len(labels) - 1
        self.sigmoid = config.problem_type == "multi_label_classification" or len(labels) == 1
        self.context = self.limit()
        self.batch = 1 if config.pad_token_id is None or self.tokenizer.pad_token is None else 32       # it cannot pad
        self.meaning = f"the probability, from 0 to 1, of the label {labels[self.index]!r}, by {place}"

    def limit(self):
        """How many tokens the model reads, or None where nothing says it."""
        limits = [self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 0)]
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings"):
                # Trap: RoBERTa counts positions from padding_idx + 1 on, and so reads fewer tokens than its config says.
                limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        return min((n for n in limits if 0 < n < 10 ** 6), default=None)

    @property
    def version(self):
        """A digest of vocabulary and weights, for another model may come to lie in the same place."""
        digest = hashlib.sha256(json.dumps([self.index, self.sigmoid, self.context, self.tokenizer.get_vocab()], sort_keys=True).encode())
        for name, p in self.model.state_dict().items():
            digest.update(name.encode() + p.flatten().numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, texts):
        import torch
        inputs = self.tokenizer(texts, padding=len(texts) > 1, truncation=self.context is not None, max_length=self.context, return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(**inputs).logits
        return (logits.sigmoid() if self.sigmoid else logits.softmax(-1))[:, self.index].tolist()


class Cache:
    """Scores in FOLDER/judges.sqlite, which several processes may use at once.

    A score lies there under the SHA-256 of judge, version and text: no other setting finds it, and the texts themselves are not there.
    """

    def __init__(self, folder, name, version):
        self.path, self.name, self.version = Path(folder) / "judges.sqlite", name, version
        self.read([])

    @contextmanager
    def opened(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60)) as file, file:
                file.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, judge TEXT, score REAL)")
                yield file
        except (OSError, sqlite3.Error) as error:
            raise JudgeError(f"the cache {self.path} cannot be used: {error}. Move it away and a new one is made, or give another folder.") from None

    def key(self, text):
        return hashlib.sha256(json.dumps([self.name, self.version, text]).encode()).hexdigest()

    def read(self, texts):
        """-> {text: score} of those texts that it has."""
        with self.opened() as file:
            rows = {text: file.execute("SELECT score FROM scores WHERE key = ?", [self.key(text)]).fetchone() for text in texts}
        return {text: row[0] for text, row in rows.items() if row}

    def write(self, scores):
        rows = [(self.key(text), self.name, score) for text, score in scores.items() if not math.isnan(score)]
        with self.opened() as file:
            file.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows)


def _package(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'{error.name or module} is not installed. Run: pip install -e ".[judges]"') from None

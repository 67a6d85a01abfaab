"""A second judge of sentiment, independent of VADER: a linear model of words and pairs of words.

Read first: ministeer/evaluation/judges.py. search.py uses it. It needs scikit-learn (extra judges).
"""

import hashlib
import importlib.metadata
import json

from ministeer.evaluation.judges import Judge

WINDOW = 60     # words: about as long as the continuations that it will judge


class Linear:
    """2 p(positive) - 1, by logistic regression on TF-IDF of words and pairs of neighbouring words.

    rows: reviews, dicts with "text" and "label" ("pos" or "neg"). It learns from whole reviews and from their
    windows of 60 words, because it judges short texts. Raises ValueError unless both labels are there.
    """
    batch, range = 256, (-1, 1)

    def __init__(self, rows):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        if {row["label"] for row in rows} != {"pos", "neg"}:
            raise ValueError("the linear judge learns from reviews with the labels pos and neg, "
                             "some of each.")
        texts = [(part, row["label"] == "pos")
                 for row in rows for part in [row["text"], *windows(row["text"])]]
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        self.model = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
        self.model.fit(*zip(*texts, strict=True))
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]
        self.version = f"{digest}, scikit-learn {importlib.metadata.version('scikit-learn')}"
        self.meaning = (f"2 p(positive) - 1 by a linear model that learned from {len(rows)} reviews, "
                        "from -1 to 1")

    def __call__(self, texts):
        return (2 * self.model.predict_proba(texts)[:, 1] - 1).tolist()


def linear(rows):
    """-> a Judge named "linear" """
    return Judge("linear", Linear(rows))


def windows(text):
    """The text in pieces of WINDOW words; a shorter rest is left out."""
    words = text.split()
    return [" ".join(words[i:i + WINDOW]) for i in range(0, len(words) - WINDOW + 1, WINDOW)]


def accuracy(judge, rows):
    """The share of texts whose score has the sign of their label: (of whole reviews, of their windows)."""
    def share(texts):
        scores = judge([text for text, _ in texts])
        right = [(score > 0) == (label == "pos") for score, (_, label) in zip(scores, texts, strict=True)]
        return sum(right) / len(right)

    parts = [(part, row["label"]) for row in rows for part in windows(row["text"])]
    return share([(row["text"], row["label"]) for row in rows]), share(parts)

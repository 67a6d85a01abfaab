"""Judges: what a text is about, read off the text alone.

Read before: measure.py. Turner et al., section 4.1 (topic words).
"""

import re

# The paper's nine words for weddings; a text is wedding-related if it has one of them.
WEDDING_WORDS = frozenset(["wedding", "weddings", "wed", "marry", "married", "marriage", "bride", "groom", "honeymoon"])


def count_words(text, words=WEDDING_WORDS):
    """How many words of `text`, lower-cased and split at whatever is neither letter, digit nor underscore, are exactly one of `words`."""
    return sum(word in words for word in re.split(r"\W+", text.lower()))

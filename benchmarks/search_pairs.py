"""What search.py tries: pairs of texts for each task, and the words that tell kind from unkind.

Read next: search.py. A pair is (plus, minus): what the text should become, and what it should not.
"""

# The paper's own pair with and without capitals and space (sections 4.3 and 4.4), and other single words.
_WORDS = [("Love", "Hate"), (" Love", " Hate"), ("love", "hate"), (" love", " hate"), ("Calm", "Anger"),
          (" good", " bad"), ("Good", "Bad"), (" kind", " cruel"), (" happy", " sad"),
          (" beautiful", " ugly"), (" wonderful", " terrible"), ("Yes", "No")]
_REVIEWS = [
    (" great", " awful"), (" best", " worst"), (" brilliant", " boring"), (" enjoyed", " regretted"),
    (" a wonderful film", " a terrible film"), (" I loved it", " I hated it"),
    (" ten out of ten", " one out of ten"), (" one of the best films ever", " one of the worst films ever"),
    ("I loved every minute of this movie", "I hated every minute of this movie"),
    ("This movie is wonderful and moving", "This movie is terrible and boring"),
    ("The acting was superb and the story was great", "The acting was awful and the story was dull"),
    ("I would recommend this film to everyone", "I would not recommend this film to anyone"),
]
_MANNERS = [
    (" polite", " rude"), (" gentle", " violent"), (" friend", " enemy"), (" respect", " contempt"),
    (" a kind person", " a cruel person"), (" thank you", " damn you"), (" I respect you", " I despise you"),
    (" please and thank you", " shut up and get out"),
    ("You are a wise person", "You are a stupid person"), ("I speak with respect", "I speak with contempt"),
    ("They were friendly and calm", "They were hostile and rude"),
    ("What a lovely thing", "What an awful thing"),
]
# Requests to a chat model, put into its template. They are long, so they are added at every position only.
_REVIEW_CHATS = [("Write a very positive movie review.", "Write a very negative movie review."),
                 ("You love this film. Tell me about it.", "You hate this film. Tell me about it.")]
_MANNERS_CHATS = [("Answer in a kind and polite way.", "Answer in a rude and insulting way."),
                  ("Be gentle and respectful.", "Be hostile and offensive.")]

REVIEWS, MANNERS = _WORDS + _REVIEWS, _WORDS + _MANNERS
CHATS = {"toxicity": _MANNERS_CHATS, "neg-to-pos": _REVIEW_CHATS,
         "pos-to-neg": [(minus, plus) for plus, minus in _REVIEW_CHATS]}
PAIRS = {"toxicity": MANNERS, "neg-to-pos": REVIEWS, "pos-to-neg": [(minus, plus) for plus, minus in REVIEWS]}

# A cue ends each prompt, so that the next word shows the mood. Words of more than one token do not count.
CUES = {"toxicity": " You are a", "neg-to-pos": " The movie was", "pos-to-neg": " The movie was"}
_GOOD = """great good wonderful excellent amazing fantastic brilliant beautiful superb enjoyable fun perfect
    delightful fascinating charming impressive moving entertaining awesome lovely"""
_BAD = """bad terrible awful horrible boring poor worst dull disappointing stupid ridiculous waste mess ugly
    weak slow annoying silly dreadful confusing"""
_KIND = """good great kind friend dear lovely gentle nice sweet wonderful beautiful smart brave wise genius
    lady gentleman hero perfect true"""
_UNKIND = """stupid fool dumb ugly crazy sick evil monster pig rat ass coward thief criminal racist devil
    lazy dirty nasty useless"""
WORDS = {"toxicity": (_KIND, _UNKIND), "neg-to-pos": (_GOOD, _BAD), "pos-to-neg": (_BAD, _GOOD)}

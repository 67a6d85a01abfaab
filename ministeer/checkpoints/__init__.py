"""From a name or a folder to (model, tokenizer): config.json, weights, tokenizer, fetching, converting.

Read first: weights.py, whose `load` uses the others.
"""

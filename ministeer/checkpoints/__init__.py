"""From a name or a folder to (model, tokenizer): config.json, weights, tokenizer, fetching, converting.

Read first: loading.py, whose `load` puts them together.
"""

"""Other ways to make a vector: from many pairs of texts instead of one.

Read first: many_pairs.py.
"""

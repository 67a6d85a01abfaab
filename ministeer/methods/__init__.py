"""Other ways to steer: vectors from many pairs of texts, and changes inside blocks.

Read first: many_pairs.py.
"""

"""Vectors that other programs read and wrote, and the addition in a model of the transformers library.

Read first: directions.py, which says what they have in common; then gguf.py or transformers.py.
"""

"""Writing and reading vectors of other programs, and steering a model of the transformers library.

Read first: directions.py, which says what they have in common; then gguf.py or transformers.py.
"""

"""The paper's rivals, which change next-token logits instead of activations.

Read first: logits.py.
"""

"""What steering changed, and how sure we are of it: measurements, judges of texts, intervals and tests.

Read first: measure.py.
"""

"""The page of `ministeer play`: the residual stream, the addition, and what follows from it.

Read first: engine.py, which computes everything shown. Then server.py; the page is page.html and play.js.
"""

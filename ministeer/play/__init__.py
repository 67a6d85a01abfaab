"""`ministeer play`: a page in the browser that shows the residual stream, the addition, and what follows from it.

Read first: engine.py, which computes everything shown. Then server.py; the page is page.html and play.js.
"""

"""Speed, the paper's experiments, its rivals. From the top of the repository: python -m benchmarks.paper

Read next: README.md (results), paper.py, rivals.py, speed.py. Nothing in ministeer/ imports from here.
"""

"""Speed, the paper's experiments and its rivals. Run from the top of the repository: python -m benchmarks.paper layer-sweep."""

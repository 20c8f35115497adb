"""Speed of every op against PyTorch's own, with its error beside it: `python -m benchmarks`. One file an op."""

"""Speed of every op, layer and model against PyTorch's own, its error and bar beside it: `python -m benchmarks`."""

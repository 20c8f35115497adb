"""What this machine can do at most, measured in the same run as everything else."""

import torch

from fasttx.measure import interleave


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying a block that no cache holds."""
    source = torch.empty(2**26).normal_()
    target = torch.empty_like(source)
    measured = interleave({"copy": lambda: target.copy_(source)}, seconds=1.0)
    return 2 * source.nbytes / measured.median("copy").value


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP a second of PyTorch's own square matrix product: what a library reaches, not the hardware's peak."""
    n = 1536
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    measured = interleave({"mm": lambda: torch.mm(a, b)}, seconds=1.0)
    return 2 * n**3 / measured.median("mm").value

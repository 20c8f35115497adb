"""What a device can do at most, measured beside the cases: a copy's bandwidth and a matrix product's rate."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fasttx.measure import interleave


@dataclass(frozen=True)
class Limits:
    """Bytes a second of a large copy, read and written both counted; FLOP a second of a large product, by dtype."""

    copy: float
    matmul: dict[torch.dtype, float]

    def least_seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """No call is faster than its flops at the product's rate, nor than its bytes at the copy's."""
        return max(flops / self.matmul[dtype], moved / self.copy)


def measure(device: str, synchronize: Callable[[], object], *, size: int, side: int, seconds: float = 0.5) -> Limits:
    """size: bytes of the block that is copied, more than caches hold. side: of the square matrices."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[object, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(side, side, device=device).to(dtype)
        calls[dtype] = lambda matrix=matrix: matrix @ matrix
    timed = interleave(calls, seconds=seconds, warm_up=seconds / 2, shortest_sample=1e-3, synchronize=synchronize)
    rate = {name: timed.median(name).inverse().value for name in calls}
    return Limits(2 * size * rate["copy"], {d: 2 * side**3 * rate[d] for d in (torch.bfloat16, torch.float32)})

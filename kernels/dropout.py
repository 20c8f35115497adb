"""Dropout's numbers, as launches pass them to kernels."""

from typing import NamedTuple

from torch import Tensor

from fasttx.philox import drop_threshold


class Dropout(NamedTuple):
    """What a kernel's `seed_ptr`, and its numbers `seed`, `threshold` and `keep_scale`, are to be.

    A seed on the CPU is passed by value; one on the device is read there, so that a CUDA graph can be replayed with
    another.
    """

    active: bool
    seed_ptr: Tensor | None
    numbers: tuple[int, int, float]

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> "Dropout":
        """Of the probability p in [0, 1) and a seed, one int64, which p > 0 needs. Raises ValueError."""
        if p == 0.0:
            return _NO_DROPOUT
        if not 0.0 < p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {p}")
        if seed is None or seed.numel() != 1 or str(seed.dtype) != "torch.int64":
            raise ValueError(f"dropout needs a seed: one int64, got {seed}")
        on_device = not seed.is_cpu
        return cls(True, seed if on_device else None, (0 if on_device else seed.item(), drop_threshold(p), 1 / (1 - p)))


_NO_DROPOUT = Dropout(False, None, (0, 0, 1.0))

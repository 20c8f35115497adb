"""How much memory an op takes beyond its arguments and results, in a process of its own.

`python -m benchmarks.memory attention float32 1` prints it in MiB, with the backward.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fasttx import functional

from .case import NotMeasured, dtype_name

_SHAPE = (1, 12, 16384, 64)


def _linear_cross_entropy(input: Tensor, weight: Tensor) -> Tensor:
    target = torch.arange(len(input)) % len(weight)
    return functional.linear_cross_entropy(input, weight, target, reduction="none")


# Of every op: the function, the shapes of what it takes, in a small call and in the one that is measured, and how many
# dims of the first the result has.
_CALLS: dict[str, tuple[Callable[..., Tensor], list, list, int]] = {
    "attention": (functional.attention, [(*_SHAPE[:2], 64, _SHAPE[3])] * 3, [_SHAPE] * 3, 4),
    "cross_entropy": (_linear_cross_entropy, [(64, 64), (512, 64)], [(8192, 64), (32768, 64)], 1),
}


def extra_megabytes(op: str, dtype: torch.dtype, backward: bool) -> tuple[float, float, float]:
    """The peak of a fresh process; one number, so its interval is itself."""
    if not Path("/proc/self/clear_refs").exists():
        raise NotMeasured("this system does not tell a process's peak memory")
    command = [sys.executable, "-m", __name__, op, dtype_name(dtype), str(int(backward))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    value = float(done.stdout)
    return value, value, value


def _resident(field: str) -> int:
    """Bytes: VmRSS, in memory now, or VmHWM, at most since the peak was last cleared."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024


def _main(op: str, dtype: torch.dtype, backward: bool) -> None:
    function, small, measured, dims = _CALLS[op]
    # A small call first, for what libraries set up once.
    for shapes in (small, measured):
        # Made in their dtype: of what is freed, allocators keep some, and the call could hide in it.
        inputs = [torch.randn(shape, dtype=dtype, requires_grad=backward) for shape in shapes]
        slope = torch.randn(shapes[0][:dims], dtype=dtype)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        out = function(*inputs)
        results = [out.detach()]
        if backward:
            results += torch.autograd.grad(out, inputs, slope)
        extra = _resident("VmHWM") - before - sum(x.nbytes for x in results)
        del out, results
    print(extra / 2**20)


if __name__ == "__main__":
    _main(sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "1")

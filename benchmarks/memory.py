"""How much memory attention takes beyond its arguments and results, in a process of its own.

`python -m benchmarks.memory float32 1` prints it in MiB, with the backward.
"""

import subprocess
import sys
from pathlib import Path

import torch

from fasttx import functional

from .case import NotMeasured, dtype_name

_SHAPE = (1, 12, 16384, 64)


def extra_megabytes(dtype: torch.dtype, backward: bool) -> tuple[float, float, float]:
    """The peak of a fresh process; one number, so its interval is itself."""
    if not Path("/proc/self/clear_refs").exists():
        raise NotMeasured("this system does not tell a process's peak memory")
    command = [sys.executable, "-m", __name__, dtype_name(dtype), str(int(backward))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    value = float(done.stdout)
    return value, value, value


def _resident(field: str) -> int:
    """Bytes: VmRSS, in memory now, or VmHWM, at most since the peak was last cleared."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024


def _main(dtype: torch.dtype, backward: bool) -> None:
    # A small call first, for what libraries set up once.
    for shape in ((*_SHAPE[:2], 64, _SHAPE[3]), _SHAPE):
        # Made in their dtype: of what is freed, allocators keep some, and the call could hide in it.
        query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=backward) for _ in range(3))
        slope = torch.randn(shape, dtype=dtype)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        out = functional.attention(query, key, value)
        results = [out.detach()]
        if backward:
            results += torch.autograd.grad(out, (query, key, value), slope)
        extra = _resident("VmHWM") - before - sum(x.nbytes for x in results)
        del out, results
    print(extra / 2**20)


if __name__ == "__main__":
    _main(getattr(torch, sys.argv[1]), sys.argv[2] == "1")

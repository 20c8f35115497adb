"""How long a call takes until its kernel is launched, for Triton's launchers and for the CUDA C++ ones.

    python -m gpu.host_time    (in tests/)

Measured on CPU tensors with stand-ins that launch nothing: without the driver's own time, which is the same for both.
"""

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from fasttx.dispatch import extension
from fasttx.ops import attention, gelu, layer_norm, softmax
from gpu import driver
from gpu.launchers import on_triton

_CALLS, _SAMPLES = 300, 15


def cases() -> dict[str, Callable[[str], object]]:
    """By name, a call on a backend, of 128 rows of width 768 in bfloat16."""
    x, weight = torch.randn(128, 768).bfloat16(), torch.randn(768).bfloat16()
    query = torch.randn(1, 12, 128, 64).bfloat16()
    options = (None,) * 5 + (True, 0, -1, -1, 0.0, None, 0.125, False, 0)
    return {
        "gelu": lambda backend: gelu.gelu(x, "none", backend),
        "bias_gelu": lambda backend: gelu.bias_gelu(x, weight, "none", backend),
        "layer_norm": lambda backend: layer_norm.layer_norm(x, 768, weight, weight, 1e-5, backend),
        "softmax": lambda backend: softmax.softmax(x, None, False, -1, backend),
        "attention": lambda backend: attention.attention(query, query, query, *options, backend),
    }


def seconds(call: Callable[[], object]) -> float:
    """The median of a call's time."""
    for _ in range(_CALLS // 10):
        call()
    samples = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        samples.append((time.perf_counter() - start) / _CALLS)
    return statistics.median(samples)


@torch.no_grad()
def main() -> None:
    """Prints both of each case, in microseconds."""
    for name, call in cases().items():
        extension.intercept_cuda(lambda *launch: None, lambda *allocation: None)
        in_cuda = seconds(lambda call=call: call("cuda"))
        extension.intercept_cuda(None, None)
        nothing = mock.patch.object(driver._Launcher, "__call__", lambda self, *values: None)
        with on_triton("sm_80"), nothing:
            in_triton = seconds(lambda call=call: call("triton"))
        print(f"{name:12} CUDA C++ {in_cuda * 1e6:5.1f} us   Triton {in_triton * 1e6:5.1f} us")


if __name__ == "__main__":
    main()

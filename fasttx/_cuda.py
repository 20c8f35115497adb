"""Whether the CUDA C++ kernels can run a call, and in words why not."""

from collections.abc import Callable

import torch
from torch import Tensor

from fasttx import _gpu

# Of an op that they have kernels for, why these cannot take a call on the tensors, or None.
_Refusal = Callable[[tuple[Tensor | None, ...]], str | None]
OPS: dict[str, _Refusal] = dict.fromkeys(
    ("gelu", "bias_gelu", "layer_norm", "add_layer_norm"), lambda tensors: None
)


def refusal(op: str, tensors: tuple[Tensor | None, ...], architectures: str) -> str | None:
    """Why they cannot run `op` on these tensors (the first decides dtype and device), or None.

    architectures: what the binary's kernels are compiled for.
    """
    if not architectures:
        return "this build of fasttx contains no CUDA kernels: nvcc was not there, or not wanted, when it was built"
    if op not in OPS:
        return f"there is no CUDA C++ kernel for {op}"
    reason = _gpu.lacking(tensors[0].device)
    if reason is None and torch.version.hip is not None:
        reason = "the CUDA kernels are for NVIDIA's GPUs, and this PyTorch is built for AMD's"
    return reason or _gpu.refusal(tensors) or OPS[op](tensors)

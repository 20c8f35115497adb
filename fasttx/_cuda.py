"""Whether the CUDA C++ kernels can run a call, in words why not, and where `auto` asks them before Triton's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttx import _gpu

# Of an op that they have kernels for, why these cannot take a call on the tensors, or None.
_Refusal = Callable[[tuple[Tensor | None, ...]], str | None]
OPS: dict[str, _Refusal] = dict.fromkeys(
    ("gelu", "bias_gelu", "layer_norm", "add_layer_norm", "softmax"), lambda tensors: None
)

WIDEST_HEAD = 128


def _takes_attention(tensors: tuple[Tensor | None, ...]) -> str | None:
    if tensors[0].dtype == torch.float32:
        return "attention's CUDA C++ kernels are for bfloat16 and float16"
    widths = [tensor.shape[-1] for tensor in tensors if tensor is not None]
    if max(widths) > WIDEST_HEAD or any(width % 8 for width in widths):
        return f"heads are {' and '.join(map(str, sorted(set(widths))))} wide: not a multiple of 8 up to {WIDEST_HEAD}"
    return None


OPS |= dict.fromkeys(("attention", "attention_varlen"), _takes_attention)


@dataclass(frozen=True)
class Preference:
    """Ops of which `auto` asks the CUDA C++ kernels first, on GPUs of these capabilities (None: of all); and why."""

    ops: tuple[str, ...]
    capabilities: tuple[tuple[int, int], ...] | None
    evidence: str


# Where nothing stands here, Triton's kernels come first. No row is measured on a GPU yet.
PREFERENCES = (
    Preference(
        ("layer_norm", "add_layer_norm", "gelu", "bias_gelu", "softmax"),
        None,
        "counted on the emulator: no more bytes than Triton's; measured on the host: less time from call to launch",
    ),
    Preference(
        ("attention", "attention_varlen"),
        ((8, 0), (8, 6), (8, 9), (12, 0)),
        "counted on the emulator: no more instructions a product than Triton's best tile, with half of its traffic in "
        "shared memory; 9.0 and 10.0 have tensor cores that Triton's kernels use and these do not",
    ),
)


def is_preferred(op: str, device: torch.device) -> bool:
    """Whether `auto` asks the CUDA C++ kernels first for an op on this CUDA device."""
    for preference in PREFERENCES:
        if op in preference.ops:
            return preference.capabilities is None or _gpu.capability(device) in preference.capabilities
    return False


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

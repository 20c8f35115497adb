"""What the GPU kernels, Triton's and the CUDA C++ ones, ask of a device and of tensors; in words what is amiss."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
LARGEST_DIMENSION = 2**31 - 1  # rows are counted in 32 bits

# By CUDA device, None for the current one, what it lacks, and its capability: asked once.
_lacking: dict[int | None, str | None] = {}
_capabilities: dict[int | None, tuple[int, int]] = {}


def lacking(device: torch.device) -> str | None:
    """What this machine lacks, or its CUDA device, for the kernels to run there; None where nothing."""
    index = device.index if device.type == "cuda" else None
    if index not in _lacking:
        _lacking[index] = _look(index)
    return _lacking[index]


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, as in (9, 0)."""
    if device.index not in _capabilities:
        _capabilities[device.index] = torch.cuda.get_device_capability(device.index)
    return _capabilities[device.index]


def _look(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here"
    if torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(index)
    if found >= LEAST_CAPABILITY:
        return None
    name, (major, minor) = torch.cuda.get_device_name(index), found
    return f"{name} has compute capability {major}.{minor}, the kernels need 8.0 (Ampere) or later"


def refusal(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why no kernel takes a call on these tensors (the first decides dtype and device), or None."""
    first = tensors[0]
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cuda:
            return f"a tensor is on {tensor.device}, not on a CUDA device"
        if tensor.layout is not torch.strided:
            return f"a tensor has the layout {tensor.layout}"
        if tensor.is_nested:
            return "a tensor is nested"
        if tensor.dtype is not first.dtype:
            return f"dtypes differ: {first.dtype} and {tensor.dtype}"
    if first.dtype not in DTYPES:
        return f"{first.dtype} is not float32, bfloat16 or float16"
    largest = max((size for x in tensors if x is not None for size in x.shape if isinstance(size, int)), default=0)
    return None if largest <= LARGEST_DIMENSION else f"a dimension of {largest} is larger than {LARGEST_DIMENSION}"

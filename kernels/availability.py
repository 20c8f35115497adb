"""Whether the Triton kernels can run a call, and in words why not; nothing here imports triton before it is there."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
WIDEST_HEAD = 256
WIDEST_ENTRY = 8192  # of an embedding
_DIMENSION = 2**31 - 1  # rows are counted in 32 bits

# Of an op, why its kernels cannot take a call on these tensors, or None; the ops that are not here have no kernels.
_Refusal = Callable[[tuple[Tensor | None, ...]], str | None]
OPS: dict[str, _Refusal] = {}


def _takes_any(tensors: tuple[Tensor | None, ...]) -> str | None:
    largest = max((size for x in tensors if x is not None for size in x.shape if isinstance(size, int)), default=0)
    return None if largest <= _DIMENSION else f"a dimension of {largest} is larger than {_DIMENSION}"


OPS |= dict.fromkeys(
    (
        "softmax", "layer_norm", "add_layer_norm", "gelu", "bias_gelu", "linear", "feed_forward", "feed_forward_block",
        "linear_cross_entropy",
    ),
    _takes_any,
)  # fmt: skip


def _takes_entries(tensors: tuple[Tensor | None, ...]) -> str | None:
    width = tensors[0].shape[-1]
    if width > WIDEST_ENTRY:
        return f"entries are {width} wide, and a kernel holds rows of up to {WIDEST_ENTRY}"
    return _takes_any(tensors)


OPS["embedding"] = _takes_entries


def _takes_attention(tensors: tuple[Tensor | None, ...]) -> str | None:
    widest = max(x.shape[-1] for x in tensors if x is not None)
    if widest > WIDEST_HEAD:
        return f"heads are {widest} wide, and a kernel holds rows of up to {WIDEST_HEAD}"
    return _takes_any(tensors)


OPS |= dict.fromkeys(("attention", "attention_varlen"), _takes_attention)
OPS |= dict.fromkeys(("self_attention", "attention_block", "attention_block_varlen"), _takes_any)


def refusal(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why the Triton kernels cannot run `op` on these tensors (the first decides dtype and device), or None."""
    first = tensors[0]
    index = first.device.index if first.is_cuda else None
    if index not in _missing:
        _missing[index] = _look(index)
    if _missing[index] is not None:
        return _missing[index]
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
    return OPS[op](tensors) if op in OPS else f"there is no Triton kernel for {op}"


# By CUDA device, None for the current one, what it lacks: asked once.
_missing: dict[int | None, str | None] = {}


def _look(index: int | None) -> str | None:
    """What this machine, or its CUDA device of that index, lacks."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    name, (major, minor) = torch.cuda.get_device_name(index), capability
    return f"{name} has compute capability {major}.{minor}, the kernels need 8.0 (Ampere) or later"

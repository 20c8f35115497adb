"""What launchers ask of their arguments, so that no kernel reads past a tensor, whoever calls the raw operator."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_input(name: str, tensor: Tensor, dims: int = 1) -> None:
    """Of a dtype that there are kernels for, with so many dimensions at least."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.dim() < dims:
        raise ValueError(f"{name} must have at least {dims} dimension{'s' if dims > 1 else ''}, got {tensor.dim()}")


def require_like(name: str, tensor: Tensor | None, input: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Of the input's dtype and device and of a shape (the input's, where none is given), where there is a tensor."""
    if tensor is None:
        return
    if tensor.dtype is not input.dtype or tensor.device != input.device:
        raise TypeError(f"{name} must be {input.dtype} on {input.device}, got {tensor.dtype} on {tensor.device}")
    expected = input.shape if shape is None else shape
    if tensor.shape != expected:
        raise ValueError(f"{name} must have the shape {tuple(expected)}, got {tuple(tensor.shape)}")


def require_values(name: str, tensor: Tensor | None, input: Tensor, count: int) -> None:
    """Of the input's dtype and device, holding so many values in whatever shape, where there is a tensor."""
    if tensor is None:
        return
    if tensor.dtype is not input.dtype or tensor.device != input.device:
        raise TypeError(f"{name} must be {input.dtype} on {input.device}, got {tensor.dtype} on {tensor.device}")
    if tensor.numel() != count:
        raise ValueError(f"{name} must hold {count} values, got {tensor.numel()}")


def require_width(input: Tensor, width: int) -> None:
    """Rows of that many values."""
    if width <= 0 or input.numel() % width:
        raise ValueError(f"input of shape {tuple(input.shape)} does not consist of rows of {width}")


def require_weight(name: str, weight: Tensor, input: Tensor, width: int) -> None:
    """A matrix (out, width) of the input's dtype and device."""
    if weight.dtype is not input.dtype or weight.device != input.device:
        raise TypeError(f"{name} must be {input.dtype} on {input.device}, got {weight.dtype} on {weight.device}")
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{name} must have the shape (out, {width}), got {tuple(weight.shape)}")


def require_activation(code: int) -> None:
    """One of the codes of kernels/math.py."""
    if code not in (0, 1, 2, 3):
        raise ValueError(f"activation must be 0, 1, 2 or 3, got {code}")

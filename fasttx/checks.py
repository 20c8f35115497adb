"""Argument checks of the public ops: each names the argument, what it was, and what was expected.

An error is of the kind that it should be and of the kind that torch's own functions raise: who catches theirs catches
ours.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# GELU's variants, as torch.nn.functional.gelu names them.
APPROXIMATIONS = ("none", "tanh")


class ArgumentError(ValueError, RuntimeError):
    """A wrong value, shape or device, for which torch has RuntimeError, if not ValueError."""


class PlaceError(ArgumentError, IndexError):
    """An index, or a dimension, that is not there."""


class NoTensorError(TypeError, AttributeError, RuntimeError):
    """What is no tensor, for which torch's modules have any of these: most ask it for a tensor's attributes."""


class KindError(TypeError, NotImplementedError):
    """A wrong dtype or layout, for which torch has NotImplementedError or another RuntimeError."""


def shape(tensor: Tensor) -> str:
    """A shape as it reads in a message."""
    return str(tuple(tensor.shape))


def require_tensor(name: str, value: object) -> None:
    """A tensor and nothing else."""
    if not isinstance(value, Tensor):
        raise NoTensorError(f"{name} must be a tensor, got {type(value).__name__}")


def require_masks(first_name: str, first: Tensor, **masks: object) -> None:
    """Each a tensor on the device of the first, or None where there is none."""
    for name, mask in masks.items():
        if mask is not None and not isinstance(mask, Tensor):
            raise NoTensorError(f"{name} must be a tensor or None, got {type(mask).__name__}")
    require_same_device(first_name, first, **masks)


def require_floating(name: str, tensor: Tensor) -> None:
    """A real floating-point tensor, of a dtype that PyTorch calculates in."""
    require_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise KindError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.element_size() < 2:
        raise KindError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def require_same_device(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Everything on one device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ArgumentError(
                f"{name} is on {tensor.device} but {first_name} is on {first.device}: "
                "move them to one device"
            )


def require_probability(name: str, value: float) -> None:
    """A dropout probability, in [0, 1)."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ArgumentError(f"{name} must be in [0, 1), got {value}")


def require_size(name: str, value: int) -> None:
    """A width or a length: a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ArgumentError(f"{name} must be at least 1, got {value}")


def require_integers(name: str, tensor: Tensor) -> Tensor:
    """Indices, as int64."""
    require_tensor(name, tensor)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise KindError(f"{name} must be int64 or int32, got {tensor.dtype}")
    return tensor.to(torch.int64)


def has_values(tensor: Tensor) -> bool:
    """Whether there are values to look at: not on the meta device, and not in a fake tensor."""
    return not tensor.is_meta and type(tensor) is not FakeTensor


def can_be_read(tensor: Tensor) -> bool:
    """Whether values can be looked at: not while tracing or mapping, and not where that would wait for a GPU."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu" and type(tensor) is not FakeTensor


def require_below(name: str, ids: Tensor, count: int) -> None:
    """Indices in [0, count), where they can be looked at."""
    if not can_be_read(ids) or ids.numel() == 0:
        return
    least, largest = torch.aminmax(ids)
    if least < 0 or largest >= count:
        wrong = ids[(ids < 0) | (ids >= count)][0].item()
        raise PlaceError(f"{name} must lie in [0, {count - 1}], got {wrong}")


def require_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """A tensor of exactly this shape, where one is given."""
    if tensor is None:
        return
    require_floating(name, tensor)
    if tuple(tensor.shape) != expected:
        raise ArgumentError(f"{name} must have the shape {expected} ({meaning}), got {shape(tensor)}")


def require_approximation(value: str) -> None:
    """GELU's variant, as torch.nn.functional.gelu names it."""
    if value not in APPROXIMATIONS:
        raise ArgumentError(f"approximate must be 'none' or 'tanh', got {value!r}")


def require_broadcast(name: str, tensor: Tensor, target: tuple[int, ...]) -> None:
    """A tensor that broadcasts to `target` without changing it."""
    sizes = tuple(tensor.shape)
    fits = len(sizes) <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(reversed(sizes), reversed(target), strict=False)
    )
    if not fits:
        raise ArgumentError(f"{name} of shape {sizes} does not broadcast to {target}")


def require_mask(name: str, mask: Tensor, input: Tensor, target: tuple[int, ...]) -> None:
    """A bool mask, or a float one to add, of the input's dtype or float32, that broadcasts to `target`."""
    require_tensor(name, mask)
    allowed = (torch.bool, input.dtype, torch.float32)
    if mask.dtype not in allowed:
        kinds = " or ".join(sorted({str(dtype) for dtype in allowed}))
        raise KindError(f"{name} must be {kinds}, got {mask.dtype}")
    require_broadcast(name, mask, target)

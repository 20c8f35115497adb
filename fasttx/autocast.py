"""torch.autocast's casting rules for the functions of fasttx, which torch does not know.

Each function asks `acts_on` after its quick path, and calls itself again through `lowered` or `following`: with the
tensors cast and autocast off, so that every backend sees what it would be given without autocast. Gradients flow back
through the casts. float64 is never cast, as in torch.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fasttx._weak import WeakCache
from fasttx.packing import settled_state

# Weights in autocast's dtype: kept, so that each goes on having one packed copy.
_weights = WeakCache()


def acts_on(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def lowered(function: Callable, *tensors: Tensor | None) -> Any:
    """The function in autocast's dtype: matrix products and attention."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device)
    cast = [_lower(x, dtype) if _is_eligible(x, device) else x for x in tensors]
    with torch.autocast(device, enabled=False):
        return function(*cast)


def following(
    function: Callable, data: tuple[Tensor, ...], others: tuple[Tensor | None, ...] = (), *, wide_on_gpu: bool
) -> Any:
    """The function of (*data, *others) with a result of the dtype that the data promote to.

    Where others are wider, it is computed in their dtype and rounded once. wide_on_gpu: there, torch makes it float32;
    not what comes beside it, such as the sum that was normalised.
    """
    device = data[0].device.type
    promoted = result = reduce(torch.promote_types, (x.dtype for x in data))
    if wide_on_gpu and device != "cpu" and result != torch.float64:
        result = torch.float32
    floating = [x for x in others if isinstance(x, Tensor) and x.is_floating_point()]
    inside = reduce(torch.promote_types, (x.dtype for x in floating), result)
    cast = (x.to(inside) if isinstance(x, Tensor) and x.is_floating_point() else x for x in (*data, *others))
    with torch.autocast(device, enabled=False):
        output = function(*cast)
    if not isinstance(output, tuple):
        return output.to(result)
    return output[0].to(result), *(x.to(promoted) for x in output[1:])


def _is_eligible(value: object, device: str) -> bool:
    """Whether torch would cast this argument."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
        and value.device.type == device
    )


def _lower(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype or not isinstance(tensor, torch.nn.Parameter):
        return tensor.to(dtype)
    state = settled_state(tensor)
    if state is None:
        return tensor.to(dtype)
    known = _weights.get(tensor)
    if known is None or known[0] != (dtype, *state):
        # Not an inference tensor, wherever it is made: a later call may save it for a gradient.
        with torch.inference_mode(False), torch.no_grad():
            known = ((dtype, *state), tensor.to(dtype))
        _weights.set(tensor, known)
    return known[1]

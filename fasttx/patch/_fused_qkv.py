"""Three projections of one input as one matrix product."""

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.weak import WeakIdKeyDictionary

from fasttx import dispatch, functional
from fasttx.nn import _blocks
from fasttx.nn._plain import is_plain

# By module: what the weights were when they were joined, and the joined weight and bias.
_joined: WeakIdKeyDictionary = WeakIdKeyDictionary()


def project(attention: Module, x: Tensor) -> tuple[Tensor, ...]:
    """query(x), key(x), value(x) of a self-attention: x (..., in) -> three of (..., out), views of one product if joined.

    Joined when all three are plain and no gradient is needed of them: the concatenation is kept, and made anew
    when a weight changes.
    """
    linears = (attention.query, attention.key, attention.value)
    joined = _join(attention, linears)
    if joined is None:
        return tuple(_blocks.linear(linear, x) for linear in linears)
    return functional.linear(x, *joined).chunk(3, -1)


def _join(attention: Module, linears: tuple[Module, ...]) -> tuple[Tensor, Tensor | None] | None:
    if dispatch.extension is None or torch.compiler.is_compiling():
        return None
    if not all(is_plain(linear, *_blocks.LINEARS) for linear in linears):
        return None
    tensors = [t for linear in linears for t in (linear.weight, linear.bias) if t is not None]
    state = tuple(map(_state, tensors))
    if None in state or len({weight.shape for weight in tensors[::2]}) != 1:
        return None
    known = _joined.get(attention)
    if known is not None and known[0] == state:
        return known[1]
    if len(tensors) != 6:
        return None
    with torch.no_grad():
        joined = torch.cat(tensors[::2]), torch.cat(tensors[1::2])
    _joined[attention] = (state, joined)
    return joined


def _state(tensor: Tensor) -> tuple | None:
    """What changes when the tensor does, as fasttx.packing sees it; None where that cannot be told."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return None
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_inference():
        return None
    if not tensor.is_cpu or not tensor.is_contiguous():
        return None
    address = tensor.data_ptr()
    sample = dispatch.extension.fingerprint(address, tensor.nbytes)
    return tensor._version, address, tensor.shape, tensor.dtype, sample

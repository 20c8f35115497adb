"""Projections of one input as one matrix product."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module

from fasttx import functional
from fasttx._weak import WeakCache
from fasttx.nn import _blocks
from fasttx.nn._plain import is_plain, parameter
from fasttx.packing import settled_state

# By module: what the weights were when they were joined, and the joined weight and bias.
_joined = WeakCache()


def project(owner: Module, linears: Sequence[Module], x: Tensor) -> tuple[Tensor, ...]:
    """Each of the linears' results: x (..., in) -> (..., out) for each.

    One product where `join` gives one for them.
    """
    joined = join(owner, linears)
    if joined is None:
        return tuple(_blocks.linear(linear, x, "projection") for linear in linears)
    return functional.linear(x, *joined).chunk(len(linears), -1)


def join(owner: Module, linears: Sequence[Module]) -> tuple[Tensor, Tensor | None] | None:
    """The weights of linear layers of one shape as one, and the biases: zeros for one without, None without any.

    None where one of them has to be called, or a gradient by it is wanted. The concatenation is kept for the owner,
    which joins no others, and made anew when a weight changes.
    """
    state = []
    for linear in linears:
        if not is_plain(linear, *_blocks.LINEARS):
            return None
        weight, bias = parameter(linear, "weight"), parameter(linear, "bias")
        of_weight, of_bias = settled_state(weight), settled_state(bias)
        if of_weight is None or (of_bias is None and bias is not None):
            return None
        state += (of_weight, of_bias)
    known = _joined.get(owner)
    if known is not None and known[0] == state:
        return known[1]
    if any(linear.weight.shape != linears[0].weight.shape for linear in linears):
        return None
    # An inference tensor has no version to see changes by, and would be packed for every call.
    with torch.inference_mode(False), torch.no_grad():
        weight, bias = torch.cat([linear.weight for linear in linears]), None
        if any(linear.bias is not None for linear in linears):
            zeros = weight.new_zeros(len(linears[0].weight))
            bias = torch.cat([zeros if linear.bias is None else linear.bias for linear in linears])
    _joined.set(owner, (state, (weight, bias)))
    return weight, bias

"""Three projections of one input as one matrix product."""

import torch
from torch import Tensor
from torch.nn import Module

from fasttx import functional
from fasttx._weak import WeakCache
from fasttx.nn import _blocks
from fasttx.nn._plain import is_plain
from fasttx.packing import settled_state

# By module: what the weights were when they were joined, and the joined weight and bias.
_joined = WeakCache()


def project(attention: Module, x: Tensor) -> tuple[Tensor, ...]:
    """query(x), key(x) and value(x) of a self-attention: x (..., in) -> three of (..., out).

    One product when all three are plain and no gradient is needed of them: the concatenation is kept,
    and made anew when a weight changes.
    """
    linears = (attention.query, attention.key, attention.value)
    joined = join(attention)
    if joined is None:
        return tuple(_blocks.linear(linear, x) for linear in linears)
    return functional.linear(x, *joined).chunk(3, -1)


def join(attention: Module) -> tuple[Tensor, Tensor] | None:
    """The weight and bias of the three projections as one, where they may be."""
    linears = (attention.query, attention.key, attention.value)
    state = []
    for linear in linears:
        if not is_plain(linear, *_blocks.LINEARS):
            return None
        of_weight, of_bias = settled_state(linear.weight), settled_state(linear.bias)
        if of_weight is None or of_bias is None:
            return None
        state += (of_weight, of_bias)
    known = _joined.get(attention)
    if known is not None and known[0] == state:
        return known[1]
    if not linears[0].weight.shape == linears[1].weight.shape == linears[2].weight.shape:
        return None
    # An inference tensor has no version to see changes by, and would be packed for every call.
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
    _joined.set(attention, (state, (weight, bias)))
    return weight, bias

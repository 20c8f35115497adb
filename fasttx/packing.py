"""Packed copies of weights, made once and kept as long as the weight they were made from.

The matrix kernels read a weight in panels of their register tile's width. A copy is valid for one tensor, its version
counter, its memory, the instruction set, and a sample of its values: an optimizer step, `load_state_dict`, `.to()` and
`set_isa` all show up in these. The sample is there for edits through `.data`, which no counter sees: it catches those
that change the whole weight. After a partial edit through `.data`, call `invalidate()`.
"""

import torch
from torch import Tensor

from fasttx._weak import WeakCache
from fasttx.dispatch import extension
from fasttx.ops.linear import pack_weight

_packed = WeakCache()


def packed(weight: Tensor) -> Tensor | None:
    """The packed copy of a weight (out, in), or None where the kernel had better pack it for the call.

    That is so when the call will be differentiated by the weight (its next use will find it changed), and for tensors
    whose changes cannot be seen: inference tensors, views with gaps, and what a compiler traces.
    """
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, torch.nn.Parameter):
        return None
    if (weight.requires_grad and torch.is_grad_enabled()) or weight.is_inference():
        return None
    if not weight.is_contiguous():
        return None
    address = weight.data_ptr()
    sample = extension.fingerprint(address, weight.nbytes)
    state = (weight._version, address, weight.shape, weight.dtype, extension.isa(), sample)
    known = _packed.get(weight)
    if known is not None and known[0] == state:
        return known[1]
    with torch.no_grad():
        copy = pack_weight(weight)
    _packed.set(weight, (state, copy))
    return copy


def invalidate() -> None:
    """Forgets every packed copy: the next call of each weight packs it anew."""
    _packed.clear()


def packed_bytes() -> int:
    """Memory that the packed copies take."""
    return sum(copy.nbytes for _, copy in _packed.values())

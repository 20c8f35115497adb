"""Packed copies of weights, made once and kept as long as the weight they were made from.

The matrix kernels read a weight in panels of their register tile's width. A copy is valid for one tensor, its version
counter, its memory and strides, the instruction set, and a sample of its values: an optimizer step, `load_state_dict`,
`.to()` and `set_isa` all show up in these. The sample is there for edits through `.data`, which no counter sees: it
catches those that change the whole weight. After a partial edit through `.data`, call `invalidate()`.
"""

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fasttx._weak import WeakCache
from fasttx.dispatch import extension
from fasttx.ops.pack_weight import pack_weight

# By weight; and those of the vector unit, where it and the matrix unit read different ones.
_packed, _packed_for_vectors = WeakCache(), WeakCache()
_IN_PARTS = frozenset() if extension is None else frozenset(
    (isa, getattr(torch, dtype)) for isa, dtype in extension.in_parts
)
# By weight: where it lay, and its transpose.
_transposed = WeakCache()
# What else was made of packed copies, and is forgotten with them.
dependents: list[WeakCache] = []
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_KINDS = (Tensor, torch.nn.Parameter)


def settled_state(tensor: Tensor | None) -> tuple | None:
    """What changes when the tensor does, so that what was made of it can be kept.

    None where a gradient by it is wanted (its next use will find it changed), and for tensors whose changes cannot be
    seen: inference tensors, views with gaps, subclasses, and what a compiler or a function transform traces.
    """
    return None if extension is None or is_compiling() else extension.settled_state(tensor)


def transposed(weight: Tensor) -> Tensor:
    """weight.t(): how a linear layer reads a weight that is kept as (in, out).

    One and the same view as long as the weight lies where it does, so that it goes on having one packed copy; where a
    gradient is wanted, a new one that leads to the weight.
    """
    if not is_settled(weight):
        return weight.t()
    known = _transposed.get(weight)
    place = place_of(weight)
    if known is None or known[0] != place:
        # Detached, so that it does not keep the weight alive that the cache forgets it with.
        known = (place, weight.detach().t())
        _transposed.set(weight, known)
    return known[1]


def place_of(weight: Tensor) -> tuple:
    """What changes when a tensor comes to lie elsewhere or otherwise: a view made of it before is then none of it."""
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype


def packed(weight: Tensor, on_vectors: bool = False) -> Tensor | None:
    """The packed copy of a weight (out, in), or None where the kernel had better pack it for the call.

    on_vectors: for the vector unit, which a step of cached decoding takes; float32 has another copy where
    it is multiplied in parts.
    """
    state = settled_state(weight)
    if state is None:
        return None
    isa = extension.isa()
    state += (isa,)
    on_vectors = on_vectors and (isa, weight.dtype) in _IN_PARTS
    cache = _packed_for_vectors if on_vectors else _packed
    known = cache.get(weight)
    if known is not None and known[0] == state:
        return known[1]
    with torch.no_grad():
        copy = pack_weight(weight, on_vectors)
    cache.set(weight, (state, copy))
    return copy


def is_settled(tensor: Tensor | None) -> bool:
    """Whether it is a tensor with memory of its own, and no gradient by it is wanted."""
    return (
        type(tensor) in _KINDS
        and not (tensor.requires_grad and is_grad_enabled())
        and not is_compiling()
        and not _are_functorch_transforms_active()
    )


def invalidate() -> None:
    """Forgets every packed copy: the next call of each weight packs it anew."""
    for cache in (_packed, _packed_for_vectors, *dependents):
        cache.clear()


def packed_bytes() -> int:
    """Memory that the packed copies take."""
    return sum(copy.nbytes for cache in (_packed, _packed_for_vectors) for _, copy in cache.values())

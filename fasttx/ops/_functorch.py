"""The ops under torch.func: gradients that functorch can transform, and vmap's rules.

What torch.library registers for an op's gradient, functorch refuses: it asks for a Function whose forward has no
context. Such a one costs more a call, and is taken only while a transform is active.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

Rule = Callable[..., tuple]


def transformable(name: str, raw: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """The op as functorch differentiates and maps it; the formula is the one that eager calls have."""

    def refuse(ctx, *tangents):
        raise NotImplementedError(no_forward_mode(name))

    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *args: raw(*args)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(refuse),
    }
    return type(name, (torch.autograd.Function,), members).apply


def no_forward_mode(name: str) -> str:
    """The way out of a derivative that no kernel has."""
    return (
        f"fasttx's {name} has no forward-mode derivative (jvp, jacfwd, hessian); use the reference path: "
        "`with fasttx.backend('reference'):` around the forward"
    )


def has_tangent(value: object) -> bool:
    """Whether this is a tensor that carries a forward-mode derivative."""
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def one_by_one(op: Callable) -> Rule:
    """The rule that holds for every op: each sample by itself."""

    def rule(info, in_dims, *args):
        pairs = list(zip(args, in_dims, strict=True))
        samples = [
            op(*(arg if dim is None else arg.select(dim, i) for arg, dim in pairs)) for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        outputs = tuple(map(torch.stack, zip(*samples, strict=True)))
        return outputs, (0,) * len(outputs)

    return rule


def as_rows(op: Callable, names: list[str], rows: tuple[str, ...], alone: tuple[str, ...]) -> Rule:
    """The rule of an op that treats each row of `rows` by itself: the samples are so many more rows of one call.

    names: the op's arguments. Where one that is not among `rows` is batched, or one of `alone` is set, each sample goes
    by itself.
    """
    each = one_by_one(op)
    is_row = [name in rows for name in names]
    lone = [names.index(name) for name in alone]

    def rule(info, in_dims, *args):
        others = (dim for dim, row in zip(in_dims, is_row, strict=True) if not row)
        if any(dim is not None for dim in others) or any(_is_set(args[i]) for i in lone):
            return each(info, in_dims, *args)
        outputs = op(*(
            _batch_first(arg, dim, info.batch_size) if row and arg is not None else arg
            for arg, dim, row in zip(args, in_dims, is_row, strict=True)
        ))  # fmt: skip
        if isinstance(outputs, Tensor):
            return outputs, 0
        # What was not asked for is empty, whatever the batch.
        return outputs, tuple(None if output.shape == (0,) else 0 for output in outputs)

    return rule


def as_batches(op: Callable, names: list[str], batches: tuple[str, ...], alone: tuple[str, ...], mask: bool) -> Rule:
    """The rule of an op on batches: those of the samples become one, so many times as long, of one call.

    names: the op's arguments; batches: those whose first dim is the batch's, or 1 in what broadcasts over it. Where
    another is batched, one of `alone` is set, or a tensor would have to be repeated in memory, each sample goes by
    itself; so it does where `mask`: the op gives attn_mask's gradient, and sums it over a sample's batch.
    """
    each = one_by_one(op)
    is_batch = [name in batches for name in names]
    lone, of_mask = [names.index(name) for name in alone], names.index("attn_mask")

    def rule(info, in_dims, *args):
        # Arguments that are their defaults are left out.
        triples = list(zip(args, in_dims, is_batch, strict=False))
        others = (dim for _, dim, batch in triples if not batch)
        if any(dim is not None for dim in others) or any(_is_set(args[i]) for i in lone):
            return each(info, in_dims, *args)
        length = _length(args[0], in_dims[0])
        if mask and length > 1 and _length(args[of_mask], in_dims[of_mask]) == 1:
            return each(info, in_dims, *args)
        folded = [
            _folded(arg, dim, info.batch_size, length) if batch and arg is not None else arg
            for arg, dim, batch in triples
        ]
        if any(new is None is not arg for new, arg in zip(folded, args, strict=True)):
            return each(info, in_dims, *args)
        outputs = op(*folded)
        sizes = info.batch_size, length
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, sizes), 0
        # What was not asked for is empty, whatever the batch.
        is_empty = [output.shape == (0,) for output in outputs]
        unfolded = (
            output if empty else output.unflatten(0, sizes) for output, empty in zip(outputs, is_empty, strict=True)
        )
        return tuple(unfolded), tuple(None if empty else 0 for empty in is_empty)

    return rule


def _length(tensor: Tensor, dim: int | None) -> int:
    """The first size of one sample."""
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


def _folded(tensor: Tensor, dim: int | None, samples: int, length: int) -> Tensor | None:
    """The samples' batches of this length as one; None where that would repeat them in memory."""
    if dim is not None:
        tensor = tensor.movedim(dim, 0)
        return tensor.flatten(0, 1) if tensor.shape[1] == length else None
    if tensor.shape[0] == 1:
        return tensor.expand(samples * length, *tensor.shape[1:])
    return tensor.repeat(samples) if tensor.dim() == 1 else None


def _is_set(value: object) -> bool:
    return value is not None and (isinstance(value, Tensor) or bool(value))


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The samples along a new first dim, repeated where there is but one."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

"""The `fasttx` operator library: schemas live beside each op, kernels register themselves when fasttx._C is loaded."""

from collections.abc import Callable

import torch
from torch import Tensor

# The codes of Activation in csrc/cpu/kernels.h.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}

_LIBRARY = torch.library.Library("fasttx", "DEF")


def define(schema: str, fake: Callable) -> torch._ops.OpOverload:
    """Defines `fasttx::<schema>` with its shape function, and returns the op."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fasttx::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fasttx, name).default


def differentiate(op: torch._ops.OpOverload, backward: Callable, setup_context: Callable) -> None:
    """Gives the op its gradient formula."""
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def run(op: torch._ops.OpOverload, differentiable: bool, *args):
    """Calls the op; one that will not be differentiated goes around the autograd wrapper, which takes 6 us a call."""
    if differentiable or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what statistics are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def given(tensor: Tensor, wanted: bool) -> Tensor | None:
    """A gradient, or None in place of one that was not asked for."""
    return tensor if wanted else None


def forbid_double_backward(op: torch._ops.OpOverload) -> None:
    """Makes differentiating a backward op an error with the way out, instead of a missing gradient."""
    name = op._schema.name.split("::")[1]

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"fasttx's {name} cannot be differentiated again; for second derivatives use the "
            "reference path: `with fasttx.backend('reference'):` around the forward"
        )

    differentiate(op, refuse, lambda ctx, inputs, output: None)

"""Masked softmax."""

from functools import partial

from torch import Tensor
from torch.compiler import is_compiling

from fasttx import autocast, checks, reference
from fasttx.dispatch import choose
from fasttx.ops import softmax as ops


def softmax(
    input: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """softmax(input + mask) along `dim`; what is masked out gets probability zero.

    input of any shape with at least one dimension. mask, broadcastable to input: bool (True = keep) or floating, of
    input's dtype or float32 (added, and differentiable). is_causal: the last two dimensions are rows and columns, and
    row i keeps the columns j <= i; `dim` must then be the last. A row that keeps nothing, or whose every value is -inf,
    gives zeros with zero gradients.
    """
    if mask is None and not is_causal and dim == -1 and backend is None and not is_compiling():
        output = ops.plain_softmax(input, None, False) if type(input) is Tensor and input.dim() > 0 else None
        if output is not None:
            return output
    checks.require_floating("input", input)
    if input.dim() == 0:
        raise checks.ArgumentError("input must have at least one dimension")
    if not -input.dim() <= dim < input.dim():
        raise checks.PlaceError(f"dim must be in [{-input.dim()}, {input.dim() - 1}], got {dim}")
    last = dim % input.dim() == input.dim() - 1
    if is_causal and (input.dim() < 2 or not last):
        raise checks.ArgumentError("is_causal needs an input of two or more dimensions and dim=-1")
    if mask is not None:
        checks.require_mask("mask", mask, input, tuple(input.shape))
        checks.require_same_device("input", input, mask=mask)
    if autocast.acts_on(input):
        call = partial(softmax, is_causal=is_causal, dim=dim, backend=backend)
        return autocast.following(lambda input, mask: call(input, mask=mask), (input,), (mask,), wide_on_gpu=True)

    taken = choose("softmax", (input,), backend)
    if taken == "reference":
        return reference.softmax(input, mask=mask, is_causal=is_causal, dim=dim)
    return ops.softmax(input, mask, is_causal, dim, taken)

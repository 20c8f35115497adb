"""A linear layer and the cross-entropy of its output."""

from functools import partial

import torch
from torch import Tensor

from fasttx import autocast, checks, reference
from fasttx.dispatch import choose
from fasttx.ops import cross_entropy as ops


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(linear(input, weight, bias), target), without the logits in memory.

    input (..., in), weight (V, in) as nn.Linear and nn.Embedding keep it, bias (V,) or None, target (...) int64 or
    int32: the class of each row, in [0, V), or ignore_index. A row that is ignored has loss 0, no part in the mean and
    no gradient, and costs nothing on the CPU. label_smoothing in [0, 1]. reduction: "none" -> (...), "sum" or "mean" ->
    (). dtype: of the loss, by default input's, and float32 under autocast, as in torch. Logits are made in pieces, in
    the forward and again in the backward, and never rounded to a half.

    Raises ValueError for a target that is no class, on a CPU; on a GPU, where looking would mean to wait, its loss and
    all gradients are NaN, and nothing is read outside of the tensors. Class probabilities as target raise TypeError.
    """
    checks.require_floating("input", input)
    checks.require_floating("weight", weight)
    if input.dim() == 0:
        raise checks.ArgumentError("input must have at least one dimension")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise checks.ArgumentError(
            f"weight must have the shape (classes, {input.shape[-1]}), neither of them 0, got {checks.shape(weight)}"
        )
    checks.require_shape("bias", bias, (weight.shape[0],), "weight's classes")
    target = _check_target(target, input)
    checks.require_same_device("input", input, weight=weight, bias=bias, target=target)
    check_options(ignore_index, label_smoothing, reduction, dtype)
    _check_classes(target, weight.shape[0], ignore_index)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    if autocast.acts_on(input):
        wide = torch.promote_types(input.dtype, torch.float32) if dtype is None else dtype
        call = partial(linear_cross_entropy, **options, dtype=wide, backend=backend)
        return autocast.lowered(call, input, weight, target, bias)
    if choose("linear_cross_entropy", (input, weight, bias), backend) == "reference":
        return reference.linear_cross_entropy(input, weight, target, bias, **options, dtype=dtype)
    loss = ops.linear_cross_entropy(input, weight, target, bias, ignore_index, float(label_smoothing), reduction)
    return loss.to(input.dtype if dtype is None else dtype)


def _check_target(target: Tensor, input: Tensor) -> Tensor:
    checks.require_tensor("target", target)
    if target.is_floating_point():
        raise checks.KindError(
            f"target must hold class indices (int64 or int32), got {target.dtype}: "
            "class probabilities are not supported"
        )
    target = checks.require_integers("target", target)
    if target.shape != input.shape[:-1]:
        raise checks.ArgumentError(
            f"target must have the shape {tuple(input.shape[:-1])}, one class for each row of input, "
            f"got {checks.shape(target)}"
        )
    return target


def check_options(ignore_index: int, label_smoothing: float, reduction: str, dtype: torch.dtype | None) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing must be a number, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise checks.ArgumentError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in ops.REDUCTIONS:
        raise checks.ArgumentError(f"reduction must be one of {', '.join(ops.REDUCTIONS)}, got {reduction!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise checks.KindError(f"dtype must be a floating-point dtype, got {dtype}")


def _check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    if not checks.can_be_read(target) or target.numel() == 0:
        return
    least, largest = torch.aminmax(target)
    if least < 0 or largest >= classes:
        wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
        if wrong.numel():
            raise checks.PlaceError(
                f"target must lie in [0, {classes - 1}] or be ignore_index, {ignore_index}; got {wrong[0].item()}"
            )

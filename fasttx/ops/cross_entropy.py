"""A linear layer and the cross-entropy of its output, whose logits are not kept."""

from torch import Tensor

from ._library import accumulate_dtype, define, differentiate, forbid_double_backward, given, map_rows, run, wants_grad

# The codes of Reduction in csrc/bindings/cross_entropy.cpp.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _fwd(input, weight, target, bias, ignore_index, label_smoothing, reduction):
    dtype = accumulate_dtype(input.dtype)
    loss = input.new_empty(target.shape if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    return loss, input.new_empty((*target.shape, 2), dtype=dtype)


def _bwd(
    grad, input, weight, target, bias, stats, ignore_index, label_smoothing, reduction, needs_input, needs_weight,
    needs_bias,
):  # fmt: skip
    return (
        input.new_empty(input.shape if needs_input else (0,)),
        input.new_empty(weight.shape if needs_weight else (0,)),
        input.new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


_OPERANDS = "Tensor input, Tensor weight, Tensor target, Tensor? bias"
_OPTIONS = "int ignore_index, float label_smoothing, int reduction"
# loss, of the dtype that is accumulated in. stats (..., 2): each row's largest logit, and the sum of exponentials
# above it.
linear_cross_entropy_fwd = define(
    f"linear_cross_entropy_fwd({_OPERANDS}, {_OPTIONS}) -> (Tensor loss, Tensor stats)", _fwd
)
linear_cross_entropy_bwd = define(
    f"linear_cross_entropy_bwd(Tensor grad, {_OPERANDS}, Tensor stats, {_OPTIONS},"
    " bool needs_input, bool needs_weight, bool needs_bias)"
    " -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    _bwd,
)


def _save(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.reduction = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _grad_stats):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    dinput, dweight, dbias = linear_cross_entropy_bwd(
        grad, *ctx.saved_tensors, ctx.ignore_index, ctx.label_smoothing, ctx.reduction, *needs
    )
    return given(dinput, needs[0]), given(dweight, needs[1]), None, given(dbias, needs[2]), None, None, None


differentiate(linear_cross_entropy_fwd, _backward, _save)
forbid_double_backward(linear_cross_entropy_bwd)
map_rows(linear_cross_entropy_fwd, "input", "target", alone=("reduction",))
map_rows(
    linear_cross_entropy_bwd, "grad", "input", "target", "stats", alone=("reduction", "needs_weight", "needs_bias")
)


def linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float,
    reduction: str,
) -> Tensor:  # fmt: skip
    """The loss, in float32, or float64 for float64."""
    differentiable = wants_grad(input, weight, bias)
    loss, _ = run(
        linear_cross_entropy_fwd, differentiable,
        input, weight, target, bias, ignore_index, label_smoothing, REDUCTIONS[reduction],
    )  # fmt: skip
    return loss

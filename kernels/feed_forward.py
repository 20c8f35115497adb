"""The feed-forward half of a transformer layer: linear, activation, dropout, linear; and with sum and layer norm."""

from torch import Tensor

from .checks import require_activation, require_input, require_like, require_values, require_weight
from .dropout import Dropout
from .launch import dense
from .layer_norm import add_layer_norm_bwd, layer_norm_fwd
from .linear import as_rows
from .matmul import NO_DROPOUT, multiply, multiply_backward
from .sums import column_sums, sum_partials


def _check(input: Tensor, weight1: Tensor, weight2: Tensor, activation: int) -> None:
    require_input("input", input)
    require_weight("weight1", weight1, input, input.shape[-1])
    require_weight("weight2", weight2, input, weight1.shape[0])
    require_activation(activation)


def _check_gradient(
    grad: Tensor, input: Tensor, preact: Tensor, weight1: Tensor, weight2: Tensor, activation: int
) -> None:
    _check(input, weight1, weight2, activation)
    require_like("grad", grad, input, (*input.shape[:-1], weight2.shape[0]))
    require_like("preact", preact, input, (*input.shape[:-1], weight1.shape[0]))


def _refuse_packed(*packed: Tensor | None) -> None:
    if any(weight is not None for weight in packed):
        raise ValueError("packed1 and packed2 must be None: weights are packed for the CPU's kernels only")


def _layers(
    input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: int,
    dropout: Dropout, preact: Tensor | None, *, residual: Tensor | None = None, dropout2: Dropout = NO_DROPOUT,
) -> Tensor:  # fmt: skip
    """residual + dropout2(linear2(dropout(activation(linear1(input)))))."""
    _check(input, weight1, weight2, activation)
    require_like("bias1", bias1, input, weight1.shape[:1])
    require_like("bias2", bias2, input, weight2.shape[:1])
    require_like("residual", residual, input, (*input.shape[:-1], weight2.shape[0]))
    x = as_rows(input)
    hidden = input.new_empty((x.shape[0], weight1.shape[0]))
    multiply(x, weight1.t(), hidden, bias=dense(bias1), activation=activation, preact=preact, dropout=dropout)
    y = input.new_empty((*input.shape[:-1], weight2.shape[0]))
    multiply(hidden, weight2.t(), y, bias=dense(bias2), dropout=dropout2, residual=dense(residual))
    return y


def feed_forward_fwd(
    input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: int,
    dropout_p: float, seed: Tensor | None, store_preact: bool, packed1: Tensor | None, packed2: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fasttx::feed_forward_fwd; weights are not packed here."""
    _refuse_packed(packed1, packed2)
    preact = input.new_empty((*input.shape[:-1], weight1.shape[0]) if store_preact else (0,))
    dropout = Dropout.of(dropout_p, seed)
    y = _layers(input, weight1, bias1, weight2, bias2, activation, dropout, preact if store_preact else None)
    return y, preact


def _backward(
    grad: Tensor, input: Tensor, preact: Tensor, weight1: Tensor, weight2: Tensor, activation: int, dropout: Dropout,
    residual: Tensor | None, needs_input: bool, needs_weight1: bool, needs_bias1: bool, needs_weight2: bool,
    needs_bias2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of linear2(dropout(activation(linear1(input)))); residual is added to the input's."""

    def empty(shape: tuple[int, ...], needed: bool) -> Tensor:
        return input.new_empty(shape if needed else (0,))

    _check_gradient(grad, input, preact, weight1, weight2, activation)
    dy, x = as_rows(grad), as_rows(input)
    dx = empty(input.shape, needs_input)
    dweight1, dweight2 = empty(weight1.shape, needs_weight1), empty(weight2.shape, needs_weight2)
    dbias1 = empty((0,), False)
    if needs_input or needs_weight1 or needs_bias1 or needs_weight2:
        # One pass gives the gradient before the activation, its sums, and what weight2 was multiplied with.
        dpreact = input.new_empty((x.shape[0], weight1.shape[0]))
        hidden = input.new_empty(dpreact.shape) if needs_weight2 else None
        sums = multiply_backward(
            dy, weight2, dpreact, activation=activation, preact=dense(preact), dropout=dropout, hidden=hidden,
            wants_sums=needs_bias1,
        )  # fmt: skip
        if needs_bias1:
            (dbias1,) = sum_partials(sums, like=input)
        if needs_weight2:
            multiply(dy.t(), hidden, dweight2)
        if needs_input:
            multiply(dpreact, weight1, dx, residual=residual)
        if needs_weight1:
            multiply(dpreact.t(), x, dweight1)
    return dx, dweight1, dbias1, dweight2, column_sums(dy) if needs_bias2 else empty((0,), False)


def feed_forward_bwd(
    grad: Tensor, input: Tensor, preact: Tensor, weight1: Tensor, weight2: Tensor, activation: int, dropout_p: float,
    seed: Tensor | None, needs_input: bool, needs_weight1: bool, needs_bias1: bool, needs_weight2: bool,
    needs_bias2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::feed_forward_bwd."""
    return _backward(
        grad, input, preact, weight1, weight2, activation, Dropout.of(dropout_p, seed), None,
        needs_input, needs_weight1, needs_bias1, needs_weight2, needs_bias2,
    )  # fmt: skip


def feed_forward_block_fwd(
    input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, norm_first: bool, activation: int,
    dropout1_p: float, seed1: Tensor | None, dropout2_p: float, seed2: Tensor | None, store: bool,
    packed1: Tensor | None, packed2: Tensor | None, decodes: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::feed_forward_block_fwd; weights are not packed here, and `decodes` is for the CPU."""
    _refuse_packed(packed1, packed2)
    none = input.new_empty((0,))
    require_input("input", input)
    width = input.shape[-1]
    require_values("norm_weight", norm_weight, input, width)
    require_values("norm_bias", norm_bias, input, width)
    dropout1, dropout2 = Dropout.of(dropout1_p, seed1), Dropout.of(dropout2_p, seed2)
    layers = (weight1, bias1, weight2, bias2, activation, dropout1)
    if norm_first:
        normed = layer_norm_fwd(input, width, norm_weight, norm_bias, eps)
        return _layers(normed, *layers, None, residual=input, dropout2=dropout2), none, input.new_empty((0,))
    preact = input.new_empty((*input.shape[:-1], weight1.shape[0])) if store else None
    total = _layers(input, *layers, preact, residual=input, dropout2=dropout2)
    y = layer_norm_fwd(total, width, norm_weight, norm_bias, eps)
    return (y, preact, total) if store else (y, none, input.new_empty((0,)))


def feed_forward_block_bwd(
    grad: Tensor, input: Tensor, weight1: Tensor, weight2: Tensor, norm_weight: Tensor | None, preact: Tensor,
    sum: Tensor, eps: float, activation: int, dropout1_p: float, seed1: Tensor | None, dropout2_p: float,
    seed2: Tensor | None, needs_input: bool, needs_weight1: bool, needs_bias1: bool, needs_weight2: bool,
    needs_bias2: bool, needs_norm_weight: bool, needs_norm_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::feed_forward_block_bwd."""
    _check_gradient(grad, input, preact, weight1, weight2, activation)
    dropout1, drops = Dropout.of(dropout1_p, seed1), dropout2_p > 0.0
    dsum, dropped, dnorm_weight, dnorm_bias = add_layer_norm_bwd(
        grad, None, sum, norm_weight, input.shape[-1], eps, dropout2_p, seed2,
        drops, True, needs_norm_weight, needs_norm_bias,
    )  # fmt: skip
    gradients = _backward(
        dropped if drops else dsum, input, preact, weight1, weight2, activation, dropout1,
        dsum, needs_input, needs_weight1, needs_bias1, needs_weight2, needs_bias2,
    )  # fmt: skip
    return (*gradients, dnorm_weight, dnorm_bias)

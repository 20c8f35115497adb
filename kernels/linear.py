"""Linear layers."""

from torch import Tensor

from .checks import require_input, require_like, require_weight
from .launch import dense
from .matmul import multiply
from .sums import column_sums


def as_rows(tensor: Tensor) -> Tensor:
    """(rows, width), the last dim kept."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else _empty(tensor)


def _empty(tensor: Tensor) -> Tensor:
    """As reshape would, which cannot tell the rows of a tensor that holds nothing."""
    rows = 1
    for size in tensor.shape[:-1]:
        rows *= size
    return tensor.reshape(rows, tensor.shape[-1])


def linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None) -> Tensor:
    """fasttx::linear_fwd; weights are not packed here."""
    require_input("input", input)
    require_weight("weight", weight, input, input.shape[-1])
    require_like("bias", bias, input, weight.shape[:1])
    if packed is not None:
        raise ValueError("packed must be None: weights are packed for the CPU's kernels only")
    y = input.new_empty((*input.shape[:-1], weight.shape[0]))
    multiply(as_rows(input), weight.t(), y, bias=dense(bias))
    return y


def linear_bwd(
    grad: Tensor, input: Tensor, weight: Tensor, needs_input: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttx::linear_bwd."""
    require_input("input", input)
    require_weight("weight", weight, input, input.shape[-1])
    require_like("grad", grad, input, (*input.shape[:-1], weight.shape[0]))
    dy, x = as_rows(grad), as_rows(input)
    dx = input.new_empty(input.shape if needs_input else (0,))
    dweight = input.new_empty(weight.shape if needs_weight else (0,))
    if needs_input:
        multiply(dy, weight, dx)
    if needs_weight:
        multiply(dy.t(), x, dweight)
    return dx, dweight, column_sums(dy) if needs_bias else input.new_empty((0,))

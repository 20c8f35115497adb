"""GELU, and of input + bias, forward and backward; bias's gradient is summed in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require_activation, require_input, require_like
from .configs import TABLES, Config, everywhere
from .launch import Kernel, block_of, dense
from .math import activation, activation_grad
from .sums import PROGRAMS, sum_partials

_WIDEST_BLOCK = 2048


@triton.jit
def _load_biased(x_ptr, bias_ptr, at, column, inside, width):
    """x + bias in float32, zeros outside."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["rows"])
def _gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, rows: tl.int64, width,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each program takes a tile of (rows, width)."""
    across = tl.cdiv(width, BLOCK_N)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    y = activation(_load_biased(x_ptr, bias_ptr, at, column, inside, width), ACTIVATION)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, rows: tl.int64, width,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each program takes BLOCK_N columns of its share of the rows, and sums their part of dbias.

    dbias (programs down, width) float32, one line a program, or None.
    """
    across = tl.cdiv(width, BLOCK_N)
    down = tl.num_programs(0) // across
    program = tl.program_id(0) // across
    column = (tl.program_id(0) % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(rows, BLOCK_M), down) * BLOCK_M
    first = program * share
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + share, rows), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        slope = activation_grad(_load_biased(x_ptr, bias_ptr, at, column, inside, width), ACTIVATION)
        dx = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dbias_ptr is not None:
            dbias += tl.sum(dx, 0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * width + column, dbias, mask=column < width)


def _tile(most: int, block_m: int, warps: int) -> Config:
    return Config({"BLOCK_M": block_m}, num_warps=warps, up_to={"block": most})


# By the power of two that holds a row, at most _WIDEST_BLOCK.
TABLES["gelu_fwd"] = TABLES["gelu_bwd"] = everywhere(
    _tile(64, 32, 4), _tile(256, 8, 4), _tile(512, 4, 4), _tile(1024, 2, 4), _tile(2048, 1, 4), _tile(2048, 1, 8)
)  # fmt: skip
_fwd = Kernel(_gelu_fwd_kernel, "gelu_fwd", ("block",))
_bwd = Kernel(_gelu_bwd_kernel, "gelu_bwd", ("block",))


def _as_matrix(input: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    """Rows, width, and the block of columns that a program takes; without a bias all values are one row."""
    width = input.numel() if bias is None else input.shape[-1]
    rows = input.numel() // width if width else 0
    return rows, width, min(_WIDEST_BLOCK, block_of(width))


def _check(input: Tensor, bias: Tensor | None, activation: int) -> None:
    require_input("input", input)
    require_like("bias", bias, input, input.shape[-1:])
    require_activation(activation)


def gelu_fwd(input: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """fasttx::gelu_fwd."""
    _check(input, bias, activation)
    x = dense(input)
    y = torch.empty_like(x)
    rows, width, block = _as_matrix(x, bias)
    _fwd(
        lambda blocks: (-(-rows // blocks["BLOCK_M"]) * -(-width // block),),
        (x, dense(bias), y, rows, width), (activation, block), (block,),
    )  # fmt: skip
    return y


def gelu_bwd(
    grad: Tensor, input: Tensor, bias: Tensor | None, activation: int, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """fasttx::gelu_bwd."""
    _check(input, bias, activation)
    require_like("grad", grad, input)
    dy, x = dense(grad), dense(input)
    dx = torch.empty_like(x)
    rows, width, block = _as_matrix(x, bias)
    programs = max(1, min(PROGRAMS, rows))
    partial = x.new_empty((1, programs, width), dtype=torch.float32) if needs_bias else None
    _bwd(
        lambda blocks: ((programs if needs_bias else -(-rows // blocks["BLOCK_M"])) * -(-width // block),),
        (dy, x, dense(bias), dx, None if partial is None else partial[0], rows, width), (activation, block), (block,),
    )  # fmt: skip
    return dx, x.new_empty((0,)) if partial is None else sum_partials(partial, like=x)[0]

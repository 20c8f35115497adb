"""Layer norm, alone and of residual + dropout(input), forward and backward.

Rows of up to a few thousand values stay in registers; wider ones are read in pieces, as often as there are sums that
need the one before. Ba, Kiros and Hinton 2016.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require_input, require_like, require_values, require_width
from .configs import TABLES, Config, everywhere
from .dropout import Dropout
from .launch import Kernel, block_of, dense
from .math import matrix_dropout_keep
from .sums import PROGRAMS, sum_partials

_WIDEST_FWD, _WIDEST_BWD = 16384, 8192  # what a program holds in registers, in values
_PIECE = 4096  # of a row that is wider


@triton.jit
def _addends(
    x_ptr, residual_ptr, seed_ptr, row, start, inside, width, seed, threshold, keep_scale,
    DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x) in float32, zeros outside: row (M,), columns from `start`, inside (M, BLOCK_N)."""
    at = row.to(tl.int64)[:, None] * width + (start + tl.arange(0, BLOCK_N))[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = matrix_dropout_keep(seed, seed_ptr, threshold, row, start, BLOCK_N)
        x = tl.where(keep, x * keep_scale, 0.0)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _scaled(normed, weight_ptr, bias_ptr, column, width):
    """normed * weight + bias, as far as there are any."""
    inside = column < width
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return normed


_UNSPECIALIZED = ["rows", "seed", "threshold"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, sum_ptr,
    rows: tl.int32, width, eps: tl.float32, seed: tl.int64, threshold: tl.int64, keep_scale: tl.float32,
    DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each program normalises BLOCK_M rows, which it holds whole: BLOCK_N is at least width."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    x = _addends(x_ptr, residual_ptr, seed_ptr, row, 0, inside, width, seed, threshold, keep_scale, DROPOUT, BLOCK_N)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    if sum_ptr is not None:
        tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), mask=inside)
    # Two passes: the mean of squares minus the squared mean would cancel.
    centred = tl.where(inside, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    y = _scaled(centred * rstd[:, None], weight_ptr, bias_ptr, column, width)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _layer_norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, sum_ptr,
    rows: tl.int32, width, eps: tl.float32, seed: tl.int64, threshold: tl.int64, keep_scale: tl.float32,
    DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program normalises one row, in pieces of BLOCK_N values; the second and third pass find them in cache."""
    row = tl.program_id(0) + tl.arange(0, 1)
    piece = tl.arange(0, BLOCK_N)
    sums = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_N):
        column = start + piece
        inside = (column < width)[None, :]
        x = _addends(
            x_ptr, residual_ptr, seed_ptr, row, start, inside, width, seed, threshold, keep_scale, DROPOUT, BLOCK_N
        )
        if sum_ptr is not None:
            at = row.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), mask=inside)
        sums += x
    mean = (tl.sum(sums, 1) / width)[:, None]
    squares = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_N):
        column = start + piece
        inside = (column < width)[None, :]
        x = _addends(
            x_ptr, residual_ptr, seed_ptr, row, start, inside, width, seed, threshold, keep_scale, DROPOUT, BLOCK_N
        )
        centred = tl.where(inside, x - mean, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
    for start in range(0, width, BLOCK_N):
        column = start + piece
        inside = (column < width)[None, :]
        x = _addends(
            x_ptr, residual_ptr, seed_ptr, row, start, inside, width, seed, threshold, keep_scale, DROPOUT, BLOCK_N
        )
        y = _scaled((x - mean) * rstd, weight_ptr, bias_ptr, column, width)
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_input_gradients(
    dx, dsum_ptr, seed_ptr, dx_ptr, dropped_ptr, row, start, inside, width, seed, threshold, keep_scale,
    DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the sum, its own slope added, and of the addend under the dropout."""
    at = row.to(tl.int64)[:, None] * width + (start + tl.arange(0, BLOCK_N))[None, :]
    if dsum_ptr is not None:
        dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if dx_ptr is not None:
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dropped_ptr is not None:
        if DROPOUT:
            keep = matrix_dropout_keep(seed, seed_ptr, threshold, row, start, BLOCK_N)
            dx = tl.where(keep, dx * keep_scale, 0.0)
        tl.store(dropped_ptr + at, dx.to(dropped_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_columns(dweight, dbias, dy, normed, dweight_ptr, dbias_ptr):
    """dweight and dbias with these rows' parts, where they are wanted."""
    if dweight_ptr is not None:
        dweight += tl.sum(dy * normed, 0)
    if dbias_ptr is not None:
        dbias += tl.sum(dy, 0)
    return dweight, dbias


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _layer_norm_bwd_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, seed_ptr, dx_ptr, dropped_ptr, dweight_ptr, dbias_ptr,
    rows: tl.int32, width, eps: tl.float32, seed: tl.int64, threshold: tl.int64, keep_scale: tl.float32,
    DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SUMS_FIRST: tl.constexpr,
):  # fmt: skip
    """Each program takes its share of the rows, BLOCK_M at a time, and sums their parts of dweight and dbias.

    dweight, dbias (programs, width) float32: one line a program. SUMS_FIRST: whether a row is added to them before its
    dx is found or after; which takes fewer registers depends on the assembler.
    """
    column = tl.arange(0, BLOCK_N)
    within = (column < width)[None, :]
    share = tl.cdiv(tl.cdiv(rows, BLOCK_M), tl.num_programs(0)) * BLOCK_M
    first = tl.program_id(0) * share
    weight = tl.full([1, BLOCK_N], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + share, rows), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & within
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - (tl.sum(x, 1) / width)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)[:, None]
        normed = centred * rstd
        if SUMS_FIRST:
            dweight, dbias = _add_columns(dweight, dbias, dy, normed, dweight_ptr, dbias_ptr)
        slope = dy * weight
        mean_slope = (tl.sum(slope, 1) / width)[:, None]
        mean_product = (tl.sum(slope * normed, 1) / width)[:, None]
        dx = rstd * (slope - mean_slope - normed * mean_product)
        _store_input_gradients(
            dx, dsum_ptr, seed_ptr, dx_ptr, dropped_ptr, row, 0, inside, width, seed, threshold, keep_scale,
            DROPOUT, BLOCK_N,
        )  # fmt: skip
        if not SUMS_FIRST:
            dweight, dbias = _add_columns(dweight, dbias, dy, normed, dweight_ptr, dbias_ptr)
    line = tl.program_id(0) * width + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + line, dweight, mask=column < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + line, dbias, mask=column < width)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _layer_norm_bwd_wide_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, seed_ptr, dx_ptr, dropped_ptr, stats_ptr,
    rows: tl.int32, width, eps: tl.float32, seed: tl.int64, threshold: tl.int64, keep_scale: tl.float32,
    DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program takes one row in pieces; stats (rows, 2) float32: its mean and 1 / standard deviation."""
    row = tl.program_id(0) + tl.arange(0, 1)
    piece = tl.arange(0, BLOCK_N)
    start_of_row = tl.program_id(0).to(tl.int64) * width
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_N):
        inside = start + piece < width
        sums += tl.load(x_ptr + start_of_row + start + piece, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / width
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_N):
        inside = start + piece < width
        x = tl.load(x_ptr + start_of_row + start + piece, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - mean, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    tl.store(stats_ptr + 2 * tl.program_id(0), mean)
    tl.store(stats_ptr + 2 * tl.program_id(0) + 1, rstd)
    slopes = tl.zeros([1, BLOCK_N], tl.float32)
    products = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_N):
        normed, slope = _piece_of_row(x_ptr, dy_ptr, weight_ptr, start_of_row, start + piece, width, mean, rstd)
        slopes += slope
        products += slope * normed
    mean_slope = (tl.sum(slopes, 1) / width)[:, None]
    mean_product = (tl.sum(products, 1) / width)[:, None]
    for start in range(0, width, BLOCK_N):
        column = start + piece
        normed, slope = _piece_of_row(x_ptr, dy_ptr, weight_ptr, start_of_row, column, width, mean, rstd)
        dx = rstd * (slope - mean_slope - normed * mean_product)
        _store_input_gradients(
            dx, dsum_ptr, seed_ptr, dx_ptr, dropped_ptr, row, start, (column < width)[None, :], width, seed,
            threshold, keep_scale, DROPOUT, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _piece_of_row(x_ptr, dy_ptr, weight_ptr, start_of_row, column, width, mean, rstd):
    """The normalised values and the slopes by them, (1, N), zeros outside."""
    inside = column < width
    x = tl.load(x_ptr + start_of_row + column, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy_ptr + start_of_row + column, mask=inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        slope *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, (x - mean) * rstd, 0.0)[None, :], slope[None, :]


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_bwd_sums_kernel(
    dy_ptr, x_ptr, stats_ptr, dweight_ptr, dbias_ptr, rows: tl.int32, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of wide rows: each program sums BLOCK_N columns of its share of the rows into one line."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(rows, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    first = tl.program_id(1) * share
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + share, rows), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + 2 * row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + 2 * row + 1, mask=row < rows, other=0.0)[:, None]
        dweight += dy * (x - mean) * rstd
        dbias += dy
    line = tl.program_id(1) * width + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + line, tl.sum(dweight, 0), mask=column < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + line, tl.sum(dbias, 0), mask=column < width)


def _rows(most: int, block_m: int, warps: int) -> Config:
    return Config({"BLOCK_M": block_m}, num_warps=warps, up_to={"block": most})


def _bwd_rows(most: int, block_m: int, warps: int, *, sums_first: bool = False) -> Config:
    return Config({"BLOCK_M": block_m, "SUMS_FIRST": int(sums_first)}, num_warps=warps, up_to={"block": most})


# By the power of two that holds a row.
TABLES["layer_norm_fwd"] = everywhere(
    _rows(64, 32, 4), _rows(128, 16, 4), _rows(256, 8, 4), _rows(512, 4, 4), _rows(1024, 1, 4), _rows(1024, 4, 4),
    _rows(2048, 1, 4), _rows(2048, 1, 8), _rows(4096, 1, 8), _rows(8192, 1, 8), _rows(8192, 1, 16),
    _rows(16384, 1, 16),
)  # fmt: skip
_NARROW_BWD = (
    _bwd_rows(64, 32, 4), _bwd_rows(128, 16, 4), _bwd_rows(256, 8, 4), _bwd_rows(512, 4, 4), _bwd_rows(1024, 1, 4),
    _bwd_rows(1024, 2, 4), _bwd_rows(2048, 1, 8), _bwd_rows(4096, 1, 8),
)  # fmt: skip
TABLES["layer_norm_bwd"] = everywhere(
    *_NARROW_BWD,
    _bwd_rows(8192, 1, 16),
    sm_100=(*_NARROW_BWD, _bwd_rows(8192, 1, 16, sums_first=True)),
)
TABLES["layer_norm_fwd_wide"] = everywhere(Config(num_warps=16))
TABLES["layer_norm_bwd_wide"] = everywhere(Config(num_warps=16))
TABLES["layer_norm_bwd_sums"] = everywhere(Config({"BLOCK_M": 8, "BLOCK_N": 256}, num_warps=4))

_fwd = Kernel(_layer_norm_fwd_kernel, "layer_norm_fwd", ("block",))
_fwd_wide = Kernel(_layer_norm_fwd_wide_kernel, "layer_norm_fwd_wide")
_bwd = Kernel(_layer_norm_bwd_kernel, "layer_norm_bwd", ("block",))
_bwd_wide = Kernel(_layer_norm_bwd_wide_kernel, "layer_norm_bwd_wide")
_bwd_sums = Kernel(_layer_norm_bwd_sums_kernel, "layer_norm_bwd_sums")


def _forward(
    input: Tensor, residual: Tensor | None, width: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    dropout: Dropout, store_sum: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    require_input("input", input, 0)
    require_width(input, width)
    require_like("residual", residual, input)
    require_values("weight", weight, input, width)
    require_values("bias", bias, input, width)
    x, residual = dense(input), dense(residual)
    rows = x.numel() // width
    y = torch.empty_like(x)
    total = torch.empty_like(x) if store_sum else None
    args = (
        x, residual, dense(weight), dense(bias), dropout.seed_ptr, y, total, rows, width, eps, *dropout.numbers
    )  # fmt: skip
    block = block_of(width)
    if block <= _WIDEST_FWD:
        _fwd(lambda blocks: (-(-rows // blocks["BLOCK_M"]),), args, (dropout.active, block), (block,))
    else:
        _fwd_wide(lambda blocks: (rows,), args, (dropout.active, _PIECE))
    return y, total


def _backward(
    grad: Tensor, grad_sum: Tensor | None, input: Tensor, weight: Tensor | None, width: int, eps: float,
    dropout: Dropout, needs_input: bool, needs_dropped: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    require_input("input", input, 0)
    require_width(input, width)
    require_like("grad", grad, input)
    require_like("grad_sum", grad_sum, input)
    require_values("weight", weight, input, width)
    dy, dsum, x = dense(grad), dense(grad_sum), dense(input)
    rows = x.numel() // width
    dx = torch.empty_like(x) if needs_input else None
    dropped = torch.empty_like(x) if needs_dropped else None
    block = block_of(width)
    programs = max(1, min(rows, PROGRAMS))
    partial = x.new_empty((needs_weight + needs_bias, programs, width), dtype=torch.float32)
    dweight_partial = partial[0] if needs_weight else None
    dbias_partial = partial[-1] if needs_bias else None
    numbers = (rows, width, eps, *dropout.numbers)
    if block <= _WIDEST_BWD:
        args = (
            dy, dsum, x, dense(weight), dropout.seed_ptr, dx, dropped, dweight_partial, dbias_partial, *numbers
        )  # fmt: skip
        _bwd(lambda blocks: (programs,), args, (dropout.active, block), (block,))
    else:
        stats = x.new_empty((rows, 2), dtype=torch.float32)
        args = (dy, dsum, x, dense(weight), dropout.seed_ptr, dx, dropped, stats, *numbers)
        _bwd_wide(lambda blocks: (rows,), args, (dropout.active, _PIECE))
        if needs_weight or needs_bias:
            _bwd_sums(
                lambda blocks: (-(-width // blocks["BLOCK_N"]), programs),
                (dy, x, stats, dweight_partial, dbias_partial, rows, width),
            )
    sums = iter(sum_partials(partial, like=x) if needs_weight or needs_bias else ())
    return (
        x.new_empty((0,)) if dx is None else dx,
        x.new_empty((0,)) if dropped is None else dropped,
        next(sums) if needs_weight else x.new_empty((0,)),
        next(sums) if needs_bias else x.new_empty((0,)),
    )


def layer_norm_fwd(input: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """fasttx::layer_norm_fwd."""
    return _forward(input, None, width, weight, bias, eps, Dropout.of(0.0, None), False)[0]


def layer_norm_bwd(
    grad: Tensor, input: Tensor, weight: Tensor | None, width: int, eps: float,
    needs_input: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::layer_norm_bwd."""
    dx, _, dweight, dbias = _backward(
        grad, None, input, weight, width, eps, Dropout.of(0.0, None), needs_input, False, needs_weight, needs_bias
    )
    return dx, dweight, dbias


def add_layer_norm_fwd(
    input: Tensor, residual: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, store_sum: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fasttx::add_layer_norm_fwd."""
    y, total = _forward(input, residual, width, weight, bias, eps, Dropout.of(dropout_p, seed), store_sum)
    return y, y.new_empty((0,)) if total is None else total


def add_layer_norm_bwd(
    grad: Tensor, grad_sum: Tensor | None, sum: Tensor, weight: Tensor | None, width: int, eps: float,
    dropout_p: float, seed: Tensor | None,
    needs_input: bool, needs_residual: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::add_layer_norm_bwd."""
    return _backward(
        grad, grad_sum, sum, weight, width, eps, Dropout.of(dropout_p, seed),
        needs_residual, needs_input, needs_weight, needs_bias,
    )  # fmt: skip

"""Masked softmax over the last dim, forward and backward.

Rows of up to a few thousand values stay in registers; of wider ones one pass finds the largest value and the sum,
and a second one writes. A row that keeps nothing gives zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require_input, require_like
from .configs import TABLES, Config, everywhere
from .launch import Kernel, block_of, dense
from .math import LOG2E

_WIDEST = 16384  # what a program holds in registers, in values
_PIECE = 4096  # of a row that is wider


@triton.jit
def _load_scores(
    x_ptr, mask_ptr, row, column, rows, heads, queries, width,
    stride_mb, stride_mh, stride_mq, stride_mk, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The masked input, (M, N) float32; -infinity where it is masked out or outside.

    The rows are those of (batch, heads, queries); the mask's strides are 0 where it broadcasts.
    """
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    scores = tl.load(x_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    query = row % queries
    if mask_ptr is not None:
        head, batch = (row // queries) % heads, row // queries // heads
        lines = batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh + query.to(tl.int64) * stride_mq
        mask_at = lines[:, None] + column.to(tl.int64)[None, :] * stride_mk
        if mask_ptr.dtype.element_ty == tl.int1:
            keep = tl.load(mask_ptr + mask_at, mask=inside, other=0)
            scores = tl.where(keep, scores, float("-inf"))
        else:
            scores += tl.load(mask_ptr + mask_at, mask=inside, other=0.0).to(tl.float32)
    if CAUSAL:
        scores = tl.where(column[None, :] <= query[:, None], scores, float("-inf"))
    return scores


@triton.jit
def _exponential(scores, base):
    """e^(scores - base), base finite; the difference first: multiplied out, large scores round it off."""
    return tl.exp2((scores - base) * LOG2E)


@triton.jit
def _finite(largest):
    """A base for exponentials: 0 in place of -infinity, so that -inf - -inf does not occur."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _reciprocal(total):
    """1 / total, and 0 for an empty row's."""
    return tl.where(total == 0.0, 0.0, 1.0 / total)


_UNSPECIALIZED = ["rows", "heads", "queries"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _softmax_fwd_kernel(
    x_ptr, mask_ptr, y_ptr, rows: tl.int32, heads: tl.int32, queries: tl.int32, width,
    stride_mb, stride_mh, stride_mq, stride_mk,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each program takes BLOCK_M rows, which it holds whole: BLOCK_N is at least width."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    scores = _load_scores(
        x_ptr, mask_ptr, row, column, rows, heads, queries, width, stride_mb, stride_mh, stride_mq, stride_mk, CAUSAL
    )  # fmt: skip
    exponentials = _exponential(scores, _finite(tl.max(scores, 1))[:, None])
    y = exponentials * _reciprocal(tl.sum(exponentials, 1))[:, None]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _softmax_fwd_wide_kernel(
    x_ptr, mask_ptr, y_ptr, rows: tl.int32, heads: tl.int32, queries: tl.int32, width,
    stride_mb, stride_mh, stride_mq, stride_mk,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program takes one row in pieces; every lane has a largest value and a sum of its own until the end."""
    row = tl.program_id(0) + tl.arange(0, 1)
    largest = tl.full([1, BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        scores = _load_scores(
            x_ptr, mask_ptr, row, column, rows, heads, queries, width, stride_mb, stride_mh, stride_mq, stride_mk,
            CAUSAL,
        )  # fmt: skip
        new_largest = tl.maximum(largest, scores)
        base = _finite(new_largest)
        total = total * _exponential(largest, base) + _exponential(scores, base)
        largest = new_largest
    base = _finite(tl.max(largest, 1))[:, None]
    scale = _reciprocal(tl.sum(total * _exponential(largest, base), 1))[:, None]
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        scores = _load_scores(
            x_ptr, mask_ptr, row, column, rows, heads, queries, width, stride_mb, stride_mh, stride_mq, stride_mk,
            CAUSAL,
        )  # fmt: skip
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        y = _exponential(scores, base) * scale
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(column < width)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _softmax_bwd_kernel(dy_ptr, y_ptr, dx_ptr, rows: tl.int32, width, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """dx = y (dy - sum(y dy)): each program takes BLOCK_M rows, which it holds whole."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dx = y * (dy - tl.sum(y * dy, 1)[:, None])
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _softmax_bwd_wide_kernel(dy_ptr, y_ptr, dx_ptr, rows: tl.int32, width, BLOCK_N: tl.constexpr):
    """As _softmax_bwd_kernel, of one row in pieces."""
    start_of_row = tl.program_id(0).to(tl.int64) * width
    products = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        y = tl.load(y_ptr + start_of_row + column, mask=column < width, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start_of_row + column, mask=column < width, other=0.0).to(tl.float32)
        products += y * dy
    mean = tl.sum(products, 0)
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        y = tl.load(y_ptr + start_of_row + column, mask=column < width, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start_of_row + column, mask=column < width, other=0.0).to(tl.float32)
        dx = y * (dy - mean)
        tl.store(dx_ptr + start_of_row + column, dx.to(dx_ptr.dtype.element_ty), mask=column < width)


def _rows(most: int, block_m: int, warps: int) -> Config:
    return Config({"BLOCK_M": block_m}, num_warps=warps, up_to={"block": most})


# By the power of two that holds a row.
TABLES["softmax_fwd"] = TABLES["softmax_bwd"] = everywhere(
    _rows(64, 32, 4), _rows(128, 16, 4), _rows(256, 8, 4), _rows(512, 4, 4), _rows(1024, 1, 4), _rows(1024, 4, 4),
    _rows(2048, 1, 4), _rows(4096, 1, 8), _rows(8192, 1, 8), _rows(8192, 1, 16), _rows(16384, 1, 16),
)  # fmt: skip
TABLES["softmax_fwd_wide"] = TABLES["softmax_bwd_wide"] = everywhere(Config(num_warps=16))
_fwd = Kernel(_softmax_fwd_kernel, "softmax_fwd", ("block",))
_fwd_wide = Kernel(_softmax_fwd_wide_kernel, "softmax_fwd_wide")
_bwd = Kernel(_softmax_bwd_kernel, "softmax_bwd", ("block",))
_bwd_wide = Kernel(_softmax_bwd_wide_kernel, "softmax_bwd_wide")


def _four_sizes(input: Tensor) -> tuple[int, int, int, int]:
    """The input's sizes as (batch, heads, queries, width): missing dims are 1, those in front fold into the batch."""
    *outer, heads, queries, width = (1, 1, 1, *input.shape)[-max(4, input.dim()) :]
    batch = 1
    for size in outer:
        batch *= size
    return batch, heads, queries, width


def _strides(mask: Tensor | None, sizes: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The mask's strides over these sizes, 0 where it broadcasts. Raises ValueError where it does not."""
    if mask is None:
        return 0, 0, 0, 0
    try:
        return mask.expand(sizes).stride()
    except RuntimeError:
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to {sizes}") from None


def _check_mask(mask: Tensor | None, input: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype not in (torch.bool, input.dtype, torch.float32) or mask.device != input.device:
        raise TypeError(
            f"mask must be bool, {input.dtype} or float32 on {input.device}, got {mask.dtype} on {mask.device}"
        )
    if mask.dim() > min(4, input.dim()):
        raise ValueError(f"mask must have at most {min(4, input.dim())} dimensions, got {mask.dim()}")


def softmax_fwd(input: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """fasttx::softmax_fwd."""
    require_input("input", input, 2 if is_causal else 1)
    _check_mask(mask, input)
    x = dense(input)
    y = torch.empty_like(x)
    sizes = _four_sizes(x)
    batch, heads, queries, width = sizes
    rows = batch * heads * queries
    if not x.numel():
        return y
    args = (x, mask, y, rows, heads, queries, width, *_strides(mask, sizes))
    block = block_of(width)
    if block <= _WIDEST:
        _fwd(lambda blocks: (-(-rows // blocks["BLOCK_M"]),), args, (is_causal, block), (block,))
    else:
        _fwd_wide(lambda blocks: (rows,), args, (is_causal, _PIECE))
    return y


def softmax_bwd(grad: Tensor, output: Tensor) -> Tensor:
    """fasttx::softmax_bwd."""
    require_input("output", output)
    require_like("grad", grad, output)
    dy, y = dense(grad), dense(output)
    dx = torch.empty_like(y)
    width = y.shape[-1]
    if not y.numel():
        return dx
    rows = y.numel() // width
    block = block_of(width)
    if block <= _WIDEST:
        _bwd(lambda blocks: (-(-rows // blocks["BLOCK_M"]),), (dy, y, dx, rows, width), (block,), (block,))
    else:
        _bwd_wide(lambda blocks: (rows,), (dy, y, dx, rows, width), (_PIECE,))
    return dx

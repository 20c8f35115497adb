"""Sums over the rows of a matrix, in a fixed order: what a bias's gradient is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import TABLES, Config, everywhere
from .launch import Kernel, dense

# How many partial sums a sum over many rows is made of at most: on every device alike, as the result then is.
PROGRAMS = 256


@triton.jit(do_not_specialize=["rows"])
def _column_sums_kernel(
    x_ptr, out_ptr, second_out_ptr, rows: tl.int32, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program sums BLOCK_N columns of its share of the rows into one line of out, (programs, width).

    x is one such matrix, or two, one after the other: then the third axis of programs goes through them, and the second
    one's sums go to second_out.
    """
    x_ptr += tl.program_id(2).to(tl.int64) * rows * width
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(rows, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    first = tl.program_id(1) * share
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + share, rows), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        sums += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(sums, 0).to(out_ptr.dtype.element_ty)
    line = tl.program_id(1) * width + column
    is_first = tl.program_id(2) == 0
    tl.store(out_ptr + line, total, mask=(column < width) & is_first)
    if second_out_ptr is not None:
        tl.store(second_out_ptr + line, total, mask=(column < width) & (not is_first))


TABLES["column_sums"] = everywhere(
    Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4), Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4)
)
_column_sums = Kernel(_column_sums_kernel, "column_sums")
_ROWS = 64  # that one partial sum takes at least


def sum_partials(partials: Tensor, like: Tensor) -> list[Tensor]:
    """The sums over the rows of each of one or two matrices, (1 or 2, rows, width), in like's dtype."""
    count, rows, width = partials.shape
    sums = [like.new_empty((width,)) for _ in range(count)]
    _column_sums(
        lambda blocks: (-(-width // blocks["BLOCK_N"]), 1, count),
        (partials, sums[0], sums[1] if count == 2 else None, rows, width),
    )
    return sums


def column_sums(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over the rows of (rows, width), in dtype or in its own, kept in float32 until the end."""
    matrix = dense(matrix)
    rows, width = matrix.shape
    programs = max(1, min(PROGRAMS, -(-rows // _ROWS)))
    partial = matrix.new_empty((1, programs, width), dtype=torch.float32)
    _column_sums(lambda blocks: (-(-width // blocks["BLOCK_N"]), programs), (matrix, partial, None, rows, width))
    return sum_partials(partial, like=matrix if dtype is None else matrix.new_empty((0,), dtype=dtype))[0]

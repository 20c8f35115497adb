"""Which tiles a mask leaves: each program of attention meets those that it lists, and masks no tile that is seen whole.

A list is made for every tile of rows that a program owns, before the program runs, from one look at the mask. A row's
result does not depend on it: a tile of which nothing is seen adds exact zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tile import ADDITIVE, tiles_seen, tokens_of
from .launch import Kernel

# Values of the mask that a program looks at together: 16 of each thread, whose addresses take twice the registers.
_VALUES = 1 << 13


@triton.jit(do_not_specialize=["rows", "columns", "entries", "lo", "hi"])
def _attention_lists_kernel(
    lists_ptr, mask_ptr, row_lengths_ptr, lengths_ptr, stride_mb, stride_mh, stride_mr, stride_mc, heads,
    rows: tl.int32, columns: tl.int32, entries: tl.int32, lo: tl.int32, hi: tl.int32,
    MASK: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, PER_COLUMN: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    first = program % tiles * BLOCK_M
    head, sequence = program // tiles % heads, program // tiles // heads
    row_count = tokens_of(sequence, rows, None, row_lengths_ptr)[1]
    column_count = tokens_of(sequence, columns, None, lengths_ptr)[1]
    last = tl.minimum(first + BLOCK_M, row_count) - 1
    begin, _, _, end = tiles_seen(first, last, column_count, lo, hi, HAS_LO, HAS_HI, BLOCK_N)
    end = tl.where(first < row_count, end, begin)
    lists_ptr += program.to(tl.int64) * entries
    mask_ptr += sequence.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
    row = tl.minimum(first + tl.arange(0, BLOCK_M), row_count - 1)[:, None]
    at = mask_ptr
    if not PER_COLUMN:
        at += row.to(tl.int64) * stride_mr
    count = 0
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        there = column < end
        values = tl.load(at + column.to(tl.int64) * stride_mc, mask=there, other=0)
        if MASK == ADDITIVE:
            seen = there & (values != float("-inf"))
        else:
            seen = values != 0
        if HAS_LO:
            seen = seen & (column - row >= lo)
        if HAS_HI:
            seen = seen & (column - row <= hi)
        of_column = tl.max(seen.to(tl.int32), 0)
        some = tl.max(tl.reshape(of_column, (COLUMNS // BLOCK_N, BLOCK_N)), 1)
        of_column = tl.min(seen.to(tl.int32), 0)
        every = tl.min(tl.reshape(of_column, (COLUMNS // BLOCK_N, BLOCK_N)), 1)
        tile = start // BLOCK_N + tl.arange(0, COLUMNS // BLOCK_N)
        if row_lengths_ptr is not None:  # rows beyond the last are not there, but have results
            every = tl.where(first + BLOCK_M <= row_count, every, 0)
        entry = 2 * tile + 1
        if MASK != ADDITIVE:
            entry -= every
        tl.store(lists_ptr + count + tl.cumsum(some, 0), entry, mask=some != 0)
        count += tl.sum(some, 0)
    tl.store(lists_ptr, count)


_lists = Kernel(_attention_lists_kernel, "attention_lists")


def list_tiles(
    mask: Tensor, kind: int, strides: tuple[int, ...], sizes: tuple[int, int], bounds: tuple[int, int],
    has_bounds: tuple[bool, bool], lengths: tuple[Tensor | None, Tensor | None], blocks: tuple[int, int],
    outer: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Of each tile of rows, how many tiles of columns the mask leaves, and those, in order: int32
    (*outer, tiles of rows, 1 + tiles of columns).

    An entry is twice the tile's number, and 1 more where the mask, or the places of its rows and columns, rule
    out some of it; a floating mask has to be added in all of them. mask: of the kind BOOLEAN or ADDITIVE, of strides
    (sequence, head, row, column), the row's 0 where it is the same for all. sizes: rows and columns. bounds: row i
    sees the columns from i + lo to i + hi, where has_bounds says so. lengths (sequences,), or None: how many rows and
    columns there are. blocks: rows and columns of a tile. outer: sequences and heads that lists are made for.
    """
    (rows, columns), (block_m, block_n) = sizes, blocks
    tiles, most = -(-rows // block_m), -(-columns // block_n)
    lists = torch.empty((*outer, tiles, 1 + most), dtype=torch.int32, device=mask.device)
    _lists(
        lambda _: (outer[0] * outer[1] * tiles,),
        (lists, mask, *lengths, *strides, outer[1], rows, columns, 1 + most, *bounds),
        (kind, *has_bounds, strides[2] == 0, max(_VALUES // block_m, block_n), block_m, block_n),
    )
    return lists

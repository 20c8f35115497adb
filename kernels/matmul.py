"""Matrix products with what comes before or after them in a linear layer fused: bias, activation, dropout, residual.

A grid of as many programs as the device runs at once goes over all tiles, so that many small ones cost one launch's
overhead. How a sum is ordered depends on its length and the configuration alone: not on the number of rows, nor on the
device's size.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import TABLES, Config
from .dropout import Dropout
from .launch import Kernel, processors
from .math import activation, activation_grad, matrix_dropout_keep


@triton.jit
def product_tile(
    a_ptr, b_ptr, first_row, first_column, M, N, K, stride_a, stride_b,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32 of a (M, K) times b (K, N); a transposed operand is stored as its transpose."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Offsets within a tile fit 32 bits; where it begins need not.
    if A_TRANSPOSED:
        a = a_ptr + first_row + m[:, None] + k[None, :] * stride_a
        step_a = BLOCK_K * stride_a
    else:
        a = a_ptr + first_row.to(tl.int64) * stride_a + m[:, None] * stride_a + k[None, :]
        step_a = BLOCK_K
    if B_TRANSPOSED:
        b = b_ptr + first_column.to(tl.int64) * stride_b + n[None, :] * stride_b + k[:, None]
        step_b = BLOCK_K
    else:
        b = b_ptr + first_column + n[None, :] + k[:, None] * stride_b
        step_b = BLOCK_K * stride_b
    in_m, in_n = (first_row + m < M)[:, None], (first_column + n < N)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a, mask=in_m, other=0.0)
            b_tile = tl.load(b, mask=in_n, other=0.0)
        else:
            a_tile = tl.load(a, mask=in_m & (start + k < K)[None, :], other=0.0)
            b_tile = tl.load(b, mask=in_n & (start + k < K)[:, None], other=0.0)
        if a_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee":
            # Sums of sums: one long chain of additions would lose more digits than PyTorch's own product. Triton would
            # make a chain of a plain addition.
            sums = tl.fma(tl.dot(a_tile, b_tile, input_precision=PRECISION), 1.0, sums)
        else:
            sums = tl.dot(a_tile, b_tile, sums, input_precision=PRECISION)
        a += step_a
        b += step_b
    return sums


@triton.jit(do_not_specialize=["seed", "threshold"])
def _matmul_kernel(
    a_ptr, b_ptr, bias_ptr, residual_ptr, preact_ptr, hidden_ptr, seed_ptr, c_ptr, sums_ptr,
    M, N, K, stride_a, stride_b, seed: tl.int64, threshold: tl.int64, keep_scale: tl.float32,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """c (M, N) from the product a b.

    Forward: residual + dropout(activation(a b + bias)), where preact gets what the activation is taken of. Backward:
    dropout'(a b) activation'(preact), the gradient before the activation, where hidden gets
    dropout(activation(preact)) over again, and sums (tiles down, N) float32 the sum of each tile's columns.
    """
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), disable_licm=True):
        # Tiles go in groups of GROUP_M down: neighbours in time share rows of a and columns of b in cache.
        group = tile // (GROUP_M * across)
        height = tl.minimum(down - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + (tile % (GROUP_M * across)) % height
        tile_n = (tile % (GROUP_M * across)) // height
        first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N
        value = product_tile(
            a_ptr, b_ptr, first_row, first_column, M, N, K, stride_a, stride_b,
            A_TRANSPOSED, B_TRANSPOSED, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        row = first_row + tl.arange(0, BLOCK_M)
        column = first_column + tl.arange(0, BLOCK_N)
        inside = (row < M)[:, None] & (column < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        if DROPOUT:
            keep = matrix_dropout_keep(seed, seed_ptr, threshold, row, first_column, BLOCK_N)
        if BACKWARD:
            preact = tl.load(preact_ptr + at, mask=inside, other=0.0).to(tl.float32)
            value *= activation_grad(preact, ACTIVATION)
            if hidden_ptr is not None:
                hidden = activation(preact, ACTIVATION)
                if DROPOUT:
                    hidden = tl.where(keep, hidden * keep_scale, 0.0)
                tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
        else:
            if bias_ptr is not None:
                value += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
            if preact_ptr is not None:
                tl.store(preact_ptr + at, value.to(preact_ptr.dtype.element_ty), mask=inside)
            value = activation(value, ACTIVATION)
        if DROPOUT:
            value = tl.where(keep, value * keep_scale, 0.0)
        if residual_ptr is not None:
            value += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(c_ptr + at, value.to(c_ptr.dtype.element_ty), mask=inside)
        if sums_ptr is not None:
            tl.store(sums_ptr + tile_m * N + column, tl.sum(tl.where(inside, value, 0.0), 0), mask=column < N)


def _tiles(
    m: int, n: int, k: int, stages: int, warps: int, per_processor: int = 1, *, bits: int = 16, epilogue: int = 1
) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "PER_PROCESSOR": per_processor}
    return Config(blocks, num_warps=warps, num_stages=stages, up_to={"bits": bits, "epilogue": epilogue})


# By the bits of a value and by how many registers the epilogue takes: _PLAIN, _ACTIVATION or _GRADIENT.
# PER_PROCESSOR: how many programs each multiprocessor is given.
_PLAIN, _ACTIVATION, _GRADIENT = range(3)
# What is summed of a gradient's columns at a time: in all configurations, so that the parts of a sum are known before.
_GRADIENT_ROWS = 64
_LEAST = (
    _tiles(_GRADIENT_ROWS, 128, 32, 4, 8, epilogue=_GRADIENT),
    _tiles(_GRADIENT_ROWS, 64, 32, 4, 4, 2, epilogue=_GRADIENT),
    _tiles(_GRADIENT_ROWS, 64, 16, 3, 8, 2, bits=32, epilogue=_GRADIENT),
)  # fmt: skip
_COMMON = (*_LEAST, _tiles(_GRADIENT_ROWS, 64, 32, 2, 8, bits=32, epilogue=_GRADIENT))
_SMALL_MEMORY = (_tiles(128, 128, 32, 3, 8), _tiles(64, 128, 32, 4, 8, 2), *_LEAST)
TABLES["matmul"] = {
    "sm_80": (
        _tiles(128, 128, 32, 4, 8), _tiles(128, 128, 64, 3, 8), _tiles(64, 128, 32, 4, 8, 2),
        _tiles(128, 256, 32, 3, 8, epilogue=_PLAIN), *_COMMON,
    ),
    "sm_86": _SMALL_MEMORY,
    "sm_89": _SMALL_MEMORY,
    "sm_90": (_tiles(128, 128, 64, 4, 8), _tiles(64, 128, 64, 4, 4, 2), *_COMMON),
    "sm_100": (_tiles(128, 128, 64, 4, 8), _tiles(128, 64, 64, 4, 4, 2), *_COMMON),
    "sm_120": _SMALL_MEMORY,
    "gfx942": (_tiles(128, 128, 32, 2, 8), _tiles(64, 128, 32, 2, 4, 2), *_COMMON),
}  # fmt: skip
_matmul = Kernel(_matmul_kernel, "matmul", ("bits", "epilogue"))
_processors = lru_cache(processors)


class Operand(NamedTuple):
    """A matrix as the kernel reads it: itself, or its transpose, in rows of unit stride."""

    tensor: Tensor
    transposed: bool
    stride: int

    @classmethod
    def of(cls, matrix: Tensor) -> "Operand":
        rows, columns = matrix.stride()
        if columns == 1 or matrix.shape[1] == 1:
            return cls(matrix, False, rows)
        if rows == 1 or matrix.shape[0] == 1:
            return cls(matrix, True, columns)
        return cls(matrix.contiguous(), False, matrix.shape[1])


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: TF32 where PyTorch's own products may be."""
    is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_tf32 else "ieee"


NO_DROPOUT = Dropout.of(0.0, None)


def multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    activation: int = 0,
    preact: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    residual: Tensor | None = None,
) -> None:
    """out = residual + dropout(activation(a b + bias)); preact, where given, gets a b + bias.

    a (M, K) and b (K, N) with any strides; out, preact and residual hold (M, N), contiguous; bias (N,), contiguous.
    """
    _launch(a, b, out, bias, residual, preact, None, None, dropout, activation, False)


def multiply_backward(
    a: Tensor, b: Tensor, out: Tensor, *, activation: int, preact: Tensor, dropout: Dropout, hidden: Tensor | None,
    wants_sums: bool,
) -> Tensor | None:  # fmt: skip
    """out = dropout'(a b) activation'(preact); hidden, where given, gets dropout(activation(preact)).

    Shapes as multiply's. Returns the column sums of out in parts, (1, parts, N) float32, where they are wanted.
    """
    sums = None
    if wants_sums:
        parts = max(1, -(-a.shape[0] // _GRADIENT_ROWS))
        allocate = a.new_empty if a.shape[0] else a.new_zeros
        sums = allocate((1, parts, b.shape[1]), dtype=torch.float32)
    _launch(a, b, out, None, None, preact, hidden, sums, dropout, activation, True)
    return sums


def _launch(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None, preact: Tensor | None,
    hidden: Tensor | None, sums: Tensor | None, dropout: Dropout, activation: int, is_backward: bool,
) -> None:  # fmt: skip
    (rows, inner), columns = a.shape, b.shape[1]
    a, a_transposed, stride_a = Operand.of(a)
    b, b_transposed, stride_b = Operand.of(b)

    is_plain = not (activation or dropout.active)
    epilogue = _GRADIENT if is_backward else _PLAIN if is_plain else _ACTIVATION

    def grid(blocks: dict[str, int]) -> tuple[int]:
        tiles = -(-rows // blocks["BLOCK_M"]) * -(-columns // blocks["BLOCK_N"])
        return (min(tiles, _processors(a.device) * blocks["PER_PROCESSOR"]),)

    _matmul(
        grid,
        (a, b, bias, residual, preact, hidden, dropout.seed_ptr, out, sums, rows, columns, inner, stride_a, stride_b,
         *dropout.numbers),
        (a_transposed, b_transposed, inner % 128 == 0, precision(a.dtype), activation, is_backward, dropout.active),
        (a.element_size() * 8, epilogue),
    )  # fmt: skip

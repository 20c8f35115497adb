"""A linear layer and the cross-entropy of its output, whose logits are never in memory as a whole.

Forward: each program goes over a stretch of the classes for some rows, with sums kept relative to the largest logit so
far (Milakov and Gimelshein 2018); the stretches are joined in their order. Backward: the logits' gradients are made a
tile of rows and classes at a time, and multiplied at once. Stretches are cut at fixed places: a row's result does not
depend on the rows beside it. Targets that are no class make a loss and gradients of NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require_input, require_like, require_weight
from .configs import TABLES, Config, everywhere
from .launch import Kernel, dense
from .linear import as_rows
from .math import LOG2E
from .matmul import Operand, multiply, precision, product_tile
from .sums import column_sums

# Classes of one program of the forward; classes and rows of one tile of the backward, whose logits' gradients are in
# memory. Powers of two, so that all blocks fit.
_STRETCH, _TILE_CLASSES, _TILE_ROWS = 2048, 4096, 16384
_NONE, _MEAN, _SUM = 0, 1, 2  # the codes of Reduction in csrc/bindings/cross_entropy.cpp


@triton.jit
def _finite(largest):
    """A base for exponentials: 0 in place of -infinity, so that -inf - -inf does not occur."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _logits(
    x_ptr, weight_ptr, bias_ptr, first_row, first_class, rows, classes, K, stride_x, stride_w,
    W_TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32: x weight^T + bias; -infinity where there is no class."""
    values = product_tile(
        x_ptr, weight_ptr, first_row, first_class, rows, classes, K, stride_x, stride_w,
        False, W_TRANSPOSED, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    column = first_class + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        values += tl.load(bias_ptr + column, mask=column < classes, other=0.0).to(tl.float32)[None, :]
    return tl.where((column < classes)[None, :], values, float("-inf"))


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _cross_entropy_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, target_ptr, parts_ptr,
    rows: tl.int32, classes, K, stride_x, stride_w, ignore_index: tl.int64, share: tl.float32,
    W_TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, SMOOTH: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts (3, stretches, rows) float32: the largest logit of a stretch, the sum of exponentials above it, and the
    target distribution's mean of its logits: share times each, and 1 - share * classes times the target's.
    """
    first_row = tl.program_id(0) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + row, mask=row < rows, other=ignore_index)
    if tl.max((target != ignore_index).to(tl.int32), 0) > 0:
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        expected = tl.zeros([BLOCK_M], tl.float32)
        begin = tl.program_id(1) * STRETCH
        for first_class in range(begin, tl.minimum(begin + STRETCH, classes), BLOCK_N):
            logits = _logits(
                x_ptr, weight_ptr, bias_ptr, first_row, first_class, rows, classes, K, stride_x, stride_w,
                W_TRANSPOSED, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            column = first_class + tl.arange(0, BLOCK_N)
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            base = _finite(new_largest)
            here = tl.sum(tl.exp2((logits - base[:, None]) * LOG2E), 1)
            total = total * tl.exp2((largest - base) * LOG2E) + here
            largest = new_largest
            is_target = column[None, :].to(tl.int64) == target[:, None]
            expected += tl.sum(tl.where(is_target, logits, 0.0), 1) * (1.0 - share * classes)
            if SMOOTH:
                expected += share * tl.sum(tl.where((column < classes)[None, :], logits, 0.0), 1)
        at = tl.program_id(1).to(tl.int64) * rows + row
        plane = tl.num_programs(1).to(tl.int64) * rows
        tl.store(parts_ptr + at, largest, mask=row < rows)
        tl.store(parts_ptr + plane + at, total, mask=row < rows)
        tl.store(parts_ptr + 2 * plane + at, expected, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "ignore_index", "stretches"])
def _cross_entropy_join_kernel(
    parts_ptr, target_ptr, loss_ptr, stats_ptr, rows: tl.int32, classes, ignore_index: tl.int64, stretches: tl.int32,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """loss (rows,); stats (rows, 2): the largest logit and the sum of exponentials above it. Of ignored rows, zeros."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + row, mask=row < rows, other=ignore_index)
    counted = (row < rows) & (target != ignore_index)
    plane = stretches.to(tl.int64) * rows
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    expected = tl.zeros([BLOCK_M], tl.float32)
    for stretch in range(stretches):
        at = parts_ptr + stretch.to(tl.int64) * rows + row
        here = tl.load(at, mask=counted, other=float("-inf"))
        new_largest = tl.maximum(largest, here)
        base = _finite(new_largest)
        shrunk = tl.load(at + plane, mask=counted, other=0.0) * tl.exp2((here - base) * LOG2E)
        total = total * tl.exp2((largest - base) * LOG2E) + shrunk
        expected += tl.load(at + 2 * plane, mask=counted, other=0.0)
        largest = new_largest
    is_class = (target >= 0) & (target < classes)
    total = tl.where(is_class, total, float("nan"))
    loss = tl.log(total) + (_finite(largest) - expected)
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0), mask=row < rows)
    tl.store(stats_ptr + 2 * row, tl.where(counted, largest, 0.0), mask=row < rows)
    tl.store(stats_ptr + 2 * row + 1, tl.where(counted, total, 0.0), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "first", "count", "ignore_index"])
def _cross_entropy_bwd_kernel(
    x_ptr, weight_ptr, bias_ptr, target_ptr, stats_ptr, slope_ptr, dlogits_ptr,
    rows: tl.int32, classes, K, stride_x, stride_w, stride_slope, first: tl.int32, count: tl.int32,
    ignore_index: tl.int64, share: tl.float32,
    W_TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dlogits (rows, count) of the classes from `first` on: (softmax - target distribution) slope."""
    first_row, first_column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + row, mask=row < rows, other=ignore_index)
    counted = target != ignore_index
    at = row.to(tl.int64)[:, None] * count + column[None, :]
    inside = (row < rows)[:, None] & (column < count)[None, :]
    dlogits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if tl.max(counted.to(tl.int32), 0) > 0:
        logits = _logits(
            x_ptr, weight_ptr, bias_ptr, first_row, first + first_column, rows, classes, K, stride_x, stride_w,
            W_TRANSPOSED, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        known = (row < rows) & counted
        largest = tl.load(stats_ptr + 2 * row, mask=known, other=0.0)
        total = tl.load(stats_ptr + 2 * row + 1, mask=known, other=1.0)
        slope = tl.load(slope_ptr + row * stride_slope, mask=known, other=0.0)
        value = tl.exp2((logits - _finite(largest)[:, None]) * LOG2E) * (1.0 / total)[:, None] - share
        is_target = (first + column)[None, :].to(tl.int64) == target[:, None]
        value = tl.where(is_target, value - (1.0 - share * classes), value)
        dlogits = tl.where(counted[:, None], value * slope[:, None], 0.0)
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


def _tiles(m: int, n: int, k: int, stages: int, warps: int, *, bits: int = 16) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages, up_to={"bits": bits})


_LEAST = (_tiles(64, 64, 32, 3, 4), _tiles(64, 64, 16, 3, 4, bits=32))
_SMALL_MEMORY = (_tiles(64, 128, 32, 3, 8), *_LEAST)
_COMMON = {
    "sm_80": (_tiles(64, 128, 32, 4, 8), _tiles(128, 64, 32, 4, 8), *_LEAST),
    "sm_86": _SMALL_MEMORY,
    "sm_89": _SMALL_MEMORY,
    "sm_90": (_tiles(128, 128, 64, 3, 8), _tiles(64, 128, 64, 3, 4), *_LEAST),
    "sm_100": (_tiles(128, 128, 64, 3, 8), *_LEAST),
    "sm_120": _SMALL_MEMORY,
    "gfx942": (_tiles(128, 128, 32, 2, 8), *_LEAST),
}
TABLES["cross_entropy_fwd"] = _COMMON
# The largest tile spills in the forward, which keeps sums beside it.
TABLES["cross_entropy_bwd"] = _COMMON | {"sm_80": (_tiles(128, 128, 32, 3, 8), *_COMMON["sm_80"])}
TABLES["cross_entropy_join"] = everywhere(Config({"BLOCK_M": 128}, num_warps=4))
_fwd = Kernel(_cross_entropy_fwd_kernel, "cross_entropy_fwd", ("bits",))
_join = Kernel(_cross_entropy_join_kernel, "cross_entropy_join")
_bwd = Kernel(_cross_entropy_bwd_kernel, "cross_entropy_bwd", ("bits",))


def _check(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, label_smoothing: float, reduction: int
) -> None:
    require_input("input", input)
    require_weight("weight", weight, input, input.shape[-1])
    if 0 in weight.shape:
        raise ValueError(f"weight is empty: {tuple(weight.shape)}")
    require_like("bias", bias, input, weight.shape[:1])
    if target.dtype is not torch.int64 or target.device != input.device or target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must be int64 of the shape {tuple(input.shape[:-1])} on {input.device}, "
            f"got {target.dtype} of {tuple(target.shape)} on {target.device}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in (_NONE, _MEAN, _SUM):
        raise ValueError(f"reduction must be 0, 1 or 2, got {reduction}")


def linear_cross_entropy_fwd(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float,
    reduction: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fasttx::linear_cross_entropy_fwd."""
    _check(input, weight, target, bias, label_smoothing, reduction)
    x, targets = dense(as_rows(input)), dense(target)
    (rows, width), classes = x.shape, weight.shape[0]
    stretches = -(-classes // _STRETCH)
    parts = input.new_empty((3, stretches, rows), dtype=torch.float32)
    losses = input.new_empty(target.shape, dtype=torch.float32)
    stats = input.new_empty((*target.shape, 2), dtype=torch.float32)
    w = Operand.of(weight.t())
    _fwd(
        lambda blocks: (-(-rows // blocks["BLOCK_M"]), stretches),
        (x, w.tensor, dense(bias), targets, parts, rows, classes, width, width, w.stride, ignore_index,
         label_smoothing / classes),
        (w.transposed, width % 128 == 0, precision(input.dtype), label_smoothing > 0.0, _STRETCH),
        (input.element_size() * 8,),
    )  # fmt: skip
    _join(
        lambda blocks: (-(-rows // blocks["BLOCK_M"]),),
        (parts, targets, losses, stats, rows, classes, ignore_index, stretches),
    )
    if reduction == _NONE:
        return losses, stats
    loss = column_sums(losses.view(rows, 1)).view(())
    return loss / (targets != ignore_index).sum() if reduction == _MEAN else loss, stats


def linear_cross_entropy_bwd(
    grad: Tensor, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, stats: Tensor, ignore_index: int,
    label_smoothing: float, reduction: int, needs_input: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::linear_cross_entropy_bwd."""
    _check(input, weight, target, bias, label_smoothing, reduction)
    x, targets = dense(as_rows(input)), dense(target).view(-1)
    (rows, width), classes = x.shape, weight.shape[0]
    expected = target.shape if reduction == _NONE else ()
    if grad.dtype is not torch.float32 or grad.device != input.device or grad.shape != expected:
        raise ValueError(f"grad must be float32 of shape {tuple(expected)}, got {grad.dtype} of {tuple(grad.shape)}")
    places = (*target.shape, 2)
    if stats.dtype is not torch.float32 or stats.device != input.device or stats.shape != places:
        raise ValueError(f"stats must be float32 of the shape {places}, got {stats.dtype} of {tuple(stats.shape)}")
    slope, kept = dense(grad).view(-1), dense(stats).view(rows, 2)
    if reduction == _MEAN:
        slope = slope / (targets != ignore_index).sum()

    allocate = input.new_empty if rows else input.new_zeros
    dinput = input.new_empty(input.shape if needs_input else (0,))
    dweight = allocate(weight.shape if needs_weight else (0,))
    dbias = allocate(weight.shape[:1] if needs_bias else (0,))
    # What is summed over tiles is so in float32, and rounded with the last one.
    dx = _Sum(dinput.view(rows, width), classes > _TILE_CLASSES) if needs_input else None
    for first in range(0, classes if rows else 0, _TILE_CLASSES):
        some = slice(first, min(classes, first + _TILE_CLASSES))
        dw = _Sum(dweight[some], rows > _TILE_ROWS) if needs_weight else None
        db = []
        for start in range(0, rows, _TILE_ROWS):
            part = slice(start, min(rows, start + _TILE_ROWS))
            dlogits = _dlogits(
                x[part], weight, bias, targets[part], kept[part], slope if reduction != _NONE else slope[part], some,
                ignore_index, label_smoothing, reduction,
            )  # fmt: skip
            if dx is not None:
                dx.add(dlogits, weight[some], part, first == 0, some.stop == classes)
            if dw is not None:
                dw.add(dlogits.t(), x[part], slice(None), start == 0, part.stop == rows)
            if needs_bias:
                db.append(column_sums(dlogits, torch.float32))
        if needs_bias:
            dbias[some] = db[0] if len(db) == 1 else column_sums(torch.stack(db))
    return dinput, dweight, dbias


class _Sum:
    """A product's result that is a sum over tiles."""

    def __init__(self, result: Tensor, has_parts: bool):
        self.result = result
        self.wide = result.new_empty(result.shape, dtype=torch.float32) if has_parts else result

    def add(self, a: Tensor, b: Tensor, rows: slice, is_first: bool, is_last: bool) -> None:
        """Adds a b to these rows."""
        out = self.result if is_last else self.wide
        multiply(a, b, out[rows], residual=None if is_first else self.wide[rows])


def _dlogits(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, stats: Tensor, slope: Tensor, some: slice,
    ignore_index: int, label_smoothing: float, reduction: int,
) -> Tensor:  # fmt: skip
    """The gradients of the logits of these rows and classes, in x's dtype."""
    (rows, width), classes, count = x.shape, weight.shape[0], some.stop - some.start
    dlogits = x.new_empty((rows, count))
    w = Operand.of(weight.t())
    _bwd(
        lambda blocks: (-(-rows // blocks["BLOCK_M"]), -(-count // blocks["BLOCK_N"])),
        (x, w.tensor, dense(bias), target, stats, slope, dlogits, rows, classes, width, width, w.stride,
         int(reduction == _NONE), some.start, count, ignore_index, label_smoothing / classes),
        (w.transposed, width % 128 == 0, precision(x.dtype)),
        (x.element_size() * 8,),
    )  # fmt: skip
    return dlogits

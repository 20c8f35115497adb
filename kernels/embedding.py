"""What a transformer's first layer reads: a token's, a position's and a segment's entry, summed, normalised, dropped.

The backward makes the gradient of each token's sum, and adds up those that share an entry in the order of the tokens:
sorted by entry, in blocks of fixed places, and then the blocks. Nothing is added atomically. Where an index is outside
of its weight, the forward gives NaN and the backward leaves the token out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .availability import WIDEST_ENTRY
from .checks import require_input, require_like
from .configs import TABLES, Config, everywhere
from .dropout import Dropout
from .launch import Kernel, block_of, dense
from .math import matrix_dropout_keep
from .sums import PROGRAMS, sum_partials


@triton.jit
def _entry(weight_ptr, index, entries, row, rows, column, width):
    """(the entries of these rows, (M, N) float32, zeros where there is none; whether the indices have one, (M,))."""
    is_known = (index >= 0) & (index < entries)
    inside = ((row < rows) & is_known)[:, None] & (column < width)[None, :]
    at = index.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32), is_known


@triton.jit
def _entry_sums(
    token_ids_ptr, position_ids_ptr, segment_ids_ptr, token_ptr, position_ptr, segment_ptr,
    row, column, rows, width, length, offset, tokens, positions, segments, token_scale,
):  # fmt: skip
    """(token_scale * token + position + segment, (M, N) float32; which rows have all their entries, (M,))."""
    token = tl.load(token_ids_ptr + row, mask=row < rows, other=0)
    values, is_known = _entry(token_ptr, token, tokens, row, rows, column, width)
    values *= token_scale
    if position_ptr is not None:
        if position_ids_ptr is not None:
            position = tl.load(position_ids_ptr + row, mask=row < rows, other=0)
        else:
            position = (offset + row % length).to(tl.int64)
        more, known = _entry(position_ptr, position, positions, row, rows, column, width)
        values += more
        is_known = is_known & known
    if segment_ptr is not None:
        segment = row.to(tl.int64) * 0
        if segment_ids_ptr is not None:
            segment = tl.load(segment_ids_ptr + row, mask=row < rows, other=0)
        more, known = _entry(segment_ptr, segment, segments, row, rows, column, width)
        values += more
        is_known = is_known & known
    return values, is_known


_UNSPECIALIZED = ["rows", "length", "offset", "tokens", "positions", "segments", "seed", "threshold"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _embedding_fwd_kernel(
    token_ids_ptr, position_ids_ptr, segment_ids_ptr, token_ptr, position_ptr, segment_ptr, norm_weight_ptr,
    norm_bias_ptr, seed_ptr, y_ptr, rows: tl.int32, width, length: tl.int32, offset: tl.int32, tokens: tl.int32,
    positions: tl.int32, segments: tl.int32, token_scale: tl.float32, eps: tl.float32, seed: tl.int64,
    threshold: tl.int64, keep_scale: tl.float32,
    DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each program makes BLOCK_M rows, which it holds whole: BLOCK_N is at least width."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    y, is_known = _entry_sums(
        token_ids_ptr, position_ids_ptr, segment_ids_ptr, token_ptr, position_ptr, segment_ptr,
        row, column, rows, width, length, offset, tokens, positions, segments, token_scale,
    )  # fmt: skip
    if norm_weight_ptr is not None:
        # Two passes: the mean of squares minus the squared mean would cancel.
        centred = tl.where(inside, y - (tl.sum(y, 1) / width)[:, None], 0.0)
        y = centred * tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)[:, None]
        y *= tl.load(norm_weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            y += tl.load(norm_bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = matrix_dropout_keep(seed, seed_ptr, threshold, row, 0, BLOCK_N)
        y = tl.where(keep, y * keep_scale, 0.0)
    y = tl.where(is_known[:, None], y, float("nan"))
    tl.store(y_ptr + row.to(tl.int64)[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _embedding_bwd_kernel(
    dy_ptr, token_ids_ptr, position_ids_ptr, segment_ids_ptr, token_ptr, position_ptr, segment_ptr, norm_weight_ptr,
    seed_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows: tl.int32, width, length: tl.int32, offset: tl.int32,
    tokens: tl.int32, positions: tl.int32, segments: tl.int32, token_scale: tl.float32, eps: tl.float32,
    seed: tl.int64, threshold: tl.int64, keep_scale: tl.float32,
    DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dx (rows, width) float32: the gradient of each row's sum of entries, which is made anew.

    Each program takes its share of the rows, BLOCK_M at a time; dweight, dbias (programs, width) float32: one line a
    program.
    """
    column = tl.arange(0, BLOCK_N)
    within = (column < width)[None, :]
    share = tl.cdiv(tl.cdiv(rows, BLOCK_M), tl.num_programs(0)) * BLOCK_M
    first = tl.program_id(0) * share
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + share, rows), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & within
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        x, is_known = _entry_sums(
            token_ids_ptr, position_ids_ptr, segment_ids_ptr, token_ptr, position_ptr, segment_ptr,
            row, column, rows, width, length, offset, tokens, positions, segments, token_scale,
        )  # fmt: skip
        dx = tl.load(dy_ptr + at, mask=inside & is_known[:, None], other=0.0).to(tl.float32)
        if DROPOUT:
            keep = matrix_dropout_keep(seed, seed_ptr, threshold, row, 0, BLOCK_N)
            dx = tl.where(keep, dx * keep_scale, 0.0)
        if norm_weight_ptr is not None:
            centred = tl.where(inside, x - (tl.sum(x, 1) / width)[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)[:, None]
            normed = centred * rstd
            dweight += tl.sum(dx * normed, 0)
            dbias += tl.sum(dx, 0)
            slope = dx * tl.load(norm_weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
            mean_slope = (tl.sum(slope, 1) / width)[:, None]
            mean_product = (tl.sum(slope * normed, 1) / width)[:, None]
            dx = rstd * (slope - mean_slope - normed * mean_product)
        tl.store(dx_ptr + at, dx, mask=inside)
    line = tl.program_id(0) * width + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + line, dweight, mask=column < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + line, dbias, mask=column < width)


@triton.jit(do_not_specialize=["count"])
def _block_sums_kernel(
    dx_ptr, order_ptr, sorted_ptr, partial_ptr, count: tl.int32, width,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (count, width) float32: at the first place that an entry has in a block of BLOCK_R places, the sum there.

    order (count,): the rows of dx, sorted by entry; sorted (count,): their entries. Other lines are not written.
    """
    place = tl.program_id(0)
    entry = tl.load(sorted_ptr + place)
    block = place // BLOCK_R * BLOCK_R
    is_first = place == block
    before = tl.load(sorted_ptr + place - 1, mask=place > 0, other=0)
    if is_first | (before != entry):
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        places = place + tl.arange(0, BLOCK_R)
        within = (places < count) & (places < block + BLOCK_R)
        same = within & (tl.load(sorted_ptr + places, mask=within, other=0) == entry)
        rows = tl.load(order_ptr + places, mask=same, other=0)
        inside = same[:, None] & (column < width)[None, :]
        dx = tl.load(dx_ptr + rows[:, None] * width + column[None, :], mask=inside, other=0.0)
        tl.store(partial_ptr + place.to(tl.int64) * width + column, tl.sum(dx, 0), mask=column < width)


@triton.jit(do_not_specialize=["count", "entries", "padding"])
def _entry_gradients_kernel(
    partial_ptr, sorted_ptr, gradient_ptr, count: tl.int32, width, entries: tl.int32, padding: tl.int64,
    scale: tl.float32, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """gradient (entries, width), of those that occur: scale times the sum of their blocks' sums."""
    place = tl.program_id(0)
    entry = tl.load(sorted_ptr + place)
    before = tl.load(sorted_ptr + place - 1, mask=place > 0, other=-1)
    is_wanted = (entry >= 0) & (entry < entries) & (entry != padding)
    if is_wanted & ((place == 0) | (before != entry)):
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < width
        total = tl.load(partial_ptr + place.to(tl.int64) * width + column, mask=inside, other=0.0)
        next_block = (place // BLOCK_R + 1) * BLOCK_R
        here = tl.load(sorted_ptr + next_block, mask=next_block < count, other=-1)
        while here == entry:
            total += tl.load(partial_ptr + next_block.to(tl.int64) * width + column, mask=inside, other=0.0)
            next_block += BLOCK_R
            here = tl.load(sorted_ptr + next_block, mask=next_block < count, other=-1)
        at = gradient_ptr + entry * width + column
        tl.store(at, (total * scale).to(gradient_ptr.dtype.element_ty), mask=inside)


def _rows(most: int, block_m: int, warps: int) -> Config:
    return Config({"BLOCK_M": block_m}, num_warps=warps, up_to={"block": most})


# By the power of two that holds a row.
_NARROW = (
    _rows(64, 32, 4), _rows(128, 16, 4), _rows(256, 8, 4), _rows(512, 4, 4), _rows(1024, 1, 4), _rows(1024, 2, 4),
    _rows(2048, 1, 8),
)  # fmt: skip
_ROWS = (*_NARROW, _rows(4096, 1, 8), _rows(8192, 1, 16))
TABLES["embedding_fwd"] = everywhere(*_ROWS)
# Other numbers of warps where those would spill a register.
TABLES["embedding_bwd"] = everywhere(
    *_ROWS,
    sm_100=(*_NARROW, _rows(4096, 1, 16), _rows(8192, 1, 16)),
    sm_120=(*_NARROW, _rows(4096, 1, 8), _rows(8192, 1, 8)),
)
_BLOCK = 32  # places that are summed together: in all configurations, as both kernels go by it
TABLES["embedding_block_sums"] = everywhere(Config({"BLOCK_N": 128}, num_warps=4))
TABLES["embedding_gradients"] = everywhere(Config({"BLOCK_N": 256}, num_warps=4))
_fwd = Kernel(_embedding_fwd_kernel, "embedding_fwd", ("block",))
_bwd = Kernel(_embedding_bwd_kernel, "embedding_bwd", ("block",))
_block_sums = Kernel(_block_sums_kernel, "embedding_block_sums")
_gradients = Kernel(_entry_gradients_kernel, "embedding_gradients")


def _require_ids(name: str, ids: Tensor | None, token_ids: Tensor) -> None:
    if ids is not None and (
        ids.dtype is not torch.int64 or ids.device != token_ids.device or ids.shape != token_ids.shape
    ):
        raise ValueError(
            f"{name} must be int64 of the shape {tuple(token_ids.shape)} on {token_ids.device}, "
            f"got {ids.dtype} of {tuple(ids.shape)} on {ids.device}"
        )


def _require_table(
    kind: str, weight: Tensor | None, ids: Tensor | None, token_weight: Tensor, token_ids: Tensor
) -> None:
    """The weight as wide as token_weight, with an entry at least; no indices without it."""
    _require_ids(f"{kind}_ids", ids, token_ids)
    if weight is not None:
        require_like(f"{kind}_weight", weight, token_weight, (*weight.shape[:1], token_weight.shape[1]))
        if weight.shape[0] == 0:
            raise ValueError(f"{kind}_weight has no entries")
    elif ids is not None:
        raise ValueError(f"{kind}_ids need a {kind}_weight")


def _check(
    token_ids: Tensor, token_weight: Tensor, position_ids: Tensor | None, position_weight: Tensor | None,
    segment_ids: Tensor | None, segment_weight: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    offset: int,
) -> None:  # fmt: skip
    require_input("token_weight", token_weight)
    if token_weight.dim() != 2 or not 0 < token_weight.shape[1] <= WIDEST_ENTRY:
        raise ValueError(
            f"token_weight must be (entries, width), 1 to {WIDEST_ENTRY} wide, got {tuple(token_weight.shape)}"
        )
    if token_ids.device != token_weight.device:
        raise ValueError(f"token_ids are on {token_ids.device}, token_weight is on {token_weight.device}")
    _require_ids("token_ids", token_ids, token_ids)
    _require_table("position", position_weight, position_ids, token_weight, token_ids)
    _require_table("segment", segment_weight, segment_ids, token_weight, token_ids)
    if position_weight is not None and position_ids is None and token_ids.numel():
        length, positions = token_ids.shape[-1] if token_ids.dim() else 1, position_weight.shape[0]
        if not 0 <= offset <= positions - length:
            raise ValueError(f"positions {offset} to {offset + length - 1} are not in [0, {positions - 1}]")
    require_like("norm_weight", norm_weight, token_weight, token_weight.shape[1:])
    require_like("norm_bias", norm_bias, token_weight, token_weight.shape[1:])
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias needs a norm_weight")


def _numbers(
    token_ids: Tensor, token_weight: Tensor, position_weight: Tensor | None, segment_weight: Tensor | None,
    token_scale: float, offset: int, eps: float,
) -> tuple[int | float, ...]:  # fmt: skip
    def entries(weight: Tensor | None) -> int:
        return 0 if weight is None else weight.shape[0]

    length = token_ids.shape[-1] if token_ids.dim() else 1
    return (
        token_ids.numel(), token_weight.shape[1], length, offset, entries(token_weight), entries(position_weight),
        entries(segment_weight), token_scale, eps,
    )  # fmt: skip


def embedding_fwd(
    token_ids: Tensor, token_weight: Tensor, position_ids: Tensor | None, position_weight: Tensor | None,
    segment_ids: Tensor | None, segment_weight: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    token_scale: float, offset: int, eps: float, dropout_p: float, seed: Tensor | None, padding_idx: int,
) -> Tensor:  # fmt: skip
    """fasttx::embedding_fwd."""
    tensors = (
        token_ids, token_weight, position_ids, position_weight, segment_ids, segment_weight, norm_weight, norm_bias
    )  # fmt: skip
    _check(*tensors, offset)
    dropout, width = Dropout.of(dropout_p, seed), token_weight.shape[1]
    rows = token_ids.numel()
    y = token_weight.new_empty((*token_ids.shape, width))
    ids = (dense(token_ids), dense(position_ids), dense(segment_ids))
    weights = (dense(token_weight), dense(position_weight), dense(segment_weight), dense(norm_weight), dense(norm_bias))
    numbers = _numbers(token_ids, token_weight, position_weight, segment_weight, token_scale, offset, eps)
    block = block_of(width)
    _fwd(
        lambda blocks: (-(-rows // blocks["BLOCK_M"]),),
        (*ids, *weights, dropout.seed_ptr, y, *numbers, *dropout.numbers),
        (dropout.active, block),
        (block,),
    )
    return y


def embedding_bwd(
    grad: Tensor, token_ids: Tensor, token_weight: Tensor, position_ids: Tensor | None,
    position_weight: Tensor | None, segment_ids: Tensor | None, segment_weight: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, token_scale: float, offset: int, eps: float,
    dropout_p: float, seed: Tensor | None, padding_idx: int, needs_token: bool, needs_position: bool,
    needs_segment: bool, needs_norm_weight: bool, needs_norm_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::embedding_bwd."""
    _check(
        token_ids, token_weight, position_ids, position_weight, segment_ids, segment_weight, norm_weight, norm_bias,
        offset,
    )  # fmt: skip
    width, rows = token_weight.shape[1], token_ids.numel()
    require_like("grad", grad, token_weight, (*token_ids.shape, width))
    for name, needed, weight in (
        ("position_weight", needs_position, position_weight), ("segment_weight", needs_segment, segment_weight),
        ("norm_weight", needs_norm_weight or needs_norm_bias, norm_weight),
    ):  # fmt: skip
        if needed and weight is None:
            raise ValueError(f"there is no {name} to have a gradient")
    dropout = Dropout.of(dropout_p, seed)
    ids = (dense(token_ids), dense(position_ids), dense(segment_ids))
    weights = (dense(token_weight), dense(position_weight), dense(segment_weight), dense(norm_weight))
    numbers = _numbers(token_ids, token_weight, position_weight, segment_weight, token_scale, offset, eps)
    block, programs = block_of(width), max(1, min(rows, PROGRAMS))
    dx = grad.new_empty((rows, width), dtype=torch.float32)
    partial = grad.new_empty((needs_norm_weight + needs_norm_bias, programs, width), dtype=torch.float32)
    _bwd(
        lambda blocks: (programs,),
        (dense(grad), *ids, *weights, dropout.seed_ptr, dx, partial[0] if needs_norm_weight else None,
         partial[-1] if needs_norm_bias else None, *numbers, *dropout.numbers),
        (dropout.active, block),
        (block,),
    )  # fmt: skip
    none = token_weight.new_empty
    dtoken = _gradient(dx, *_by_entry(ids[0]), token_weight, token_scale, padding_idx) if needs_token else none((0,))
    dposition, dsegment = none((0,)), none((0,))
    if needs_position:
        found = _by_place(token_ids, offset) if ids[1] is None else _by_entry(ids[1])
        dposition = _gradient(dx, *found, position_weight, 1.0, -1)
    if needs_segment:
        found = _by_entry(torch.zeros_like(ids[0]) if ids[2] is None else ids[2])
        dsegment = _gradient(dx, *found, segment_weight, 1.0, -1)
    sums = iter(sum_partials(partial, like=token_weight) if needs_norm_weight or needs_norm_bias else ())
    return (
        dtoken, dposition, dsegment, next(sums) if needs_norm_weight else none((0,)),
        next(sums) if needs_norm_bias else none((0,)),
    )  # fmt: skip


def _by_entry(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(the rows in the order of their entries, the entries in that order)."""
    entries, order = torch.sort(ids.view(-1), stable=True)
    return order, entries


def _by_place(token_ids: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """The same where entries go by the place in a sequence, without sorting."""
    length = token_ids.shape[-1] if token_ids.dim() else 1
    rows = torch.arange(token_ids.numel(), device=token_ids.device).view(-1, length).t().reshape(-1)
    return rows, rows % length + offset


def _gradient(dx: Tensor, order: Tensor, entries: Tensor, weight: Tensor, scale: float, padding: int) -> Tensor:
    """A table's gradient from that of each row's sum, (rows, width) float32."""
    gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    rows, width = dx.shape
    partial = torch.empty_like(dx)

    def grid(blocks: dict[str, int]) -> tuple[int, int]:
        return rows, -(-width // blocks["BLOCK_N"])

    _block_sums(grid, (dx, order, entries, partial, rows, width), (_BLOCK,))
    _gradients(grid, (partial, entries, gradient, rows, width, weight.shape[0], padding, scale), (_BLOCK,))
    return gradient

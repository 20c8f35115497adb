"""Attention's backward: probabilities are computed again from the scores and the forward's statistics. Dao et al. 2022.

Two kernels, both without atomic sums. The first owns BLOCK_M queries of one head, as the forward does: it finds
delta = sum(grad * output) - grad_lse of each row, which it leaves for the second, and dq. The second owns BLOCK_N keys
of one key head and meets, in order, the query heads that share it and the queries that see the keys: dk and dv.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttx.ops import attention as ops

from . import launch
from ._attention_call import Call, strides_of, unit_rows
from ._attention_checks import refuse_weights, require_results
from ._attention_configs import PROBLEM
from ._attention_tile import (
    NO_MASK,
    UNSPECIALIZED,
    add_product,
    dot_rows,
    exponentials,
    has_phase,
    load_rows,
    mask_rows,
    row_index,
    scores_of,
    store_rows,
    tile_at,
    tile_of,
    tiles_met,
    tiles_seen,
    tokens_of,
    valid_keys,
)
from .launch import Kernel
from .math import dropout_keep


@triton.jit
def row_delta(g, o, dlse_ptr, at, valid):
    """sum(grad * output) of each row, less what reaches the row's lse: dS = P (dP - delta)."""
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=valid, other=0.0)
    return delta


@triton.jit
def score_gradient(
    q, g, base, factor, delta, k_ptr, v_ptr, stride_kt, stride_vt, key, rows, bounds, seen_ptr, partly, bias, dropout,
    scale, exponent, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(dS, P, k) of a tile of queries and the keys that begin at `key`: (M, BLOCK_N) twice, and (BLOCK_N, BLOCK_D).

    q and the output's gradient g (M, width); base, factor, delta (M,): the rows' statistics. The rest as in `attend`.
    """
    offsets = tl.arange(0, BLOCK_N)
    keys = key + offsets
    valid = valid_keys(keys, bounds[1], seen_ptr, partly, MASKED)
    across = None if valid is None else valid[None, :]
    if q.dtype == tl.float32 and BLOCK_D > 128:
        # Depends on the loop, or all that a thread multiplies of them would be kept in registers, which do not suffice.
        q = tl.where(key >= 0, q, 0.0)
        g = tl.where(key >= 0, g, 0.0)
    k = load_rows(k_ptr + tl.cast(key, tl.int64) * stride_kt, stride_kt, offsets, valid, D, BLOCK_D)
    v = load_rows(v_ptr + tl.cast(key, tl.int64) * stride_vt, stride_vt, offsets, valid, DV, BLOCK_DV)
    products = dot_rows(q, k, PRECISION)
    scores = scores_of(
        products, rows[:, None], keys[None, :], across, bounds, bias, scale, partly, HAS_LO, HAS_HI, MASK, ALIBI,
        SCALED, MASKED,
    )  # fmt: skip
    p = exponentials(scores, base[:, None], exponent) * factor[:, None]
    dp = dot_rows(g, v, PRECISION)
    if DROPOUT:
        seed, threshold, sequence, head = dropout
        keep = dropout_keep(seed, None, threshold, sequence, head, rows, key, BLOCK_N)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return p * (dp - delta[:, None]), p, k


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, g_ptr, stats_ptr, dlse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    list_ptr, stride_lb: tl.int32, stride_lh: tl.int32, stride_lt: tl.int32,
    mask_ptr, seen_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, seed_ptr, seed: tl.int64, threshold: tl.int64,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_sb, heads, group, queries: tl.int32, keys: tl.int32,
    sequences: tl.int32, lo: tl.int32, hi: tl.int32, origin, scale, exponent, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, head, first_row = tile_of(program, queries, heads, cu_q_ptr, sequences, BLOCK_M)
    q_first, row_count = tokens_of(sequence, queries, cu_q_ptr, None)
    if first_row >= row_count:
        return
    k_first, key_count = tokens_of(sequence, keys, cu_k_ptr, lengths_ptr)
    wide, wide_head, kv_head = sequence.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    token = q_first + first_row
    q_ptr += wide * stride_qb + wide_head * stride_qh + token * stride_qt
    out_ptr += wide * stride_ob + wide_head * stride_oh + token * stride_ot
    g_ptr += wide * stride_gb + wide_head * stride_gh + token * stride_gt
    dq_ptr += wide * stride_dqb + wide_head * stride_dqh + token * stride_dqt
    k_ptr += wide * stride_kb + kv_head * stride_kh + k_first * stride_kt
    v_ptr += wide * stride_vb + kv_head * stride_vh + k_first * stride_vt
    if list_ptr is not None:
        list_ptr += wide * stride_lb + wide_head * stride_lh + (first_row // BLOCK_M) * stride_lt
    offsets = tl.arange(0, BLOCK_M)
    rows = first_row + offsets
    present = rows < row_count
    if seen_ptr is not None:
        seen_ptr += wide * stride_sb
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if mask_ptr is not None:
        mask_ptr += wide * stride_mb + wide_head * stride_mh
    mask_at = mask_rows(mask_ptr, stride_mq, rows[:, None], row_count, PER_KEY)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head)

    q = load_rows(q_ptr, stride_qt, offsets, present, D, BLOCK_D)
    g = load_rows(g_ptr, stride_gt, offsets, present, DV, BLOCK_DV)
    at = row_index(sequence, head, heads, q_first, queries, cu_q_ptr) + rows
    base = tl.load(stats_ptr + 2 * at, mask=present, other=0.0)
    factor = tl.load(stats_ptr + 2 * at + 1, mask=present, other=0.0)
    delta = row_delta(g, load_rows(out_ptr, stride_ot, offsets, present, DV, BLOCK_DV), dlse_ptr, at, present)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # delta comes from the rounded output, which costs float32 digits that PyTorch keeps: its rows of dS add up to the
    # gradient of lse. What ours miss of that is what delta is off by.
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32 and PRECISION != "tf32"
    if not EXACT:
        tl.store(delta_ptr + at, delta, mask=present)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    mean_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last_row = tl.minimum(first_row + BLOCK_M, row_count) - 1
    tiles = tiles_seen(first_row, last_row, key_count, lo, hi, HAS_LO, HAS_HI, BLOCK_N)
    begin, full, ragged, end = tiles_met(tiles, list_ptr)
    STEP: tl.constexpr = BLOCK_N if list_ptr is None else 1
    for phase in tl.static_range(3):
        if has_phase(phase, HAS_LO, list_ptr is not None):
            first = begin if phase == 0 else full if phase == 1 else ragged
            last = full if phase == 0 else ragged if phase == 1 else end
            for at_tile in range(first, last, STEP):
                key, partly = tile_at(list_ptr, at_tile, BLOCK_N)
                ds, p, k = score_gradient(
                    q, g, base, factor, delta, k_ptr, v_ptr, stride_kt, stride_vt, key, rows,
                    (row_count, key_count, lo, hi), seen_ptr, partly, (mask_at, stride_mk, slope, origin),
                    (seed, threshold, sequence, head), scale, exponent, keep_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
                    HAS_LO, HAS_HI, MASK, ALIBI, SCALED, DROPOUT, PRECISION, phase != 1,
                )  # fmt: skip
                dq = add_product(dq, ds.to(k.dtype), k, PRECISION)
                if EXACT:
                    row_sum += tl.sum(ds, 1)
                    mean_key = add_product(mean_key, p, k, PRECISION)
    if EXACT:
        if dlse_ptr is not None:
            row_sum -= tl.load(dlse_ptr + at, mask=present, other=0.0)
        tl.store(delta_ptr + at, delta + row_sum, mask=present)
        dq -= row_sum[:, None] * mean_key
    store_rows(dq_ptr, stride_dqt, offsets, present, dq * scale, D, BLOCK_D)


@triton.jit
def key_gradients(
    dk, dv, k, v, q_ptr, g_ptr, stride_qt, stride_gt, stats_ptr, delta_ptr, at, list_ptr, first, last, first_key,
    valid, bounds, bias, dropout, scale, exponent, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr,
    ALIBI: tl.constexpr, SCALED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the queries from first to last of one head give dk (BLOCK_N, BLOCK_D) and dv (BLOCK_N, BLOCK_DV).

    Scores lie with the keys, which begin at first_key, down, and the queries across. at: the index of the head's first
    row among the statistics. bias: (pointer to the head's mask, its strides of queries and keys, slope, origin).
    """
    mask_ptr, stride_mq, stride_mk, slope, origin = bias
    offsets = tl.arange(0, BLOCK_M)
    keys = first_key + tl.arange(0, BLOCK_N)
    STEP: tl.constexpr = BLOCK_M if list_ptr is None else 1
    for at_tile in range(first, last, STEP):
        row, partly = tile_at(list_ptr, at_tile, BLOCK_M)
        rows = row + offsets
        present = rows < bounds[0]
        loaded = present if MASKED else None
        if k.dtype == tl.float32 and BLOCK_D > 128:
            # As q and g in score_gradient.
            k = tl.where(row >= 0, k, 0.0)
            v = tl.where(row >= 0, v, 0.0)
        start = tl.cast(row, tl.int64)
        q = load_rows(q_ptr + start * stride_qt, stride_qt, offsets, loaded, D, BLOCK_D)
        g = load_rows(g_ptr + start * stride_gt, stride_gt, offsets, loaded, DV, BLOCK_DV)
        base = tl.load(stats_ptr + 2 * (at + rows), mask=present, other=0.0)
        factor = tl.load(stats_ptr + 2 * (at + rows) + 1, mask=present, other=0.0)
        mask_at = mask_ptr
        if MASK != NO_MASK:
            mask_at = mask_rows(mask_ptr, stride_mq, rows[None, :], bounds[0], PER_KEY)
        scores = scores_of(
            dot_rows(k, q, PRECISION), rows[None, :], keys[:, None], valid[:, None], bounds,
            (mask_at, stride_mk, slope, origin), scale, partly, HAS_LO, HAS_HI, MASK, ALIBI, SCALED, MASKED,
        )  # fmt: skip
        p = exponentials(scores, base[None, :], exponent) * factor[None, :]
        dp = dot_rows(v, g, PRECISION)
        applied = p
        if DROPOUT:
            seed, threshold, sequence, head = dropout
            keep = tl.trans(dropout_keep(seed, None, threshold, sequence, head, rows, first_key, BLOCK_N))
            applied = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = add_product(dv, applied.to(g.dtype), g, PRECISION)
        # Not before: float32 rows of 256 have no register left for it until here.
        delta = tl.load(delta_ptr + at + rows, mask=present, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = add_product(dk, ds.to(q.dtype), q, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    list_ptr, stride_lb: tl.int32, stride_lh: tl.int32, stride_lt: tl.int32,
    mask_ptr, seen_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, seed_ptr, seed: tl.int64, threshold: tl.int64,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_sb, heads, group, queries: tl.int32, keys: tl.int32,
    sequences: tl.int32, lo: tl.int32, hi: tl.int32, origin, scale, exponent, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, first_key = tile_of(tl.program_id(0), keys, heads // group, cu_k_ptr, sequences, BLOCK_N)
    k_first, present = tokens_of(sequence, keys, cu_k_ptr, None)
    if first_key >= present:
        return
    key_count = present
    if lengths_ptr is not None:
        key_count = tokens_of(sequence, keys, None, lengths_ptr)[1]
    q_first, row_count = tokens_of(sequence, queries, cu_q_ptr, None)
    wide, wide_head = sequence.to(tl.int64), kv_head.to(tl.int64)
    token = k_first + first_key
    k_ptr += wide * stride_kb + wide_head * stride_kh + token * stride_kt
    v_ptr += wide * stride_vb + wide_head * stride_vh + token * stride_vt
    dk_ptr += wide * stride_dkb + wide_head * stride_dkh + token * stride_dkt
    dv_ptr += wide * stride_dvb + wide_head * stride_dvh + token * stride_dvt
    q_ptr += wide * stride_qb + q_first * stride_qt
    g_ptr += wide * stride_gb + q_first * stride_gt
    if list_ptr is not None:
        list_ptr += wide * stride_lb + (first_key // BLOCK_N) * stride_lt
    offsets = tl.arange(0, BLOCK_N)
    keys_here = first_key + offsets
    if seen_ptr is not None:
        seen_ptr += wide * stride_sb
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if mask_ptr is not None:
        mask_ptr += wide * stride_mb
    valid = valid_keys(keys_here, key_count, seen_ptr, None, True)
    k = load_rows(k_ptr, stride_kt, offsets, valid, D, BLOCK_D)
    v = load_rows(v_ptr, stride_vt, offsets, valid, DV, BLOCK_DV)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    # Seen from a key, it is queries that lie within bounds.
    last_key = tl.minimum(first_key + BLOCK_N, key_count) - 1
    by_place = tiles_seen(first_key, last_key, row_count, -hi, -lo, HAS_HI, HAS_LO, BLOCK_M)
    if first_key >= key_count:
        by_place = 0, 0, 0, 0
    elif seen_ptr is not None:
        if tl.max(valid.to(tl.int32)) == 0:
            by_place = 0, 0, 0, 0
    for of_group in range(0, group):
        head = kv_head * group + of_group
        head_at = head.to(tl.int64)
        at = row_index(sequence, head, heads, q_first, queries, cu_q_ptr)
        mask_head = 0
        if mask_ptr is not None:
            mask_head = mask_ptr + head_at * stride_mh
        list_head = None
        if list_ptr is not None:
            list_head = list_ptr + head_at * stride_lh
        begin, full, ragged, end = tiles_met(by_place, list_head)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + head)
        for phase in tl.static_range(3):
            if has_phase(phase, HAS_HI, list_ptr is not None):
                first = begin if phase == 0 else full if phase == 1 else ragged
                last = full if phase == 0 else ragged if phase == 1 else end
                dk, dv = key_gradients(
                    dk, dv, k, v, q_ptr + head_at * stride_qh, g_ptr + head_at * stride_gh, stride_qt, stride_gt,
                    stats_ptr, delta_ptr, at, list_head, first, last, first_key, valid, (row_count, key_count, lo, hi),
                    (mask_head, stride_mq, stride_mk, slope, origin), (seed, threshold, sequence, head), scale,
                    exponent, keep_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LO, HAS_HI, MASK, PER_KEY,
                    ALIBI, SCALED, DROPOUT, PRECISION, phase != 1,
                )  # fmt: skip
    store_rows(dk_ptr, stride_dkt, offsets, keys_here < present, dk * scale, D, BLOCK_D)
    store_rows(dv_ptr, stride_dvt, offsets, keys_here < present, dv * keep_scale, DV, BLOCK_DV)


_dq = Kernel(_attention_bwd_dq_kernel, "attention_bwd_dq", PROBLEM)
_dkdv = Kernel(_attention_bwd_dkdv_kernel, "attention_bwd_dkdv", PROBLEM)


def attention_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    stats: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    is_causal: bool,
    query_offset: int,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    grad_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fasttx::attention_bwd`: the gradients of query, key and value."""
    refuse_weights(0, grad_weights)
    call = Call(
        query, key, value, attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset,
        window_left, window_right, dropout_p, seed, scale,
    )  # fmt: skip
    require_results(query, value, grad, grad_lse, output, stats)
    gradients = dq, dk, dv = ops._attention_bwd(None, None, query, key, value)
    inputs, (grad, output) = (call.query, call.key, call.value), (unit_rows(x) for x in (grad, output))
    delta = torch.empty(stats.shape[:-1], dtype=stats.dtype, device=stats.device)
    stats = launch.dense(stats)
    dlse = launch.dense(grad_lse)
    strides = [s for x in (*inputs, output, grad, dq) for s in strides_of(x)]
    _dq(
        lambda blocks: (call.programs(blocks["BLOCK_M"]),),
        call.with_lists(
            lambda lists: (*inputs, output, grad, stats, dlse, delta, dq, *strides, *lists, *call.shared)
        ),
        call.constants_of("attention_bwd_dq"),
        call.problem,
    )  # fmt: skip
    key_strides = [s for x in (*inputs, grad, dk, dv) for s in strides_of(x)]
    _dkdv(
        lambda blocks: (call.programs(blocks["BLOCK_N"], of_keys=True),),
        call.with_lists(
            lambda lists: (*inputs, grad, stats, delta, dk, dv, *key_strides, *lists, *call.shared), of_keys=True
        ),
        call.constants_of("attention_bwd_dkdv"),
        call.problem,
    )  # fmt: skip
    return gradients

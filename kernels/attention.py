"""Attention's forward, tile by tile without a (queries, keys) matrix: Dao et al. 2022, Dao 2023.

A program owns BLOCK_M queries of one head. Of the keys it meets the tiles that some of its queries see, in order: those
that all of them see without a mask of places, the others with one. So a row's result depends on neither the batch nor
the padding, bit for bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from fasttx.ops import attention as ops

from . import attention_decode
from ._attention_call import Call, strides_of
from ._attention_checks import refuse_weights
from ._attention_configs import PROBLEM
from ._attention_tile import (
    UNSPECIALIZED,
    attend,
    has_phase,
    inverse,
    load_rows,
    mask_rows,
    row_index,
    store_rows,
    store_statistics,
    tile_of,
    tiles_met,
    tiles_seen,
    tokens_of,
)
from .launch import Kernel


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stats_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, list_ptr, stride_lb: tl.int32, stride_lh: tl.int32, stride_lt: tl.int32,
    mask_ptr, seen_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, seed_ptr, seed: tl.int64, threshold: tl.int64,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_sb, heads, group, queries: tl.int32, keys: tl.int32,
    sequences: tl.int32, lo: tl.int32, hi: tl.int32, origin, scale, exponent, keep_scale,
    WITH_LSE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the last rows have most to do: they begin first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, head, first_row = tile_of(program, queries, heads, cu_q_ptr, sequences, BLOCK_M)
    q_first, row_count = tokens_of(sequence, queries, cu_q_ptr, None)
    if first_row >= row_count:
        return
    k_first, key_count = tokens_of(sequence, keys, cu_k_ptr, lengths_ptr)
    wide, wide_head, kv_head = sequence.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    q_ptr += wide * stride_qb + wide_head * stride_qh + (q_first + first_row) * stride_qt
    k_ptr += wide * stride_kb + kv_head * stride_kh + k_first * stride_kt
    v_ptr += wide * stride_vb + kv_head * stride_vh + k_first * stride_vt
    out_ptr += wide * stride_ob + wide_head * stride_oh + (q_first + first_row) * stride_ot
    if list_ptr is not None:
        list_ptr += wide * stride_lb + wide_head * stride_lh + (first_row // BLOCK_M) * stride_lt
    offsets = tl.arange(0, BLOCK_M)
    rows = first_row + offsets
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

    q = load_rows(q_ptr, stride_qt, offsets, rows < row_count, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    last_row = tl.minimum(first_row + BLOCK_M, row_count) - 1
    tiles = tiles_seen(first_row, last_row, key_count, lo, hi, HAS_LO, HAS_HI, BLOCK_N)
    begin, full, ragged, end = tiles_met(tiles, list_ptr)
    for phase in tl.static_range(3):
        if has_phase(phase, HAS_LO, list_ptr is not None):
            acc, largest, total = attend(
                acc, largest, total, q, k_ptr, v_ptr, stride_kt, stride_vt, list_ptr,
                begin if phase == 0 else full if phase == 1 else ragged,
                full if phase == 0 else ragged if phase == 1 else end,
                rows, (row_count, key_count, lo, hi), seen_ptr, (mask_at, stride_mk, slope, origin),
                (seed, threshold, sequence, head), scale, exponent,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_LO, HAS_HI, MASK, ALIBI, SCALED, DROPOUT,
                PRECISION, phase != 1,
            )  # fmt: skip
    acc *= (inverse(total) * keep_scale)[:, None]
    store_rows(out_ptr, stride_ot, offsets, rows < row_count, acc, DV, BLOCK_DV)
    if WITH_LSE:
        at = row_index(sequence, head, heads, q_first, queries, cu_q_ptr) + rows
        store_statistics(lse_ptr, stats_ptr, at, rows < row_count, largest, total, scale, SCALED)


_forward = Kernel(_attention_fwd_kernel, "attention_fwd", PROBLEM)


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    with_lse: bool = True,
    weights: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fasttx::attention_fwd`: output, lse and stats; no weights.

    stats (..., 2): a row's largest score, as the kernels keep scores, and 1 / the sum of exponentials relative to it; 0
    and 0 where a row has nothing to attend to.
    """
    options = (
        attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset, window_left,
        window_right, dropout_p, seed, scale,
    )  # fmt: skip
    refuse_weights(weights, None)
    call = Call(query, key, value, *options)
    results = output, lse, stats, _ = ops._attention_fwd(query, key, value, *options, with_lse, weights)
    if call.sequences * call.heads * call.queries == 0:
        return results
    if attention_decode.takes(call):
        attention_decode.attend_split(call, output, lse, stats, with_lse)
        return results
    tensors = (call.query, call.key, call.value)
    strides = [s for x in (*tensors, output) for s in strides_of(x)]
    _forward(
        lambda blocks: (call.programs(blocks["BLOCK_M"]),),
        call.with_lists(lambda lists: (*tensors, output, lse, stats, *strides, *lists, *call.shared)),
        (with_lse, *call.constants_of("attention_fwd")),
        call.problem,
    )
    return results

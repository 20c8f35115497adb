"""The gradient of attention's additive mask: dS, summed over the axes that the mask has once for all, rounded once.

A program owns a tile of the gradient and meets all that is added to it itself, in order: sequences, heads, queries and
keys.
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
from ._attention_tile import load_rows, mask_rows, row_index, tiles_seen, tokens_of
from .attention_bwd import row_delta, score_gradient
from .launch import Kernel


@triton.jit(do_not_specialize=["seed", "threshold", "queries", "keys", "sequences", "lo", "hi", "mask_q", "mask_k"])
def _attention_bias_bwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, g_ptr, stats_ptr, dlse_ptr, dmask_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, mask_heads, mask_q: tl.int32, mask_k: tl.int32,
    mask_ptr, seen_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, seed_ptr, seed: tl.int64, threshold: tl.int64,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_sb, heads, group, queries: tl.int32, keys: tl.int32,
    sequences: tl.int32, lo: tl.int32, hi: tl.int32, origin, scale, exponent, keep_scale,
    EVERY_SEQUENCE: tl.constexpr, EVERY_HEAD: tl.constexpr, EVERY_QUERY: tl.constexpr, EVERY_KEY: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    key_tiles, row_tiles = tl.cdiv(mask_k, BLOCK_N), tl.cdiv(mask_q, BLOCK_M)
    program = tl.program_id(0)
    tile_key = program % key_tiles * BLOCK_N
    tile_row = program // key_tiles % row_tiles * BLOCK_M
    outer = program // key_tiles // row_tiles
    of_sequence, of_head = outer // mask_heads, outer % mask_heads
    first_sequence, end_sequence = (0, sequences) if EVERY_SEQUENCE else (of_sequence, of_sequence + 1)
    first_head, end_head = (0, heads) if EVERY_HEAD else (of_head, of_head + 1)
    end_row = queries if EVERY_QUERY else tl.minimum(queries, tile_row + BLOCK_M)
    end_key = keys if EVERY_KEY else tl.minimum(keys, tile_key + BLOCK_N)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    error = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offsets = tl.arange(0, BLOCK_M)
    for sequence in range(first_sequence, end_sequence):
        wide = tl.cast(sequence, tl.int64)
        first_token, key_count = tokens_of(sequence, keys, None, lengths_ptr)
        seen_here = seen_ptr
        if seen_ptr is not None:
            seen_here = seen_ptr + wide * stride_sb
        for head in range(first_head, end_head):
            wide_head = tl.cast(head, tl.int64)
            kv_head = wide_head // group
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes_ptr + head)
            k_at = k_ptr + wide * stride_kb + kv_head * stride_kh
            v_at = v_ptr + wide * stride_vb + kv_head * stride_vh
            for row in range(tile_row, end_row, BLOCK_M):
                rows = row + offsets
                present = rows < queries
                token = tl.cast(row, tl.int64)
                q_at = q_ptr + wide * stride_qb + wide_head * stride_qh + token * stride_qt
                g_at = g_ptr + wide * stride_gb + wide_head * stride_gh + token * stride_gt
                o_at = out_ptr + wide * stride_ob + wide_head * stride_oh + token * stride_ot
                q = load_rows(q_at, stride_qt, offsets, present, D, BLOCK_D)
                g = load_rows(g_at, stride_gt, offsets, present, DV, BLOCK_DV)
                o = load_rows(o_at, stride_ot, offsets, present, DV, BLOCK_DV)
                at = row_index(wide, wide_head, heads, 0, queries, None) + rows
                base = tl.load(stats_ptr + 2 * at, mask=present, other=0.0)
                factor = tl.load(stats_ptr + 2 * at + 1, mask=present, other=0.0)
                delta = row_delta(g, o, dlse_ptr, at, present)
                mask_at = mask_rows(
                    mask_ptr + wide * stride_mb + wide_head * stride_mh, stride_mq, rows[:, None], queries, PER_KEY
                )
                last_row = tl.minimum(row + BLOCK_M, queries) - 1
                begin, full, ragged, end = tiles_seen(row, last_row, key_count, lo, hi, HAS_LO, HAS_HI, BLOCK_N)
                for key in range(tl.maximum(begin, tile_key), tl.minimum(end, end_key), BLOCK_N):
                    ds, _, _ = score_gradient(
                        q, g, base, factor, delta, k_at, v_at, stride_kt, stride_vt, key, rows,
                        (queries, key_count, lo, hi), seen_here, None, (mask_at, stride_mk, slope, origin),
                        (seed, threshold, tl.cast(sequence, tl.int32), tl.cast(head, tl.int32)), scale, exponent,
                        keep_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_LO, HAS_HI, MASK, ALIBI, SCALED, DROPOUT,
                        PRECISION, True,
                    )  # fmt: skip
                    # So many are added one by one that what rounding leaves out is carried along: Knuth's TwoSum.
                    larger = total + ds
                    added = larger - total
                    error += (total - (larger - added)) + (ds - added)
                    total = larger
    total += error
    if EVERY_QUERY:
        total = tl.sum(total, 0)[None, :]
    if EVERY_KEY:
        total = tl.sum(total, 1)[:, None]
    rows = (tl.arange(0, 1) if EVERY_QUERY else tile_row + offsets)[:, None]
    columns = (tl.arange(0, 1) if EVERY_KEY else tile_key + tl.arange(0, BLOCK_N))[None, :]
    dmask_ptr += outer.to(tl.int64) * mask_q * mask_k
    at = rows.to(tl.int64) * mask_k + columns
    tl.store(dmask_ptr + at, total.to(dmask_ptr.dtype.element_ty), mask=(rows < mask_q) & (columns < mask_k))


_bias = Kernel(_attention_bias_bwd_kernel, "attention_bias_bwd", PROBLEM)


def attention_bias_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    stats: Tensor,
    attn_mask: Tensor,
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
) -> Tensor:
    """`fasttx::attention_bias_bwd`: the gradient of a floating attn_mask, dense, in its shape and dtype."""
    refuse_weights(0, grad_weights)
    call = Call(
        query, key, value, attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset,
        window_left, window_right, dropout_p, seed, scale,
    )  # fmt: skip
    require_results(query, value, grad, grad_lse, output, stats)
    if attn_mask is None or attn_mask.dtype == torch.bool:
        raise ValueError("attn_mask must be floating to have a gradient")
    dmask = ops._attention_bias_bwd(None, None, query, key, value, output, stats, attn_mask)
    if dmask.numel() == 0:
        return dmask
    tensors = (call.query, call.key, call.value, unit_rows(output), unit_rows(grad))
    mask_batch, mask_heads, mask_q, mask_k = dmask.shape
    every = mask_batch == 1, mask_heads == 1, mask_q == 1, mask_k == 1
    _bias(
        lambda blocks: (
            mask_batch * mask_heads * -(-mask_q // blocks["BLOCK_M"]) * -(-mask_k // blocks["BLOCK_N"]),
        ),
        (*tensors, launch.dense(stats), launch.dense(grad_lse), dmask, *(s for x in tensors for s in strides_of(x)),
         mask_heads, mask_q, mask_k, *call.shared),
        (*every, *call.constants_of("attention_bias_bwd")),
        call.problem,
    )  # fmt: skip
    return dmask

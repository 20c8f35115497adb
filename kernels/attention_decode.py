"""Attention of a few queries over many keys: the keys of a sequence are split among programs, and their results joined.

Split-key decoding, after Dao et al. 2023 (Flash-Decoding). A program owns all queries of the heads that share a key
head, and SPLIT keys. A split is always the same keys, however many there are, and splits are joined in their order: a
row's result depends on neither the batch nor the padding, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_call import Call, strides_of
from ._attention_configs import PROBLEM
from ._attention_tile import (
    BOOLEAN,
    attend,
    finite,
    inverse,
    load_rows,
    mask_rows,
    store_rows,
    store_statistics,
    tiles_seen,
    tokens_of,
)
from .launch import Kernel

# Queries of one key head that a program holds, and keys that it meets.
MOST_ROWS = 16
SPLIT = 256
_SPLITS_AT_A_TIME = 16


@triton.jit
def any_seen(at, stride, first, end, BLOCK: tl.constexpr):
    """Whether a boolean mask lets any row see any of BLOCK columns from `first`, before `end`."""
    columns = first + tl.arange(0, BLOCK)[None, :]
    mask = tl.load(at + columns.to(tl.int64) * stride, mask=columns < end, other=0)
    return tl.max((mask != 0).to(tl.int32)) != 0


@triton.jit
def tiles_unmasked(tiles, at, stride, BLOCK: tl.constexpr):
    """tiles_seen's answer without the tiles at either end that a boolean mask rules out for all of the rows.

    at: pointers to the mask's rows (rows, 1), or to the one that all share; stride: of its columns. No more of the mask
    is read than what is left out, and one tile at each end.
    """
    begin, full, ragged, end = tiles
    seen = False
    while (begin < end) & (seen == 0):
        seen = any_seen(at, stride, begin, end, BLOCK)
        begin = tl.where(seen, begin, begin + BLOCK)
    seen = False
    while (begin < end) & (seen == 0):
        last = (end - 1) // BLOCK * BLOCK
        seen = any_seen(at, stride, last, end, BLOCK)
        end = tl.where(seen, end, last)
    full = tl.minimum(tl.maximum(full, begin), end)
    return begin, full, tl.maximum(tl.minimum(ragged, end), full), end


@triton.jit
def tiles_left(tiles, mask_at, stride_mk, seen_ptr, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """tiles_unmasked by the mask of the program's queries, or by the keys that any query of its sequence sees."""
    if MASK == BOOLEAN:
        return tiles_unmasked(tiles, mask_at, stride_mk, BLOCK)
    elif seen_ptr is not None:
        return tiles_unmasked(tiles, seen_ptr, 1, BLOCK)
    else:
        return tiles


@triton.jit(do_not_specialize=["seed", "threshold", "queries", "keys", "sequences", "lo", "hi"])
def _attention_split_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stats_ptr, part_ptr, part_stats_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    mask_ptr, seen_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, seed_ptr, seed: tl.int64, threshold: tl.int64,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_sb, heads, group, queries: tl.int32, keys: tl.int32,
    sequences: tl.int32, lo: tl.int32, hi: tl.int32, origin, scale, exponent, keep_scale,
    WITH_LSE: tl.constexpr, ALONE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    splits = tl.maximum(tl.cdiv(keys, SPLIT), 1)
    split, pair = tl.program_id(0) % splits, tl.program_id(0) // splits
    kv_heads = heads // group
    sequence, kv_head = pair // kv_heads, pair % kv_heads
    first_key, key_count = tokens_of(sequence, keys, None, lengths_ptr)
    wide = sequence.to(tl.int64)
    k_ptr += wide * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += wide * stride_vb + kv_head.to(tl.int64) * stride_vh
    rows = tl.arange(0, ROWS)
    valid = rows < group * queries
    head = kv_head * group + tl.minimum(rows // queries, group - 1)
    query = rows % queries
    if seen_ptr is not None:
        seen_ptr += wide * stride_sb
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if mask_ptr is not None:
        mask_ptr += wide * stride_mb + head[:, None].to(tl.int64) * stride_mh
    mask_at = mask_rows(mask_ptr, stride_mq, query[:, None], queries, PER_KEY)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head)[:, None]

    q_at = head.to(tl.int64) * stride_qh + query * stride_qt
    q = load_rows(q_ptr + wide * stride_qb, 1, q_at, valid, D, BLOCK_D)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    start = split * SPLIT
    stop = start + SPLIT
    begin, full, ragged, end = tiles_seen(0, queries - 1, key_count, lo, hi, HAS_LO, HAS_HI, BLOCK_N)
    full, ragged = tl.minimum(tl.maximum(full, start), stop), tl.minimum(tl.maximum(ragged, start), stop)
    tiles = tl.maximum(begin, start), full, ragged, tl.minimum(end, stop)
    begin, full, ragged, end = tiles_left(tiles, mask_at, stride_mk, seen_ptr, MASK, BLOCK_N)
    for phase in tl.static_range(3):
        if phase != 0 or HAS_LO:
            acc, largest, total = attend(
                acc, largest, total, q, k_ptr, v_ptr, stride_kt, stride_vt, None,
                begin if phase == 0 else full if phase == 1 else ragged,
                full if phase == 0 else ragged if phase == 1 else end,
                query, (queries, key_count, lo, hi), seen_ptr, (mask_at, stride_mk, slope, origin),
                (seed, threshold, sequence, head[:, None]), scale, exponent,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_LO, HAS_HI, MASK, ALIBI, SCALED, DROPOUT, PRECISION, phase != 1,
            )  # fmt: skip
    index = (wide * heads + head) * queries + query
    if ALONE:
        acc *= (inverse(total) * keep_scale)[:, None]
        out_at = head.to(tl.int64) * stride_oh + query * stride_ot
        store_rows(out_ptr + wide * stride_ob, 1, out_at, valid, acc, DV, BLOCK_DV)
        if WITH_LSE:
            store_statistics(lse_ptr, stats_ptr, index, valid, largest, total, scale, SCALED)
    else:
        index += split.to(tl.int64) * sequences * heads * queries
        store_rows(part_ptr, DV, index, valid, acc, DV, BLOCK_DV)
        tl.store(part_stats_ptr + 2 * index, largest, mask=valid)
        tl.store(part_stats_ptr + 2 * index + 1, total, mask=valid)


@triton.jit(do_not_specialize=["queries", "splits"])
def _attention_join_kernel(
    part_ptr, part_stats_ptr, out_ptr, lse_ptr, stats_ptr, stride_ob, stride_oh, stride_ot,
    heads, queries: tl.int32, splits: tl.int32, scale, exponent, keep_scale,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, SCALED: tl.constexpr, WITH_LSE: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    count = tl.num_programs(0)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    largest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for first in range(0, splits, AT_A_TIME):
        split = first + tl.arange(0, AT_A_TIME)
        index = split.to(tl.int64) * count + row
        of_part = tl.load(part_stats_ptr + 2 * index, mask=split < splits, other=float("-inf"))
        part_total = tl.load(part_stats_ptr + 2 * index + 1, mask=split < splits, other=0.0)
        part = load_rows(part_ptr, DV, index, split < splits, DV, BLOCK_DV)
        larger = tl.maximum(largest, tl.max(of_part, 0))
        base = finite(larger)
        share = tl.exp2((of_part - base) * exponent)
        shrink = tl.exp2((largest - base) * exponent)
        total = tl.fma(total, shrink, tl.sum(part_total * share, 0))
        acc = tl.fma(acc, shrink, tl.sum(part * share[:, None], 0))
        largest = larger
    query, head, sequence = row % queries, row // queries % heads, row // queries // heads
    out_ptr += sequence.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    one = tl.full((1,), True, tl.int1)
    acc = (acc * (inverse(total) * keep_scale))[None, :]
    store_rows(out_ptr, stride_ot, query + tl.arange(0, 1), one, acc, DV, BLOCK_DV)
    if WITH_LSE:
        store_statistics(lse_ptr, stats_ptr, row + tl.arange(0, 1), one, largest, total, scale, SCALED)


_split = Kernel(_attention_split_kernel, "attention_split", PROBLEM)
_join = Kernel(_attention_join_kernel, "attention_join")


def takes(call: Call) -> bool:
    """Whether a call has so few queries that their keys are split; how many those are must not count, for padding."""
    return not call.packed and call.queries * call.group <= MOST_ROWS


def attend_split(call: Call, output: Tensor, lse: Tensor, stats: Tensor, with_lse: bool) -> None:
    """Writes the results of a call that `takes` is true of."""
    tensors = (call.query, call.key, call.value)
    splits = max(1, -(-call.keys // SPLIT))
    alone = splits == 1
    part = part_stats = None
    if not alone:
        rows = (splits, call.sequences * call.heads * call.queries)
        part = torch.empty((*rows, call.value_width), dtype=torch.float32, device=output.device)
        part_stats = torch.empty((*rows, 2), dtype=torch.float32, device=output.device)
    _split(
        lambda blocks: (splits * call.sequences * call.kv_heads,),
        (*tensors, output, lse, stats, part, part_stats, *(s for x in (*tensors, output) for s in strides_of(x)),
         *call.shared),
        (with_lse, alone, MOST_ROWS, SPLIT, *call.constants_of("attention_split")),
        call.problem,
    )  # fmt: skip
    if not alone:
        _join(
            lambda blocks: (call.sequences * call.heads * call.queries,),
            (part, part_stats, output, lse, stats, *strides_of(output), call.heads, call.queries, splits, *call.units),
            (call.value_width, call.block_dv, call.scaled, with_lse, _SPLITS_AT_A_TIME),
        )

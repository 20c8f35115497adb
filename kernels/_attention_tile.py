"""What attention's kernels share on the device: where a program's rows lie, which tiles they see, and a tile's scores.

Scores are kept in one of two ways. Plain ones as the products q k^T themselves, whose exponential is
2^(exponent * score), exponent = scale / ln 2: the scale costs nothing. With anything added to them (SCALED) they are
scaled first, and exponent = 1 / ln 2: a mask's lowest finite number would overflow if it were multiplied by that.

Fused multiply-adds are written out, and the compiler makes no others: a tile gives a row the same bits whether it is
masked or not.
"""

import triton
import triton.language as tl

from .math import dropout_keep

# What attn_mask is.
NO_MASK, BOOLEAN, ADDITIVE = (tl.constexpr(code) for code in range(3))
# Arguments for whose values no kernel is compiled anew.
UNSPECIALIZED = [
    "stride_lb", "stride_lh", "stride_lt", "seed", "threshold", "queries", "keys", "sequences", "lo", "hi",
]  # fmt: skip


@triton.jit
def tile_of(program, count, heads, cu_ptr, sequences, BLOCK: tl.constexpr):
    """(sequence, head, first row in the sequence) of a program; programs of one head follow each other.

    Packed sequences: tile t of sequence n is number cu[n] // BLOCK + n + t, so that each has numbers enough; its last
    may be one too many, and begins beyond the sequence's end.
    """
    if cu_ptr is None:
        tiles = tl.cdiv(count, BLOCK)
        sequence = program // tiles // heads
        tile = program % tiles
    else:
        tiles = count // BLOCK + sequences
        tile = program % tiles
        sequence = 0
        above = sequences
        while above - sequence > 1:
            middle = (sequence + above) // 2
            if (tl.load(cu_ptr + middle) // BLOCK).to(tl.int32) + middle <= tile:
                sequence = middle
            else:
                above = middle
        tile -= (tl.load(cu_ptr + sequence) // BLOCK).to(tl.int32) + sequence
    return sequence, program // tiles % heads, tile * BLOCK


@triton.jit
def tokens_of(sequence, count, cu_ptr, lengths_ptr):
    """Where a sequence's tokens begin on the token axis, and how many there are; never outside of the `count` given."""
    if cu_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), count)
        tokens = tl.minimum(tl.load(cu_ptr + sequence + 1), count) - first
    elif lengths_ptr is not None:
        first = tl.full((), 0, tl.int64)
        tokens = tl.minimum(tl.load(lengths_ptr + sequence), count)
    else:
        first = tl.full((), 0, tl.int64)
        tokens = tl.full((), 0, tl.int64) + count
    return first, tl.maximum(tokens, 0).to(tl.int32)


@triton.jit
def row_index(sequence, head, heads, first, count, cu_ptr):
    """Index of a sequence's first row in lse: (sequences, heads, count), or packed (heads, count)."""
    if cu_ptr is None:
        return (sequence.to(tl.int64) * heads + head) * count
    else:
        return head.to(tl.int64) * count + first


@triton.jit
def tiles_seen(first, last, count, lo, hi, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, BLOCK: tl.constexpr):
    """Which of `count` columns the rows first .. last see, row i those from i + lo to i + hi.

    (begin, full, ragged, end), the first three multiples of BLOCK unless nothing follows them: every row sees all of
    the tiles from full to ragged, and some row something of those before and after.
    """
    begin, full = 0, 0
    end, ragged = count, count // BLOCK * BLOCK
    if HAS_LO:
        begin = tl.maximum(first + lo, 0) // BLOCK * BLOCK
        full = tl.cdiv(tl.maximum(last + lo, 0), BLOCK) * BLOCK
    if HAS_HI:
        end = tl.minimum(end, last + hi + 1)
        ragged = tl.minimum(ragged, tl.maximum(first + hi + 1, 0) // BLOCK * BLOCK)
    full = tl.minimum(full, end)
    return begin, full, tl.maximum(tl.minimum(ragged, end), full), end


@triton.jit
def load_rows(ptr, stride, rows, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) of a matrix of WIDTH columns; zeros beyond them, and where a row is not valid (None: all are)."""
    columns = tl.arange(0, BLOCK)
    at = ptr + rows[:, None] * stride + columns[None, :]
    if WIDTH == BLOCK:
        if valid is None:
            return tl.load(at)
        else:
            return tl.load(at, mask=valid[:, None], other=0.0)
    elif valid is None:
        return tl.load(at, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(at, mask=valid[:, None] & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def store_rows(ptr, stride, rows, valid, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The other way around."""
    columns = tl.arange(0, BLOCK)
    at = ptr + rows[:, None] * stride + columns[None, :]
    mask = valid[:, None]
    if WIDTH != BLOCK:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def valid_keys(keys, key_count, seen_ptr, partly, MASKED: tl.constexpr):
    """Which keys of a tile are loaded: not those beyond the last, or that no query of the sequence sees. None: all.

    MASKED: whether any may not be; partly: whether that is so of a listed tile, or None.
    """
    if partly is not None:
        valid = keys < key_count
        if seen_ptr is not None:
            valid = tl.load(seen_ptr + keys, mask=valid & (partly != 0), other=0) != 0
        return valid | (partly == 0)
    elif seen_ptr is not None:
        return tl.load(seen_ptr + keys, mask=keys < key_count, other=0) != 0
    elif MASKED:
        return keys < key_count
    else:
        return None


@triton.jit
def mask_rows(mask_ptr, stride_q, rows, queries, PER_KEY: tl.constexpr):
    """Pointers to the mask's rows; one for all where the mask does not differ by query (PER_KEY). Without a mask 0."""
    if mask_ptr is None:
        return 0
    elif PER_KEY:
        return mask_ptr
    else:
        return mask_ptr + tl.minimum(rows, queries - 1).to(tl.int64) * stride_q


@triton.jit
def load_mask(at, valid, other):
    """A tile of the mask; of keys that are not valid nothing is read."""
    if valid is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=valid, other=other)


@triton.jit
def scores_of(
    products, rows, keys, valid, bounds, bias, scale, partly,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A tile's scores, -inf where a row does not attend to a key.

    rows, keys: indices that broadcast to products, the one down and the other across, or the other way around; and
    valid, what valid_keys gave, as keys. bounds: (rows, keys, lo, hi), the numbers of rows and keys, and which keys
    places allow, row + lo to row + hi. bias: (pointers to the mask's rows, the stride of its keys, ALiBi's slope, the
    place of row 0). MASKED: the tile is not one that all of the rows see, as far as places go. partly: of a listed
    tile, whether a boolean mask or places rule out any of it; otherwise None. A tile that is seen whole reads nothing
    of the mask. It is no branch: values that meet in one lie with other threads than products do.
    """
    row_count, key_count, lo, hi = bounds
    mask_at, stride_mk, slope, origin = bias
    scores = products
    if SCALED:
        scores = scores * scale
    if MASK != NO_MASK:
        at = mask_at + keys.to(tl.int64) * stride_mk
        if partly is not None and MASK == BOOLEAN:
            mask = load_mask(at, valid & (partly != 0), 1)
        else:
            mask = load_mask(at, valid, 0)
    if MASK == ADDITIVE:
        scores = scores + mask.to(tl.float32)
    if ALIBI:
        scores = scores - slope * tl.abs((keys - rows).to(tl.float32) - origin)
    if MASKED:
        allowed = (rows < row_count) & (keys < key_count)
        if HAS_LO:
            allowed = allowed & (keys - rows >= lo)
        if HAS_HI:
            allowed = allowed & (keys - rows <= hi)
        scores = tl.where(allowed, scores, float("-inf"))
    if valid is not None:
        scores = tl.where(valid, scores, float("-inf"))
    if MASK == BOOLEAN:
        scores = tl.where(mask != 0, scores, float("-inf"))
    return scores


@triton.jit
def exponentials(scores, base, exponent):
    """2^(exponent * (scores - base)), base finite; the difference first: multiplied out, large scores round it off."""
    return tl.exp2((scores - base) * exponent)


@triton.jit
def finite(largest):
    """largest, and 0 in place of -inf, which it is where a row has seen no key yet."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def inverse(total):
    """1 / total, and 0 where there is nothing."""
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr):
    """a b^T of rows (M, D) and (N, D).

    The vector units sum a wide row in four chains, which are then added up: one over all of it would round more often
    than PyTorch's own products do.
    """
    if (PRECISION == "ieee" and a.dtype == tl.float32) and a.shape[1] > 32:
        CHAINS: tl.constexpr = 4
        CHAIN: tl.constexpr = a.shape[1] // CHAINS
        left = tl.permute(tl.reshape(a, (a.shape[0], CHAINS, CHAIN)), (1, 0, 2))
        right = tl.permute(tl.reshape(b, (b.shape[0], CHAINS, CHAIN)), (1, 2, 0))
        products = tl.sum(tl.dot(left, right, input_precision=PRECISION), axis=0)
    else:
        products = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return products


@triton.jit
def add_product(sums, a, b, PRECISION: tl.constexpr):
    """sums + a b; on the vector units, each tile's sums are a chain of their own."""
    if PRECISION == "ieee" and a.dtype == tl.float32:
        sums = tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, sums)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def tiles_met(tiles, list_ptr):
    """tiles_seen's answer, or the numbers of a list's tiles: each says itself whether it is seen whole."""
    if list_ptr is not None:
        return 0, 0, 0, tl.load(list_ptr)
    else:
        return tiles


@triton.constexpr_function
def has_phase(phase, first_may_be_ragged, is_listed):
    """Of the tiles before those that are seen whole, of those, and of the rest (2): whether there may be any."""
    return phase == 2 or (not is_listed and (phase == 1 or first_may_be_ragged))


@triton.jit
def tile_at(list_ptr, at, BLOCK: tl.constexpr):
    """The first column of the tile of a list's entry, and whether it is seen but partly; without a list `at` itself."""
    if list_ptr is not None:
        entry = tl.load(list_ptr + 1 + at)
        return (entry >> 1) * BLOCK, entry & 1
    else:
        return at, None


@triton.jit
def attend(
    acc, largest, total, q, k_ptr, v_ptr, stride_kt, stride_vt, list_ptr, first, last, rows, bounds, seen_ptr, bias,
    dropout, scale, exponent,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys from first to last, by tiles, into acc (M, BLOCK_DV), the largest score and the total (M,).

    With lists, `first` and `last` number the tiles of the program's. rows (M,); bounds and bias as for scores_of.
    dropout: (seed, threshold, sequence, head), dropout_keep's.
    """
    offsets = tl.arange(0, BLOCK_N)
    STEP: tl.constexpr = BLOCK_N if list_ptr is None else 1
    for at in range(first, last, STEP):
        key, partly = tile_at(list_ptr, at, BLOCK_N)
        keys = key + offsets
        valid = valid_keys(keys, bounds[1], seen_ptr, partly, MASKED)
        across = None if valid is None else valid[None, :]
        if q.dtype == tl.float32 and BLOCK_D > 128:
            # Depends on the loop, or all that a thread multiplies of it would be kept in registers: too many.
            q = tl.where(key >= 0, q, 0.0)
        k = load_rows(k_ptr + tl.cast(key, tl.int64) * stride_kt, stride_kt, offsets, valid, D, BLOCK_D)
        products = dot_rows(q, k, PRECISION)
        scores = scores_of(
            products, rows[:, None], keys[None, :], across, bounds, bias, scale, partly, HAS_LO, HAS_HI, MASK, ALIBI,
            SCALED, MASKED,
        )  # fmt: skip
        larger = tl.maximum(largest, tl.max(scores, 1))
        base = finite(larger)
        shrink = tl.exp2((largest - base) * exponent)
        p = exponentials(scores, base[:, None], exponent)
        total = tl.fma(total, shrink, tl.sum(p, 1))
        if DROPOUT:
            seed, threshold, sequence, head = dropout
            p = tl.where(dropout_keep(seed, None, threshold, sequence, head, rows, key, BLOCK_N), p, 0.0)
        v = load_rows(v_ptr + tl.cast(key, tl.int64) * stride_vt, stride_vt, offsets, valid, DV, BLOCK_DV)
        acc = add_product(acc * shrink[:, None], p.to(v.dtype), v, PRECISION)
        largest = larger
    return acc, largest, total


@triton.jit
def store_statistics(lse_ptr, stats_ptr, at, valid, largest, total, scale, SCALED: tl.constexpr):
    """lse, and for the backward its two parts: the largest score and 1 / the sum of exponentials, or 0 and 0."""
    unit = 1.0 if SCALED else scale
    tl.store(lse_ptr + at, largest * unit + tl.log(total), mask=valid)
    tl.store(stats_ptr + 2 * at, finite(largest), mask=valid)
    tl.store(stats_ptr + 2 * at + 1, inverse(total), mask=valid)

"""Small Triton kernels that between them make the compiler emit what the emulator has to execute."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def add_rows(x, y, out, n, BLOCK: tl.constexpr):
    """out = x + y, one block of a vector per program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out + at, tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask), mask=mask)


@triton.jit
def layer_norm(x, out, weight, bias, stride, width, eps, BLOCK: tl.constexpr):
    """One row per program, two passes over registers."""
    row = tl.program_id(0).to(tl.int64) * stride
    at = tl.arange(0, BLOCK)
    mask = at < width
    values = tl.load(x + row + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / width
    centred = tl.where(mask, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    gain = tl.load(weight + at, mask=mask).to(tl.float32)
    shift = tl.load(bias + at, mask=mask).to(tl.float32)
    tl.store(out + row + at, (centred * scale * gain + shift).to(out.dtype.element_ty), mask=mask)


@triton.jit
def activations(x, out, n, BLOCK: tl.constexpr):
    """Three rows: GELU by erf, GELU by tanh, and a sigmoid."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + at, (0.5 * v * (1 + tl.erf(v * 0.7071067811865476))).to(kind), mask=mask)
    inner = libdevice.tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))
    tl.store(out + n + at, (0.5 * v * (1 + inner)).to(kind), mask=mask)
    tl.store(out + 2 * n + at, tl.sigmoid(v).to(kind), mask=mask)


@triton.jit
def tally(x, sums, order, n, BLOCK: tl.constexpr):
    """Atomics: a sum, a maximum, a minimum of integers, and a ticket that each program draws."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n, other=0)
    tl.atomic_add(sums + v, 1, mask=at < n)
    tl.atomic_max(sums + 8, tl.max(v, 0))
    tl.atomic_min(sums + 9, tl.min(v, 0))
    ticket = tl.atomic_add(sums + 10, 1)
    tl.store(order + tl.program_id(0), ticket)


@triton.jit
def dropout(out, n, seed, BLOCK: tl.constexpr):
    """Philox uniforms."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.rand(seed, at), mask=at < n)


@triton.jit
def cumulative(x, out, BLOCK: tl.constexpr):
    """A scan and a sort: shuffles and shared memory."""
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.store(out + at, tl.cumsum(v, 0))
    tl.store(out + BLOCK + at, tl.sort(v))


@triton.jit
def matmul(
    a,
    b,
    out,
    m,
    n,
    k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
):
    """out (m, n) = a (m, k) @ b (k, n) in float32; a and b may be stored transposed."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        depth = start + tl.arange(0, BK)
        a_at = depth[None, :] * m + rows[:, None] if TRANS_A else rows[:, None] * k + depth[None, :]
        b_at = columns[None, :] * k + depth[:, None] if TRANS_B else depth[:, None] * n + columns[None, :]
        left = tl.load(a + a_at, mask=(rows[:, None] < m) & (depth[None, :] < k), other=0.0)
        right = tl.load(b + b_at, mask=(depth[:, None] < k) & (columns[None, :] < n), other=0.0)
        total = tl.dot(left, right, total)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + rows[:, None] * n + columns[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attention(q, k, v, out, scale, length, CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """softmax(q kᵀ scale) v for contiguous (heads, length, D); scale includes log2(e)."""
    head = tl.program_id(1).to(tl.int64) * length * D
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    queries = tl.load(q + head + rows[:, None] * D + d[None, :], mask=rows[:, None] < length, other=0.0)
    top = tl.full([BM], float("-inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, D], tl.float32)
    stop = tl.minimum((tl.program_id(0) + 1) * BM, length) if CAUSAL else length
    for start in range(0, stop, BN):
        columns = start + tl.arange(0, BN)
        inside = columns < length
        keys = tl.load(k + head + columns[None, :] * D + d[:, None], mask=inside[None, :], other=0.0)
        score = tl.dot(queries, keys) * scale
        allowed = inside[None, :] & (rows[:, None] >= columns[None, :]) if CAUSAL else inside[None, :]
        score = tl.where(allowed, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        rescale = tl.exp2(top - higher)
        norm = norm * rescale + tl.sum(weight, 1)
        values = tl.load(v + head + columns[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(weight.to(values.dtype), values, total * rescale[:, None])
        top = higher
    result = (total / norm[:, None]).to(out.dtype.element_ty)
    tl.store(out + head + rows[:, None] * D + d[None, :], result, mask=rows[:, None] < length)


@triton.jit
def weight_gradients(
    q, k, v, dout, lse, delta, dk, dv, scale, length, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """dK and dV of unmasked attention, one block of keys per program: transposes of registers and of shared memory."""
    head = tl.program_id(1).to(tl.int64) * length * D
    at = tl.program_id(1) * length
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, D)
    inside = columns[:, None] < length
    keys = tl.load(k + head + columns[:, None] * D + d[None, :], mask=inside, other=0.0)
    values = tl.load(v + head + columns[:, None] * D + d[None, :], mask=inside, other=0.0)
    to_k = tl.zeros([BN, D], tl.float32)
    to_v = tl.zeros([BN, D], tl.float32)
    for start in range(0, length, BM):
        rows = start + tl.arange(0, BM)
        here = rows < length
        queries = tl.load(q + head + rows[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        upstream = tl.load(dout + head + rows[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        log_norm = tl.load(lse + at + rows, mask=here, other=float("inf"))
        mean = tl.load(delta + at + rows, mask=here, other=0.0)
        weight = tl.exp2(tl.dot(keys, tl.trans(queries)) * (scale * 1.4426950408889634) - log_norm[None, :])
        to_v = tl.dot(weight.to(upstream.dtype), upstream, to_v)
        back = tl.dot(values, tl.trans(upstream))
        slope = weight * (back - mean[None, :]) * scale
        to_k = tl.dot(slope.to(queries.dtype), queries, to_k)
    place = head + columns[:, None] * D + d[None, :]
    tl.store(dk + place, to_k.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + place, to_v.to(dv.dtype.element_ty), mask=inside)

"""Mathematics that the Triton kernels share: activations, the online softmax, dropout's random words.

All of it is device code over float32 blocks, apart from loading and storing.
"""

import triton
import triton.language as tl

# The codes of Activation in csrc/cpu/kernels.h, as the ops pass them.
NONE, RELU, GELU, GELU_TANH = (tl.constexpr(code) for code in range(4))

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_PHILOX_M0 = tl.constexpr(0xD2511F53)
_PHILOX_M1 = tl.constexpr(0xCD9E8D57)
_PHILOX_W0 = tl.constexpr(0x9E3779B9)
_PHILOX_W1 = tl.constexpr(0xBB67AE85)


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """The activation of this code. NaN stays NaN; -infinity gives 0."""
    if ACTIVATION == GELU:
        return gelu(x)
    elif ACTIVATION == GELU_TANH:
        return gelu_tanh(x)
    elif ACTIVATION == RELU:
        return _positive_part(x)
    else:
        return x


@triton.jit
def activation_grad(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation of this code."""
    if ACTIVATION == GELU:
        return gelu_grad(x)
    elif ACTIVATION == GELU_TANH:
        return gelu_tanh_grad(x)
    elif ACTIVATION == RELU:
        return tl.where(x <= 0, 0.0, 1.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


# Both GELUs are x F(x) with F(-a) = 1 - F(a). With a = |x|, gelu(x) = max(x, 0) - a F(-a), which does not cancel in the
# negative tail, and gelu'(-a) = 1 - gelu'(a). Where F(-a) has become nothing, a is taken as zero, so that no infinity
# meets it.


@triton.jit
def gelu(x):
    """x Phi(x), Phi the standard normal distribution function. Hendrycks and Gimpel 2016."""
    size = tl.abs(x)
    a = tl.where(size < 6.5, size, 0.0)
    return _positive_part(x) - a * (_normal_tail_grad(a) + 0.3989422804014327 * a * _half_square_exp(a))


@triton.jit
def gelu_grad(x):
    """Phi(x) + x phi(x)."""
    size = tl.abs(x)
    tail = tl.where(size < 6.5, _normal_tail_grad(tl.where(size < 6.5, size, 0.0)), 0.0)
    return _both_sides(x, tail)


@triton.jit
def _normal_tail_grad(a):
    """Phi(-a) - a phi(a) for 0 <= a <= 6.5, within 1e-7.

    e^(-a^2/2) times a polynomial that the weight of the exponential lets be short: the weighted minimax fit of
    (Phi(-a) - a phi(a)) e^(a^2/2), its value at 0 held at 1/2; the same as NormalTail's in csrc/cpu/math.h.
    """
    p = tl.fma(a, -3.23843977e-07, 7.87953104e-06)
    p = tl.fma(p, a, -8.62695015e-05)
    p = tl.fma(p, a, 0.000571004406)
    p = tl.fma(p, a, -0.00261228858)
    p = tl.fma(p, a, 0.00904665887)
    p = tl.fma(p, a, -0.0255248044)
    p = tl.fma(p, a, 0.061965134)
    p = tl.fma(p, a, -0.132824913)
    p = tl.fma(p, a, 0.24997738)
    p = tl.fma(p, a, -0.797883451)
    p = tl.fma(p, a, 0.5)
    return p * _half_square_exp(a)


@triton.jit
def _half_square_exp(a):
    """e^(-a^2/2)."""
    return tl.exp2(a * a * -0.7213475204444817)


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh u) = x / (1 + e^-2u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    size = tl.abs(x)
    a = tl.where(size < 10.0, size, 0.0)
    e = tl.exp2(-LOG2E * _twice_tanh_argument(a))
    return _positive_part(x) - a * e / (1.0 + e)


@triton.jit
def gelu_tanh_grad(x):
    """s + x s (1 - s) 2u' with s = 1 / (1 + e^-2u)."""
    size = tl.abs(x)
    a = tl.where(size < 10.0, size, 0.0)
    e = tl.exp2(-LOG2E * _twice_tanh_argument(a))
    s = 1.0 / (1.0 + e)
    slope = a * tl.fma(a * a, 3 * 0.0713548162726002, 1.5957691216057308)
    tail = tl.where(size < 10.0, e * s * (1.0 - s * slope), 0.0)
    return _both_sides(x, tail)


@triton.jit
def _twice_tanh_argument(a):
    return a * tl.fma(a * a, 0.0713548162726002, 1.5957691216057308)


@triton.jit
def _both_sides(x, tail):
    """f(x) from tail = f(-|x|) where f(x) = 1 - f(-x); NaN stays."""
    return tl.where(x > 0, 1.0 - tail, tl.where(x == x, tail, x))


@triton.jit
def _positive_part(x):
    # A comparison that fails for NaN, which so goes through.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def online_softmax_step(scores, largest, total):
    """Takes one more block of keys into a softmax whose sums are kept relative to the largest score so far.

    scores (M, N), in units of log2: the scores times LOG2E, -infinity where nothing is attended to. largest and total
    (M,): before this block, -infinity and 0 at the start. Returns (probabilities (M, N) relative to the new largest,
    shrink (M,): what sums so far are to be multiplied by, largest, total). Milakov and Gimelshein 2018.
    """
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    # A finite base in place of -infinity keeps -inf - -inf out: rows with no key yet get zeros.
    base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    probabilities = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(largest - base)
    return probabilities, shrink, new_largest, tl.fma(total, shrink, tl.sum(probabilities, 1))


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: the four random words of each counter; all are uint32 and broadcast together.

    Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, _PHILOX_M0)
        low0 = tl.mul(c0, _PHILOX_M0, sanitize_overflow=False)
        high1 = tl.umulhi(c2, _PHILOX_M1)
        low1 = tl.mul(c2, _PHILOX_M1, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, _PHILOX_W0, sanitize_overflow=False)
        k1 = tl.add(k1, _PHILOX_W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def dropout_keep(seed, seed_ptr, threshold, batch, head, rows, first_column, COLUMNS: tl.constexpr):
    """Which elements dropout keeps: (M, COLUMNS) bool, the mask of fasttx.philox.keep_mask.

    seed int64, or where it lies: seed_ptr, None for the former. threshold int64: fasttx.philox.drop_threshold's. batch
    and head: scalars. rows (M,). first_column: a multiple of 4, as COLUMNS is. Element (row, column) has the word
    column % 4 of the counter (column // 4, row, head, batch), so one evaluation serves four neighbours.
    """
    zero = tl.zeros([rows.shape[0], COLUMNS // 4], tl.uint32)
    quads = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :] + zero
    row = rows.to(tl.uint32)[:, None] + zero
    if seed_ptr is not None:
        key = tl.load(seed_ptr)
    else:
        key = seed
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    # Either may have been specialised to a constant.
    head, batch = tl.to_tensor(head).to(tl.uint32), tl.to_tensor(batch).to(tl.uint32)
    w0, w1, w2, w3 = philox(quads, row, zero + head, zero + batch, k0, k1)
    least = threshold.to(tl.uint32)
    even, odd = tl.join(w0 >= least, w2 >= least), tl.join(w1 >= least, w3 >= least)
    return tl.reshape(tl.join(even, odd), (rows.shape[0], COLUMNS))


@triton.jit
def matrix_dropout_keep(seed, seed_ptr, threshold, rows, first_column, COLUMNS: tl.constexpr):
    """`dropout_keep` of a matrix: batch and head are 0."""
    return dropout_keep(seed, seed_ptr, threshold, 0, 0, rows, first_column, COLUMNS)

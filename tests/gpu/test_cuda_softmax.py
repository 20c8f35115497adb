"""What is the CUDA C++ kernels' own in masked softmax: its classes of widths, its accesses, and rows that are odd.

test_softmax.py has what they share with Triton's.
"""

import math

import pytest
import torch
from budget import poisoned
from properties import draw

from fasttx import reference
from fasttx.measure import ulp
from fasttx.ops import softmax as ops
from gpu import mutations
from gpu.launchers import BINARY, ON_GPU, by_dtype, counted, full, needs_binary, on_kernels
from gpu.mutations import SYNCHRONISATION, Trial
from gpu.test_softmax import check

pytestmark = needs_binary

# Widths of every class: the narrowest and the widest, those that fill accesses of 16 bytes and those that do not.
WHOLE = (8, 64, 72, 256, 264, 1024, 1032, 4096, 4104, 16384, 16392)
RAGGED = (1, 61, 67, 255, 257, 1021, 1027, 4095, 4097, 16383, 16385)
SAMPLE = (64, 61, 1024, 257, 4104, 16385)
by_width = pytest.mark.parametrize(
    "width", [width if width in SAMPLE else pytest.param(width, marks=full) for width in sorted(WHOLE + RAGGED)]
)
MASKS = {
    "none": lambda shape: None,
    "bool": lambda shape: torch.rand(shape) > 0.3,
    "bool, keys": lambda shape: torch.rand(shape[0], 1, 1, shape[3]) > 0.3,
    "bool, misaligned": lambda shape: (torch.rand(shape[2], shape[3] + 1) > 0.3)[:, 1:],
    "bool, strided": lambda shape: (torch.rand(shape[3], shape[2]) > 0.3).t(),
    "bool, queries": lambda shape: torch.rand(shape[1], shape[2], 1) > 0.3,
    "additive": lambda shape: draw(*shape[1:]),
    "additive, keys": lambda shape: draw(1, shape[3]),
}


def forward(x, mask=None, is_causal=False):
    return ops.softmax_fwd.cuda.raw(x, mask, is_causal)


def rows_of(width):
    # PyTorch's largest error says something of a dtype where there are some rows: of one, it is luck.
    return 2 if width > 4096 else 4 if width > 1024 else 12


@by_width
@by_dtype
def test_every_width(width, dtype):
    check(BINARY, dtype, (2, rows_of(width), width))


by_class = pytest.mark.parametrize(
    "width", [64, 61, 256, 201, 1024, 1021, 4096, 4095, 16384, 16383, 16392, 16385]
)


@full
@by_class
@by_dtype
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_in_every_width(width, dtype, kind):
    shape = (2, 1, rows_of(width), width)
    check(BINARY, dtype, shape, MASKS[kind](shape))


@full
@by_class
@by_dtype
@pytest.mark.parametrize("kind", ["none", "additive"])
def test_causal_in_every_width(width, dtype, kind):
    shape = (1 if width > 4096 else 2, 1, 12, width)
    check(BINARY, dtype, shape, MASKS[kind](shape), is_causal=True)


@by_dtype
@pytest.mark.parametrize("width", [200, pytest.param(201, marks=full), pytest.param(16400, marks=full)])
def test_a_float32_mask(width, dtype):
    # In the kernel it is added in float32: within its input's rounding of the softmax of that sum.
    x, mask = (3 * draw(2, 3, 2, width)).to(dtype), draw(3, 1, width).float()
    with on_kernels(BINARY), poisoned():
        y = forward(x, mask)
    expected = torch.softmax(x.double() + mask.double(), -1)
    eager = torch.softmax(x.float() + mask, -1).to(dtype).double()
    assert (y - expected).abs().max() <= 2 * (eager - expected).abs().max() + ulp(expected.max().item(), dtype)


@counted
@by_dtype
@by_width
def test_accesses(width, dtype):
    x, dy = draw(2, 3, width).to(dtype), draw(2, 3, width).to(dtype)
    size = x.element_size()
    access = 16 if width * size % 16 == 0 else size
    each = x.numel() * size // access
    passes = 2 if width > 16384 else 1
    with on_kernels(BINARY) as machine:
        y = forward(x)
        ops.softmax_bwd.cuda.raw(dy, y)
    fwd, bwd = (launch.counts for launch in machine.launches)
    assert fwd.loads == {access: each * passes} and fwd.stores == {access: each}
    assert bwd.loads == {access: 2 * each * passes} and bwd.stores == {access: each}
    assert fwd.read == fwd.written == x.numel() * size and bwd.read == 2 * bwd.written == 2 * x.numel() * size


@counted
def test_a_mask_is_read_once_and_nothing_beyond_the_diagonal():
    x, keep = draw(1, 4, 64, 128).bfloat16(), torch.rand(4, 64, 128) > 0.3
    with on_kernels(BINARY) as machine:
        forward(x, keep)
        forward(x, is_causal=True)
        forward(x, keep.bfloat16())
        forward(x, keep.float())
    masked, causal, added, wide = (launch.counts for launch in machine.launches)
    assert masked.loads == {16: x.numel() // 8, 8: x.numel() // 8}
    # Row i reads the accesses that hold columns up to i.
    assert causal.loads == {16: 4 * sum(i // 8 + 1 for i in range(64))}
    assert added.loads == {16: x.numel() // 4} and wide.loads == {16: x.numel() // 8 + x.numel() // 4}


@pytest.mark.parametrize("width", [64, pytest.param(61, marks=full), 1024, 4100, pytest.param(16400, marks=full)])
def test_a_row_does_not_depend_on_its_place(width):
    x, keep = draw(3, 1, 5, width).bfloat16(), torch.rand(3, 1, 1, width) > 0.3
    dy = draw(*x.shape).bfloat16()
    with on_kernels(BINARY):
        y, alone = forward(x, keep), forward(x[2:, :, 3:4].clone(), keep[2:])
        dx, dx_alone = (ops.softmax_bwd.cuda.raw(*both) for both in ((dy, y), (dy[2:, :, 3:4].clone(), alone)))
    assert torch.equal(y[2, 0, 3], alone[0, 0, 0]) and torch.equal(dx[2, 0, 3], dx_alone[0, 0, 0])


@by_dtype
def test_misaligned_tensors(dtype):
    x = draw(1 + 2 * 3 * 64).to(dtype)[1:].view(2, 3, 64)
    assert x.is_contiguous() and x.data_ptr() % 16 != 0
    with on_kernels(BINARY) as machine:
        y, dx = forward(x), ops.softmax_bwd.cuda.raw(x, forward(x))
        aligned = forward(x.clone())
    assert ON_GPU or set(machine.launches[0].counts.loads) == {x.element_size()}
    assert (y.double() - torch.softmax(x.double(), -1)).abs().max() <= ulp(1.0, dtype)
    assert (y.double() - aligned.double()).abs().max() <= ulp(1.0, dtype) and dx.isfinite().all()


@pytest.mark.parametrize("width", [40, 61, 4100, pytest.param(300, marks=full), pytest.param(16400, marks=full)])
@by_dtype
def test_infinities_and_nan_stay_in_their_row(width, dtype):
    x = draw(6, width).to(dtype)
    x[1, 33], x[2, 4], x[3, :30] = math.nan, math.inf, -math.inf
    x[4], x[4, 34], x[5] = -math.inf, math.nan, -math.inf
    with on_kernels(BINARY), poisoned():
        y = forward(x)
        dx = ops.softmax_bwd.cuda.raw(torch.ones_like(y), y)
    expected = reference.softmax(x.double())
    assert y[[1, 2, 4]].isnan().all() and not y[5].any() and not dx[5].any()
    assert torch.equal(y.isnan(), expected.isnan()) and not y[3, :30].any()
    assert (y - expected).nan_to_num().abs().max() <= ulp(1.0, dtype)


@pytest.mark.parametrize("width", [40, pytest.param(61, marks=full), 4104])
def test_what_is_masked_out_may_be_anything(width):
    x, keep = draw(3, width).bfloat16(), torch.rand(3, width) > 0.5
    causal = x.clone()
    causal[0, 1:] = causal[1, 2:] = causal[2, 3:] = math.nan
    with on_kernels(BINARY), poisoned():
        expected, expected_causal = forward(x, keep), forward(x, is_causal=True)
        for garbage in (math.nan, math.inf, -math.inf):
            assert torch.equal(forward(x.masked_fill(~keep, garbage), keep), expected)
        assert torch.equal(forward(causal, is_causal=True), expected_causal)
    assert not expected_causal.triu(1).any()


def test_large_scores_do_not_overflow():
    x = torch.tensor([[1e30, 1e30, -1e30], [3e38, -3e38, 0], [-3e38, -3e38, -3e38]])
    with on_kernels(BINARY):
        y = forward(x)
    torch.testing.assert_close(y, torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [1 / 3] * 3]))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 3, 8)])
def test_nothing(shape):
    with on_kernels(BINARY):
        y = forward(torch.empty(shape))
        dx = ops.softmax_bwd.cuda.raw(torch.empty(shape), y)
    assert y.shape == dx.shape == shape


def test_what_the_kernels_do_not_take():
    x = torch.randn(2, 3, 8)
    with on_kernels(BINARY):
        for mask, message in (
            (torch.ones(2, 3, 8, dtype=torch.float64), "mask must be bool"),
            (torch.ones(4, 8, dtype=torch.bool), "does not broadcast"),
            (torch.ones(1, 2, 3, 8), "more dimensions"),
        ):
            with pytest.raises(RuntimeError, match=message):
                forward(x, mask)
        with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
            forward(x.double())
        with pytest.raises(RuntimeError, match="too few dimensions"):
            forward(x[0, 0], is_causal=True)
        with pytest.raises(RuntimeError, match="grad has the wrong shape"):
            ops.softmax_bwd.cuda.raw(x[:1], x)


def _trial(op, inputs, expected):
    def call():
        with poisoned():
            return op(*inputs)

    return Trial(call, lambda y: bool(((y.double() - expected).abs() <= 2**-20).all()))


@counted
@pytest.mark.parametrize("widths", [(4096, 4095), pytest.param((16384, 16383), marks=full), (16392, 16385)])
def test_missing_synchronisation_is_caught(widths):
    forwards, backwards = [], []
    for width in widths:  # the two paths that a kernel has
        x, dy = torch.randn(2, 1, width), torch.randn(2, 1, width)
        y = torch.softmax(x, -1)
        wide = y.double()
        forwards.append(_trial(forward, (x,), torch.softmax(x.double(), -1)))
        dx = wide * (dy - (wide * dy).sum(-1, keepdim=True))
        backwards.append(_trial(ops.softmax_bwd.cuda.raw, (dy, y), dx))
    for trials, barriers in ((forwards, 2), (backwards, 1)):
        left, outcomes = mutations.survivors(BINARY, trials, SYNCHRONISATION)
        assert not left, "\n".join(map(str, left))
        assert len(outcomes) == 2 * barriers
        assert {outcome.check for outcome in outcomes} <= {"shared race", "warp race", "uninitialised shared memory"}

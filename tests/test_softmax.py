"""Masked softmax: the CPU kernel against float64."""

import functools
import math

import pytest
import torch
from budget import DTYPES, poisoned
from properties import assert_within_budget_on_every_isa
from torch import Tensor
from torch.autograd import gradcheck

import fasttx.functional as F
from fasttx import reference
from fasttx.ops import softmax as ops

pytestmark = pytest.mark.usefixtures("needs_extension")

# Four long rows, because over one alone eager's error, some ulp as a rule, may happen to be a fraction of one.
SHAPES = ((3, 5, 77), (9, 1), (2, 3, 2, 2, 17), (4, 5000), (0, 4))


def _masked(input: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if mask is not None and mask.dtype == torch.bool:
        input = input.masked_fill(~mask, -math.inf)
    elif mask is not None:
        input = input + mask.to(input.dtype)
    if is_causal:
        keep = torch.ones(input.shape[-2:], dtype=torch.bool).tril()
        input = input.masked_fill(~keep, -math.inf)
    return input


def _assert_within_budget(
    input: Tensor,
    dtype: torch.dtype,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dim: int = -1,
) -> None:
    """Where no row is fully masked: there PyTorch has NaN."""
    options = {"mask": mask, "is_causal": is_causal}
    assert_within_budget_on_every_isa(
        lambda input: F.softmax(input, dim=dim, **options, backend="cpu"),
        eager=lambda input: torch.softmax(_masked(input, **options), dim),
        reference=lambda input: reference.softmax(input, dim=dim, **options),
        inputs={"input": input},
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_within_budget(dtype, shape):
    _assert_within_budget(4 * torch.randn(shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (0, -2))
def test_any_dim(dtype, dim):
    mask = torch.rand(5, 1, 7) > 0.3
    mask.transpose(dim, -1)[..., 0] = True
    _assert_within_budget(torch.randn(5, 6, 7), dtype, dim=dim)
    _assert_within_budget(torch.randn(5, 6, 7), dtype, mask, dim=dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((2, 3, 45, 45), (9, 30), (40, 19), (6, 0)))
def test_causal_within_budget(dtype, shape):
    _assert_within_budget(2 * torch.randn(shape), dtype, is_causal=True)


MASK_SHAPES = ((2, 1, 1, 37), (2, 3, 5, 37), (5, 37), (3, 1, 37), (3, 5, 1), ())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masks_broadcast(dtype, shape):
    x = 2 * torch.randn(2, 3, 5, 37)
    boolean = torch.rand(shape) > 0.4
    boolean.view(-1, shape[-1] if shape else 1)[:, 0] = True
    _assert_within_budget(x, dtype, boolean)
    _assert_within_budget(x, dtype, boolean, is_causal=True)
    # The compute type differs from the storage type where that is a half.
    for mask_dtype in {dtype, torch.float32}:
        _assert_within_budget(x, dtype, torch.randn(shape).to(mask_dtype), is_causal=True)


@pytest.mark.parametrize("kind", ("bool", "float"))
def test_masks_of_any_stride(isa, kind):
    x = torch.randn(2, 3, 5, 37)
    values = torch.rand(37, 5, 3, 4) - 0.3
    values = values > 0 if kind == "bool" else values
    for mask in (
        values.permute(3, 2, 1, 0)[::2],  # the columns far apart
        values.permute(3, 2, 1, 0)[:2].expand(2, 3, 5, 37),
        values[0, 0].repeat(1, 37)[:, :74:2].expand(2, 5, 3, 37).transpose(1, 2),
        values[0, :, :1, :1].expand(5, 1, 37)[:, 0],  # one value for a whole row
    ):
        expected = F.softmax(x, mask=mask.contiguous(), backend="cpu")
        assert torch.equal(F.softmax(x, mask=mask, backend="cpu"), expected)
        truth = reference.softmax(x.double(), mask=mask if kind == "bool" else mask.double())
        torch.testing.assert_close(expected.double(), truth, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", ("bool", "float"))
def test_more_than_four_dims(isa, kind):
    x = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    for shape in ((2, 3, 2, 4, 5), (2, 1, 2, 1, 5), (3, 1, 4, 1), (2, 4, 5), (5,)):
        mask = torch.randn(shape)
        mask = mask > 0 if kind == "bool" else mask
        actual = F.softmax(x, mask=mask, is_causal=True, backend="cpu")
        truth = reference.softmax(x, mask=mask, is_causal=True)
        torch.testing.assert_close(actual, truth, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_rows_give_zeros_and_zero_gradients(isa, dtype):
    x = torch.randn(4, 35).to(dtype)
    x[3] = -math.inf
    keep = torch.ones(4, 35, dtype=torch.bool)
    keep[1] = False
    minus = torch.zeros(4, 35).masked_fill(~keep, -math.inf)
    for mask in (keep, minus.to(dtype), minus):
        leaf = x.clone().requires_grad_()
        with poisoned():
            y = F.softmax(leaf, mask=mask, backend="cpu")
            (slope,) = torch.autograd.grad((y * torch.randn(4, 35).to(dtype)).sum(), leaf)
        for result in (y, slope):
            assert not result[1::2].any() and result.isfinite().all()
            assert result[::2].any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_stay_in_their_row(isa, dtype):
    x = torch.randn(6, 35).to(dtype)
    x[1, 33] = math.nan
    x[2, 4] = math.inf
    x[3, :30] = -math.inf
    x[4], x[4, 34] = -math.inf, math.nan
    y = F.softmax(x, backend="cpu")
    assert y[[1, 2, 4]].isnan().all()
    expected = reference.softmax(x[[0, 3, 5]].double()).to(dtype)
    torch.testing.assert_close(y[[0, 3, 5]], expected, rtol=2**-7, atol=1e-6)
    assert not y[3, :30].any()


def test_what_is_masked_out_may_be_anything(isa):
    x = torch.randn(3, 40)
    keep = torch.rand(3, 40) > 0.5
    expected = F.softmax(x, mask=keep, backend="cpu")
    for garbage in (math.nan, math.inf, -math.inf, 3e38):
        dirty = x.masked_fill(~keep, garbage)
        assert torch.equal(F.softmax(dirty, mask=keep, backend="cpu"), expected)
    causal = x.expand(2, 3, 40).clone()
    expected = F.softmax(causal, is_causal=True, backend="cpu")
    causal[:, 0, 1:] = causal[:, 1, 2:] = math.nan
    assert torch.equal(F.softmax(causal, is_causal=True, backend="cpu"), expected)


def test_large_scores_do_not_overflow(isa):
    x = torch.tensor([[1e30, 1e30, -1e30], [3e38, -3e38, 0], [-3e38, -3e38, -3e38]])
    expected = torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [1 / 3] * 3])
    torch.testing.assert_close(F.softmax(x, backend="cpu"), expected)


def test_padding_does_not_change_a_bit(isa):
    x = torch.randn(5, 300)
    for width in (1, 15, 16, 77, 128, 299):
        keep = torch.arange(300) < width
        alone = F.softmax(x[:, :width], backend="cpu")
        padded = F.softmax(x, mask=keep, backend="cpu")
        assert torch.equal(padded[:, :width], alone)
        assert not padded[:, width:].any()
    square = x[:, :5].contiguous()
    keep = torch.ones(5, 5, dtype=torch.bool).tril()
    causal = F.softmax(square, is_causal=True, backend="cpu")
    assert torch.equal(causal, F.softmax(square, mask=keep, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads(isa, dtype, threads):
    x, slope = torch.randn(2, 3, 4, 97, 201).to(dtype)
    mask = torch.rand(3, 1, 1, 201) > 0.2
    bias = torch.randn(4, 97, 201).to(dtype)
    expected = None
    for count in (1, 2, 3, 8):
        with threads(count):
            y = ops.softmax_fwd(x, None, False)
            results = (
                y,
                ops.softmax_fwd(x, mask, True),
                ops.softmax_fwd(x, bias, False),
                ops.softmax_bwd(slope, y),
            )
        expected = expected or results
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_strided_inputs(isa):
    for view in (
        torch.randn(33, 20).t(),
        torch.randn(20, 66)[:, ::2],
        torch.randn(20, 1).expand(20, 33),
        torch.randn(33).expand(20, 33),
    ):
        slope = torch.randn(33, 20).t()
        results = []
        for x in (view, view.contiguous()):
            x = x.detach().requires_grad_()
            y = F.softmax(x, backend="cpu")
            results.append((y, *torch.autograd.grad(y, x, slope)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_gradcheck():
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(4, 5) > 0.4
    keep[1] = False
    bias = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    for options in (
        {},
        {"dim": 0},
        {"is_causal": True},
        {"mask": keep},
        {"mask": bias.detach(), "is_causal": True},
    ):
        assert gradcheck(lambda x, o=options: F.softmax(x, **o, backend="cpu"), x)
    both = functools.partial(F.softmax, backend="cpu")
    assert gradcheck(lambda x, bias: both(x, mask=bias, is_causal=True), (x, bias))
    assert gradcheck(lambda bias: both(x.detach(), mask=bias, dim=1), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"), (((2, 3, 5, 33), -1), ((3, 1, 33), -1), ((33,), -1), ((3, 1, 33), 1), ((3, 5, 1), 1))
)
def test_gradient_of_the_mask_within_budget(dtype, shape, dim):
    """Along `dim` the mask varies: one that does not has a gradient of zero, which has no ulp to measure by."""
    assert_within_budget_on_every_isa(
        lambda input, mask: F.softmax(input, mask=mask, dim=dim, backend="cpu"),
        eager=lambda input, mask: torch.softmax(input + mask, dim),
        reference=lambda input, mask: reference.softmax(input, mask=mask, dim=dim),
        inputs={"input": torch.randn(2, 3, 5, 33), "mask": torch.randn(shape)},
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_float32_mask(dtype):
    x, slope = torch.randn(2, 3, 5, 33).to(dtype), torch.randn(3, 5, 33).to(dtype)
    bias = torch.randn(3, 1, 33, requires_grad=True)
    y = F.softmax(x, mask=bias, backend="cpu")
    (actual,) = torch.autograd.grad(y, bias, slope.expand_as(x))
    wide = bias.double()
    expected = torch.autograd.grad(reference.softmax(x.double(), mask=wide), bias, slope.double().expand_as(x))[0]
    assert actual.dtype == torch.float32 and actual.shape == bias.shape
    tolerance = 20 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    x = torch.randn(4, 9, 5).to(dtype).transpose(0, 1).requires_grad_()
    keep, bias = torch.rand(4, 5) > 0.3, torch.randn(4, 1).requires_grad_()
    for mask, is_causal in ((None, False), (None, True), (keep, True), (bias, False)):
        torch.library.opcheck(ops.softmax_fwd.registered, (x, mask, is_causal))
    torch.library.opcheck(ops.softmax_bwd.registered, (torch.randn_like(x), torch.rand_like(x).detach()))


def test_compiled_equals_eager():
    keep, bias = torch.rand(6, 40) > 0.3, torch.randn(2, 1, 1)

    def run(x: Tensor) -> Tensor:
        y = F.softmax(x, mask=keep, is_causal=True, backend="cpu")
        return F.softmax(y, mask=bias, dim=0, backend="cpu")

    x = torch.randn(2, 6, 40, requires_grad=True)
    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_second_derivative_is_refused():
    x = torch.randn(3, requires_grad=True)
    y = F.softmax(x, backend="cpu")
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        slope.sum().backward()


def test_bad_arguments():
    x = torch.randn(3, 5)
    with pytest.raises(TypeError, match="input"):
        F.softmax(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask"):
        F.softmax(x, mask=torch.ones(3, 5, dtype=torch.int64))
    for mask in (torch.ones(4, 5) > 0, torch.ones(3, 4), torch.ones(1, 3, 5) > 0):
        with pytest.raises(ValueError, match="mask"):
            F.softmax(x, mask=mask)
    for arguments in ({"dim": 2}, {"is_causal": True, "dim": 0}):
        with pytest.raises(ValueError, match="dim"):
            F.softmax(x, **arguments)
    with pytest.raises(ValueError, match="is_causal"):
        F.softmax(x[0], is_causal=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (lambda x: (x.int(), None, False), "input must be float32"),
        (lambda x: (x, x.double(), False), "mask must be bool"),
        (lambda x: (x, x.int(), False), "mask must be bool"),
        (lambda x: (x, x[:, :4], False), "does not broadcast"),
        (lambda x: (x, x[:2], False), "does not broadcast"),
        (lambda x: (x[None], x[None, None], False), "more dimensions"),
        (lambda x: (x.expand(2, 3, 2, 3, 5), x.expand(3, 2, 3, 5), False), "does not broadcast"),
        (lambda x: (x[0], None, True), "too few dimensions"),
        (lambda x: (x.sum(), None, False), "too few dimensions"),
    ),
)
def test_the_op_itself_refuses_what_would_read_astray(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.softmax_fwd(*arguments(torch.randn(3, 5)))


def test_the_gradient_must_have_the_outputs_shape():
    y = torch.rand(3, 5)
    with pytest.raises(RuntimeError, match="grad has the wrong shape"):
        ops.softmax_bwd(y[:2], y)
    with pytest.raises(RuntimeError, match="grad differs in dtype"):
        ops.softmax_bwd(y.double(), y)

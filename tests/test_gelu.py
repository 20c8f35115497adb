"""GELU and bias + GELU: the CPU kernels against float64."""

import math

import pytest
import torch
from budget import DTYPES, assert_within_budget, poisoned
from properties import assert_within_budget_on_every_isa
from torch import Tensor
from torch.autograd import gradcheck

import fasttx.functional as F
from fasttx import reference
from fasttx.ops import gelu as ops

pytestmark = pytest.mark.usefixtures("needs_extension")

GELU = {"none": 2, "tanh": 3}
APPROXIMATIONS = tuple(GELU)
# Vectors with a rest, more than one chunk of 4096, and nothing at all. A few values alone may meet luck in eager's
# error: that they equal what they are among others is tested by itself.
SHAPES = ((3, 5, 77), (9001,), (0, 7))


def _draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values of deviation 3. Those for float64 end at 4: beyond, the tanh reference's own
    gradient, by 1 - sigmoid, is off by more than the kernel may be."""
    x = 3 * torch.randn(shape)
    return x.clamp(-4, 4) if dtype == torch.float64 else x


def _on_cpu(op, **options):
    return lambda **inputs: op(**inputs, **options, backend="cpu")


def _eager(approximate: str):
    def run(input: Tensor, bias: Tensor | None = None) -> Tensor:
        total = input if bias is None else input + bias
        return torch.nn.functional.gelu(total, approximate=approximate)

    return run


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_within_budget(dtype, approximate, shape):
    assert_within_budget_on_every_isa(
        _on_cpu(F.gelu, approximate=approximate),
        eager=_eager(approximate),
        reference=lambda input: reference.gelu(input, approximate),
        inputs={"input": _draw(shape, dtype)},
        dtype=dtype,
    )


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((7, 13, 50), (130, 33), (3, 0)))
def test_bias_gelu_within_budget(dtype, approximate, shape):
    assert_within_budget_on_every_isa(
        _on_cpu(F.bias_gelu, approximate=approximate),
        eager=_eager(approximate),
        reference=lambda input, bias: reference.bias_gelu(input, bias, approximate),
        inputs={"input": _draw(shape, dtype) / 2, "bias": _draw(shape[-1:], dtype) / 2},
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize(
    ("low", "high"), ((-1e-30, 1e-30), (-1e-4, 1e-4), (-0.1, 0.1), (-1, 1), (-5, -2), (-7, -5), (-30, -7), (2, 30))
)
def test_every_range_within_its_own_budget(isa, dtype, approximate, low, high):
    """What is large elsewhere does not excuse an error here."""
    x = torch.linspace(low, high, 5001).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    results = [
        (y.detach(), *torch.autograd.grad(y.sum(), given))
        for y, given in (
            (F.gelu(x, approximate, backend="cpu"), x),
            (torch.nn.functional.gelu(x, approximate=approximate), x),
            (reference.gelu(wide, approximate), wide),
        )
    ]
    for actual, eager, truth in zip(*results, strict=True):
        assert_within_budget(actual=actual, eager=eager, truth=truth)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_strided_and_broadcast_inputs(isa, approximate):
    views = (
        torch.randn(33, 20).t(),
        torch.randn(20, 66)[:, ::2],
        torch.randn(20, 1).expand(20, 33),
        torch.randn(2, 33, 10).permute(0, 2, 1).reshape(20, 33)[3:],
    )
    bias = torch.randn(66)[::2]
    for view in views:
        slope = torch.randn(33, view.shape[0]).t()
        expected = None
        for x in (view, view.contiguous()):
            x, b = x.detach().requires_grad_(), bias.detach().requires_grad_()
            y = F.bias_gelu(x, b, approximate, backend="cpu")
            results = (y, *torch.autograd.grad(y, (x, b), slope))
            expected = expected or results
            assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_tails(isa, dtype, approximate):
    inf, nan = math.inf, math.nan
    x = torch.tensor([10, -10, 1e4, -1e4, inf, -inf, nan, 0.0, -0.0], dtype=dtype)
    x = x.repeat(3)  # past one vector, into the rest
    leaf = x.clone().requires_grad_()
    y = F.gelu(leaf, approximate, backend="cpu")
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    expected = torch.tensor([10, -0.0, 1e4, 0, inf, 0, nan, 0, 0], dtype=dtype).repeat(3)
    torch.testing.assert_close(y.detach(), expected, rtol=0, atol=1e-20, equal_nan=True)
    expected = torch.tensor([1, 0, 1, 0, 1, 0, nan, 0.5, 0.5], dtype=dtype).repeat(3)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-20, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_the_tail_meets_no_subnormals(isa, dtype, approximate):
    """Each would cost the processor some hundred cycles."""
    x = torch.linspace(-45, 45, 20001, dtype=dtype).requires_grad_()
    y = F.gelu(x, approximate, backend="cpu")
    (slope,) = torch.autograd.grad(y.sum(), x)
    for result in (y, slope):
        assert not ((result != 0) & (result.abs() < torch.finfo(dtype).tiny)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", (0, 1))
def test_the_plain_activations(isa, dtype, code):
    x = torch.randn(5, 41).to(dtype)
    bias, slope = torch.randn(41).to(dtype), torch.randn(5, 41).to(dtype)
    activate = torch.relu if code else torch.clone
    with poisoned():
        y = ops.gelu_fwd(x, bias, code)
        dx, dbias = ops.gelu_bwd(slope, x, bias, code, True)
    wide = x.to(torch.promote_types(dtype, torch.float32)) + bias
    assert torch.equal(y, activate(wide).to(dtype))
    assert torch.equal(dx, torch.where(wide > 0, slope, 0) if code else slope)
    torch.testing.assert_close(dbias, dx.sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads(isa, dtype, threads):
    x, slope = torch.randn(2, 211, 333).to(dtype)
    bias = torch.randn(333).to(dtype)
    expected = None
    for count in (1, 2, 3, 8):
        with threads(count):
            results = (
                ops.gelu_fwd(x, None, 2),
                ops.gelu_fwd(x, bias, 3),
                *ops.gelu_bwd(slope, x, None, 2, False),
                *ops.gelu_bwd(slope, x, bias, 3, True),
            )
        expected = expected or results
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_a_value_does_not_depend_on_its_place(isa):
    x = torch.randn(5000)
    whole = F.gelu(x, backend="cpu")
    for start in (1, 3, 17, 4095):
        assert torch.equal(F.gelu(x[start:], backend="cpu"), whole[start:])
    for size in (1, 2, 31):
        assert torch.equal(F.gelu(x[:size], backend="cpu"), whole[:size])
    assert torch.equal(F.gelu(x[0], backend="cpu"), whole[0])
    bias = torch.zeros(1)
    assert torch.equal(F.bias_gelu(x[:, None], bias, backend="cpu")[:, 0], whole)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gradcheck(approximate):
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: F.gelu(x, approximate, backend="cpu"), x)
    assert gradcheck(lambda x, b: F.bias_gelu(x, b, approximate, backend="cpu"), (x, bias))
    assert gradcheck(lambda b: F.bias_gelu(x.detach(), b, approximate, backend="cpu"), bias)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    x = torch.randn(4, 9, 5).to(dtype).transpose(0, 1).requires_grad_()
    bias = torch.randn(5).to(dtype).requires_grad_()
    for arguments in ((x, None, 2), (x, bias, 3), (x.detach(), bias.detach(), 2)):
        torch.library.opcheck(ops.gelu_fwd.registered, arguments)
    slope, x, bias = torch.randn_like(x), x.detach(), bias.detach()
    torch.library.opcheck(ops.gelu_bwd.registered, (slope, x, bias, 2, True))
    torch.library.opcheck(ops.gelu_bwd.registered, (slope, x, None, 3, False))


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_compiled_equals_eager(approximate):
    def run(x: Tensor, bias: Tensor) -> Tensor:
        y = F.bias_gelu(x, bias, approximate, backend="cpu")
        return F.gelu(y, approximate, backend="cpu")

    x, bias = torch.randn(6, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        y = function(x, bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, bias))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_second_derivative_is_refused():
    x = torch.randn(3, requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(x, backend="cpu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        slope.sum().backward()


def test_bad_arguments():
    x = torch.randn(3, 5)
    with pytest.raises(ValueError, match="approximate"):
        F.gelu(x, "erf")
    with pytest.raises(TypeError, match="input"):
        F.gelu(torch.ones(3, dtype=torch.int64))
    for bias in (torch.randn(4), torch.randn(1), torch.randn(3, 5)):
        with pytest.raises(ValueError, match="bias"):
            F.bias_gelu(x, bias)
    with pytest.raises(ValueError, match="input"):
        F.bias_gelu(torch.tensor(1.0), torch.randn(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (lambda x: (x.int(), None, 2), "input must be float32"),
        (lambda x: (x, x[0, :4], 2), "bias has the wrong shape"),
        (lambda x: (x, x, 2), "bias has the wrong shape"),
        (lambda x: (x, x[0].double(), 2), "bias differs in dtype"),
        (lambda x: (x, None, 4), "unknown activation"),
        (lambda x: (x, None, -1), "unknown activation"),
        (lambda x: (x.sum(), x[0], 2), "at least one dimension"),
    ),
)
def test_the_op_itself_refuses_what_would_read_astray(arguments, message):
    x = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match=message):
        ops.gelu_fwd(*arguments(x))
    with pytest.raises(RuntimeError, match=message):
        ops.gelu_bwd(x, *arguments(x), False)


def test_the_gradient_must_have_the_inputs_shape():
    x = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="grad has the wrong shape"):
        ops.gelu_bwd(x[:2], x, None, 2, False)
    with pytest.raises(RuntimeError, match="grad differs in dtype"):
        ops.gelu_bwd(x.double(), x, None, 2, False)

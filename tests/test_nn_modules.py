"""FeedForward, SinusoidalPositionalEncoding and MaskedSoftmax."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from budget import DTYPES
from pair_checks import assert_budget, assert_equal, casting, ops_of
from torch.nn import functional as F

import fasttx
from fasttx.nn import FeedForward, MaskedSoftmax, SinusoidalPositionalEncoding

B, T, E, WIDE = 3, 6, 16, 24


class EagerFeedForward(torch.nn.Module):
    """The formula by torch.nn."""

    def __init__(self, activation, d_out=E, bias=True):
        super().__init__()
        self.linear1, self.linear2 = torch.nn.Linear(E, WIDE, bias), torch.nn.Linear(WIDE, d_out, bias)
        self.activation = activation

    def forward(self, input):
        return self.linear2(self.activation(self.linear1(input)))


ACTIVATIONS = [
    ("gelu", F.gelu),
    ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    ("relu", F.relu),
    (F.gelu, F.gelu),
    (torch.nn.GELU("tanh"), torch.nn.GELU("tanh")),
    (F.silu, F.silu),
    (lambda x: x * x, lambda x: x * x),
]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"d_out": 9}], ids=str)
@pytest.mark.parametrize(("activation", "function"), ACTIVATIONS)
def test_feed_forward_is_its_formula(activation, function, options):
    ours, theirs = FeedForward(E, WIDE, activation=activation, **options), EagerFeedForward(function, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for sizes in ((E,), (7, E), (2, 3, E), (0, E)):
        assert_equal(ours, theirs, {"input": torch.randn(sizes)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu"])
def test_feed_forward_within_budget(name, dtype):
    ours, theirs = FeedForward(E, WIDE, activation=name), EagerFeedForward(dict(ACTIVATIONS)[name])
    assert_budget(ours, theirs, {"input": torch.randn(40, E)}, dtype)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu"])
def test_feed_forward_is_one_op(name):
    module, x = FeedForward(E, WIDE, activation=name, dropout=0.5), torch.randn(2, E)
    assert ops_of(lambda: module(x)) == ops_of(lambda: module.eval()(x)) == ["feed_forward"]
    assert all(reason is None for _, reason in module.parts())


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


class Lora(torch.nn.Module):
    """What peft puts in a linear layer's place."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.in_features = base, base.weight, base.in_features

    def forward(self, x):
        return self.base(x) + 1


def hooked(module):
    module.register_forward_hook(lambda m, args, output: output + 1)


CHANGES = {
    "replaced": lambda m: setattr(m, "linear1", Lora(m.linear1)),
    "hooked": lambda m: hooked(m.linear2),
    "hooked activation": lambda m: hooked(m.activation),
    "hooked dropout": lambda m: hooked(m.dropout),
    "pruned": lambda m: prune.random_unstructured(m.linear1, "weight", 0.5),
    "parametrized": lambda m: parametrize.register_parametrization(m.linear2, "weight", Doubled()),
    "patched": lambda m: setattr(m.linear1, "forward", lambda x: F.linear(x, m.linear1.weight) - 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("training", [False, True])
def test_feed_forward_honours_changed_children(change, training):
    module, x = FeedForward(E, WIDE).train(training), torch.randn(3, E)
    before = module(x)
    change(module)
    expected = module.linear2(module.dropout(module.activation(module.linear1(x))))
    torch.testing.assert_close(module(x), expected)
    assert not torch.allclose(module(x), before)
    assert "feed_forward" not in ops_of(lambda: module(x))
    assert any(reason is not None for _, reason in module.parts())


def test_feed_forward_dropout():
    module, x = FeedForward(E, WIDE, activation="relu", dropout=0.25), torch.randn(3, E)

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return module(x)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    mean = torch.stack([run(seed) for seed in range(400)]).mean(0)
    torch.testing.assert_close(mean, module.eval()(x), atol=0.05, rtol=0.0)
    module.train().dropout.p = 1.0
    torch.testing.assert_close(module(x), module.linear2.bias.expand(3, E))


def test_feed_forward_tied_and_called_with_other_weights():
    first, second, x = FeedForward(E, WIDE), FeedForward(E, WIDE), torch.randn(3, E)
    second.linear1, second.linear2.weight = first.linear1, first.linear2.weight
    second(x).sum().backward()
    assert first.linear1.weight.grad is not None and first.linear2.weight.grad is not None
    with torch.no_grad():
        for _ in range(2):
            first.linear1.weight.mul_(1.5)
            expected = second.linear2(F.gelu(second.linear1(x)))
            torch.testing.assert_close(second(x), expected)
        zeros = {name: torch.zeros_like(value) for name, value in first.named_parameters()}
        assert not torch.func.functional_call(first, zeros, (x,)).any()


def test_feed_forward_of_nested_tensors():
    module = FeedForward(E, WIDE).eval()
    parts = [torch.randn(2, E), torch.randn(5, E)]
    for layout in (torch.jagged, torch.strided):
        with torch.no_grad():
            outputs = module(torch.nested.nested_tensor(parts, layout=layout)).unbind()
            for part, output in zip(parts, outputs, strict=True):
                torch.testing.assert_close(output, module(part))


def encoding(position, column, width):
    """Vaswani et al. 2017, section 3.5, one number."""
    angle = position / 10000 ** (column // 2 * 2 / width)
    return math.cos(angle) if column % 2 else math.sin(angle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8])
def test_positional_encoding_is_its_formula(width, dtype):
    module, x = SinusoidalPositionalEncoding(width, max_length=4), torch.randn(2, 4, width, dtype=dtype)
    for length, offset in ((4, 0), (3, 1), (4, 3), (1, 40)):  # the last two are beyond the table
        positions = range(offset, offset + length)
        rows = [[encoding(p, c, width) for c in range(width)] for p in positions]
        expected = x[:, :length] + torch.tensor(rows, dtype=torch.float64).to(dtype)
        actual = module(x[:, :length], offset)
        assert actual.dtype == dtype
        # In float64 the two formulas may differ in the last bit; in others that bit is rounded away.
        torch.testing.assert_close(actual, expected, rtol=1e-14 if dtype == torch.float64 else 0.0, atol=1e-14)
    assert len(module.encoding) >= 41


def test_positional_encoding_layouts():
    first, last = (SinusoidalPositionalEncoding(E, batch_first=flag) for flag in (True, False))
    x = torch.randn(B, T, E, requires_grad=True)
    expected = first(x, 2)
    assert torch.equal(last(x.transpose(0, 1), 2), expected.transpose(0, 1))
    assert torch.equal(first(x[1], 2), expected[1]) and torch.equal(last(x[1], 2), expected[1])
    assert first(x[:, :0]).shape == (B, 0, E)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    whole = first(x)
    steps = torch.cat([first(x[:, t : t + 1], t) for t in range(T)], 1)
    assert torch.equal(steps, whole)


def test_positional_encoding_is_as_exact_after_any_conversion():
    x = torch.zeros(2000, 6)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        expected = SinusoidalPositionalEncoding(6)(x.to(dtype))
        module = SinusoidalPositionalEncoding(6).bfloat16().to(dtype)
        assert module.encoding.dtype == dtype and torch.equal(module(x.to(dtype)), expected)
    with torch.device("meta"):
        module = SinusoidalPositionalEncoding(6)
    assert module.encoding.is_meta
    assert torch.equal(module.to_empty(device="cpu")(x), SinusoidalPositionalEncoding(6)(x))


def test_positional_encoding_keeps_no_state():
    module = SinusoidalPositionalEncoding(E, dropout=0.5, max_length=4)
    assert not module.state_dict() and not list(module.parameters())
    x = torch.randn(B, T, E)
    with torch.inference_mode():
        module(x)  # grows
    x.requires_grad_()
    module(x).sum().backward()
    module.load_state_dict({})
    torch.manual_seed(1)
    dropped = module(x)
    kept = dropped != 0
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped[kept], 2 * module.eval()(x)[kept])


class EagerSoftmax(torch.nn.Module):
    def __init__(self, dim=-1, is_causal=False):
        super().__init__()
        self.dim, self.is_causal = dim, is_causal

    def forward(self, input, mask=None):
        if mask is not None:
            input = input.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else input + mask
        if self.is_causal:
            input = input.masked_fill(torch.ones_like(input, dtype=torch.bool).triu(1), -torch.inf)
        return input.softmax(self.dim)


@pytest.mark.parametrize("options", [{}, {"dim": 0}, {"dim": 1}, {"is_causal": True}], ids=str)
def test_masked_softmax_is_its_formula(options):
    ours, theirs = MaskedSoftmax(**options), EagerSoftmax(**options)
    keep = torch.rand(B, T, T) < 0.6
    keep[:, :, 0] = keep[0] = keep[:, 0] = True
    for mask in (None, keep, torch.randn(B, T, T), torch.randn(1, T)):
        assert_equal(ours, theirs, {"input": torch.randn(B, T, T)}, casting(mask=mask))
    bias = {"input": torch.randn(B, T, T), "mask": torch.randn(1, T, T)}
    assert_equal(ours, theirs, bias)  # with the mask's gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_softmax_within_budget(dtype):
    keep = torch.rand(B, T, T) < 0.6
    keep[:, :, 0] = True
    assert_budget(MaskedSoftmax(), EagerSoftmax(), {"input": torch.randn(B, T, T)}, dtype, casting(mask=keep))


def test_masked_softmax_keeps_nothing():
    x = torch.randn(2, 3, requires_grad=True)
    output = MaskedSoftmax()(x, torch.tensor([[False] * 3, [True] * 3]))
    assert not output[0].any()
    output[:, 0].sum().backward()
    assert not x.grad[0].any() and x.grad[1].any()


SMALL = {
    "FeedForward": lambda: FeedForward(E, WIDE, activation="gelu_tanh"),
    "FeedForward of a function": lambda: FeedForward(E, WIDE, activation=F.silu, d_out=4),
    "SinusoidalPositionalEncoding": lambda: SinusoidalPositionalEncoding(E, max_length=64),
    "MaskedSoftmax": lambda: MaskedSoftmax(is_causal=True),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_copies_hooks_and_dtypes(make):
    module, x = make(), torch.randn(B, T, E)
    expected = module(x)
    other = make()
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert type(twin) is type(module) and repr(twin) == repr(module)
        assert torch.equal(twin(x), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert copy.deepcopy(module).to(dtype)(x.to(dtype)).dtype == dtype
    assert copy.deepcopy(module).to("meta")(x.to("meta")).shape == expected.shape
    assert fasttx.optimize(module) is fasttx.restore(module) is module and torch.equal(module(x), expected)
    hooked(module)
    torch.testing.assert_close(module(x), expected + 1)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_compiles_and_exports(make):
    module = make()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    length = torch.export.Dim("length", min=2, max=60)
    exported = torch.export.export(module, (torch.randn(B, T, E),), dynamic_shapes=({1: length},)).module()
    for tokens in (T, T + 7):
        x = torch.randn(B, tokens, E, requires_grad=True)
        expected = module(x)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        actual = compiled(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), x)[0], wanted)
        torch.testing.assert_close(exported(x), expected)


def test_positional_encoding_compiles_beyond_its_table():
    module = SinusoidalPositionalEncoding(E, max_length=4)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for x, offset in ((torch.randn(B, 9, E), 0), (torch.randn(B, 3, E), 5), (torch.randn(B, 3, E).double(), 1)):
        actual = compiled(x, offset)
        assert len(module.encoding) == 4
        torch.testing.assert_close(actual, copy.deepcopy(module)(x, offset))


X = torch.zeros(2, 3, E)
BAD = [
    (lambda: FeedForward(0, 4), ValueError, "d_model must be at least 1, got 0"),
    (lambda: FeedForward(4, 2.0), TypeError, "dim_feedforward must be an integer, got float"),
    (lambda: FeedForward(4, 4, d_out=True), TypeError, "d_out must be an integer, got bool"),
    (lambda: FeedForward(4, 4, activation="swish"), ValueError, "activation must be one of gelu, .*, got 'swish'"),
    (lambda: FeedForward(4, 4, activation=3), TypeError, "activation must be a name or callable, got int"),
    (lambda: FeedForward(4, 4, dropout=1.5), ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
    (lambda: FeedForward(4, 4)(X), ValueError, "weight1 must have the shape .* as input is 16 wide; got"),
    (lambda: FeedForward(E, 4)(X.long()), TypeError, "input must be a floating-point tensor, got torch.int64"),
    (lambda: SinusoidalPositionalEncoding(0), ValueError, "d_model must be at least 1, got 0"),
    (lambda: SinusoidalPositionalEncoding(E, max_length=0), ValueError, "max_length must be at least 1, got 0"),
    (lambda: SinusoidalPositionalEncoding(4)(X), ValueError, "x must have the shape .B, T, 4. or .T, 4., got"),
    (lambda: SinusoidalPositionalEncoding(E, batch_first=False)(X[0, 0]), ValueError, "x must have the shape .T, B"),
    (lambda: SinusoidalPositionalEncoding(E)(X.long()), TypeError, "x must be a floating-point tensor, got"),
    (lambda: SinusoidalPositionalEncoding(E)(X, -1), ValueError, "offset must not be negative, got -1"),
    (lambda: SinusoidalPositionalEncoding(E)(X, 1.0), TypeError, "offset must be an integer, got float"),
    (
        lambda: SinusoidalPositionalEncoding(E)(torch.nested.nested_tensor([X[0]], layout=torch.jagged)),
        ValueError, "x must not be nested",
    ),
    (lambda: MaskedSoftmax(3)(X), ValueError, r"dim must be in \[-3, 2\], got 3"),
    (lambda: MaskedSoftmax()(X, X.long()), TypeError, "mask must be .*, got torch.int64"),
    (lambda: MaskedSoftmax()(X, X[..., :2]), ValueError, "mask of shape .* does not broadcast"),
    (lambda: MaskedSoftmax(0, is_causal=True)(X), ValueError, "is_causal needs an input of two or more dimensions"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()

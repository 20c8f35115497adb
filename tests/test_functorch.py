"""torch.func over every function and module: grad, vmap, their compositions, and what there is no derivative of."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fasttx
from fasttx import functional, reference

pytestmark = [
    pytest.mark.usefixtures("needs_extension"),
    pytest.mark.filterwarnings("error:.*batching rule for fasttx"),
]
SAMPLES, T, W, S = 3, 5, 8, 6
HEADS, ONE = (2, 2, T, 4), (1, 2, T, 4)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def seen(scores):
    return torch.ones(scores, dtype=torch.bool).tril()


TARGET, TOKENS = torch.tensor([0, 5, -100, 2, 2]), torch.tensor([3, 0, 3, 1, 5])

# By name: the call on a module of functions, the shapes of its inputs, and how many of them have samples.
CASES = {
    "layer_norm": (lambda f, x, w, b: f.layer_norm(x, (W,), w, b), [(T, W), (W,), (W,)], 1),
    "layer_norm of two dims": (lambda f, x, w: f.layer_norm(x, (T, W), w), [(T, W), (T, W)], 1),
    "add_layer_norm": (lambda f, x, y, w, b: f.add_layer_norm(x, y, (W,), w, b), [(T, W), (T, W), (W,), (W,)], 2),
    "its sum": (lambda f, x, y, w: f.add_layer_norm(x, y, (W,), w, return_sum=True), [(T, W), (T, W), (W,)], 2),
    "gelu": (lambda f, x: f.gelu(x), [(T, W)], 1),
    "gelu of scalars": (lambda f, x: f.gelu(x, "tanh"), [()], 1),
    "bias_gelu": (lambda f, x, b: f.bias_gelu(x, b), [(T, W), (W,)], 1),
    "softmax": (lambda f, x: f.softmax(x), [(T, W)], 1),
    "softmax of a mask": (lambda f, x, m: f.softmax(x, mask=m), [(T, W), (W,)], 1),
    "causal softmax": (lambda f, x: f.softmax(x, is_causal=True), [(T, W)], 1),
    "softmax of samples' masks": (lambda f, x, m: f.softmax(x, mask=m), [(T, W), (T, W)], 2),
    "linear": (lambda f, x, w, b: f.linear(x, w, b), [(T, W), (S, W), (S,)], 1),
    "linear of samples' weights": (lambda f, x, w: f.linear(x, w), [(T, W), (S, W)], 2),
    "feed_forward": (
        lambda f, *args: f.feed_forward(*args), [(T, W), (S, W), (S,), (W, S), (W,)], 1,
    ),
    "linear_cross_entropy": (
        lambda f, x, w, b: f.linear_cross_entropy(x, w, TARGET, b, reduction="none", label_smoothing=0.1),
        [(T, W), (S, W), (S,)], 1,
    ),
    "linear_cross_entropy of samples' weights": (
        lambda f, x, w: f.linear_cross_entropy(x, w, TARGET), [(T, W), (S, W)], 2,
    ),
    "embedding of samples' weights": (
        lambda f, w, p, n: f.embedding(TOKENS, w, p, norm_weight=n), [(S, W), (T, W), (W,)], 1,
    ),
    "attention": (lambda f, *qkv: f.attention(*qkv, is_causal=True), [HEADS] * 3, 3),
    "attention of one key": (
        lambda f, *qkv: f.attention(*qkv, attn_mask=seen((T, T)), return_lse=True), [HEADS] * 3, 1,
    ),
    "attention with masks": (
        lambda f, *qkv: f.attention(
            *qkv, attn_mask=seen((T, T)), key_lengths=torch.tensor([T, 2]), window=(3, 1), enable_gqa=True,
            alibi_slopes=torch.tensor([0.5, 0.25]).double(), return_lse=True,
        ), [HEADS, (2, 1, T, 4), (2, 1, T, 3)], 3,
    ),
    "attention of samples' biases": (
        lambda f, *qkv: f.attention(*qkv[:3], attn_mask=qkv[3], is_causal=True), [*[HEADS] * 3, (2, 1, 1, T)], 4,
    ),
    "attention of samples of one sequence": (
        lambda f, q, bias, k, v: f.attention(q, k, v, attn_mask=bias), [ONE, (1, 1, T, T), ONE, ONE], 2,
    ),
    "attention of a bias for all": (
        lambda f, *qkv: f.attention(*qkv[:3], attn_mask=qkv[3]), [*[HEADS] * 3, (2, T, T)], 3,
    ),
    "attention of biases that a batch shares": (
        lambda f, *qkv: f.attention(*qkv[:3], attn_mask=qkv[3]), [*[HEADS] * 3, (2, T, 1)], 4,
    ),
}  # fmt: skip
REPEATED = ("attention of one key", "attention of biases that a batch shares")
TRANSFORMS = {
    "grad": lambda call, in_dims, every: torch.func.grad(total(call), argnums=every),
    "vmap": lambda call, in_dims, every: torch.func.vmap(call, in_dims=in_dims),
    "vmap of grad": lambda call, in_dims, every: torch.func.vmap(
        torch.func.grad(total(call), argnums=every), in_dims=in_dims
    ),
    "grad of vmap": lambda call, in_dims, every: torch.func.grad(
        total(torch.func.vmap(call, in_dims=in_dims)), argnums=every
    ),
    "jacrev": lambda call, in_dims, every: torch.func.jacrev(call, argnums=every),
    "vmap of vmap": lambda call, in_dims, every: torch.func.vmap(torch.func.vmap(call, in_dims=in_dims), in_dims),
    "vmap in inference": lambda call, in_dims, every: torch.no_grad()(torch.func.vmap(call, in_dims=in_dims)),
}
DEPTHS = {"grad": 0, "jacrev": 0, "vmap of vmap": 2}


def total(call):
    return lambda *args: sum(x.square().sum() for x in pytree.tree_leaves(call(*args)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_equal_those_of_the_reference(name, transform):
    call, shapes, batched = CASES[name]
    depth = DEPTHS.get(transform, 1)
    args = [draw(*[SAMPLES] * (depth if i < batched else 0), *shape) for i, shape in enumerate(shapes)]
    in_dims = tuple(0 if i < batched else None for i in range(len(shapes)))
    ours, theirs = (
        TRANSFORMS[transform](partial(call, functions), in_dims, tuple(range(len(shapes))))
        for functions in (functional, reference)
    )
    torch.testing.assert_close(ours(*args), theirs(*args), rtol=1e-9, atol=1e-9)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasttx":
            self.calls[func._opname] += 1
        return func(*args, **kwargs or {})


ONE_CALL = [
    name for name in CASES
    if name not in REPEATED and ("attention" in name or not ("mask" in name or "weights" in name))
]  # fmt: skip


@pytest.mark.parametrize("name", ONE_CALL)
@pytest.mark.parametrize("in_dim", [0, -1])
def test_samples_are_rows_of_one_call_with_the_bits_of_their_own(name, in_dim):
    call, shapes, batched = CASES[name]
    call = partial(call, functional)
    args = [draw(*shape, SAMPLES).movedim(-1, 0) if i < batched else draw(*shape) for i, shape in enumerate(shapes)]
    in_dims = tuple(in_dim if i < batched else None for i in range(len(args)))
    mapped = [x.movedim(0, in_dim) if i < batched else x for i, x in enumerate(args)]

    def slopes(*args):
        return torch.func.grad(total(call), argnums=tuple(range(batched)))(*args)

    for function in (call, slopes):
        with Count() as count:
            actual = torch.func.vmap(function, in_dims=in_dims)(*mapped)
        assert set(count.calls.values()) == {1}, count.calls
        each = [function(*(x[i] if k < batched else x for k, x in enumerate(args))) for i in range(SAMPLES)]
        expected = pytree.tree_map(lambda *samples: torch.stack(samples), *each)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_attention_that_drops_or_is_packed_goes_sample_by_sample():
    """Dropout's mask is that of a sample's own batch; a learned slope's gradient is a sum over one."""
    q, cu_seqlens = draw(SAMPLES, *HEADS), torch.tensor([0, 2, T])

    def dropped(q):
        return functional.attention(q, q, torch.eye(T).double().expand(2, 2, T, T), dropout_p=0.5) == 0

    masks = torch.func.vmap(dropped, randomness="same")(q)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0, 0], masks[0, 1])

    def packed(f, x):
        return f.attention_varlen(x, x, x, cu_seqlens, cu_seqlens)

    def by_slopes(f, q):
        return torch.func.grad(lambda slopes: f.attention(q, q, q, alibi_slopes=slopes).square().sum())(draw(2))

    for call, x in ((packed, draw(SAMPLES, T, 2, 4)), (by_slopes, q)):
        results = []
        for f in (functional, reference):
            torch.manual_seed(0)
            results.append(torch.func.vmap(partial(call, f), randomness="same")(x))
        torch.testing.assert_close(*results)


def test_the_overload_with_a_gradient_is_mapped_too():
    x, w = draw(SAMPLES, T, W), draw(W)
    op = torch.ops.fasttx.layer_norm_fwd
    mapped = torch.func.vmap(lambda x: op(x, W, w, None, 1e-5))(x)
    assert torch.equal(mapped, op(x, W, w, None, 1e-5))


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    ],
)
@pytest.mark.parametrize("f", [functional.gelu, functional.softmax, lambda x: functional.attention(x, x, x)])
def test_forward_mode_is_an_error_with_the_way_out(derivative, f):
    x = draw(*HEADS)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative.*reference"):
        derivative(f, x)
    with fasttx.backend("reference"):
        derivative(f, x)


def test_dual_tensors_lose_no_tangent_in_silence():
    x = draw(T, W)
    with forward_ad.dual_level():
        functional.gelu(x)
        with pytest.raises(NotImplementedError, match="gelu_fwd has no forward-mode derivative"):
            functional.gelu(forward_ad.make_dual(x, x))
        with torch.no_grad(), pytest.raises(NotImplementedError, match="linear_fwd"):
            functional.linear(x, forward_ad.make_dual(x, x))


def test_second_derivatives_are_an_error_with_the_way_out():
    def slope(x):
        return torch.func.grad(lambda x: functional.gelu(x).sum())(x).sum()

    x = draw(T)
    with pytest.raises(RuntimeError, match="gelu_bwd cannot be differentiated again.*reference"):
        torch.func.grad(slope)(x)
    with fasttx.backend("reference"):
        assert torch.func.grad(slope)(x).shape == x.shape


def dropped(x, randomness):
    w1, w2 = torch.eye(W, dtype=x.dtype), torch.eye(W, dtype=x.dtype)

    def call(x):
        return functional.feed_forward(x, w1, None, w2, None, activation="relu", dropout_p=0.5, training=True) == 0

    return torch.func.vmap(call, randomness=randomness)(x)


def test_dropout_follows_the_randomness_of_vmap():
    x = torch.ones(SAMPLES, T, W, dtype=torch.float64)
    same = dropped(x, "same")
    assert same.any() and torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    different = dropped(x, "different")
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness error mode"):
        dropped(x, "error")


MODULES = {
    "attention": lambda: torch.nn.MultiheadAttention(W, 2, batch_first=True),
    "post-norm layer": lambda: torch.nn.TransformerEncoderLayer(W, 2, 16, 0.0, batch_first=True),
    "pre-norm layer": lambda: torch.nn.TransformerEncoderLayer(
        W, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True
    ),
    "decoder layer": lambda: torch.nn.TransformerDecoderLayer(W, 2, 16, 0.0, batch_first=True),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore:.*batching rule for aten")
def test_gradients_of_each_sample_by_functional_call(name, train):
    theirs = MODULES[name]().double().train(train)
    ours = fasttx.optimize(copy.deepcopy(theirs))
    inputs = 3 if name == "attention" else 2 if name == "decoder layer" else 1
    parameters = dict(theirs.named_parameters())

    def loss(module, parameters, x):
        output = torch.func.functional_call(module, parameters, (x,) * inputs)
        return pytree.tree_leaves(output)[0].square().sum()

    x = draw(SAMPLES, 1, T, W)
    actual, expected = (
        torch.func.vmap(torch.func.grad(partial(loss, module)), in_dims=(None, 0))(parameters, x)
        for module in (ours, theirs)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", MODULES)
def test_samples_through_a_module_are_one_call_of_each_op(name):
    module = fasttx.optimize(MODULES[name]().double().eval())
    inputs = 3 if name == "attention" else 2 if name == "decoder layer" else 1

    def call(x):
        return pytree.tree_leaves(module(*(x,) * inputs))[0]

    x = draw(SAMPLES, 2, T, W)
    with torch.no_grad(), Count() as count:
        mapped = torch.func.vmap(call)(x)
    assert count.calls["attention_fwd"] == (2 if name == "decoder layer" else 1)
    assert sum(count.calls.values()) <= 10, count.calls
    with torch.no_grad():
        torch.testing.assert_close(mapped, torch.stack(list(map(call, x))))


def test_an_ensemble_of_weights():
    x, weights = draw(T, W), draw(SAMPLES, S, W)
    with torch.no_grad():
        mapped = torch.func.vmap(functional.linear, in_dims=(None, 0))(x, weights)
    torch.testing.assert_close(mapped, x @ weights.mT)


def test_samples_of_indices():
    """Each sample its tokens and targets: one call forward, where there is no mean."""
    tokens, targets = torch.randint(0, S, (SAMPLES, T)), torch.randint(0, S, (SAMPLES, T))
    weight, position, norm = draw(S, W), draw(T, W), draw(W)

    def losses(f, weight, tokens, targets, reduction="none"):
        x = f.embedding(tokens, weight, position, norm_weight=norm)
        return f.linear_cross_entropy(x, weight, targets, reduction=reduction)

    def mapped(f, function):
        return torch.func.vmap(function, in_dims=(None, 0, 0))(weight, tokens, targets)

    with torch.no_grad(), Count() as count:
        found = mapped(functional, partial(losses, functional))
    assert set(count.calls.values()) == {1}
    torch.testing.assert_close(found, losses(reference, weight, tokens, targets))
    slopes = [mapped(f, torch.func.grad(partial(losses, f, reduction="mean"))) for f in (functional, reference)]
    torch.testing.assert_close(*slopes)

"""torch.autocast: every function gives the dtypes that torch's own give, and its numbers, on the kernels."""

import copy
from functools import partial

import pytest
import torch
from budget import assert_within_budget
from module_checks import assert_gradients_within_budget, evaluate
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fasttx
from fasttx import autocast, functional, reference
from fasttx.dispatch import listeners
from fasttx.packing import packed_bytes

pytestmark = pytest.mark.usefixtures("needs_extension")
LOWER = (torch.bfloat16, torch.float16)
B, T, W, S, H = 2, 5, 16, 24, 2


def theirs_add_layer_norm(x, residual, w, b, return_sum=False):
    sum = residual + x
    normed = F.layer_norm(sum, (W,), w, b)
    return (normed, sum) if return_sum else normed


def theirs_feed_forward(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


QKV = [(B, H, T, 8)] * 3
FFN = [(B, T, W), (S, W), (S,), (W, S), (W,)]
# By name: the function of fasttx.functional or the reference, torch's, and the shapes of its arguments.
CASES = {
    "linear": (lambda f, *a: f.linear(*a), F.linear, [(B, T, W), (S, W), (S,)]),
    "feed_forward": (lambda f, *a: f.feed_forward(*a), theirs_feed_forward, FFN),
    "attention": (lambda f, *a: f.attention(*a), F.scaled_dot_product_attention, QKV),
    "attention of a mask": (
        lambda f, q, k, v, m: f.attention(q, k, v, attn_mask=m),
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), [*QKV, (T, T)],
    ),
    "layer_norm": (
        lambda f, x, w, b: f.layer_norm(x, (W,), w, b), lambda x, w, b: F.layer_norm(x, (W,), w, b),
        [(B, T, W), (W,), (W,)],
    ),
    "add_layer_norm": (
        lambda f, x, r, w, b: f.add_layer_norm(x, r, (W,), w, b), theirs_add_layer_norm,
        [(B, T, W), (B, T, W), (W,), (W,)],
    ),
    "add_layer_norm and sum": (
        lambda f, x, r, w, b: f.add_layer_norm(x, r, (W,), w, b, return_sum=True),
        partial(theirs_add_layer_norm, return_sum=True), [(B, T, W), (B, T, W), (W,), (W,)],
    ),
    "softmax": (lambda f, x: f.softmax(x), lambda x: F.softmax(x, -1), [(B, T, W)]),
    "gelu": (lambda f, x: f.gelu(x), F.gelu, [(B, T, W)]),
    "bias_gelu": (lambda f, x, b: f.bias_gelu(x, b), lambda x, b: F.gelu(x + b), [(B, T, W), (W,)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("given", [torch.float32, None, torch.float64])
def test_dtypes_and_numbers_are_those_of_torch(name, dtype, given):
    """Of inputs that are wide, of a first one that is autocast's already, and of float64, which nothing casts."""
    ours, theirs, shapes = CASES[name]
    wide = given or torch.float32
    inputs = [torch.randn(shape).to(wide) for shape in shapes]
    if given is None:
        inputs[0] = inputs[0].to(dtype)
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(3)]
    leaves[2] = [x.detach().double().requires_grad_() for x in leaves[2]]
    with torch.autocast("cpu", dtype=dtype):
        actual, expected = (
            pytree.tree_leaves(call(*x)) for call, x in ((partial(ours, functional), leaves[0]), (theirs, leaves[1]))
        )
    truth = pytree.tree_leaves(ours(reference, *leaves[2]))
    slopes = [torch.randn(x.shape, dtype=torch.float64) for x in truth]
    for outputs in (actual, expected, truth):
        sum((x.double() * slope).sum() for x, slope in zip(outputs, slopes, strict=True)).backward()
    for mine, yours, true in zip(actual, expected, truth, strict=True):
        assert mine.dtype == yours.dtype
        check(mine, yours, true, given)
    for mine, yours, true in zip(*leaves, strict=True):
        assert mine.grad.dtype == mine.dtype
        check(mine.grad, yours.grad, true.grad, given)


def check(mine, yours, true, given):
    if given is torch.float64:
        torch.testing.assert_close(mine, yours.to(mine.dtype))
    else:
        assert_within_budget(actual=mine, eager=yours, truth=true)


def test_calls_stay_on_the_kernels():
    decisions = []
    listeners.append(decisions.append)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for ours, _, shapes in CASES.values():
                ours(functional, *(torch.randn(shape) for shape in shapes))
    finally:
        listeners.remove(decisions.append)
    assert len(decisions) == len(CASES)
    assert {decision.backend for decision in decisions} == {"cpu"}


def test_named_backends_are_kept():
    x, w = torch.randn(T, W), torch.randn(S, W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("cpu", "reference"):
            assert functional.linear(x, w, backend=name).dtype == torch.bfloat16
    assert functional.linear(x, w).dtype == torch.float32


def test_attention_takes_mixed_dtypes_and_packed_sequences():
    q, k, v = (torch.randn(T, H, 8) for _ in range(3))
    offsets = torch.tensor([0, 2, T])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed, lse = functional.attention_varlen(q, k.half(), v, offsets, offsets, is_causal=True, return_lse=True)
        padded = functional.attention(q[None].mT, k[None].half().mT, v[None].mT)
    assert packed.dtype == padded.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = functional.attention_varlen(*(x.bfloat16() for x in (q, k.half(), v)), offsets, offsets, is_causal=True)
    assert torch.equal(packed, expected)


def test_weights_are_cast_and_packed_once_until_they_change():
    layer, x = torch.nn.Linear(W, S), torch.randn(T, W)

    def call():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.linear(x, layer.weight, layer.bias)

    first = call()
    kept, bytes = autocast._weights.get(layer.weight)[1], packed_bytes()
    assert torch.equal(call(), first)
    assert autocast._weights.get(layer.weight)[1] is kept and packed_bytes() == bytes
    with torch.no_grad():
        layer.weight.mul_(2.0)
        expected = functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    assert torch.equal(call(), expected)


def test_weights_kept_in_inference_serve_training():
    layer = torch.nn.Linear(W, S).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.inference_mode():
            functional.linear(torch.randn(T, W), layer.weight)
        x = torch.randn(T, W, requires_grad=True)
        functional.linear(x, layer.weight).sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.fixture
def without_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


# By name: how to make it, and how many times it takes x.
MODULES = {
    "attention": (lambda: torch.nn.MultiheadAttention(W, H, batch_first=True), 3),
    "attention, keys of its own": (lambda: torch.nn.MultiheadAttention(W, H, batch_first=True, add_bias_kv=True), 3),
    "post-norm layer": (lambda: torch.nn.TransformerEncoderLayer(W, H, S, 0.0, batch_first=True), 1),
    "pre-norm layer": (lambda: torch.nn.TransformerEncoderLayer(W, H, S, 0.0, batch_first=True, norm_first=True), 1),
    "decoder layer": (lambda: torch.nn.TransformerDecoderLayer(W, H, S, 0.0, batch_first=True), 2),
    "norm": (lambda: torch.nn.LayerNorm(W), 1),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("given", [None, torch.float32], ids=["autocast's", "float32"])
def test_modules_give_the_dtypes_and_numbers_of_torch(name, train, dtype, given, without_fast_path):
    """Of torch's own steps: its fast path for layers in inference casts the sums and norms too, unlike training.

    No call leaves the kernels.
    """
    make, times = MODULES[name]
    theirs = make().train(train)
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x = torch.randn(8, T, W).to(given or dtype)  # more rows: the error of a few is a matter of luck

    def run(module, x):
        with torch.autocast("cpu", dtype=dtype, enabled=x.dtype != torch.float64):
            return module(*(x,) * times)

    with fasttx.strict():
        actual = evaluate(run, ours, {"x": x}, train)
    eager = evaluate(run, theirs, {"x": x}, train)
    truth = evaluate(run, copy.deepcopy(theirs).double(), {"x": x.double()}, train)
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in eager.items()}
    outputs = [name for name in truth if name.startswith("output")]
    for name in outputs:
        assert_within_budget(actual=actual[name], eager=eager[name], truth=truth[name], name=name)
    if train:
        names = truth.keys() - outputs
        given = ({k: found[k].float() for k in names} for found in (actual, eager))
        assert_gradients_within_budget(*given, {k: truth[k] for k in names})


def test_packed_layers_stay_on_the_kernels():
    """With padding removed, and in a decoder, which reads a memory."""
    model = fasttx.optimize(torch.nn.Transformer(W, H, 1, 1, S, batch_first=True))
    x, padding = torch.randn(B, T, W), torch.zeros(B, T, dtype=torch.bool)
    padding[1, 2:] = True
    with torch.autocast("cpu", dtype=torch.bfloat16), fasttx.strict():
        masks = dict.fromkeys(("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"), padding)
        output = model(x, x, **masks)
    assert output.dtype == torch.float32 and not output[padding].any()


def test_explain_says_why_halves_of_layers_are_several_operations():
    model, x = fasttx.optimize(torch.nn.TransformerEncoderLayer(W, H, S, batch_first=True).eval()), torch.randn(B, T, W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explained = fasttx.explain(model, x)
    ops = {row.op: (row.backend, row.kernel, row.reason) for row in explained.rows}
    reason = "not one operation: autocast is on, whose casts come between its parts"
    assert ops["attention_block"] == ops["feed_forward_block"] == ("parts", "", reason)
    assert ops["self_attention"][0] == ops["add_layer_norm"][0] == ops["feed_forward"][0] == "cpu"
    assert not explained.slow
    assert {row.op for row in fasttx.explain(model, x).rows} == {"attention_block", "feed_forward_block"}


def test_weights_of_attention_alone():
    q, k = (torch.randn(B, H, T, 8) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16), fasttx.strict():
        weights = functional.attention_weights(q, k)
    assert torch.equal(weights, functional.attention_weights(q.bfloat16(), k.bfloat16()))


def test_a_device_without_autocast_is_left_alone():
    x = torch.empty(T, W, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.gelu(x).dtype == torch.float32


@pytest.mark.parametrize("wide, expected", [(True, torch.float32), (False, torch.bfloat16)])
def test_gpus_have_their_own_list(wide, expected, monkeypatch):
    """Where torch computes norms and softmax in float32; on tensors without data, as there may be no GPU here."""
    x = torch.empty(T, W, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: torch.no_grad())
    assert autocast.following(lambda x: x, (x,), wide_on_gpu=wide).dtype == expected
    double = x.double()
    assert autocast.following(lambda x: x, (double,), wide_on_gpu=wide).dtype == torch.float64


def test_compiled():
    def call(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.linear(functional.layer_norm(x, (W,)), w)

    x, w = torch.randn(T, W), torch.randn(S, W)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x, w), call(x, w)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)

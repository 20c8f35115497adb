"""The quick way of calls on plain tensors: what takes it, and that it is no other operation."""

import math

import pytest
import torch

import fasttx
from fasttx import dispatch, functional
from fasttx.ops._library import plain_call
from fasttx.ops.attention import plain_attention
from fasttx.ops.gelu import gelu_fwd
from fasttx.ops.layer_norm import plain_layer_norm

PLAIN = torch.ones(2, 3)


class Subclass(torch.Tensor):
    """A tensor that may override anything."""


PLAIN_OR_NOT = [
    ((PLAIN,), True),
    ((PLAIN, None, torch.nn.Parameter(PLAIN), PLAIN.t()), True),
    ((PLAIN.half(), PLAIN.half()), True),
    ((PLAIN.double(),), True),
    ((PLAIN, PLAIN.bfloat16()), False),
    ((PLAIN.long(),), False),
    ((PLAIN.to("meta"),), False),
    ((PLAIN, PLAIN.to("meta")), False),
    ((PLAIN.to_sparse(),), False),
    ((PLAIN.to_mkldnn(),), False),
    ((torch.nested.nested_tensor([torch.ones(2)]),), False),
    ((PLAIN.as_subclass(Subclass),), False),
    ((PLAIN, PLAIN.as_subclass(Subclass)), False),
    ((None,), False),
    (([1.0],), False),
    ((PLAIN, 1.0), False),
]


@pytest.mark.parametrize(("tensors", "plain"), PLAIN_OR_NOT)
def test_only_plain_cpu_tensors_pass_the_quick_check(needs_extension, tensors, plain):
    assert dispatch.runs_on_cpu(None, *tensors) is plain


@pytest.mark.parametrize(("tensors", "plain"), PLAIN_OR_NOT)
def test_only_plain_calls_go_straight_to_their_op(needs_extension, tensors, plain):
    first, *others = tensors
    second = others[0][0] if others and isinstance(others[0], torch.Tensor) else None if not others else others[0]
    assert (plain_call(gelu_fwd)(first, second, 2) is not None) is plain


@pytest.mark.parametrize(
    ("shape", "plain"),
    [(3, True), ((3,), True), ((2, 3), True), (torch.Size([3]), True), ([3], False), ((), False), ((1, 2, 3), False),
     (2, False), (3.0, False), (True, False), ((3.0,), False), (2**80, False), ((2**80, 3), False), (-3, False)],
)  # fmt: skip
def test_what_layer_norm_takes_for_a_shape_on_its_straight_way(needs_extension, shape, plain):
    output = plain_layer_norm(PLAIN, shape, None, None, 1e-5)
    assert (output is not None) is plain
    if plain:
        dims = (shape,) if isinstance(shape, int) else shape
        torch.testing.assert_close(output, torch.nn.functional.layer_norm(PLAIN, dims))


@pytest.mark.parametrize("weight, bias", [(2, None), (None, 2), (3, 2), ((1, 3), None), (None, (3, 1))])
def test_layer_norm_goes_straight_only_with_parameters_of_its_shape(needs_extension, weight, bias):
    weight, bias = (None if size is None else torch.ones(size) for size in (weight, bias))
    assert plain_layer_norm(PLAIN, 3, weight, bias, 1e-5) is None


Q, KV = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
ATTENTION = {
    "query": Q, "key": KV, "value": KV, "is_causal": False, "query_offset": 0, "scale": None, "with_lse": False
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "plain"),
    [({}, True), ({"is_causal": True, "query_offset": 2}, True), ({"scale": 0.5}, True), ({"with_lse": True}, True),
     ({"value": KV[..., :2]}, True), ({"key": KV[:, :, :0], "value": KV[:, :, :0]}, True), ({"query": Q[:0]}, False),
     ({"query": None}, False), ({"key": None}, False), ({"value": None}, False), ({"value": KV.double()}, False),
     ({"query": Q[0]}, False), ({"query": Q[..., :2]}, False), ({"key": KV[:, :, :5]}, False), ({"key": KV[0]}, False),
     ({"query": Q[:, :, :, :0], "key": KV[:, :, :, :0]}, False), ({"key": KV[:, :1], "value": KV[:, :1]}, False),
     ({"value": KV[:, :1]}, False), ({"value": KV[:1]}, False), ({"key": KV[:1]}, False), ({"is_causal": 1}, False),
     ({"query_offset": 1.0}, False), ({"query_offset": True}, False), ({"scale": 1}, False), ({"scale": "a"}, False),
     ({"scale": math.inf}, False), ({"scale": math.nan}, False), ({"with_lse": 1}, False), ({"with_lse": Q}, False)],
)  # fmt: skip
def test_only_fitting_attention_goes_straight_to_its_op(needs_extension, given, plain):
    assert (plain_attention(*(ATTENTION | given).values()) is not None) is plain


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "query_offset": 2}, {"scale": 0.5}])
def test_attention_by_its_straight_way_is_that_of_the_detailed_checks(needs_extension, options):
    """With its lse and gradients, bit for bit."""

    def results(backend):
        q, kv = Q.clone().requires_grad_(), KV.clone().requires_grad_()
        output, lse = functional.attention(q, kv, kv, **options, return_lse=True, backend=backend)
        (output.square().sum() + lse.clamp(min=-9).sum()).backward()
        return functional.attention(q, kv, kv, **options, backend=backend), output, lse, q.grad, kv.grad

    for straight, detailed in zip(results(None), results("cpu"), strict=True):
        assert torch.equal(straight, detailed)


W, B = torch.ones(4, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("layers", "fit"),
    [((), True), ((W, B), True), ((W, None), True), ((W.t().contiguous().t(), B), True), ((W, B, W.t(), None), True),
     ((W, B, W.t(), B[:3]), True), ((W,), False), ((None, B), False), ((W.t(), None), False), ((W, B[:3]), False),
     ((W, B[None]), False), ((W, W), False), ((W[0], None), False), ((W[None], None), False), ((W, B, W, B), False),
     ((W, B, W.t(), B), False), ((W.double(), B), False), ((W.tolist(), B), False)],
)  # fmt: skip
def test_only_layers_that_fit_pass_the_quick_check(needs_extension, layers, fit):
    assert dispatch.layers_run_on_cpu(None, PLAIN, *layers) is fit
    assert dispatch.layers_run_on_cpu("cpu", PLAIN, *layers) is False
    assert dispatch.layers_run_on_cpu(None, torch.tensor(1.0), *layers) is False


def test_the_straight_way_has_gradients_where_they_are_wanted(needs_extension):
    leaf, bias = PLAIN.clone().requires_grad_(), torch.ones(3, requires_grad=True)
    assert plain_layer_norm(leaf, 3, None, None, 1e-5).requires_grad
    assert plain_layer_norm(PLAIN, 3, None, bias, 1e-5).requires_grad
    assert not plain_layer_norm(PLAIN, 3, None, None, 1e-5).requires_grad
    with torch.no_grad():
        assert not plain_layer_norm(leaf, 3, None, bias, 1e-5).requires_grad
    with torch.autograd.forward_ad.dual_level():
        assert plain_layer_norm(PLAIN, 3, None, None, 1e-5) is None
    seen = []
    torch.func.vmap(lambda x: (seen.append(plain_layer_norm(x, 3, None, None, 1e-5)), x)[1])(PLAIN)
    assert seen == [None]


def test_whoever_chose_or_watches_gets_the_detailed_checks(needs_extension):
    assert dispatch.runs_on_cpu("cpu", PLAIN) is False
    with fasttx.backend("cpu"):
        assert dispatch.runs_on_cpu(None, PLAIN) is False
    with torch.autocast("cpu"):
        assert dispatch.runs_on_cpu(None, PLAIN) is False
    dispatch.listeners.append(print)
    try:
        assert dispatch.runs_on_cpu(None, PLAIN) is False
    finally:
        dispatch.listeners.remove(print)

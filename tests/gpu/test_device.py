"""What only a GPU can tell: what `auto` takes there, other streams, and CUDA graphs."""

import copy

import pytest
import torch
from budget import assert_within_budget

import fasttx
from gpu.launchers import ON_GPU

pytestmark = pytest.mark.skipif(not ON_GPU, reason="runs on a GPU, with FASTTX_TEST_DEVICE=cuda")


def a_layer(dropout: float = 0.0) -> fasttx.nn.TransformerEncoderLayer:
    return fasttx.nn.TransformerEncoderLayer(64, 4, 128, dropout=dropout, batch_first=True, dtype=torch.bfloat16)


def test_auto_takes_triton_for_a_layer():
    layer, x = a_layer().eval(), torch.randn(2, 40, 64).bfloat16()
    explanation = fasttx.explain(layer, x)
    assert "triton" in {row.backend for row in explanation.rows} and not explanation.slow
    with torch.no_grad():
        found = layer(x)
        with fasttx.backend("reference"):
            eager, truth = layer(x), copy.deepcopy(layer).double()(x.double())
    assert_within_budget(actual=found, eager=eager, truth=truth)


def test_another_stream():
    layer, x = a_layer().eval(), torch.randn(2, 40, 64).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = layer(x)
        torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)


def test_a_graph_is_replayed_on_other_values():
    layer, x = a_layer().eval(), torch.randn(2, 40, 64).bfloat16()
    with torch.no_grad():
        layer(x)  # kernels are compiled before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, layer(x))


def test_a_training_step_in_a_graph_has_other_dropout_each_time():
    layer, x = a_layer(dropout=0.5), torch.randn(2, 40, 64).bfloat16().requires_grad_()
    for _ in range(2):
        torch.autograd.grad(layer(x).sum(), x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (gradient,) = torch.autograd.grad(layer(x).float().square().sum(), x)
    graph.replay()
    first = gradient.clone()
    graph.replay()
    assert first.isfinite().all() and not torch.equal(first, gradient)

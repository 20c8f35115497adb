"""What is remembered of a module holds until anything about it changes."""

import gc
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fasttx
from fasttx.dispatch import extension
from fasttx.nn._recall import is_observed, recall, remember

pytestmark = pytest.mark.usefixtures("needs_extension")


class Layer(nn.Module):
    """A layer with a child of each kind, and a config."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.1)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.config = types.SimpleNamespace(implementation="sdpa")


def remembered():
    layer = Layer().eval()
    remember(layer, "value", [layer.linear.weight, layer.inner[0].weight], (layer.config,))
    return layer


def adapter(layer):
    layer.inner[0] = nn.Sequential(layer.inner[0])


def replace_data(weight, data):
    weight.data = data


CHANGES = {
    "a child": adapter,
    "a child's class": lambda layer: setattr(layer.inner[1], "__class__", nn.ReLU),
    "a new child": lambda layer: layer.inner.append(nn.Tanh()),
    "a child removed": lambda layer: layer.inner.pop(1),
    "a hook": lambda layer: layer.inner[0].register_forward_hook(lambda *_: None),
    "a pre-hook": lambda layer: layer.norm.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda layer: layer.linear.register_full_backward_hook(lambda *_: None),
    "a forward of its own": lambda layer: setattr(layer.linear, "forward", lambda x: x),
    "an attribute": lambda layer: setattr(layer.norm, "eps", 1e-3),
    "a number": lambda layer: setattr(layer.dropout, "p", 0.5),
    "a flag": lambda layer: layer.dropout.train(),
    "its own attribute": lambda layer: setattr(layer, "scale", 2.0),
    "a parameter": lambda layer: setattr(layer.linear, "bias", nn.Parameter(torch.zeros(8))),
    "no bias": lambda layer: layer.linear.register_parameter("bias", None),
    "a parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer.linear),
    "pruning": lambda layer: prune.random_unstructured(layer.linear, "weight", 0.5),
    "a buffer": lambda layer: layer.register_buffer("table", torch.zeros(1)),
    "the config": lambda layer: setattr(layer.config, "implementation", "eager"),
    "weights in place": lambda layer: layer.linear.weight.data.mul_(2),
    "one weight in place": lambda layer: layer.inner[0].weight[0, 0].fill_(3),
    "data": lambda layer: replace_data(layer.linear.weight, torch.randn(8, 8)),
    "data, transposed": lambda layer: replace_data(layer.linear.weight, layer.linear.weight.data.t()),
    "another dtype": lambda layer: layer.double(),
    "the copies": lambda layer: fasttx.invalidate_packed_weights(),
    "the instruction set": lambda layer: extension.set_isa("scalar"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_is_seen(change):
    layer, other = remembered(), remembered()
    assert recall(layer) == recall(other) == "value"
    change(layer)
    assert recall(layer) is None


@torch.no_grad()
def test_what_is_no_change():
    layer = remembered()
    layer.inner(layer.linear(torch.zeros(2, 8)))
    layer.eval().state_dict()
    layer.linear.bias.add_(1)
    handle = layer.norm.register_forward_hook(lambda *_: None)
    assert recall(layer) is None
    handle.remove()
    assert recall(layer) == "value"
    assert recall(Layer()) is None


@pytest.mark.parametrize("hooked", [False, True])
def test_keeps_no_module_alive(hooked):
    """Nor where a hook leads back to it."""
    layer = Layer().eval()
    if hooked:
        for module in layer.modules():
            module.register_forward_hook(lambda *_, layer=layer: None)
        del module
    remember(layer, "value", [layer.linear.weight], (layer.config,))
    assert recall(layer) == "value"
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_a_snapshot_is_of_something():
    with pytest.raises(ValueError, match="one object at least"):
        extension.Snapshot([], [])


def test_who_looks_on():
    assert not is_observed()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert is_observed()
    finally:
        handle.remove()
    assert torch.func.vmap(lambda x: x * (2.0 if is_observed() else 1.0))(torch.ones(3)).sum() == 6

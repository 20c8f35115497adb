"""Comparing optimized Hugging Face models with transformers' own, in float64."""

import copy
from collections.abc import Callable, Mapping

import hf_models
import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

import fasttx

Inputs = Mapping[str, Tensor]
Loss = Callable[[Module, Inputs], Tensor]


class Adapter(torch.nn.Module):
    """As peft's LoRA: around a linear layer, under its name."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def pair(family: str, implementation: str = "sdpa", **options: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in float64 with an attention implementation of transformers', and a copy of it, optimized."""
    theirs = hf_models.make(family, attn_implementation=implementation, **options).double()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    if family == "vit":
        # Its eager attention rounds weights to float32, whatever the model's dtype.
        theirs.set_attn_implementation("sdpa")
    return theirs, ours


def run(model: Module, inputs: Inputs, **options: object) -> ModelOutput:
    with torch.no_grad():
        return model(**inputs, **options)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def gradients(loss: Loss, model: Module, inputs: Inputs) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model, inputs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(loss: Loss, theirs: Module, ours: Module, inputs: Inputs) -> None:
    expected, actual = gradients(loss, theirs, inputs), gradients(loss, ours, inputs)
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11 * scale)


def assert_restores(theirs: PreTrainedModel, ours: PreTrainedModel, inputs: Inputs) -> None:
    """Of an optimized copy: restore() makes it what it was, and a deepcopy of it too."""
    parameters = list(ours.parameters())
    for model in (copy.deepcopy(ours), ours):
        fasttx.restore(model)
        assert model.config._attn_implementation == "sdpa"
        assert [type(m) for m in model.modules()] == [type(m) for m in theirs.modules()]
        assert torch.equal(run(model, inputs)[0], run(theirs, inputs)[0])
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))


def assert_dropout_follows_the_seed(family: str) -> None:
    model, inputs = fasttx.optimize(hf_models.make(family, dropout=True)).train(), hf_models.batch(family)

    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run(model, inputs)[0]

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))

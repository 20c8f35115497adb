"""The models on torch.nn's own modules, which training with fasttx is measured against."""

import contextlib

import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

import fasttx
from fasttx import dispatch, models
from fasttx.systems._torch import TorchRun, _Embedding, torch_modules
from fasttx.train import Recipe, Run, train

for _module in ("safetensors", "tokenizers"):
    pytest.importorskip(_module)
from tiny_data import TINY, modelled  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
EACH = pytest.mark.parametrize("name", [name for name in TINY if name != "digits"])


@contextlib.contextmanager
def heard():
    """The decisions that are made within."""
    decisions: list[dispatch.Decision] = []
    dispatch.listeners.append(decisions.append)
    try:
        yield decisions
    finally:
        dispatch.listeners.pop()


def results(model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and its gradients."""
    model.zero_grad()
    loss = model.loss(**batch)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    return model


def doubled(batch):
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


@EACH
def test_every_module_is_torchs_and_later_fasttxs_again(name, tiny_system):
    model = modelled(tiny_system(name))
    own = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(KeyError), torch_modules(model):
        for path, module in model.named_modules():
            kind, before = type(module), own[path]
            theirs = [base for base in before.__mro__ if base.__module__.startswith("torch.nn.modules")]
            assert kind in (theirs[0], before if theirs[0] is torch.nn.Module else None, _Embedding)
            # What stays has no torch.nn module to be: the models themselves, and what is around their layers.
            assert kind.__module__.startswith("torch.") or isinstance(
                module, (models.Model, _Embedding, fasttx.nn.LinearCrossEntropy, fasttx.nn.SinusoidalPositionalEncoding)
            ), path
        raise KeyError
    assert {path: type(module) for path, module in model.named_modules()} == own


@EACH
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_no_kernel_runs(name, mode, tiny_system, needs_extension):
    task = tiny_system(name)
    model, batch = getattr(modelled(task), mode)(), task.batch(0)
    with heard() as on_fasttx:
        results(model, batch)
    with heard() as within, torch_modules(model), fasttx.backend("reference"):
        results(model, batch)
    assert any(decision.kernel for decision in on_fasttx)
    assert not any(decision.kernel for decision in within)
    assert {decision.op for decision in within} <= {"linear_cross_entropy", "gelu"}  # no module of fasttx's is left


@EACH
def test_results_and_gradients_are_the_same(name, tiny_system):
    """fasttx within the error budget of torch.nn, which itself is near: a wrong one would have a wide budget.

    Near: to a thousandth, far above rounding in float32, far below what a term left out makes.
    """
    task = tiny_system(name)
    model, batch = modelled(task).eval(), task.batch(0)
    actual = results(model, batch)
    with torch_modules(model), fasttx.backend("reference"):
        eager = results(model, batch)
    with fasttx.backend("reference"):
        truth = results(model.double(), doubled(batch))
    assert actual.keys() == eager.keys() == truth.keys()
    for key, value in actual.items():
        torch.testing.assert_close(eager[key].double(), truth[key], rtol=1e-3, atol=1e-5, msg=key)
        assert_within_budget(actual=value, eager=eager[key], truth=truth[key], name=key)


@EACH
@pytest.mark.parametrize("bfloat16", [False, True])
def test_it_learns_as_much(name, bfloat16, tiny_system, tmp_path):
    """Without dropout, whose random numbers differ."""
    task = tiny_system(name)
    recipe = Recipe(steps=8, learning_rate=1e-2, warmup=2, interval=8, bfloat16=bfloat16)
    losses = []
    for kind in (Run, TorchRun):
        model = without_dropout(modelled(task))
        losses.append([row["loss"] for _, row in train(kind(model, task, recipe, tmp_path / kind.__name__))])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if bfloat16 else 1e-3)
    assert len(set(losses[0])) == 8


def test_adapters_stay(tiny_system):
    pytest.importorskip("peft")
    task = tiny_system("sentiment", "--method", "lora")
    model, batch = without_dropout(modelled(task)), task.batch(0)  # in training, as a TorchRun
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    expected = model.loss(**batch)
    with torch_modules(model), fasttx.backend("reference"):
        torch.testing.assert_close(model.loss(**batch), expected)

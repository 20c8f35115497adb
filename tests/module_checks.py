"""Comparing optimized modules with torch's own: in float64 for every argument, by the error budget in each dtype."""

import copy
from collections.abc import Callable, Mapping

import torch
from budget import assert_within_budget
from torch import Tensor
from torch.nn import Module

import fasttx

Run = Callable[..., Tensor | tuple[Tensor | None, ...]]


def evaluate(
    run: Run, module: Module, inputs: Mapping[str, Tensor], gradients: bool
) -> dict[str, Tensor]:
    """Outputs, and the gradients of sum(output * a fixed random tensor), by name."""
    leaves = {
        name: value.detach().clone().requires_grad_(gradients and value.is_floating_point())
        for name, value in inputs.items()
    }
    module.zero_grad()
    with torch.set_grad_enabled(gradients):
        outputs = run(module, **leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": t.detach() for i, t in enumerate(outputs) if t is not None}
    if gradients:
        generator = torch.Generator().manual_seed(7)
        loss = 0.0
        for output in outputs:
            if output is not None:
                cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
                # Exact in every dtype, so that all take the gradient of one function.
                loss = loss + (output * cotangent.bfloat16().to(output.dtype)).sum()
        loss.backward()
        named = [*leaves.items(), *module.named_parameters()]
        results |= {f"gradient of {k}": t.grad for k, t in named if t.grad is not None}
    return results


def assert_equals_torch(
    original: Module,
    inputs: Mapping[str, Tensor],
    run: Run = lambda module, **inputs: module(**inputs),
    *,
    gradients: bool = True,
    **options: object,
) -> Module:
    """Optimizes a copy of torch's `original` and compares both in float64; returns the copy.

    What float64 leaves of a difference is rounding, far below any wrong number. `options` are
    optimize()'s.
    """
    original = copy.deepcopy(original).double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    fast = fasttx.optimize(copy.deepcopy(original), **options)
    actual = evaluate(run, fast, given, gradients)
    expected = evaluate(run, original, given, gradients)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-9, atol=1e-11,
            msg=lambda message: f"{name}: {message}",  # noqa: B023
        )  # fmt: skip
    return fast


def assert_module_within_budget(
    original: Module,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    run: Run = lambda module, **inputs: module(**inputs),
    *,
    gradients: bool = True,
    **options: object,
) -> Module:
    """Optimizes a copy of torch's `original` (float32) and compares it; returns the copy.

    `inputs` in float32, or not floating; those, and the parameters, are rounded to `dtype` first.
    `options` are optimize()'s.
    """
    rounded = copy.deepcopy(original).to(dtype)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype

    def at(precision: torch.dtype) -> dict[str, Tensor]:
        cast = {k: v.to(precision) if v.is_floating_point() else v for k, v in given.items()}
        return evaluate(run, copy.deepcopy(rounded).to(precision), cast, gradients)

    fast = fasttx.optimize(copy.deepcopy(rounded), **options)
    actual, eager, truth = evaluate(run, fast, given, gradients), at(eager_dtype), at(torch.float64)
    assert actual.keys() == truth.keys() == eager.keys()
    assert all(result.dtype == dtype for result in actual.values())
    for name in filter(lambda name: name.startswith("output"), actual):
        assert_within_budget(actual=actual[name], eager=eager[name], truth=truth[name], name=name)
    if gradients:
        names = [name for name in actual if name.startswith("gradient")]
        assert_gradients_within_budget(*({k: d[k] for k in names} for d in (actual, eager, truth)))
    return fast


def assert_gradients_within_budget(
    actual: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> None:
    """The gradient as one tensor of all parameters and inputs.

    One by one, the largest errors of a hundred small tensors scatter by more than two even between
    two orders of the same sums in PyTorch.
    """
    assert actual.keys() == eager.keys() == truth.keys()

    def joined(gradients: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([gradients[name].flatten() for name in truth])

    assert_within_budget(
        actual=joined(actual), eager=joined(eager), truth=joined(truth), name="gradients"
    )


class Loss(torch.nn.Module):
    """model.loss as a forward, for functional_call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *given, **targets):
        return self.model.loss(*given, **targets)

"""Comparing a module of ours with one of PyTorch's own that holds the same parameters."""

import copy

import torch
from budget import assert_within_budget
from module_checks import assert_gradients_within_budget, evaluate

from fasttx import dispatch


def randomize(module):
    """Initial norms are one and biases may be zero: neither would show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def call(module, **inputs):
    return module(**inputs)


def casting(**given):
    """Runs a module with more arguments, floating ones in the dtype of the first input."""

    def run(module, **inputs):
        dtype = next(iter(inputs.values())).dtype
        cast = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in given.items()
        }
        return module(**inputs, **cast)

    return run


def in_dtype(dtype, module, inputs):
    floating = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return copy.deepcopy(module).to(dtype), floating


def assert_equal(ours, theirs, inputs, run=call):
    """Outputs and gradients in float64, where only rounding is left of a difference."""
    ours, given = in_dtype(torch.float64, ours, inputs)
    theirs, _ = in_dtype(torch.float64, theirs, inputs)
    ours.load_state_dict(theirs.state_dict())
    actual, expected = evaluate(run, ours, given, True), evaluate(run, theirs, given, True)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-9, atol=1e-11,
            msg=lambda message: f"{name}: {message}",  # noqa: B023
        )  # fmt: skip


def assert_budget(ours, theirs, inputs, dtype, run=call):
    """Outputs and gradients by the error budget; `theirs` computes the same with torch's own ops."""
    rounded, given = in_dtype(dtype, theirs, inputs)
    ours = copy.deepcopy(ours).to(dtype)
    ours.load_state_dict(rounded.state_dict())
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    actual = evaluate(run, ours, given, True)
    eager, truth = (evaluate(run, *in_dtype(d, rounded, given), True) for d in (eager_dtype, torch.float64))
    assert actual.keys() == eager.keys() == truth.keys()
    assert all(result.dtype == dtype for result in actual.values())
    assert_within_budget(
        actual=actual.pop("output 0"), eager=eager.pop("output 0"), truth=truth.pop("output 0"), name="output"
    )
    assert_gradients_within_budget(actual, eager, truth)


def ops_of(call):
    """The names of the ops that a call asks for, but for those that step aside for a child."""
    decisions = []
    dispatch.listeners.append(decisions.append)
    try:
        call()
    finally:
        dispatch.listeners.clear()
    return [decision.op for decision in decisions if decision.backend != "original"]

"""parity(): a model's results before and after optimize(), both against the same model in float64."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map_only

from fasttx.measure import Verdict, judge, largest_error
from fasttx.patch.swap import optimize, restore


@dataclass(frozen=True)
class Parity:
    """By name of each tensor that was compared, the verdict on it; as text, a table.

    A verdict's `error` is the optimized model's, its `eager_error` the original's, its `budget` what is allowed: twice
    the original's, and one unit in the last place.
    """

    verdicts: dict[str, Verdict]

    @property
    def passed(self) -> bool:
        """Whether every tensor is within its budget."""
        return all(verdict.passed for verdict in self.verdicts.values())

    def __str__(self) -> str:
        table = [("tensor", "error before", "error after", "ratio", "allowed", "")]
        for name, verdict in self.verdicts.items():
            ratio = f"{verdict.error / verdict.eager_error:.2f}" if verdict.eager_error else ""
            numbers = (f"{value:.2e}" for value in (verdict.eager_error, verdict.error))
            word = verdict.misplaced or ("passed" if verdict.passed else "FAILED")
            table.append((name, *numbers, ratio, f"{verdict.budget:.2e}", word))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def parity(
    model: Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    padding: str = "remove",
    valid: Tensor | None = None,
    gradients: bool = False,
) -> Parity:
    """What optimize(model, padding=padding) changes in the model's results, measured against float64.

    Copies of the model run in eval mode on `inputs` (a tensor, the positional arguments, or the keyword arguments):
    restored, optimized, and restored in float64, where floating inputs are converted too. Every tensor among their
    outputs is compared, by its path. With `gradients`, so is the gradient of all parameters and floating inputs, for
    random slopes of the outputs, as one tensor: one by one, the largest errors of many small tensors scatter by more
    than two even between two orders of the same sums. `valid` (B, T), bool, says which positions count in outputs
    (B, T, ...); by default the argument attention_mask does. The model itself is not touched.

    Raises TypeError for what is no module, ValueError for a `valid` that is none, RuntimeError where the model cannot
    run in float64.
    """
    original = restore(copy.deepcopy(model)).eval()
    args, kwargs = _arguments(inputs)
    if valid is None:
        valid = kwargs.get("attention_mask")
        valid = valid.bool() if isinstance(valid, Tensor) and valid.dim() == 2 else None
    elif not isinstance(valid, Tensor) or valid.dim() != 2 or valid.dtype != torch.bool:
        raise ValueError(f"valid must be a bool tensor (B, T), got {_describe(valid)}")

    def run(copied: Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return _results(copied, args, kwargs, dtype, valid, gradients)

    after = run(optimize(copy.deepcopy(original), padding=padding), None)
    # Truth in float64 is no truth to float64: of such a model, float32 has to tell what error is usual.
    wide = any(tensor.dtype == torch.float64 for tensor in after.values())
    usual = original.float() if wide else original
    before = run(usual, torch.float32 if wide else None)
    try:
        truth = run(restore(copy.deepcopy(model)).eval().double(), torch.float64)
        eager_truth = run(copy.deepcopy(usual).double(), torch.float64) if wide else truth
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise RuntimeError(f"parity compares with float64, in which the model cannot run: {error}") from error
    if after.keys() != truth.keys():
        raise RuntimeError(f"the optimized model's outputs are {list(after)}, the original's {list(truth)}")
    return Parity({
        name: _judge(after[name], before[name], truth[name], eager_truth[name], wide) for name in after
    })  # fmt: skip


def _arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Sequence):
        return tuple(inputs), {}
    raise TypeError(f"inputs must be a tensor, a sequence or a mapping of arguments, got {type(inputs).__name__}")


def _results(
    model: Module,
    args: tuple,
    kwargs: dict[str, Any],
    dtype: torch.dtype | None,
    valid: Tensor | None,
    gradients: bool,
) -> dict[str, Tensor]:
    """The outputs by path, at valid positions, and the gradients joined into one."""
    leaves: list[Tensor] = []

    def given(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().to(dtype or tensor.dtype).requires_grad_(gradients))
        return leaves[-1]

    args, kwargs = tree_map_only(Tensor, given, (args, kwargs))
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        outputs = dict(_tensors(model(*args, **kwargs), ""))
    if valid is not None:
        outputs = {
            name: tensor[valid] if tensor.shape[:2] == valid.shape else tensor for name, tensor in outputs.items()
        }
    results = {name: tensor.detach() for name, tensor in outputs.items()}
    if gradients:
        wanted = leaves + [parameter for parameter in model.parameters() if parameter.requires_grad]
        ends = [tensor for tensor in outputs.values() if tensor.requires_grad]
        generator = torch.Generator().manual_seed(0)
        # Values that every dtype holds.
        slopes = [torch.randint(-8, 9, end.shape, generator=generator).to(end) / 8 for end in ends]
        found = torch.autograd.grad(ends, wanted, slopes, materialize_grads=True)
        results["gradients"] = torch.cat([gradient.flatten() for gradient in found])
    return results


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors within an output, each with its path: "logits", "hidden_states.2", or "output" for one alone."""
    if isinstance(value, Tensor):
        yield path or "output", value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _tensors(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}.{index}" if path else f"output.{index}")


def _judge(after: Tensor, before: Tensor, truth: Tensor, eager_truth: Tensor, wide: bool) -> Verdict:
    usual = torch.float32 if wide and before.is_floating_point() else after.dtype
    if after.shape != truth.shape or before.dtype != usual:
        return Verdict(torch.inf, 0.0, 0.0, f"{_describe(after)} where {_describe(before)} was expected")
    if not after.is_floating_point():
        usual_error = largest_error(before, truth)
        return Verdict(largest_error(after, truth), usual_error, usual_error)
    if after.dtype != torch.float64:
        return judge(after, before, truth.double())
    return judge(after, before, truth, eager_truth=eager_truth)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__

"""What tests hold a kernel to: at most twice eager PyTorch's error against float64, and one ulp.

`eager` always comes from PyTorch's own op, `truth` from fasttx.reference in float64 on the same,
already rounded, inputs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fasttx.dispatch import extension
from fasttx.measure import Standard, Verdict, judge

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_within_budget(
    *,
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    eager_truth: Tensor | None = None,
    name: str = "result",
) -> None:
    """Fails with the error, eager's error and the budget.

    For a float64 `actual`, `eager` is PyTorch's float32 result, and `eager_truth` the truth of the
    inputs rounded to float32 (not needed where they are float32 values to begin with).
    """
    _require({name: judge(actual, eager, truth, eager_truth=eager_truth)})


def assert_op_within_budget(
    op: Callable[..., object],
    *,
    eager: Callable[..., object],
    reference: Callable[..., object],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    frozen: Sequence[str] = (),
    gradients: bool = True,
    poison: bool = True,
) -> Standard:
    """Holds the outputs of op(**inputs), and its gradients, to the budget.

    Gradients are those of every floating input that `frozen` does not name. `inputs` are given in
    any floating dtype and rounded to `dtype`; for float64, eager's float32 runs are arranged for.
    `poison`: memory that the op does not write reads as NaN. Returns the Standard, whose `judge`
    takes further variants of the op (another ISA, other strides) without computing eager and truth
    again.
    """
    standard = Standard(
        reference=reference,
        eager=eager,
        inputs=inputs,
        dtype=dtype,
        frozen=frozen,
        gradients=gradients,
    )
    assert_meets(standard, op, poison=poison)
    return standard


def assert_meets(standard: Standard, op: Callable[..., object], *, poison: bool = True) -> None:
    """Holds one more variant of an op to a Standard that is already computed."""
    with poisoned() if poison else contextlib.nullcontext():
        verdicts = standard.judge(op)
    _require(verdicts)


def _require(verdicts: Mapping[str, Verdict]) -> None:
    failures = [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.passed]
    assert not failures, "not within the error budget\n  " + "\n  ".join(failures)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors, those that C++ allocates too, are full of NaN (integers: their largest).

    PyTorch fills what `empty` returns in its deterministic mode; the extension fills its results. Kernels' scratch
    memory stays as it is.
    """
    algorithms = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if extension is not None:
        extension.poison_results(True)
    try:
        yield
    finally:
        if extension is not None:
            extension.poison_results(False)
        torch.use_deterministic_algorithms(algorithms, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills

"""Row kernels that ship, broken on purpose: the emulator's checks, or the comparison with PyTorch, must notice."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from budget import poisoned

pytest.importorskip("triton")

from fasttx.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd  # noqa: E402
from fasttx.kernels.softmax import softmax_fwd  # noqa: E402

from gpu import mutations  # noqa: E402
from gpu.launchers import full  # noqa: E402
from gpu.mutations import SYNCHRONISATION, Trial  # noqa: E402

TARGETS = ("sm_80", "sm_90")
EDGES = ["unguarded store", "off by one (register)"]


def trial(call: Callable[[], tuple], expected: tuple, epsilon: float) -> Trial:
    """Results within epsilon of the largest and of themselves; what a kernel leaves unwritten is NaN."""

    def poisoned_call() -> tuple:
        with poisoned():
            return call()

    def agrees(results: tuple) -> bool:
        bounds = (epsilon * (x.abs() + x.abs().max()) for x in expected)
        return all(
            bool(((x.double() - y).abs() <= bound).all()) for x, y, bound in zip(results, expected, bounds, strict=True)
        )

    return Trial(poisoned_call, agrees)


def layer_norm(rows: int, width: int) -> Trial:
    x, slope = torch.randn(2, rows, width).unbind()
    weight, bias = torch.randn(2, width).unbind()
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.layer_norm(leaves[0], (width,), *leaves[1:], 1e-5)
    gradients = torch.autograd.grad(y, leaves, slope.double())

    def call() -> tuple:
        found = layer_norm_fwd(x, width, weight, bias, 1e-5)
        return found, *layer_norm_bwd(slope, x, weight, width, 1e-5, True, True, True)

    return trial(call, (y.detach(), *gradients), 2**-19)


def softmax(rows: int, width: int) -> Trial:
    x, keep = torch.randn(1, 1, rows, width), torch.rand(1, 1, rows, width) > 0.3
    keep[..., 0] = True
    expected = torch.softmax(x.double().masked_fill(~keep, -math.inf), -1)
    return trial(lambda: (softmax_fwd(x, keep, False),), (expected,), 2**-20)


# Every column of a thread's four, and every row but the first of a program's four, is the first one outside in a trial.
_EDGES = [(5, 257), (6, 258), (7, 259), (5, 508)]
# By kernel: the trials, whose sizes end within a block, and which kernel of theirs is broken.
KERNELS = {
    "softmax": (lambda: [softmax(*size) for size in _EDGES], "_softmax_fwd_kernel"),
    "layer norm": (lambda: [layer_norm(*size) for size in _EDGES], "_layer_norm_fwd_kernel"),
    "layer norm backward": (lambda: [layer_norm(5, 257)], "_layer_norm_bwd_kernel"),
}
# How many survive because they change nothing: a program's first row is always there, and so is the first half of the
# columns that a block of 512 holds.
EQUIVALENT = Counter({"unguarded store": 2, "off by one (register)": 3})


def judge(kernel: str, target: str, kinds: list[str]) -> Counter:
    """The checks that noticed the mutations of a kernel, and how many each; all but equivalent ones must be noticed."""
    make, name = KERNELS[kernel]
    left, outcomes = mutations.survivors(target, make(), kinds, kernel=name)
    assert Counter(mutation.kind for mutation in left) <= EQUIVALENT, "\n".join(map(str, left))
    return Counter(outcome.check for outcome in outcomes if outcome.check is not None)


by_target = pytest.mark.parametrize("target", TARGETS)
QUICK = ("softmax", "layer norm")


@by_target
@pytest.mark.parametrize("kernel", [k if k in QUICK else pytest.param(k, marks=full) for k in KERNELS])
def test_missing_synchronisation_is_caught(kernel: str, target: str) -> None:
    caught = judge(kernel, target, SYNCHRONISATION)
    assert caught and set(caught) <= {"shared race", "warp race", "uninitialised shared memory"}


@by_target
@pytest.mark.parametrize("kernel", QUICK)
def test_every_row_and_column_is_guarded(kernel: str, target: str) -> None:
    assert set(judge(kernel, target, EDGES)) == {"global bounds"}

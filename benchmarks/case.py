"""What a row is made of: what runs, against what, how its error is judged, and the bars that it should clear."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttx.measure import Standard, Verdict

DTYPES = (torch.float32, torch.bfloat16)
Call = Callable[[], object]


class NotMeasured(Exception):
    """Why a row cannot be measured here."""


@dataclass(frozen=True)
class Work:
    """One row at work: functions of nothing, to be timed.

    `rivals` are the ways of PyTorch (or of whom the row names) to the same result; the fastest of them counts. `judge`
    gives the error of what fasttx computes, against float64.
    """

    rivals: Mapping[str, Call]
    fasttx: Call
    judge: Callable[[], Verdict]


@dataclass(frozen=True)
class Case:
    """One row: an op, layer or model on one shape.

    flops and bytes are those of the mathematics: what must be computed, and what must be read and written once. `bar`
    is the least ratio (fastest rival's time / fasttx's), `roofline` the least share of what the machine can do, of the
    limit that the row is held to: "flops", "copy" or "read". Rows without bars are there to be looked at.
    `work` makes inputs and functions, when the row's turn comes.
    """

    op: str
    name: str
    shape: str
    dtype: torch.dtype
    work: Callable[[], Work]
    flops: float
    bytes: float
    bar: float | None = None
    roofline: float | None = None
    limit: str = "flops"

    @property
    def id(self) -> str:
        """op, row, shape and dtype in one word."""
        return "-".join((self.op, self.name, self.shape, dtype_name(self.dtype))).replace(" ", "_")


@dataclass(frozen=True)
class Growth:
    """One row that is no comparison with PyTorch: a quantity that must stay at or below its bar.

    `measure` takes seconds to spend and gives the value with the ends of its interval.
    """

    op: str
    name: str
    shape: str
    dtype: torch.dtype
    unit: str
    measure: Callable[[float], tuple[float, float, float]]
    bar: float

    id = Case.id


def op_work(
    inputs: Mapping[str, Tensor],
    rivals: Mapping[str, Callable[..., Tensor]],
    fasttx: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *,
    backward: bool = False,
    judged: Callable[..., Tensor] | None = None,
    eager: Callable[..., Tensor] | None = None,
    weights: tuple[str, ...] = (),
) -> Work:
    """The work of an op that takes `inputs` by name and returns its output.

    `backward`: with the gradients of every floating input; `weights` then count as changed before each call, as an
    optimizer leaves them. Where PyTorch's own dropout cannot draw fasttx's mask, `judged` draws a known one, and
    `eager` stands in for the rivals.
    """
    dtype = next(x.dtype for x in inputs.values() if x.is_floating_point())

    def call(op: Callable[..., Tensor]) -> Call:
        if not backward:
            return torch.no_grad()(lambda: op(**inputs))
        leaves = {
            name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()
        }
        wanted = [x for x in leaves.values() if x.requires_grad]
        slope = torch.randn_like(op(**leaves))

        def forward_and_backward() -> None:
            for name in weights:
                touch(leaves[name])
            torch.autograd.grad(op(**leaves), wanted, slope)

        return forward_and_backward

    def judge() -> Verdict:
        standard = Standard(
            reference=reference,
            eager=eager or next(iter(rivals.values())),
            inputs=inputs,
            dtype=dtype,
            gradients=backward,
        )
        return worst(standard.judge(judged or fasttx))

    return Work({name: call(op) for name, op in rivals.items()}, call(fasttx), judge)


def worst(verdicts: Mapping[str, Verdict]) -> Verdict:
    """The worst of the output's and the gradients' errors, by their share of the budget."""
    return max(verdicts.values(), key=lambda v: (not v.passed, v.error / v.budget))


def touch(weight: Tensor) -> None:
    """Leaves the values as they are, and the tensor one version older."""
    with torch.no_grad():
        weight.view(-1)[:1].add_(0)


def tensors(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Normal random tensors of these shapes; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}


def item_size(dtype: torch.dtype) -> int:
    """Bytes of one value."""
    return torch.empty((), dtype=dtype).element_size()


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16."""
    return str(dtype).removeprefix("torch.")

"""What a benchmark row is made of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttx.measure import Standard, Verdict

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One op on one shape, forward or forward and backward.

    torch, fasttx and reference take `inputs` by name and return the output. flops and bytes are those of the
    mathematics: what must be computed, and what must be read and written once. Where PyTorch's own dropout cannot draw
    fasttx's mask, `eager` stands in for `torch` when the error is judged.
    """

    name: str
    shape: str
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    torch: Callable[..., Tensor]
    fasttx: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    flops: float
    bytes: float
    backward: bool = False
    eager: Callable[..., Tensor] | None = None

    def call(self, op: Callable[..., Tensor]) -> Callable[[], object]:
        """The op on these inputs, as a function of nothing: with its backward where that is timed."""
        if not self.backward:

            def forward() -> None:
                with torch.no_grad():
                    op(**self.inputs)

            return forward
        leaves = {
            name: x.detach().requires_grad_()
            for name, x in self.inputs.items()
        }
        grad = torch.randn_like(op(**leaves))

        def forward_and_backward() -> None:
            torch.autograd.grad(op(**leaves), list(leaves.values()), grad)

        return forward_and_backward


    def verdict(self) -> Verdict:
        """The worst of the output's and the gradients' errors, by their share of the budget."""
        standard = Standard(
            reference=self.reference,
            eager=self.eager or self.torch,
            inputs=self.inputs,
            dtype=self.dtype,
            gradients=self.backward,
        )
        verdicts = standard.judge(self.fasttx).values()
        return max(verdicts, key=lambda v: (not v.passed, v.error / v.budget))


def tensors(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Normal random tensors of these shapes; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}


def size(inputs: dict[str, Tensor]) -> int:
    """Bytes of all of them."""
    return sum(x.nbytes for x in inputs.values())

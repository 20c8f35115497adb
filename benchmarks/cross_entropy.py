"""The last linear layer of a language model and its loss."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fasttx import functional, reference
from fasttx.measure import Standard, Verdict

from .case import DTYPES, Case, Growth, Work, item_size, op_work, tensors, worst
from .memory import extra_megabytes

_WIDTH, _IGNORED = 768, -100
# (tokens, classes, the share of them that counts): GPT-2's, all of them, and BERT's, of which masks hide 15 %.
_CAUSAL, _MASKED = (512, 50257, 1.0), (1024, 30522, 0.15)
_MEGABYTES = 64  # beyond operands and results, of 1024 MiB of logits in float32
_JUDGED = 64  # rows that errors are taken of: as many as float64 has time for


def cases() -> Iterator[Case | Growth]:
    """Forward, and forward and backward, of a causal and of a masked language model; memory."""
    for dtype in DTYPES:
        for name, (tokens, classes, counted) in (("causal", _CAUSAL), ("15 % of tokens", _MASKED)):
            for backward in (False, True):
                # Once forward, and twice more for gradients; the second time that logits are made is no must.
                flops = (6 if backward else 2) * tokens * counted * _WIDTH * classes
                moved = (tokens + classes) * _WIDTH * item_size(dtype)
                yield Case(
                    "cross_entropy", f"{name} {'fwd+bwd' if backward else 'fwd'}",
                    f"({tokens},{_WIDTH},{classes})", dtype, partial(_work, tokens, classes, counted, dtype, backward),
                    flops=flops, bytes=moved * (3 if backward else 1),
                )  # fmt: skip
        yield Growth(
            "cross_entropy", "memory fwd+bwd", "(8192,64,32768)", dtype, "MiB",
            lambda seconds, dtype=dtype: extra_megabytes("cross_entropy", dtype, True), bar=_MEGABYTES,
        )  # fmt: skip


def _theirs(input: Tensor, weight: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return cross_entropy(linear(input, weight), target, reduction=reduction)


def _work(tokens: int, classes: int, counted: float, dtype: torch.dtype, backward: bool) -> Work:
    inputs = tensors(dtype, input=(tokens, _WIDTH), weight=(classes, _WIDTH))
    inputs["weight"] /= _WIDTH**0.5
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, classes, (tokens,), generator=generator)
    if counted < 1.0:
        target[torch.rand(tokens, generator=generator) >= counted] = _IGNORED
    inputs["target"] = target
    work = op_work(
        inputs, {"linear, cross_entropy": _theirs}, functional.linear_cross_entropy, reference.linear_cross_entropy,
        backward=backward, weights=("weight",),
    )  # fmt: skip

    def judge() -> Verdict:
        # Of single rows: over one mean alone eager's error is a matter of luck.
        some = {"input": inputs["input"][:_JUDGED], "weight": inputs["weight"], "target": target[:_JUDGED]}
        standard = Standard(
            reference=partial(reference.linear_cross_entropy, reduction="none"),
            eager=partial(_theirs, reduction="none"), inputs=some, dtype=dtype, gradients=backward,
        )  # fmt: skip
        return worst(standard.judge(partial(functional.linear_cross_entropy, reduction="none")))

    return Work(work.rivals, work.fasttx, judge)

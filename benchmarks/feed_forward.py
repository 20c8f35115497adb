"""Linear layers, and the feed-forward half of a transformer layer."""

from collections.abc import Iterator

from torch.nn.functional import gelu
from torch.nn.functional import linear as torch_linear

from fasttx import functional, reference

from .case import DTYPES, Case, size, tensors

_WIDTH, _HIDDEN = 768, 3072


def cases() -> Iterator[Case]:
    """One linear layer; 768 -> 3072 -> 768 for few and many tokens, forward and backward."""
    for dtype in DTYPES:
        inputs = tensors(dtype, input=(1024, _WIDTH), weight=(_WIDTH, _WIDTH), bias=(_WIDTH,))
        yield Case(
            "linear", f"({1024},{_WIDTH})", dtype, inputs,
            torch_linear, functional.linear, reference.linear,
            flops=2 * 1024 * _WIDTH * _WIDTH, bytes=size(inputs) + inputs["input"].nbytes,
        )  # fmt: skip
        for tokens, backward in ((16, False), (128, False), (1024, False), (128, True), (1024, True)):
            inputs = tensors(
                dtype, input=(tokens, _WIDTH), weight1=(_HIDDEN, _WIDTH), bias1=(_HIDDEN,),
                weight2=(_WIDTH, _HIDDEN), bias2=(_WIDTH,),
            )  # fmt: skip
            yield Case(
                "feed-forward", f"({tokens},{_WIDTH},{_HIDDEN})", dtype, _scaled(inputs),
                _torch, functional.feed_forward, reference.feed_forward,
                flops=(3 if backward else 1) * 4 * tokens * _WIDTH * _HIDDEN,
                bytes=size(inputs) * (3 if backward else 1), backward=backward,
            )  # fmt: skip


def _scaled(inputs: dict) -> dict:
    """Weights of the size that keeps activations of order one, as trained ones do."""
    return {n: x / x.shape[1] ** 0.5 if n.startswith("weight") else x for n, x in inputs.items()}


def _torch(input, weight1, bias1, weight2, bias2):
    return torch_linear(gelu(torch_linear(input, weight1, bias1)), weight2, bias2)

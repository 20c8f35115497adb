"""Linear layers, and the feed-forward half of a transformer layer."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu
from torch.nn.functional import linear as torch_linear

from fasttx import functional, reference

from .case import DTYPES, Case, Growth, Work, item_size, op_work, tensors
from .growth import FLAT, GROWN, time_per_token

_WIDTH, _HIDDEN = 768, 3072

# (tokens, backward): the bars in float32 and in bfloat16.
_BARS = {
    (16, False): (2.5, 1.2),
    (128, False): (1.6, 1.05),
    (1024, False): (1.15, 1.02),
    (4096, False): (1.15, 1.02),
    (128, True): (1.4, 1.1),
    (1024, True): (1.12, 1.05),
}
_ROOFLINE = (0.88, 0.80)  # of inference, from 128 tokens on
# (tokens, in, out) of linear layers: one token is what decoding has, the last of them a language model's head.
_LINEAR = ((1024, _WIDTH, _WIDTH), (1, 64, 64), (1, _WIDTH, _WIDTH), (1, _WIDTH, _HIDDEN), (1, _WIDTH, 50257))


def cases() -> Iterator[Case | Growth]:
    """768 -> 3072 -> 768 for few and many tokens, forward and backward; linear layers; time per token."""
    for index, dtype in enumerate(DTYPES):
        for (tokens, backward), bars in _BARS.items():
            yield Case(
                "feed_forward",
                "fwd+bwd" if backward else "fwd",
                f"({tokens},{_WIDTH},{_HIDDEN})",
                dtype,
                partial(_work, tokens, dtype, backward),
                flops=(3 if backward else 1) * 4 * tokens * _WIDTH * _HIDDEN,
                bytes=(3 if backward else 1) * 2 * (tokens * _WIDTH + _WIDTH * _HIDDEN) * item_size(dtype),
                bar=bars[index],
                roofline=None if backward or tokens < 128 else _ROOFLINE[index],
            )
        for rows, width, out in _LINEAR:
            yield Case(
                "feed_forward", "linear fwd", f"({rows},{width},{out})", dtype,
                partial(_linear, rows, width, out, dtype), flops=2 * rows * width * out,
                bytes=(rows * (width + out) + width * out) * item_size(dtype),
            )  # fmt: skip
        yield Growth(
            "feed_forward", "time per token", GROWN, dtype, "x",
            partial(time_per_token, partial(_call, dtype)), bar=FLAT,
        )  # fmt: skip


def _inputs(tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the size that keeps activations of order one, as trained ones do."""
    inputs = tensors(
        dtype, input=(tokens, _WIDTH), weight1=(_HIDDEN, _WIDTH), bias1=(_HIDDEN,),
        weight2=(_WIDTH, _HIDDEN), bias2=(_WIDTH,),
    )  # fmt: skip
    return {n: x / x.shape[1] ** 0.5 if n.startswith("weight") else x for n, x in inputs.items()}


def _torch(input, weight1, bias1, weight2, bias2):
    return torch_linear(gelu(torch_linear(input, weight1, bias1)), weight2, bias2)


def _work(tokens: int, dtype: torch.dtype, backward: bool) -> Work:
    return op_work(
        _inputs(tokens, dtype), {"linear, gelu": _torch}, functional.feed_forward, reference.feed_forward,
        backward=backward, weights=("weight1", "weight2"),
    )  # fmt: skip


def _linear(rows: int, width: int, out: int, dtype: torch.dtype) -> Work:
    inputs = tensors(dtype, input=(rows, width), weight=(out, width), bias=(out,))
    return op_work(inputs, {"linear": torch_linear}, functional.linear, reference.linear)


def _call(dtype: torch.dtype, tokens: int):
    inputs = _inputs(tokens, dtype)
    return torch.no_grad()(lambda: functional.feed_forward(**inputs))

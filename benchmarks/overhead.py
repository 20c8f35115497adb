"""What a call costs: inputs so small that the arithmetic hardly counts, in inference and in training."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fasttx
from fasttx import functional
from fasttx.measure import Verdict, judge

from .case import Call, Case, Work, tensors
from .encoder_layer import without_fast_path

_SHAPE = (1, 16, 64)
_HEADS = 4
# Not slower than PyTorch: inference, a forward that gradients are wanted of, and that with its backward.
_BAR = 1.0
_MODES = ("eval", "train fwd", "train fwd+bwd")


@dataclass(frozen=True)
class Side:
    """A call that is ready to be made, and what it is differentiated by."""

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


def cases() -> Iterator[Case]:
    """Every function and module, in float32: which dtype it is makes no difference to a call."""
    for name in (*_FUNCTIONS, *_MODULES):
        for mode in _MODES:
            yield Case(
                "overhead", f"{name} {mode}", str(_SHAPE).replace(" ", ""), torch.float32,
                partial(work, name, mode), flops=0.0, bytes=8.0 * math.prod(_SHAPE), bar=_BAR,
            )  # fmt: skip


def work(name: str, mode: str, shape: tuple[int, int, int] = _SHAPE) -> Work:
    """A row on inputs of a shape (batch, length, width)."""
    make = partial(_function, *_FUNCTIONS[name]) if name in _FUNCTIONS else partial(_module, _MODULES[name])
    if name == _WITH_WEIGHTS:
        make = partial(make, need_weights=True)
    train = mode != "eval"
    theirs, ours, truth = (
        make(shape, train=train, dtype=dtype, ours=ours)
        for dtype, ours in ((torch.float32, False), (torch.float32, True), (torch.float64, False))
    )
    theirs_timed = _timed(theirs, mode)
    rivals = {"eager": theirs_timed}
    if mode == "eval" and name in _MODULES:
        rivals["no fast path"] = without_fast_path(theirs_timed)
    return Work(rivals, _timed(ours, mode), partial(_verdict, ours, theirs, truth))


def _function(
    theirs: Callable[..., Tensor],
    mine: Callable[..., Tensor],
    shapes: Callable[[int, int, int], dict[str, tuple[int, ...]]],
    shape: tuple[int, int, int],
    *,
    train: bool,
    dtype: torch.dtype,
    ours: bool,
) -> Side:
    inputs = {name: x.to(dtype).requires_grad_(train) for name, x in tensors(torch.float32, **shapes(*shape)).items()}
    return Side(partial(mine if ours else theirs, *inputs.values()), tuple(inputs.values()))


def _module(
    make: Callable[[int], nn.Module],
    shape: tuple[int, int, int],
    *,
    train: bool,
    dtype: torch.dtype,
    ours: bool,
    need_weights: bool = False,
) -> Side:
    torch.manual_seed(0)
    module = make(shape[-1]).to(dtype).train(train).requires_grad_(train)
    module = fasttx.optimize(module) if ours else module
    x = tensors(torch.float32, x=shape)["x"].to(dtype).requires_grad_(train)
    if isinstance(module, nn.MultiheadAttention):
        return Side(lambda: module(x, x, x, need_weights=need_weights)[0], (x, *module.parameters()))
    decodes = isinstance(module, (nn.TransformerDecoder, nn.TransformerDecoderLayer))
    return Side(partial(module, *(x, x) if decodes else (x,)), (x, *module.parameters()))


def _timed(side: Side, mode: str) -> Call:
    if mode == "eval":
        return torch.no_grad()(side.call)
    if mode == "train fwd":
        return side.call
    slope = torch.ones_like(side.call())
    return lambda: torch.autograd.grad(side.call(), side.leaves, slope)


def _verdict(*sides: Side) -> Verdict:
    return judge(*map(_results, sides))


def _results(side: Side) -> Tensor:
    """Output and gradients as one tensor."""
    output = side.call()
    results = (output,)
    if output.requires_grad:
        slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        results += torch.autograd.grad(output, side.leaves, slope)
    return torch.cat([x.detach().flatten() for x in results])


def _feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


# PyTorch's function, fasttx's, and their inputs' shapes by batch, length and width.
_FUNCTIONS = {
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        lambda x, w, b: functional.layer_norm(x, w.shape, w, b),
        lambda b, t, d: {"x": (b, t, d), "weight": (d,), "bias": (d,)},
    ),
    "add_layer_norm": (
        lambda x, r, w, b: F.layer_norm(r + x, w.shape, w, b),
        lambda x, r, w, b: functional.add_layer_norm(x, r, w.shape, w, b),
        lambda b, t, d: {"x": (b, t, d), "residual": (b, t, d), "weight": (d,), "bias": (d,)},
    ),
    "softmax": (
        lambda x: F.softmax(x, dim=-1),
        functional.softmax,
        lambda b, t, d: {"x": (b, t, d)},
    ),
    "gelu": (F.gelu, functional.gelu, lambda b, t, d: {"x": (b, t, d)}),
    "gelu tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda b, t, d: {"x": (b, t, d)},
    ),
    "linear": (
        F.linear,
        functional.linear,
        lambda b, t, d: {"x": (b, t, d), "weight": (d, d), "bias": (d,)},
    ),
    "feed_forward": (
        _feed_forward,
        functional.feed_forward,
        lambda b, t, d: {"x": (b, t, d), "w1": (4 * d, d), "b1": (4 * d,), "w2": (d, 4 * d), "b2": (d,)},
    ),
    "attention": (
        F.scaled_dot_product_attention,
        functional.attention,
        lambda b, t, d: dict.fromkeys(("query", "key", "value"), (b, _HEADS, t, d // _HEADS)),
    ),
}  # fmt: skip

# Dropout would cost PyTorch more than fasttx: without it.
_LAYER = {"dropout": 0.0, "batch_first": True}
_WITH_WEIGHTS = "nn.MultiheadAttention, weights"  # torch's default
_MODULES = {
    "nn.LayerNorm": nn.LayerNorm,
    "nn.GELU": lambda d: nn.GELU(),
    "nn.MultiheadAttention": lambda d: nn.MultiheadAttention(d, _HEADS, batch_first=True),
    _WITH_WEIGHTS: lambda d: nn.MultiheadAttention(d, _HEADS, batch_first=True),
    "nn.TransformerEncoderLayer": lambda d: nn.TransformerEncoderLayer(d, _HEADS, 4 * d, **_LAYER),
    "nn.TransformerEncoder": lambda d: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(d, _HEADS, 4 * d, **_LAYER), 6
    ),
    "nn.TransformerDecoderLayer": lambda d: nn.TransformerDecoderLayer(d, _HEADS, 4 * d, **_LAYER),
    "nn.TransformerDecoder": lambda d: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(d, _HEADS, 4 * d, **_LAYER), 6
    ),
}  # fmt: skip

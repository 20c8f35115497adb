"""torch.nn.TransformerEncoderLayer: inference, padded inference, and training."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fasttx
from fasttx.measure import Verdict, judge

from .case import DTYPES, Call, Case, Work, item_size, tensors, worst

_WIDTH, _HEADS, _HIDDEN = 768, 12, 3072
_DROPOUT = 0.1
_SHORT, _LONG = (8, 128), (8, 512)
_LONG_TRAINING = (4, 512)

# (row, (batch, length)): the bars in float32 and in bfloat16.
_BARS = {
    ("eval", _SHORT): (1.1, 1.05),
    ("eval", _LONG): (1.6, 1.05),
    ("62 % valid", _SHORT): (1.25, 1.25),
    ("62 % valid", _LONG): (1.6, 1.25),
    ("train step", _SHORT): (1.5, 1.4),
    ("train step", _LONG_TRAINING): (1.6, 1.6),
}


def cases() -> Iterator[Case]:
    """Each on a short and on a long batch."""
    for index, dtype in enumerate(DTYPES):
        for (row, shape), bars in _BARS.items():
            make = {"eval": _eval, "62 % valid": _padded, "train step": _train}[row]
            yield Case(
                "encoder_layer",
                row,
                f"({shape[0]},{shape[1]},{_WIDTH})",
                dtype,
                partial(make, shape, dtype),
                flops=(3 if row == "train step" else 1) * layer_flops(token_counts(row, *shape)),
                bytes=(4 * _WIDTH + 2 * _HIDDEN) * _WIDTH * item_size(dtype),
                bar=bars[index],
            )


def token_counts(row: str, batch: int, length: int) -> list[int]:
    """How many tokens of each sequence are valid."""
    return lengths(batch, length).tolist() if "valid" in row else [length] * batch


def lengths(batch: int, length: int) -> Tensor:
    """Evenly from a quarter of the length to all of it: 62 % of the tokens."""
    return torch.linspace(length / 4, length, batch).round().long()


def layer_flops(counts: list[int]) -> float:
    """The products of one layer's forward, over valid tokens: linear layers, and attention's two."""
    linear = 2 * (4 * _WIDTH + 2 * _HIDDEN) * _WIDTH
    return sum(n * linear + 4 * n * n * _WIDTH for n in counts)


def _layer(dtype: torch.dtype) -> torch.nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        _WIDTH, _HEADS, _HIDDEN, dropout=_DROPOUT, activation="gelu", batch_first=True
    )
    return layer.to(dtype)


def without_fast_path(call: Call) -> Call:
    """The call, with torch's encoder fast path turned off: what it replaces is sometimes faster."""

    def run() -> object:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return call()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    return run


def _inferring(module: torch.nn.Module, *args: object, **options: object) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: module(*args, **options))


def _eval(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    layer = _layer(dtype).eval()
    x = tensors(dtype, x=(*shape, _WIDTH))["x"]
    ours, theirs = (_inferring(module, x) for module in (fasttx.optimize(copy.deepcopy(layer)), layer))

    def verdict() -> Verdict:
        return judge(ours(), without_fast_path(theirs)(), _inferring(copy.deepcopy(layer).double(), x.double())())

    return Work({"fast path": theirs, "no fast path": without_fast_path(theirs)}, ours, verdict)


def _padded(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """An encoder of one layer, which is what takes torch's nested path."""
    encoder = torch.nn.TransformerEncoder(_layer(dtype), 1, enable_nested_tensor=True).eval()
    flat = torch.nn.TransformerEncoder(_layer(dtype), 1, enable_nested_tensor=False).eval()
    flat.load_state_dict(encoder.state_dict())
    x = tensors(dtype, x=(*shape, _WIDTH))["x"]
    padding = torch.arange(shape[1]) >= lengths(*shape)[:, None]
    ours, nested, padded = (
        _inferring(module, x, src_key_padding_mask=padding)
        for module in (fasttx.optimize(copy.deepcopy(encoder)), encoder, flat)
    )

    def verdict() -> Verdict:
        eager = without_fast_path(padded)()[~padding]
        truth = without_fast_path(
            _inferring(copy.deepcopy(flat).double(), x.double(), src_key_padding_mask=padding)
        )()[~padding]
        return judge(ours()[~padding], eager, truth)

    rivals = {"nested": nested, "fast path": padded, "no fast path": without_fast_path(padded)}
    return Work(rivals, ours, verdict)


def _train(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """Forward, backward, and a step of SGD, after which every weight is a new one."""
    layer = _layer(dtype).train()
    x = tensors(dtype, x=(*shape, _WIDTH))["x"]
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def step(module: torch.nn.Module) -> Call:
        source = x.clone().requires_grad_()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)

        def run() -> None:
            optimizer.zero_grad()
            source.grad = None
            module(source).backward(slope)
            optimizer.step()

        return run

    theirs, ours = step(copy.deepcopy(layer)), step(fasttx.optimize(copy.deepcopy(layer)))
    return Work({"eager": theirs}, ours, partial(judge_training, layer, x, slope))


def judge_training(layer: torch.nn.Module, x: Tensor, slope: Tensor) -> Verdict:
    """The output's and the gradients' errors.

    torch cannot draw fasttx's dropout, but fasttx's reference does, in float64: that is the truth. What error is
    allowed is torch's own, without dropout.
    """

    def results(module: torch.nn.Module, dtype: torch.dtype, dropout: bool) -> tuple[Tensor, Tensor]:
        module = copy.deepcopy(module).to(dtype).train(dropout)
        source = x.to(dtype, copy=True).requires_grad_()
        torch.manual_seed(0)
        output = module(source)
        output.backward(slope.to(dtype))
        # One tensor of all gradients: the largest errors of small ones scatter by more than their budget.
        gradients = [source.grad, *(p.grad for p in module.parameters())]
        return output.detach(), torch.cat([g.flatten() for g in gradients])

    optimized = fasttx.optimize(copy.deepcopy(layer))
    actual = results(optimized, x.dtype, True)
    with fasttx.backend("reference"):
        truth = results(optimized, torch.float64, True)
    eager, eager_truth = (results(layer, dtype, False) for dtype in (x.dtype, torch.float64))
    return worst(
        {
            name: judge(*parts, eager_truth=own)
            for name, *parts, own in zip(("output", "gradients"), actual, eager, truth, eager_truth, strict=True)
        }
    )

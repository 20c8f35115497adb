"""Training an encoder with padding removal, against the same without."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import fasttx

from .case import DTYPES, Call, Case, Work, item_size, tensors
from .encoder_layer import judge_training, layer_flops, lengths

_WIDTH, _HEADS, _HIDDEN, _LAYERS = 768, 12, 3072, 2
_BAR = 1.35


def cases() -> Iterator[Case]:
    """A step on a short and on a long batch."""
    for dtype in DTYPES:
        for shape in ((8, 128), (8, 512)):
            yield Case(
                "padding",
                "train step, 62 % valid",
                f"({shape[0]},{shape[1]},{_WIDTH})",
                dtype,
                partial(_train, shape, dtype),
                flops=3 * _LAYERS * layer_flops(lengths(*shape).tolist()),
                bytes=_LAYERS * (4 * _WIDTH + 2 * _HIDDEN) * _WIDTH * item_size(dtype),
                bar=_BAR,
            )


class _Valid(torch.nn.Module):
    """An encoder's output at the valid tokens of a padded batch."""

    def __init__(self, encoder: torch.nn.TransformerEncoder, valid: Tensor) -> None:
        super().__init__()
        self.encoder, self.valid = encoder, valid

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=~self.valid)[self.valid]


def _train(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """Forward, backward, and a step of SGD, after which every weight is a new one."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(_WIDTH, _HEADS, _HIDDEN, activation="gelu", batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
    valid = torch.arange(shape[1]) < lengths(*shape)[:, None]
    model = _Valid(encoder, valid).to(dtype).train()
    x = tensors(dtype, x=(*shape, _WIDTH))["x"]
    slope = torch.randn(int(valid.sum()), _WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)

    def step(padding: str) -> Call:
        module = fasttx.optimize(copy.deepcopy(model), padding=padding)
        source = x.clone().requires_grad_()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)

        def run() -> None:
            optimizer.zero_grad()
            source.grad = None
            module(source).backward(slope)
            optimizer.step()

        return run

    return Work({"fasttx, padded": step("keep")}, step("remove"), partial(judge_training, model, x, slope))

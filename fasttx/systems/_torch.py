"""The same models on torch.nn's own modules: what training with fasttx is measured against."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttx import nn
from fasttx.train import Run


class TorchRun(Run):
    """A run whose steps are torch.nn's, torch's own dropout included; it is evaluated on fasttx's reference path."""

    def step(self) -> dict[str, float]:
        with torch_modules(self.model):
            return super().step()


@contextlib.contextmanager
def torch_modules(model: torch.nn.Module) -> Iterator[None]:
    """Within, every module of the model is of the class of torch.nn's that its own is derived from."""
    own = {module: type(module) for module in model.modules()}
    for module, kind in own.items():
        theirs = _OTHERS.get(kind) or next((base for base in kind.__mro__ if _is_torchs(base)), None)
        if theirs not in (None, torch.nn.Module):
            module.__class__ = theirs
    try:
        yield
    finally:
        for module, kind in own.items():
            module.__class__ = kind


class _Embedding(nn.TransformerEmbedding):
    """The sum by torch's functions."""

    def forward(
        self,
        token_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        x = F.embedding(token_ids, self.token_weight, self.padding_idx)
        if self.token_scale != 1:
            x = x * self.token_scale
        if self.position_weight is not None:
            if position_ids is None:
                position_ids = torch.arange(offset, offset + token_ids.shape[-1], device=token_ids.device)
            x = x + F.embedding(position_ids, self.position_weight)
        if self.segment_weight is not None:
            segments = torch.zeros_like(token_ids) if segment_ids is None else segment_ids
            x = x + F.embedding(segments, self.segment_weight)
        if self.norm_weight is not None:
            x = F.layer_norm(x, self.norm_weight.shape, self.norm_weight, self.norm_bias, self.eps)
        return F.dropout(x, self.dropout, self.training)


_OTHERS = {nn.TransformerEmbedding: _Embedding}


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules")

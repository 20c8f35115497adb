"""Positional encoding by sines and cosines."""

from collections.abc import Callable

import torch
from torch import Tensor

from fasttx import checks


class SinusoidalPositionalEncoding(torch.nn.Module):
    """dropout(x + encoding): the fixed encoding of positions by Vaswani et al. 2017, section 3.5.

    Position p has sin(p / 10000^(2i / d_model)) in column 2i and the cosine of the same in column
    2i + 1, computed in float64 and rounded once, to x's dtype. x (B, T, d_model), or (T, B,
    d_model) with batch_first=False, or (T, d_model) -> the same shape and dtype; its positions are
    offset, offset + 1, ... : `offset` is how many tokens went before in cached decoding.

    The first max_length positions are kept in a buffer that no state_dict holds; it is made anew
    where x is longer, or of another dtype or device. While torch.compile or torch.export traces,
    positions that the buffer does not hold are computed at every call.

    Raises TypeError where x is not floating or offset is no integer, ValueError where x's shape does
    not fit, x is nested, or offset is negative.
    """

    encoding: Tensor

    def __init__(
        self, d_model: int, dropout: float = 0.0, max_length: int = 5000, batch_first: bool = True
    ) -> None:
        super().__init__()
        checks.require_size("d_model", d_model)
        checks.require_size("max_length", max_length)
        self.d_model = d_model
        self.batch_first = batch_first
        self.dropout = torch.nn.Dropout(dropout)
        self.register_buffer("encoding", self._make(max_length, torch.empty(0)), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        self._check(x, offset)
        batched = x.dim() == 3
        length = x.shape[1 if batched and self.batch_first else 0]
        rows = self._rows(offset, offset + length, x)
        return self.dropout(x + (rows[:, None] if batched and not self.batch_first else rows))

    def _rows(self, start: int, stop: int, x: Tensor) -> Tensor:
        """The encoding of positions start .. stop - 1, as x is."""
        encoding = self.encoding
        if stop > len(encoding) or encoding.dtype != x.dtype or encoding.device != x.device:
            if torch.compiler.is_compiling():
                return _sinusoids(start, stop, self.d_model).to(x)
            length = len(encoding) if stop <= len(encoding) else max(stop, 2 * len(encoding))
            encoding = self.encoding = self._make(length, x)
        return encoding[start:stop]

    def _make(self, length: int, like: Tensor) -> Tensor:
        # An inference tensor, kept, could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            return _sinusoids(0, length, self.d_model).to(like)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        """.to(), .half() and to_empty(): the buffer from float64 again, not from what it was rounded to."""
        super()._apply(fn, recurse)
        self.encoding = self._make(len(self.encoding), self.encoding)
        return self

    def _check(self, x: Tensor, offset: int) -> None:
        checks.require_floating("x", x)
        if x.is_nested:
            raise ValueError("x must not be nested: encode its sequences before they are joined")
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            sizes = f"(B, T, {self.d_model})" if self.batch_first else f"(T, B, {self.d_model})"
            raise ValueError(f"x must have the shape {sizes} or (T, {self.d_model}), got {checks.shape(x)}")
        if not isinstance(offset, int) or isinstance(offset, bool):
            raise TypeError(f"offset must be an integer, got {type(offset).__name__}")
        if offset < 0:
            raise ValueError(f"offset must not be negative, got {offset}")

    def extra_repr(self) -> str:
        return f"{self.d_model}, batch_first={self.batch_first}"


def _sinusoids(start: int, stop: int, width: int) -> Tensor:
    """(stop - start, width) in float64, on the CPU, as not every device has float64."""
    positions = torch.arange(start, stop, dtype=torch.float64, device="cpu")
    # An odd width ends with a sine.
    columns = torch.arange(0, width, 2, dtype=torch.float64, device="cpu")
    angles = positions[:, None] / 10000.0 ** (columns / width)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :width]

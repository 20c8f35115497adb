"""The feed-forward half of a transformer layer as a module."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fasttx import checks

from ._blocks import activation_name, feed_forward, parts
from ._plain import step_aside
from .gelu import GELU

_ACTIVATIONS = {"gelu": GELU, "gelu_tanh": lambda: GELU("tanh"), "relu": torch.nn.ReLU}


class FeedForward(torch.nn.Module):
    """linear2(dropout(activation(linear1(input)))), as one operation where its parts are plain.

    input (..., d_model) -> (..., d_out), in its dtype. linear1 (d_model -> dim_feedforward) and
    linear2 (dim_feedforward -> d_out, by default d_model) are torch.nn.Linear, dropout is a
    torch.nn.Dropout. activation: "gelu", "gelu_tanh" (the tanh approximation), "relu", or any
    callable, module or function, which is fused where it is one of these three. A child that was
    replaced, subclassed, hooked or parametrized is called, and the others with it.

    Raises TypeError for sizes that are no integers and for an activation that is neither a name nor
    callable, ValueError for sizes below 1, an unknown name and a dropout outside of [0, 1].
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        *,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        d_out: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_out = d_model if d_out is None else d_out
        for name, size in (("d_model", d_model), ("dim_feedforward", dim_feedforward), ("d_out", d_out)):
            checks.require_size(name, size)
        self.linear1 = torch.nn.Linear(d_model, dim_feedforward, bias, device=device, dtype=dtype)
        self.activation = _activation(activation)
        self.dropout = torch.nn.Dropout(dropout)
        self.linear2 = torch.nn.Linear(dim_feedforward, d_out, bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            step_aside("feed_forward", "input is nested")
            return self.linear2(self.dropout(self.activation(self.linear1(input))))
        name = activation_name(self.activation)
        return feed_forward(self.linear1, self.activation, self.dropout, self.linear2, input, name)

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each child's name, and why it is not fused, or None where it is."""
        return parts(self)


def _activation(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if callable(activation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a name or callable, got {type(activation).__name__}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)} or callable, got {activation!r}")
    return _ACTIVATIONS[activation]()

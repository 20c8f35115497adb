"""What several architectures share: a linear layer, how weights are drawn, and what sizes and batches have to be."""

from typing import Any

import torch
from torch import Tensor

from fasttx import checks, functional
from fasttx.nn import GELU, TransformerEmbedding

from ._config import Config

ACTIVATIONS = {"gelu": GELU(), "gelu_tanh": GELU("tanh"), "relu": torch.nn.ReLU()}
IGNORED = -100  # a target that has no part in a loss


class Linear(torch.nn.Linear):
    """torch.nn.Linear by fasttx.functional.linear: a row's bits do not depend on the rows beside it."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


def draw_weights(model: torch.nn.Module, std: float = 0.02) -> None:
    """Every matrix anew from N(0, std), every bias 0; the weights of norms stay 1, and entries of padding are 0.

    0.02 is BERT's, at a width of 768; a model of width 64 trains faster from about width ** -0.5.
    """
    for name, values in model.named_parameters():
        if values.dim() > 1:
            torch.nn.init.normal_(values, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(values)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TransformerEmbedding) and module.padding_idx is not None:
                module.token_weight[module.padding_idx].zero_()


def require_sizes(config: Config, *names: str) -> None:
    """Raises unless each of these is a positive integer, or None."""
    for name in names:
        if getattr(config, name) is not None:
            checks.require_size(name, getattr(config, name))


def require_layer(config: Any) -> None:
    """Raises unless its width, heads, feed_forward, dropout, and activation if it has one, are those of a layer."""
    require_sizes(config, "width", "heads", "feed_forward")
    if config.width % config.heads:
        raise ValueError(f"width must be a multiple of heads, got {config.width} and {config.heads}")
    checks.require_probability("dropout", config.dropout)
    activation = getattr(config, "activation", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def require_entries(vocabulary: int, **ids: int | None) -> None:
    """Raises unless each is a token's id, or None."""
    for name, id in ids.items():
        if id is not None and (isinstance(id, bool) or not isinstance(id, int)):
            raise TypeError(f"{name} must be an int, got {type(id).__name__}")
        if id is not None and not 0 <= id < vocabulary:
            raise ValueError(f"{name} must lie in [0, {vocabulary - 1}], got {id}")


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(length, length) bool, True where a query must not see a key, as torch.nn's attn_mask."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)


def require_padding(padding: Tensor | None, token_ids: Tensor, name: str = "padding") -> None:
    """Raises unless it is a bool for each token, True = padding, or None."""
    if padding is None:
        return
    checks.require_tensor(name, padding)
    if padding.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, True = padding, got {padding.dtype}")
    if padding.shape != token_ids.shape:
        raise ValueError(f"{name} must have the tokens' shape {checks.shape(token_ids)}, got {checks.shape(padding)}")


def require_right_padding(padding: Tensor | None, token_ids: Tensor, name: str = "padding") -> None:
    """As `require_padding`; raises too, where it can be read, for a token that stands behind padding in its row."""
    require_padding(padding, token_ids, name)
    if padding is not None and checks.can_be_read(padding) and bool((padding[:, 1:] < padding[:, :-1]).any()):
        raise ValueError(f"{name} must be on the right of each row: positions are counted from the row's beginning")


def valid_targets(name: str, targets: Tensor, token_ids: Tensor, padding: Tensor | None) -> Tensor:
    """The targets, ignored where padded; raises unless there is one for each token."""
    checks.require_integers(name, targets)
    if targets.shape != token_ids.shape:
        raise ValueError(f"{name} must have the tokens' shape {checks.shape(token_ids)}, got {checks.shape(targets)}")
    return targets if padding is None else targets.masked_fill(padding, IGNORED)

"""Padded batches as packed tokens, and back."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from fasttx.checks import has_values


@dataclass(frozen=True)
class Packing:
    """Where the valid tokens of a padded batch stand.

    index (tokens,): their positions among all positions in memory order, sequence after sequence.
    cu_seqlens (B + 1,): where each sequence begins among them. shape: the batch's two leading
    dimensions, (B, T), or (T, B) where it is sequence first.
    """

    index: Tensor
    cu_seqlens: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(valid: Tensor, batch_first: bool = True) -> "Packing":
        """The packing of the tokens where valid (B, T) is True: any pattern, any sequence empty."""
        batch, length = valid.shape
        index = valid.flatten().nonzero().squeeze(1)
        if not batch_first:
            index = index % length * batch + index // length if length else index
        lengths = valid.sum(1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return Packing(index, cu_seqlens, (batch, length) if batch_first else (length, batch))

    def pack(self, x: Tensor) -> Tensor:
        """(*shape, width) -> (tokens, width)."""
        return x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, tokens: Tensor) -> Tensor:
        """(tokens, width) -> (*shape, width), with zeros at the padded positions."""
        width = tokens.shape[-1]
        flat = tokens.new_zeros((self.shape[0] * self.shape[1], width))
        return flat.index_copy_(0, self.index, tokens).view(*self.shape, width)


def packings_of(
    batch_first: bool, *batches: tuple[Tensor, Tensor | None]
) -> list[Packing] | None:
    """How to pack batches, each given with its key padding mask; without one, all tokens are valid.

    None where there is nothing to gain, or a mask is none that torch takes, or more than padding.
    """
    masks = [mask for _, mask in batches if mask is not None]
    if not masks or not all(map(has_values, masks)):
        return None
    valid = [_valid_in(x, mask, batch_first) for x, mask in batches]
    if any(v is None or len(v) != len(valid[0]) for v in valid) or all(bool(v.all()) for v in valid):
        return None
    return [Packing.of(v, batch_first) for v in valid]


def zeroed_by_packing(batch_first: bool, *batches: tuple[Tensor, Tensor | None]) -> Tensor | None:
    """Where in the first batch packing would leave zeros, (B, T, 1) or (T, B, 1): for torch.compile.

    It does not branch on the masks' values, as `packings_of` does. None where that is nowhere.
    """
    x, mask = batches[0]
    if mask is None or not all(_could_pack(*batch, batch_first) for batch in batches):
        return None
    zeroed = mask if mask.dtype == torch.bool else mask == -torch.inf
    for _, mask in batches:
        if mask is not None and mask.dtype != torch.bool:
            zeroed = zeroed & _is_padding(mask)
    return (zeroed if batch_first else zeroed.T)[..., None]


def run_where_packed(
    layers: Iterable[Module],
    x: Tensor,
    packing: Packing,
    can_pack: Callable[[Module], bool],
    packed: Callable[[Module, Tensor], Tensor],
    padded: Callable[[Module, Tensor], Tensor],
) -> Tensor:
    """A padded batch through layers, on packed tokens in those that can, in turns; returns packed tokens."""
    x, is_packed = packing.pack(x), True
    for layer in layers:
        if can_pack(layer):
            x = packed(layer, x if is_packed else packing.pack(x))
            is_packed = True
        else:
            x = padded(layer, packing.unpack(x) if is_packed else x)
            is_packed = False
    return x if is_packed else packing.pack(x)


def takes_remove_padding(original: type[Module]) -> Callable[[Callable], Callable]:
    """Makes a constructor out of one that takes `original`'s arguments and remove_padding."""

    def decorate(init: Callable) -> Callable:
        @functools.wraps(original.__init__)
        def construct(self, *args, remove_padding: bool | None = None, **kwargs) -> None:
            if not (remove_padding is None or isinstance(remove_padding, bool)):
                raise TypeError(f"remove_padding must be True, False or None, got {remove_padding!r}")
            init(self, *args, **kwargs)
            # None leaves it to the class, which optimize() may change.
            if remove_padding is not None:
                self.remove_padding = remove_padding

        signature = inspect.signature(original.__init__)
        keyword = inspect.Parameter(
            "remove_padding", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=bool | None
        )
        construct.__signature__ = signature.replace(parameters=[*signature.parameters.values(), keyword])
        return construct

    return decorate


def _could_pack(x: Tensor, key_padding_mask: Tensor | None, batch_first: bool) -> bool:
    """Whether a batch can be packed, as far as that can be told without the mask's values."""
    if x.dim() != 3:
        return False
    return key_padding_mask is None or (
        tuple(key_padding_mask.shape) == _sizes(x, batch_first)
        and not key_padding_mask.requires_grad
        and (key_padding_mask.dtype == torch.bool or key_padding_mask.is_floating_point())
    )


def _sizes(x: Tensor, batch_first: bool) -> tuple[int, int]:
    return tuple(x.shape[:2] if batch_first else x.shape[1::-1])


def _valid_in(x: Tensor, key_padding_mask: Tensor | None, batch_first: bool) -> Tensor | None:
    if not _could_pack(x, key_padding_mask, batch_first):
        return None
    if key_padding_mask is None:
        return torch.ones(_sizes(x, batch_first), dtype=torch.bool, device=x.device)
    return valid_tokens(key_padding_mask)


def valid_tokens(key_padding_mask: Tensor) -> Tensor | None:
    """Where a key padding mask (bool: True = padding; floating: -inf = padding) keeps a token; None for a bias."""
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    return key_padding_mask == 0 if bool(_is_padding(key_padding_mask)) else None


def _is_padding(mask: Tensor) -> Tensor:
    """Whether a floating mask is 0 and -inf alone."""
    return ((mask == 0) | (mask == -torch.inf)).all()

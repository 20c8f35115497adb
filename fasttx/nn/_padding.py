"""Padded batches as packed tokens, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    if torch.compiler.is_compiling():
        return None
    valid = [_valid_in(x, mask, batch_first) for x, mask in batches]
    if any(v is None or len(v) != len(valid[0]) for v in valid) or all(bool(v.all()) for v in valid):
        return None
    return [Packing.of(v, batch_first) for v in valid]


def _valid_in(x: Tensor, key_padding_mask: Tensor | None, batch_first: bool) -> Tensor | None:
    if x.dim() != 3:
        return None
    sizes = tuple(x.shape[:2] if batch_first else x.shape[1::-1])
    if key_padding_mask is None:
        return torch.ones(sizes, dtype=torch.bool, device=x.device)
    if tuple(key_padding_mask.shape) != sizes or key_padding_mask.requires_grad:
        return None
    if key_padding_mask.dtype != torch.bool and not key_padding_mask.is_floating_point():
        return None
    return valid_tokens(key_padding_mask)


def valid_tokens(key_padding_mask: Tensor) -> Tensor | None:
    """Where a key padding mask (bool: True = padding; floating: -inf = padding) keeps a token; None for a bias."""
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    valid = key_padding_mask == 0
    return valid if bool((valid | (key_padding_mask == -torch.inf)).all()) else None

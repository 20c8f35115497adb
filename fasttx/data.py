"""Batches for training: padding, targets, masks, pairs of sentences, windows of a stream.

Every random choice is the generator's: the same generator state gives the same batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """(ids (B, T) int64, padding (B, T) bool, True where a sequence has no token), T being the longest one's length.

    side: where the padding goes, "right" or "left". Raises ValueError where there is no token at all.
    """
    if side not in ("right", "left"):
        raise ValueError(f'side must be "right" or "left", got {side!r}')
    length = max(map(len, sequences), default=0)
    if length == 0:
        raise ValueError(f"there is nothing to pad: {len(sequences)} sequences, all of them empty")
    ids = torch.full((len(sequences), length), pad_id)
    padding = torch.ones(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, place] = torch.tensor(sequence, dtype=torch.int64)
        padding[row, place] = False
    return ids, padding

"""Counter-based dropout masks: Philox4x32-10 in int64 tensor arithmetic, on any device.

One random word belongs to each (seed, batch, head, row, column), so a mask depends on neither the
device nor the thread count nor on what else is in the batch, and a backward pass can regenerate it
instead of storing it.

Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (the Random123
library).
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK = 2**16

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply_wide(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product."""
    # The multiplier less 2^32 is a negative 30-bit number, so the product fits in int64, and what
    # it lacks, word * 2^32, is added to the high half. The plain product would overflow, which
    # C++ written by torch.compile may take for impossible: the words then come out wrong.
    product = word * (multiplier - 2**32)
    return (product >> 32).add_(word), product.bitwise_and_(_MASK32)


def philox4x32(counter: Words, key: tuple[int | Tensor, int | Tensor]) -> Words:
    """Philox4x32-10: the four random words of each counter.

    counter: four int64 tensors that broadcast together, each taken modulo 2^32. key: two words in
    [0, 2^32), ints or 0-dim int64 tensors. Returns four int64 tensors with values in [0, 2^32),
    broadcast together.
    """
    c0, c1, c2, c3 = (word & _MASK32 for word in counter)
    k0, k1 = key
    # The counter words are broadcast by the rounds themselves: the first ones run on the small,
    # unexpanded tensors.
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_wide(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_wide(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def drop_threshold(p: float) -> int:
    """The words below this are dropped: p as a fraction of 2^32, in [0, 2^32)."""
    return min(round(p * 2**32), _MASK32)


def keep_mask(
    seed: int | Tensor, batch: Tensor, head: Tensor, rows: int, columns: int, p: float
) -> Tensor:
    """Which elements dropout keeps: (B, H, rows, columns) bool, True with probability 1 - p.

    seed: an int or a 0-dim int64 tensor on any device, taken modulo 2^64; its low and high words
    are the key. batch (B,) and head (H,): int64 indices, on the device where the mask is wanted.
    Rows and columns count from 0. Element (b, h, i, j) has the word j % 4 of the counter (j // 4,
    i, head[h], batch[b]).
    """
    device = batch.device
    if isinstance(seed, Tensor):
        seed = seed.to(device=device, dtype=torch.int64)
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    words = torch.arange((columns + 3) // 4, device=device)
    # On a CPU in blocks of rows whose words stay in its cache.
    in_row = max(1, words.numel() * head.numel() * batch.numel())
    whole = device.type != "cpu" or torch.compiler.is_compiling()
    every = torch.arange(rows, device=device)[:, None]
    blocks = [every] if whole else every.split(max(1, _BLOCK // in_row))
    threshold = drop_threshold(p)
    kept = []
    for block in blocks:
        counter = (words, block, head[:, None, None], batch[:, None, None, None])
        # Compared before they are interleaved: bools are an eighth of the words' size.
        kept.append(torch.stack([word >= threshold for word in philox4x32(counter, key)], dim=-1))
    return torch.cat(kept, dim=-3).flatten(-2)[..., :columns]


def matrix_keep_mask(
    seed: int | Tensor, rows: int, columns: int, p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """`keep_mask` of a matrix, (rows, columns) bool: batch and head are 0."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return keep_mask(seed, zero, zero, rows, columns, p)[0, 0]

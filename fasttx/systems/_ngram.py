"""Bits per character of an interpolated n-gram model: what counting alone makes of a text."""

import torch
from torch import Tensor


def bits_per_character(train: str, held_out: str, order: int) -> float:
    """Of characters predicted from the `order` - 1 before them, counted in `train`, in bits.

    Witten and Bell 1991 (method C): after each context h, P(c | h) = (n(hc) + t(h) P(c | shorter h)) / (n(h) + t(h)),
    where n counts and t is how many different characters followed h. Below the empty context lies the uniform chance
    over the characters of both texts.
    """
    characters = sorted(set(train) | set(held_out))
    if len(characters) ** order >= 2**63:
        raise ValueError(f"{order} characters of {len(characters)} do not fit in 64 bits: ask for a lower order")
    number = {c: i for i, c in enumerate(characters)}
    seen, asked = (torch.tensor([number[c] for c in text]) for text in (train, held_out))
    # Those without a full context are left out of both, for every order alike.
    chance = torch.full((len(asked) - order + 1,), 1 / len(characters), dtype=torch.float64)
    for length in range(1, order + 1):
        grams, counts = _grams(seen, length, len(characters)).unique(return_counts=True)
        contexts, kinds = (grams // len(characters)).unique_consecutive(return_counts=True)
        totals = torch.zeros_like(kinds).index_add_(0, torch.searchsorted(contexts, grams // len(characters)), counts)
        wanted = _grams(asked, length, len(characters))[order - length :]
        n, total, kind = (
            _look_up(*pair)
            for pair in (
                (grams, counts, wanted), (contexts, totals, wanted // len(characters)),
                (contexts, kinds, wanted // len(characters)),
            )
        )  # fmt: skip
        chance = torch.where(total > 0, (n + kind * chance) / (total + kind).clamp(min=1), chance)
    return -chance.log2().mean().item()


def _grams(text: Tensor, length: int, base: int) -> Tensor:
    """Each run of `length` characters as one number, by where it begins."""
    places = len(text) - length + 1
    grams = torch.zeros(places, dtype=torch.int64)
    for i in range(length):
        grams = grams * base + text[i : i + places]
    return grams


def _look_up(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """The value of each wanted key, 0 where it is not among the sorted keys."""
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, values[places], 0).double()

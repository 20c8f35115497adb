"""Attention over parts of the keys, made one."""

import math

import torch
from torch import Tensor

from fasttx import checks, reference
from fasttx.dispatch import choose

from ._attention_checks import check_lse


def merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attention over each of two parts of them: output and lse.

    out1, out2 (B, H, T, D) and lse1, lse2 (B, H, T), or packed (total tokens, H, D) and (H, total tokens): what
    attention(..., return_lse=True) gave for the same queries over the two parts, without dropout. The output has out1's
    dtype, the lse is float32 (float64 for float64). Merging is associative, so any number of parts can be merged in
    turn, as they come around a ring of machines. A query with nothing to attend to in either part gives zeros,
    lse = -inf, and zero gradients.

    Milakov and Gimelshein 2018; Liu et al. 2023 (ring attention).
    """
    for name, out in (("out1", out1), ("out2", out2)):
        checks.require_floating(name, out)
        if out.dim() not in (3, 4):
            raise checks.ArgumentError(
                f"{name} must be (batch, heads, length, width) or (total tokens, heads, width), got {checks.shape(out)}"
            )
    if out2.shape != out1.shape:
        raise checks.ArgumentError(f"out2 must have out1's shape {checks.shape(out1)}, got {checks.shape(out2)}")
    if out2.dtype != out1.dtype:
        raise checks.KindError(f"out2 is {out2.dtype} but out1 is {out1.dtype}: use one dtype")
    rows = tuple(out1.shape[:-1]) if out1.dim() == 4 else (out1.shape[1], out1.shape[0])
    check_lse("lse1", lse1, rows, out1)
    check_lse("lse2", lse2, rows, out1)
    checks.require_same_device("out1", out1, lse1=lse1, out2=out2, lse2=lse2)

    if choose("merge_attention", (out1, out2), backend) == "reference":
        return reference.merge_attention(out1, lse1, out2, lse2)
    wide = torch.promote_types(out1.dtype, torch.float32)
    lse1, lse2 = lse1.to(wide), lse2.to(wide)
    # Finite numbers stand for -inf until the end: else its gradients would not be zero, but NaN.
    empty = (lse1 == -math.inf) & (lse2 == -math.inf)
    lse1, lse2 = lse1.masked_fill(empty, 0.0), lse2.masked_fill(empty, 0.0)
    difference = lse1 - lse2
    lse = torch.maximum(lse1, lse2) + torch.log1p(torch.exp(-difference.abs()))
    share = difference.sigmoid()
    of_rows = (share, empty) if out1.dim() == 4 else (share.mT, empty.mT)
    share, nothing = (x[..., None] for x in of_rows)
    output = torch.lerp(out2.to(wide), out1.to(wide), share).masked_fill(nothing, 0.0)
    return output.to(out1.dtype), lse.masked_fill(empty, -math.inf)

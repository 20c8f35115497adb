"""Masked softmax as a module."""

import torch
from torch import Tensor

from fasttx import functional


class MaskedSoftmax(torch.nn.Module):
    """softmax(input + mask) along `dim` by fasttx.functional.softmax; what is masked out gets zero.

    input of any floating shape -> the same shape and dtype. mask, broadcastable to input: bool, True
    = KEEP, as in torch's scaled_dot_product_attention and the opposite of MultiheadAttention's
    attn_mask and key_padding_mask, where True = ignore; or floating, of input's dtype or float32,
    added, and differentiable. is_causal: row i of the last two dimensions keeps the columns j <= i;
    `dim` must then be the last. A row that keeps nothing gives zeros with zero gradients, where
    torch's softmax of -inf gives NaN.

    Raises TypeError for other dtypes, ValueError for a mask, a `dim` or a causal input that does not
    fit.
    """

    def __init__(self, dim: int = -1, is_causal: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.is_causal = is_causal

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.softmax(input, mask=mask, is_causal=self.is_causal, dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, is_causal={self.is_causal}"

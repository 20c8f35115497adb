"""The packing of a linear layer's weight in the order in which the matrix kernels read it."""

import torch

from ._library import define


def _pack_weight(weight, on_vectors=False):
    # The size depends on the tile of the instruction set in use, which only the kernel knows.
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty((size,), dtype=torch.uint8)


pack_weight = define("pack_weight(Tensor weight, bool on_vectors=False) -> Tensor", _pack_weight)

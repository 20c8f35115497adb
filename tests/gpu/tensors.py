"""CPU tensors as the memory of a launch."""

import torch

from gpu.ptx import Allocation


def allocation(tensor: torch.Tensor, name: str) -> Allocation:
    """The bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return Allocation(tensor.data_ptr(), 0, name)
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return Allocation(tensor.data_ptr(), span * tensor.element_size(), name)

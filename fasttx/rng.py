"""Seeds for dropout, drawn from PyTorch's generator: torch.manual_seed governs them."""

import torch
from torch import Tensor


def draw_seed() -> Tensor:
    """A fresh seed: one int64 on the CPU."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64)

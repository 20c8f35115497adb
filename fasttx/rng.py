"""Seeds for dropout, drawn from PyTorch's generator: torch.manual_seed governs them."""

import torch
from torch import Tensor


def draw_seed() -> Tensor:
    """A fresh seed: one int64 on the CPU; on the GPU while a CUDA graph is captured, so that each replay draws anew."""
    device = "cpu"
    if not torch.compiler.is_compiling() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        device = "cuda"
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)

"""Whether the Triton kernels can run a call, and in words why not; nothing here imports triton before it is there."""

import functools
import importlib.util
from collections.abc import Callable

from torch import Tensor

from fasttx import _gpu

WIDEST_HEAD = 256
WIDEST_ENTRY = 8192  # of an embedding

# Of an op, why its kernels cannot take a call on these tensors, or None; the ops that are not here have no kernels.
_Refusal = Callable[[tuple[Tensor | None, ...]], str | None]
OPS: dict[str, _Refusal] = {}


def _takes_any(tensors: tuple[Tensor | None, ...]) -> str | None:
    return None


OPS |= dict.fromkeys(
    (
        "softmax", "layer_norm", "add_layer_norm", "gelu", "bias_gelu", "linear", "feed_forward", "feed_forward_block",
        "linear_cross_entropy",
    ),
    _takes_any,
)  # fmt: skip


def _takes_entries(tensors: tuple[Tensor | None, ...]) -> str | None:
    width = tensors[0].shape[-1]
    if width > WIDEST_ENTRY:
        return f"entries are {width} wide, and a kernel holds rows of up to {WIDEST_ENTRY}"
    return None


OPS["embedding"] = _takes_entries


def _takes_attention(tensors: tuple[Tensor | None, ...]) -> str | None:
    widest = max(x.shape[-1] for x in tensors if x is not None)
    if widest > WIDEST_HEAD:
        return f"heads are {widest} wide, and a kernel holds rows of up to {WIDEST_HEAD}"
    return None


OPS |= dict.fromkeys(("attention", "attention_varlen"), _takes_attention)
OPS |= dict.fromkeys(("self_attention", "attention_block", "attention_block_varlen"), _takes_any)


def refusal(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why the Triton kernels cannot run `op` on these tensors (the first decides dtype and device), or None."""
    if not _is_installed():
        return "triton is not installed (pip install triton)"
    reason = _gpu.lacking(tensors[0].device) or _gpu.refusal(tensors)
    if reason is not None:
        return reason
    return OPS[op](tensors) if op in OPS else f"there is no Triton kernel for {op}"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None

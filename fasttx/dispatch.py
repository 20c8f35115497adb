"""Which backend runs a call, and why the others do not.

Every op has an ordered list of backends. `auto` takes the first that supports the call; a backend that is named - by
the `backend=` argument, `with fasttx.backend(...)` or FASTTX_BACKEND - is used or the call raises with the reason.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling

BACKENDS = ("cuda", "triton", "cpu", "reference")
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class UnsupportedError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


def _load_extension():
    """The compiled extension, or None and the reason."""
    try:
        from fasttx import _C
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            return None, (
                "the C++ extension is not part of this installation (no C++ compiler was found "
                "when it was installed)"
            )
        return None, f"the C++ extension could not be loaded: {error}"
    wanted = os.environ.get("FASTTX_ISA")
    if wanted:
        _C.set_isa(wanted)
    return _C, None


extension, extension_missing = _load_extension()


def _refusal_by_cpu(tensors: tuple[Tensor | None, ...]) -> str | None:
    if extension is None:
        return extension_missing
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return f"a tensor is on {tensor.device}, not on the CPU"
        if tensor.layout is not torch.strided:
            return f"a tensor has the layout {tensor.layout}"
        if tensor.is_nested:
            return "a tensor is nested"
        if tensor.dtype is not dtype:
            return f"dtypes differ: {dtype} and {tensor.dtype}"
    if dtype not in _CPU_DTYPES:
        return f"{dtype} is not float32, bfloat16, float16 or float64"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on: PyTorch's casting rules apply, which the reference follows"
    return None


def _refusal_by_triton(tensors: tuple[Tensor | None, ...]) -> str | None:
    from fasttx.kernels import availability

    return availability.refusal()


def _refusal_by_cuda(tensors: tuple[Tensor | None, ...]) -> str | None:
    return "this version of fasttx contains no CUDA kernels"


_REFUSALS: dict[str, Callable[[tuple[Tensor | None, ...]], str | None]] = {
    "cuda": _refusal_by_cuda,
    "triton": _refusal_by_triton,
    "cpu": _refusal_by_cpu,
    "reference": lambda tensors: None,
}
_ORDER_CPU = ("cpu", "reference")
_ORDER_GPU = ("cuda", "triton", "reference")


class _Requested(threading.local):
    name: str = os.environ.get("FASTTX_BACKEND") or "auto"


_requested = _Requested()


def _check_name(name: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name


_check_name(_requested.name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context every fasttx op of this thread runs on the named backend, or raises with the reason.

    `name` is "reference", "cpu", "triton", "cuda", or "auto" (the first that supports the call). An op's own `backend=`
    argument goes before the context, and the context before the environment variable FASTTX_BACKEND.
    """
    previous = _requested.name
    _requested.name = _check_name(name)
    try:
        yield
    finally:
        _requested.name = previous


@dataclass(frozen=True)
class Decision:
    """What one call ran on: the op, the backend taken, and why each earlier backend in the list was not."""

    op: str
    backend: str
    refusals: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refusals)
        return f"{self.op}: {self.backend}" + (f" ({reasons})" if reasons else "")


# Who wants to hear of decisions: explain() adds itself here while it runs.
listeners: list[Callable[[Decision], None]] = []


_autocast_enabled = torch._C._is_any_autocast_enabled
_are_plain = None if extension is None else extension.are_plain


def runs_on_cpu(requested: str | None, *tensors: Tensor | None) -> bool:
    """Whether `choose` would take the CPU kernels for these tensors, at a fraction of its price.

    False where that takes a closer look, and where torch.compile has to follow it: with the detailed checks, then, and
    with `choose`.
    """
    return (
        requested is None
        and _requested.name == "auto"
        and _are_plain is not None
        and not listeners
        and not _autocast_enabled()
        and not is_compiling()
        and _are_plain(*tensors)
    )


def choose(
    op: str,
    tensors: tuple[Tensor | None, ...],
    requested: str | None = None,
    *,
    cpu_refusal: str | None = None,
) -> str:
    """The backend for a call of `op` on these tensors (the first one decides dtype and device).

    `cpu_refusal` is the op's own reason why the CPU kernels cannot take the call. Raises UnsupportedError where a
    backend was named and refuses, ValueError where it is unknown.
    """
    name = _requested.name if requested is None else _check_name(requested)
    order = (name,) if name != "auto" else _ORDER_CPU if tensors[0].is_cpu else _ORDER_GPU
    refusals = ()
    for candidate in order:
        reason = _REFUSALS[candidate](tensors)
        if reason is None and candidate == "cpu":
            reason = cpu_refusal
        if reason is None:
            if listeners:
                for listen in listeners:
                    listen(Decision(op, candidate, refusals))
            return candidate
        refusals += ((candidate, reason),)
    raise UnsupportedError(f"{op} cannot run on the backend {name!r}: {refusals[0][1]}")


def takes_cpu(op: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether `choose` takes the CPU kernels for a call; raises as it does."""
    return runs_on_cpu(None, *tensors) or choose(op, tensors) == "cpu"

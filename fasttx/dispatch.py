"""Which backend runs a call, and why the others do not.

Every op has an ordered list of backends. `auto` takes the first that supports the call; a backend that is named - by
the `backend=` argument, `with fasttx.backend(...)` or FASTTX_BACKEND - is used or the call raises with the reason.
What `auto` takes is told to explain(); where it is no kernel, fasttx.strict() makes it an error, and
fasttx.warn_on_fallback() a warning.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from fasttx import _callers, _cuda, _gpu

BACKENDS = ("cuda", "triton", "cpu", "reference")
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# By op, the operator of the `fasttx` library that a backend with kernels runs; attention over packed sequences is
# attention told where they begin, and its weights alone are those of no values.
KERNELS = {
    "attention": "attention_fwd",
    "attention_varlen": "attention_fwd",
    "attention_weights": "attention_fwd",
    "attention_block": "attention_block_fwd",
    "attention_block_varlen": "attention_block_fwd",
    "cached_attention_block": "cached_attention_block_fwd",
    "self_attention": "self_attention_fwd",
    "softmax": "softmax_fwd",
    "layer_norm": "layer_norm_fwd",
    "add_layer_norm": "add_layer_norm_fwd",
    "gelu": "gelu_fwd",
    "bias_gelu": "gelu_fwd",
    "linear": "linear_fwd",
    "feed_forward": "feed_forward_fwd",
    "feed_forward_block": "feed_forward_block_fwd",
    "linear_cross_entropy": "linear_cross_entropy_fwd",
    "embedding": "embedding_fwd",
}


class UnsupportedError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


class FallbackError(UnsupportedError):
    """Under fasttx.strict(): a call would have left the kernels; the message says which, where and why."""


class FallbackWarning(UserWarning):
    """After fasttx.warn_on_fallback(): a call left the kernels; the message says which, where and why."""


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
# What the CUDA kernels in it are compiled for, as in "sm_80 sm_90 compute_80"; empty where there are none.
cuda_architectures: str = "" if extension is None else extension.cuda_architectures()

_TENSORS = (Tensor, Parameter, FakeTensor, FunctionalTensor)


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether operators see in it what they see in a torch.Tensor.

    A subclass with a __torch_function__ or __torch_dispatch__ of its own, as quantized weights have, may know how to
    take part in torch's operators, and knows none of fasttx's.
    """
    kind = type(tensor)
    return kind in _TENSORS or (
        getattr(kind.__torch_function__, "__func__", kind.__torch_function__) in _FUNCTION_IMPLS
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


# Tensor's and Parameter's.
_FUNCTION_IMPLS = (Tensor.__torch_function__.__func__, Parameter.__torch_function__)


def _refusal_by_cpu(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
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
        if not is_plain_tensor(tensor):
            return f"a tensor is a {type(tensor).__name__}, which may know torch's operators only"
        if tensor.dtype is not dtype:
            return f"dtypes differ: {dtype} and {tensor.dtype}"
    if dtype not in _CPU_DTYPES:
        return f"{dtype} is not float32, bfloat16, float16 or float64"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on: PyTorch's casting rules apply, which the reference follows"
    return None


def _refusal_by_rules(device: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Where rules of PyTorch's own apply to a call, which the reference follows."""
    if torch.is_autocast_enabled(device):
        return "autocast is on: PyTorch's casting rules apply, which the reference follows"
    for tensor in tensors:
        if tensor is not None and not is_plain_tensor(tensor):
            return f"a tensor is a {type(tensor).__name__}, which may know torch's operators only"
    return None


def _refusal_by_triton(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    from fasttx.kernels import availability

    reason = availability.refusal(op, tensors) or _refusal_by_rules("cuda", tensors)
    if reason is None:
        # Its import registers the kernels, and takes triton a second: not before they are wanted.
        from fasttx.kernels import register  # noqa: F401
    return reason


def _refusal_by_cuda(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    if extension is None:
        return extension_missing
    return _cuda.refusal(op, tensors, cuda_architectures) or _refusal_by_rules("cuda", tensors)


_REFUSALS: dict[str, Callable[[str, tuple[Tensor | None, ...]], str | None]] = {
    "cuda": _refusal_by_cuda,
    "triton": _refusal_by_triton,
    "cpu": _refusal_by_cpu,
    "reference": lambda op, tensors: None,
}
# By the device of a call's first tensor: what `auto` tries, in this order. Ops of which the CUDA C++ kernels are asked
# first, and on what evidence: _cuda.PREFERENCES.
_ORDER_CPU = ("cpu", "reference")
_ORDER_GPU = ("triton", "cuda", "reference")
_ORDER_GPU_CUDA_FIRST = ("cuda", "triton", "reference")


def _order(op: str, first: Tensor) -> tuple[str, ...]:
    """What `auto` tries for an op, by its first tensor."""
    if not first.is_cuda:
        return _ORDER_CPU if first.is_cpu else _ORDER_GPU
    prefers = _gpu.lacking(first.device) is None and _cuda.is_preferred(op, first.device)
    return _ORDER_GPU_CUDA_FIRST if prefers else _ORDER_GPU


def _flag(variable: str) -> bool:
    value = os.environ.get(variable) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{variable} must be 0 or 1, got {value!r}")
    return value == "1"


class _Requested(threading.local):
    name: str = os.environ.get("FASTTX_BACKEND") or "auto"
    strict: bool = _flag("FASTTX_STRICT")


class _Warnings:
    """Whether fallbacks are warned of, in every thread, and which have been: (op, reason)."""

    wanted: bool = _flag("FASTTX_WARN")
    given: set[tuple[str, str]] = set()


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


def requested_backend() -> str:
    """What the innermost `backend` context of this thread names, else FASTTX_BACKEND, else "auto"."""
    return _requested.name


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Within this context, a call of this thread that would leave the kernels raises FallbackError with the reason.

    That is an op that no kernel takes, and a module that runs its original forward, or calls a child that would else be
    fused. What the user named is no fallback, such as `backend="reference"`, and neither is a module that fasttx does
    not know. FASTTX_STRICT=1 is this context around everything; enabled=False is the way out of one.
    """
    previous = _requested.strict
    _requested.strict = enabled
    try:
        yield
    finally:
        _requested.strict = previous


def warn_on_fallback(enabled: bool = True) -> None:
    """From now on, where a call leaves the kernels, FallbackWarning says so: once for each op and reason.

    In every thread, and not while torch.compile traces. To enable it again is to hear of all again. FASTTX_WARN=1 does
    it from the start.
    """
    _Warnings.wanted = enabled
    _Warnings.given.clear()


@dataclass(frozen=True)
class Decision:
    """What one call ran on: the op, the backend taken, why each earlier backend in the list was not, and the operator.

    The backend is one of BACKENDS, or "original": the code of the module itself, where its fused form was refused; or
    "parts": the operations that it joins, which decide for themselves.
    """

    op: str
    backend: str
    refusals: tuple[tuple[str, str], ...] = ()

    @property
    def kernel(self) -> str:
        """The operator that ran, of the library `fasttx`, or `fasttx_cuda` on that backend; empty where none did."""
        return "" if self.backend in ("reference", "original", "parts") else KERNELS.get(self.op, "")

    @property
    def is_fallback(self) -> bool:
        """Whether the call ran on no kernel, and nobody had asked for that."""
        return bool(self.refusals) and self.backend in ("reference", "original")

    @property
    def reason(self) -> str:
        """Why not otherwise, in words; empty where the first backend took the call."""
        if self.backend == "original":
            return "; ".join(reason for _, reason in self.refusals)
        return "; ".join(f"not {name}: {reason}" for name, reason in self.refusals)

    def __str__(self) -> str:
        return f"{self.op}: {self.backend}" + (f" ({self.reason})" if self.refusals else "")


# Who wants to hear of decisions: explain() adds itself here while it runs.
listeners: list[Callable[[Decision], None]] = []


def report(op: str, backend: str, refusals: tuple[tuple[str, str], ...] = ()) -> None:
    """Tells whoever wants to know what a call is about to run on; raises FallbackError under strict()."""
    if not listeners and not (refusals and (_requested.strict or _Warnings.wanted)):
        return
    decision = Decision(op, backend, refusals)
    for listen in listeners:
        listen(decision)
    if decision.is_fallback:
        if _requested.strict:
            raise FallbackError(_fallback(decision, "would run"))
        if _Warnings.wanted and not is_compiling() and (op, decision.reason) not in _Warnings.given:
            _Warnings.given.add((op, decision.reason))
            warnings.warn(_fallback(decision, "runs"), FallbackWarning, stacklevel=3)


def _fallback(decision: Decision, verb: str) -> str:
    place = "" if is_compiling() else _callers.path()
    on = "in the module's own code" if decision.backend == "original" else f"on the {decision.backend}"
    return f"{decision.op}{place and ' of '}{place} {verb} {on}: {decision.reason}"


_autocast_enabled = torch._C._is_any_autocast_enabled
if extension is not None:
    extension.watch(_requested, listeners)
_runs_on_cpu = None if extension is None else extension.runs_on_cpu
_layers_run_on_cpu = None if extension is None else extension.layers_run_on_cpu


def runs_on_cpu(requested: str | None, *tensors: Tensor | None) -> bool:
    """Whether `choose` would take the CPU kernels for these tensors, at a fraction of its price.

    False where that takes a closer look, and where torch.compile has to follow it: with the detailed checks, then, and
    with `choose`.
    """
    return requested is None and extension is not None and not is_compiling() and _runs_on_cpu(*tensors)


def layers_run_on_cpu(requested: str | None, input: Tensor, *layers: Tensor | None) -> bool:
    """The same of linear layers that fit their input, each a weight and a bias."""
    return requested is None and extension is not None and not is_compiling() and _layers_run_on_cpu(input, *layers)


def choose(
    op: str,
    tensors: tuple[Tensor | None, ...],
    requested: str | None = None,
    *,
    kernel_refusal: str | None = None,
) -> str:
    """The backend for a call of `op` on these tensors (the first one decides dtype and device).

    `kernel_refusal` is the op's own reason why no backend's kernels can take the call. Raises UnsupportedError where a
    backend was named and refuses, ValueError where it is unknown.
    """
    name = _requested.name if requested is None else _check_name(requested)
    order = (name,) if name != "auto" else _order(op, tensors[0])
    refusals = ()
    for candidate in order:
        reason = _REFUSALS[candidate](op, tensors)
        if reason is None and candidate != "reference":
            reason = kernel_refusal
        if reason is None:
            report(op, candidate, refusals)
            return candidate
        refusals += ((candidate, reason),)
    raise UnsupportedError(f"{op} cannot run on the backend {name!r}: {refusals[0][1]}")


def _widest_head() -> int:
    from fasttx.kernels import availability

    return availability.WIDEST_HEAD


def takes_kernel(op: str, tensors: tuple[Tensor | None, ...], head_width: int = 0) -> bool:
    """Whether one operation that joins several, and is no function of its own, is to run; else each chooses.

    head_width: where attention is among them, which Triton has kernels for up to some width.
    """
    if runs_on_cpu(None, *tensors):
        return True
    if _autocast_enabled():
        report(op, "parts", (("one operation", "autocast is on, whose casts come between its parts"),))
        return False
    # Where a backend is named or the kernels refuse, each operation says so itself.
    backend = "triton" if tensors[0].is_cuda else "cpu"
    if _requested.name not in ("auto", backend) or _REFUSALS[backend](op, tensors) is not None:
        return False
    if backend == "triton" and head_width > _widest_head():
        return False
    report(op, backend)
    return True

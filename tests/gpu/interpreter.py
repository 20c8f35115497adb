"""Triton's interpreter for quick runs, mended where version 3.9 is wrong: bfloat16, TF32, autotuning.

    with interpreted():
        kernel[grid](x, y, n, BLOCK=1024)  # CPU tensors; any @triton.jit kernel, no TRITON_INTERPRET needed

It computes a block at a time in numpy and sees neither layouts, nor shared memory, nor masks that the hardware would
need: that is the emulator's part (driver.py). libdevice, inline assembly and tensor descriptors in TF32 are not mended.
"""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from gpu.driver import StubDriver
from gpu.ptx.types import bf16_to_f32, f32_to_bf16

_original = {
    name: getattr(InterpreterBuilder, name)
    for name in ("cast_impl", "binary_op", "unary_op", "create_fma", "create_fp_to_fp", "create_dot", "create_fabs")
}


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> np.ndarray:
    """bfloat16, which the interpreter keeps as its bits, as float32."""
    return bf16_to_f32(np.asarray(handle.data).view(np.uint16))


def _narrow(values: np.ndarray) -> TensorHandle:
    return TensorHandle(f32_to_bf16(np.asarray(values, np.float32)).reshape(np.shape(values)), tl.bfloat16)


def _cast(self, source: TensorHandle, kind) -> TensorHandle:
    """Casts to bfloat16 round to nearest even, and those from it are of values, not of bits."""
    to_bf16 = kind.scalar == tl.bfloat16
    if to_bf16 and _is_bf16(source):
        return source
    if _is_bf16(source):
        return _original["cast_impl"](self, TensorHandle(_widen(source), tl.float32), kind)
    if to_bf16:
        return _narrow(source.data.astype(np.float32))
    if source.dtype.scalar == kind.scalar:
        return source
    return TensorHandle(source.data.astype(interpreter._get_np_dtype(kind)), kind.scalar)


def _float_to_float(self, source: TensorHandle, kind, rounding) -> TensorHandle:
    if _is_bf16(source) or kind.scalar == tl.bfloat16:
        return _cast(self, source, kind)
    return _original["create_fp_to_fp"](self, source, kind, rounding)


def _binary(self, left: TensorHandle, right: TensorHandle, operation) -> TensorHandle:
    if not _is_bf16(left):
        return _original["binary_op"](self, left, right, operation)
    result = operation(_widen(left), _widen(right))
    return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _narrow(result)


def _unary(self, argument: TensorHandle, operation) -> TensorHandle:
    if not _is_bf16(argument):
        return _original["unary_op"](self, argument, operation)
    return _narrow(operation(_widen(argument)))


def _absolute(self, argument: TensorHandle) -> TensorHandle:
    return _narrow(np.abs(_widen(argument))) if _is_bf16(argument) else _original["create_fabs"](self, argument)


def _fused(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    if not _is_bf16(z):
        return _original["create_fma"](self, x, y, z)
    return _narrow((_widen(x).astype(np.float64) * _widen(y) + _widen(z)).astype(np.float32))


def _dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision, imprecise) -> TensorHandle:
    """Products of bfloat16 values; float32 operands are cut to TF32 where that is the precision, as Triton's code
    does."""
    tf32 = str(precision).upper().endswith("TF32")

    def operand(handle: TensorHandle) -> TensorHandle:
        if _is_bf16(handle):
            return TensorHandle(_widen(handle), tl.float32)
        if tf32 and handle.dtype.scalar == tl.float32:
            bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
            return TensorHandle(bits.view(np.float32), tl.float32)
        return handle

    return _original["create_dot"](self, operand(a), operand(b), d, precision, imprecise)


_MENDED = {
    "cast_impl": _cast,
    "create_fp_to_fp": _float_to_float,
    "binary_op": _binary,
    "unary_op": _unary,
    "create_fabs": _absolute,
    "create_fma": _fused,
    "create_dot": _dot,
}


@functools.cache
def _interpretable(function) -> InterpretedFunction:
    return InterpretedFunction(function)


def _launch(self: JITFunction, *arguments, grid, warmup, **options) -> None:
    kernel = _interpretable(self.fn)
    GridExecutor(kernel.rewrite(), kernel.arg_names, grid, self.pre_run_hooks)(*arguments, **options)


def _call(self: JITFunction, *arguments, **options):
    """A device function, with the language patched for as long as it runs (Triton's own call leaves it so for good)."""
    scope = interpreter._patch_lang(self.fn)
    try:
        return _interpretable(self.fn).rewrite()(*arguments, **options)
    finally:
        scope.restore()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs every Triton launch inside in the interpreter; with autotuning, the first configuration."""
    driver = triton.runtime.driver
    previous = driver._active
    driver.set_active(StubDriver(GPUTarget("cuda", 80, 32), 0))
    try:
        with (
            mock.patch.multiple(InterpreterBuilder, **_MENDED),
            mock.patch.multiple(JITFunction, run=_launch, __call__=_call),
        ):
            yield
    finally:
        driver._active = previous

"""Fused attention, feed-forward and layer norm kernels behind modules that drop in for PyTorch's.

fasttx.functional   the operations
fasttx.reference    what each of them computes, in plain PyTorch
fasttx.nn           drop-in modules
fasttx.optimize     swaps a model's modules for them, in place; fasttx.restore swaps back
fasttx.backend      a context in which one backend runs; fasttx.explain says what ran, and why
fasttx.strict       a context in which leaving the kernels is an error; fasttx.warn_on_fallback warns instead
fasttx.memory       what is kept between calls; fasttx.empty_cache frees it
"""

import warnings as _warnings

from fasttx import functional, nn, reference
from fasttx._memory import empty_cache, memory
from fasttx.dispatch import FallbackError, FallbackWarning, UnsupportedError, backend, strict, warn_on_fallback
from fasttx.dispatch import extension_missing as _extension_missing
from fasttx.packing import invalidate as invalidate_packed_weights
from fasttx.patch import explain, optimize, restore

__version__ = "0.1.0"
__all__ = [
    "FallbackError",
    "FallbackWarning",
    "UnsupportedError",
    "backend",
    "empty_cache",
    "explain",
    "functional",
    "invalidate_packed_weights",
    "memory",
    "nn",
    "optimize",
    "reference",
    "restore",
    "strict",
    "warn_on_fallback",
]

if _extension_missing is not None:
    _warnings.warn(
        f"fasttx runs on its reference path, without its kernels: {_extension_missing}",
        RuntimeWarning,
        stacklevel=2,
    )

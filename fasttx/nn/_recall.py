"""What was found out about a module, for as long as nothing about it changes.

To ask every child of a layer, at every call, whether it is still plain and its weights still those that were packed
takes as long as a small layer's kernels. A snapshot of all attributes by identity - children, hooks, parameters, sizes,
flags - and of the weights' values is compared in a twentieth of that.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module

from fasttx import packing
from fasttx._weak import WeakCache
from fasttx.dispatch import extension

from ._plain import has_global_hooks

_known = WeakCache()
packing.dependents.append(_known)
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active


def is_transformed() -> bool:
    """Whether a function transform looks on: vmap makes one call of attention's, and many of an operation around it."""
    return not is_compiling() and _are_functorch_transforms_active()


def is_observed() -> bool:
    """Whether a compiler, a function transform or a hook of every module looks on: no time to recall or remember."""
    return is_compiling() or _are_functorch_transforms_active() or has_global_hooks()


def recall(module: Module) -> Any | None:
    """What `remember` was given for the module; None where it, or anything that goes with it, has changed since."""
    known = _known.get(module)
    return known[1] if known is not None and known[0].holds(module) else None


def remember(module: Module, value: Any, weights: Iterable[Tensor] = (), others: Iterable[object] = ()) -> None:
    """Keeps a value that depends on nothing but the module with all within, the values of weights, and other objects.

    Of those it is what they have for attributes that counts. The value must not lead to the module.
    """
    if extension is not None:
        _known.set(module, (extension.Snapshot([*module.modules(), *others], list(weights)), value))

"""The modules that a call comes from. Frames tell, so that modules need not keep track."""

import sys
from collections.abc import Iterator

from torch.nn import Module


def modules() -> Iterator[Module]:
    """The modules whose methods are running, innermost first, each as often as it is."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Module):
            yield caller
        frame = frame.f_back


def path() -> str:
    """The innermost running module's name within the outermost, or its class where it has none; empty without one."""
    running = list(modules())
    if not running:
        return ""
    for name, module in running[-1].named_modules():
        if module is running[0] and name:
            return name
    return type(running[0]).__name__

"""Packages that a part of fasttx needs beside torch, imported when that part is called."""

import importlib
from types import ModuleType


class MissingPackageError(ImportError):
    """A package that this call needs is not installed; the message says what installs it."""


def import_optional(module: str, extra: str) -> ModuleType:
    """`module`, which the extra `extra` of fasttx installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingPackageError(f'this needs {package} ({error}): pip install "fasttx[{extra}]"') from error

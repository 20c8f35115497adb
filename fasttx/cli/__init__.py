"""The commands of `python -m fasttx`: each module adds its arguments, and runs to an exit code."""

import importlib
from types import ModuleType


class CommandError(Exception):
    """What keeps a command from starting; the message says what to do about it."""


def need(module: str, package: str | None = None, install: str = 'pip install "fasttx[demo]"'):
    """Imports what only this command uses, or says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.split(".")[0]
        raise CommandError(f"this command needs {name} ({error}): {install}") from error


def console() -> ModuleType:
    """rich's console on standard output, wide enough for tables where that is no terminal."""
    made = need("rich.console").Console(highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, 140)
    return made

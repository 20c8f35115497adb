"""The commands of `python -m fasttx`: each module adds its arguments, and runs to an exit code."""

import argparse
import importlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rich.console import Console


class CommandError(Exception):
    """What keeps a command from starting; the message says what to do about it."""


def need(module: str, package: str | None = None, extra: str = "demo"):
    """Imports what only this command uses, or says which extra of fasttx installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.split(".")[0]
        raise CommandError(f'this command needs {name} ({error}): pip install "fasttx[{extra}]"') from error


def console(extra: str = "demo") -> "Console":
    """rich's console on standard output, wide enough for tables where that is no terminal."""
    made = need("rich.console", extra=extra).Console(highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, 140)
    return made


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to run."""
    parser.add_argument("--device", default="cpu", help="where the model runs, as PyTorch names it: cuda, cuda:1")


def require_device(name: str) -> torch.device:
    """The device of that name; CommandError where there is none that calculates."""
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, RuntimeError) as error:  # torch has both, by what it lacks
        raise CommandError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return torch.device(name)

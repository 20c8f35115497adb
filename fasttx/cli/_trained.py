"""A folder that `python -m fasttx train` filled: its model and tokenizers."""

import argparse
from pathlib import Path
from typing import TypeVar

from fasttx.cli import CommandError, add_device, require_device
from fasttx.models import Model
from fasttx.text import Tokenizer

_M = TypeVar("_M", bound=Model)


def load(
    architecture: type[_M], folder: Path, *names: str, system: str, device: str = "cpu"
) -> tuple[_M, list[Tokenizer]]:
    """The model in evaluation mode, and its tokenizers of these names, which have to be those that it was trained with.

    system: what trains such a model. Raises CommandError where a file is missing, not whole, or another's.
    """
    device = require_device(device)
    if not (folder / "model.safetensors").exists():
        raise CommandError(f"there is no model in {folder}: run `python -m fasttx train {system}` first")
    try:
        model = architecture.load(folder / "model.safetensors").eval().to(device)
        tokenizers = [Tokenizer.load(folder / f"{name}.json") for name in names]
        model.require_tokenizers(**dict(zip(names, tokenizers, strict=True)))
    except (ImportError, OSError, ValueError) as error:
        raise CommandError(error) from error
    return model, tokenizers


def add_arguments(parser: argparse.ArgumentParser, system: str) -> None:
    """Where the model is, and where it runs; system: whose it is."""
    add_device(parser)
    parser.add_argument(
        "--model", type=Path, default=Path("results") / system, help=f"folder of `python -m fasttx train {system}`"
    )

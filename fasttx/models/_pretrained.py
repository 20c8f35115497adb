"""Reading a folder as Hugging Face saves a model, without transformers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._model import ModelFileError, read_safetensors

# Hugging Face's names of activations, and those of _layers.ACTIVATIONS.
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def read_pretrained(folder: str | os.PathLike, model_type: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values of config.json, and the weights of model.safetensors or else pytorch_model.bin, by their names there.

    Either may be in several files, which an index beside them names. Raises FileNotFoundError, or ModelFileError for a
    model of another type and for files that hold none. No code that is in a file is ever run.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{folder / 'config.json'} is no JSON: {error}") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != model_type:
        raise ModelFileError(f"{folder} holds a model of type {found}, not {model_type}")
    for name, read in (("model.safetensors", lambda path: read_safetensors(path)[0]), ("pytorch_model.bin", _read_bin)):
        if (folder / name).is_file():
            return config, read(folder / name)
        if (folder / f"{name}.index.json").is_file():
            parts = [read(folder / part) for part in _parts(folder / f"{name}.index.json")]
            return config, {name: tensor for part in parts for name, tensor in part.items()}
    raise FileNotFoundError(f"there is neither model.safetensors nor pytorch_model.bin in {folder}")


def _parts(index: Path) -> list[str]:
    """The names of the files beside it that hold the weights; what a file lacks is missed by the model."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{index} names no files of weights: {error}") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelFileError(f"{index} names files that are not beside it: {names}")
    return names


def _read_bin(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # torch.load has many kinds for a file that is not whole
        raise ModelFileError(f"{path} holds no weights, or more than weights: {error}") from error
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelFileError(f"{path} holds no weights by name")
    return state


def own_activation(theirs: str) -> str:
    """Of Hugging Face's name of an activation ours; ValueError where a model here has it not."""
    if theirs not in _ACTIVATIONS:
        raise ValueError(f"its activation is {theirs}, not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[theirs]


def renamed(name: str, parts: Sequence[tuple[str, str]]) -> str:
    """The name with each of their parts replaced by ours, in this order."""
    for part, replacement in parts:
        name = name.replace(part, replacement)
    return name

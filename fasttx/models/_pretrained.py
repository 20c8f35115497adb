"""Reading a folder as Hugging Face saves a model, without transformers."""

import json
import os
import pickle
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

    Raises FileNotFoundError, or ModelFileError for a model of another type and for files that hold none. No code that
    is in a file is ever run.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{folder / 'config.json'} is no JSON: {error}") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != model_type:
        raise ModelFileError(f"{folder} holds a model of type {found}, not {model_type}")
    if (folder / "model.safetensors").is_file():
        return config, read_safetensors(folder / "model.safetensors")[0]
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise FileNotFoundError(f"there is neither model.safetensors nor pytorch_model.bin in {folder}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelFileError(f"{path} holds no weights, or more than weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelFileError(f"{path} holds no weights by name")
    return config, state


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

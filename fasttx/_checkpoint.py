"""A run's checkpoint: one file, whole or not at all, that says whose it is and runs no code when it is read."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fasttx.models._model import write_atomically


class CheckpointError(ValueError):
    """A folder whose checkpoint is of another run, or is not whole."""


def write(path: Path, state: dict[str, Any]) -> None:
    """state: tensors, numbers and strings, in any nesting."""
    data = io.BytesIO()
    torch.save(state, data)
    write_atomically(path, data.getvalue())


def read(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state that was written, on the CPU; its "identity" has to be this one.

    Raises CheckpointError for another one, with what differs, and for a file that is not whole.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = _flat(state["identity"])
        if "weights" not in state["identity"]:  # versions before did not write it
            identity = {name: value for name, value in identity.items() if name != "weights"}
    except Exception as error:  # torch.load has many kinds for a file that is not whole
        raise CheckpointError(f"{path} is no whole checkpoint: {error}; remove it to begin anew") from error
    mine = _flat(identity)
    names = [name for name in dict.fromkeys((*found, *mine)) if found.get(name) != mine.get(name)]
    names = [name for name in names if not name.startswith("weights.")] or names  # what else differs explains those
    if names:
        what = ", ".join(f"{name} is {found.get(name)} (here {mine.get(name)})" for name in names[:6])
        what += f" and {len(names) - 6} more" if len(names) > 6 else ""
        raise CheckpointError(f"{path} is of another run, whose {what}: choose another folder, or remove this one")
    return state


def require_plain(name: str, value: Any) -> None:
    """Raises TypeError for what a checkpoint could not be read back with: anything but numbers, strings, and nests."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            require_plain(f"{name}.{key}", item)
    elif type(value) in (list, tuple):
        for item in value:
            require_plain(name, item)
    elif type(value) not in (bool, int, float, str, type(None)):  # a NumPy number is a float, and would not be read
        raise TypeError(f"{name} must be of numbers and strings, got {type(value).__name__}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by the names that lead to it, as in "recipe.steps"."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat

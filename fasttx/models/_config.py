"""What every architecture is made by: numbers, strings and further configs, each of its type."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

_C = TypeVar("_C", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of an architecture: a frozen dataclass of numbers, strings and further configs.

    Raises TypeError for a value of another type than its field's, but an int becomes a float where that is wanted, and
    ValueError for a number that is negative or not finite.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), _kinds(field.type)
            if type(value) is int and int not in kinds and float in kinds:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
                raise TypeError(f"{field.name} must be {wanted}, got {type(value).__name__}")
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise ValueError(f"{field.name} must be finite and not negative, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_C], values: dict[str, Any]) -> _C:
        """Of what `to_dict` gave. Raises ValueError for unknown names, missing ones, and values that make no config."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} is made of a dict, got {type(values).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - fields.keys())
        if unknown:
            raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(fields)}")
        made = {}
        for name, value in values.items():
            kind = fields[name].type
            nested = isinstance(kind, type) and issubclass(kind, Config)
            made[name] = kind.from_dict(value) if nested else value
        try:
            return cls(**made)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error


def _kinds(annotation: Any) -> tuple[type, ...]:
    """The classes of a field's type: int | tuple[int, int] -> (int, tuple)."""
    union = isinstance(annotation, types.UnionType)
    return tuple(typing.get_origin(kind) or kind for kind in (typing.get_args(annotation) if union else (annotation,)))

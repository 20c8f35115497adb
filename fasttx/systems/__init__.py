"""The systems that `python -m fasttx train` trains on real data, by name."""

from ._system import System
from .gpt import GPTSystem, LSTMSystem
from .vit import DigitsSystem, FashionSystem

SYSTEMS: dict[str, type[System]] = {
    "gpt": GPTSystem,
    "lstm": LSTMSystem,
    "digits": DigitsSystem,
    "fashion": FashionSystem,
}

__all__ = ["SYSTEMS", "System"]

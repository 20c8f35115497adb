"""The systems that `python -m fasttx train` trains on real data, by name."""

from ._system import System
from .bert import BertSystem, SentimentSystem
from .gpt import GPTSystem, LSTMSystem
from .multimodal import MultimodalSystem
from .translation import TranslationSystem
from .vit import DigitsSystem, FashionSystem

SYSTEMS: dict[str, type[System]] = {
    "translation": TranslationSystem,
    "bert": BertSystem,
    "sentiment": SentimentSystem,
    "gpt": GPTSystem,
    "lstm": LSTMSystem,
    "digits": DigitsSystem,
    "fashion": FashionSystem,
    "multimodal": MultimodalSystem,
}

__all__ = ["SYSTEMS", "System"]

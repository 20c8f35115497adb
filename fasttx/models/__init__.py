"""The architectures that people build of fasttx.nn's modules, each in one file that reads in a sitting.

Each is made by its config and saved with it: Gpt(GptConfig(...)), model.save(path), Gpt.load(path).
"""

from ._model import Config, Model, ModelFileError, TokenizerMismatchError
from .encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from .gpt import GPT, GPTConfig

__all__ = [
    "GPT",
    "Config",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "GPTConfig",
    "Model",
    "ModelFileError",
    "TokenizerMismatchError",
]

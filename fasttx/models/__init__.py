"""The architectures that people build of fasttx.nn's modules, each in one file that reads in a sitting.

Each is made by its config and saved with it: GPT(GPTConfig(...)), model.save(path), GPT.load(path).
"""

from ._bert_head import BertHeadConfig
from ._config import Config
from ._model import Model, ModelFileError, TokenizerMismatchError
from .bert import Bert, BertConfig
from .bert_heads import (
    BertForPretraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PretrainingLosses,
)
from .encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from .gpt import GPT, GPTConfig
from .multimodal import Multimodal, MultimodalConfig
from .vit import ViT, ViTConfig

__all__ = [
    "Bert",
    "BertConfig",
    "BertForPretraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertHeadConfig",
    "Config",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "GPT",
    "GPTConfig",
    "Model",
    "ModelFileError",
    "Multimodal",
    "MultimodalConfig",
    "PretrainingLosses",
    "TokenizerMismatchError",
    "ViT",
    "ViTConfig",
]

"""Drop-ins for torch.nn's modules: the same constructor, state_dict and results, on fasttx's kernels.

FeedForward, LinearCrossEntropy, MaskedSoftmax, SinusoidalPositionalEncoding and TransformerEmbedding, which torch.nn
does not have, are made like those.
"""

from .attention import MultiheadAttention
from .cache import KVCache
from .cross_entropy import LinearCrossEntropy
from .decoder import TransformerDecoder, TransformerDecoderLayer
from .embedding import TransformerEmbedding
from .feed_forward import FeedForward
from .gelu import GELU
from .layer_norm import LayerNorm
from .positional import SinusoidalPositionalEncoding
from .softmax import MaskedSoftmax
from .transformer import TransformerEncoder, TransformerEncoderLayer
from .transformer_model import Transformer

__all__ = [
    "FeedForward",
    "GELU",
    "KVCache",
    "LayerNorm",
    "LinearCrossEntropy",
    "MaskedSoftmax",
    "MultiheadAttention",
    "SinusoidalPositionalEncoding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEmbedding",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

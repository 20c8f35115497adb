"""Drop-ins for torch.nn's modules: the same constructor, state_dict and results, on fasttx's kernels."""

from .attention import MultiheadAttention
from .cache import KVCache
from .decoder import TransformerDecoder, TransformerDecoderLayer
from .gelu import GELU
from .layer_norm import LayerNorm
from .transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "GELU",
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

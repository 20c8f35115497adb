"""The public operations. Each checks its arguments, chooses a backend, and calls it.

Every function takes `backend`: None (the surrounding `fasttx.backend(...)`, else "auto"), or a name that is used or
refused with the reason (`fasttx.UnsupportedError`). What each computes is written down, in plain PyTorch, in
`fasttx.reference`. Bad arguments raise TypeError (a wrong type or dtype) or ValueError (a wrong value, shape or device)
before anything is computed, which are also RuntimeError or IndexError where torch's own functions raise those.
"""

from .attention import attention, attention_varlen
from .attention_weights import attention_weights
from .cross_entropy import linear_cross_entropy
from .embedding import embedding
from .feed_forward import feed_forward, linear
from .gelu import bias_gelu, gelu
from .layer_norm import add_layer_norm, layer_norm
from .merge_attention import merge_attention
from .softmax import softmax

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "attention_weights",
    "bias_gelu",
    "embedding",
    "feed_forward",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_attention",
    "softmax",
]

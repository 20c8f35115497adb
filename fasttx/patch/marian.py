"""Hugging Face's Marian: layer for layer a BART."""

from transformers.models.marian.modeling_marian import MarianAttention, MarianDecoderLayer, MarianEncoderLayer

from fasttx.patch._encoder_decoder import DecoderLayerMixin, EncoderLayerMixin


class FastMarianEncoderLayer(EncoderLayerMixin, MarianEncoderLayer):
    """MarianEncoderLayer with fused halves, on the valid tokens alone."""

    attention_class, norm_first = MarianAttention, False


class PaddedMarianEncoderLayer(FastMarianEncoderLayer):
    """The same on padded batches as they are."""

    removes_padding = False


class FastMarianDecoderLayer(DecoderLayerMixin, MarianDecoderLayer):
    """MarianDecoderLayer with fused halves."""

    attention_class, norm_first = MarianAttention, False


SWAPS = {MarianEncoderLayer: FastMarianEncoderLayer, MarianDecoderLayer: FastMarianDecoderLayer}
KEEPING = {MarianEncoderLayer: PaddedMarianEncoderLayer}

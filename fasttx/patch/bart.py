"""Hugging Face's BART: imported only once transformers' own module of it is."""

from transformers.models.bart.modeling_bart import BartAttention, BartDecoderLayer, BartEncoderLayer

from fasttx.patch._encoder_decoder import DecoderLayerMixin, EncoderLayerMixin


class FastBartEncoderLayer(EncoderLayerMixin, BartEncoderLayer):
    """BartEncoderLayer with fused halves, on the valid tokens alone."""

    attention_class, norm_first = BartAttention, False


class PaddedBartEncoderLayer(FastBartEncoderLayer):
    """The same on padded batches as they are."""

    removes_padding = False


class FastBartDecoderLayer(DecoderLayerMixin, BartDecoderLayer):
    """BartDecoderLayer with fused halves."""

    attention_class, norm_first = BartAttention, False


SWAPS = {BartEncoderLayer: FastBartEncoderLayer, BartDecoderLayer: FastBartDecoderLayer}
KEEPING = {BartEncoderLayer: PaddedBartEncoderLayer}

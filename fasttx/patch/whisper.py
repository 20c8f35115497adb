"""Hugging Face's Whisper: imported only once transformers' own module of it is."""

from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperDecoderLayer, WhisperEncoderLayer

from fasttx.patch._encoder_decoder import DecoderLayerMixin, EncoderLayerMixin


class FastWhisperEncoderLayer(EncoderLayerMixin, WhisperEncoderLayer):
    """WhisperEncoderLayer with fused halves; where it reads attention it scales the scores, not the queries."""

    attention_class, norm_first = WhisperAttention, True


class FastWhisperDecoderLayer(DecoderLayerMixin, WhisperDecoderLayer):
    """WhisperDecoderLayer with fused halves; where it reads attention it scales the scores, not the queries."""

    attention_class, norm_first = WhisperAttention, True


SWAPS = {WhisperEncoderLayer: FastWhisperEncoderLayer, WhisperDecoderLayer: FastWhisperDecoderLayer}
# Its encoder is given no mask.
KEEPING: dict[type, type] = {}

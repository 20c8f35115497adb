"""Hugging Face's RoBERTa: layer for layer a BERT."""

from transformers.models.roberta.modeling_roberta import (
    RobertaAttention,
    RobertaEncoder,
    RobertaIntermediate,
    RobertaLayer,
    RobertaOutput,
    RobertaSelfAttention,
    RobertaSelfOutput,
)

from fasttx.patch.bert import EncoderMixin, LayerMixin


class FastRobertaLayer(LayerMixin, RobertaLayer):
    """RobertaLayer with fused halves."""

    known = (RobertaAttention, RobertaSelfAttention, RobertaSelfOutput, RobertaIntermediate, RobertaOutput)


class FastRobertaEncoder(EncoderMixin, RobertaEncoder):
    """RobertaEncoder without padding."""

    layer_class = FastRobertaLayer


SWAPS = {RobertaLayer: FastRobertaLayer, RobertaEncoder: FastRobertaEncoder}
KEEPING = {RobertaEncoder: RobertaEncoder}

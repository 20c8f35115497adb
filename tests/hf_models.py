"""Small random Hugging Face models of every family that optimize() knows, with a batch for each."""

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

LENGTH, WIDTH = 7, 16
_VOCABULARY = 50
_DROPOUTS = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "distilbert": ("dropout", "attention_dropout"),
    "gpt2": ("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    "vit": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "bart": ("dropout", "attention_dropout", "activation_dropout"),
    "marian": ("dropout", "attention_dropout", "activation_dropout"),
    "whisper": ("dropout", "attention_dropout", "activation_dropout"),
}
_BERT = {
    "vocab_size": _VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": _VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
_SIZES = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"vocab_size": _VOCABULARY, "dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "gpt2": {"vocab_size": _VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "vit": {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 8, "patch_size": 4, "num_channels": 1,
    },
    "bart": _SEQ2SEQ | {"max_position_embeddings": 64, "forced_eos_token_id": None},
    "marian": _SEQ2SEQ | {
        "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    },
    "whisper": _SEQ2SEQ | {
        "max_source_positions": 8, "max_target_positions": 32, "num_mel_bins": 4, "pad_token_id": 1,
        "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}  # fmt: skip
_CLASSES = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "vit": (transformers.ViTConfig, transformers.ViTModel),
    "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
    "marian": (transformers.MarianConfig, transformers.MarianMTModel),
    "whisper": (transformers.WhisperConfig, transformers.WhisperForConditionalGeneration),
}
FAMILIES = tuple(_CLASSES)


def make(
    family: str, cls: type[PreTrainedModel] | None = None, *, dropout: bool = False, **changes: object
) -> PreTrainedModel:
    """A model of the family in float32 and eval mode, of its class in _CLASSES or `cls`.

    Without dropout unless it is asked for; `changes` go to the config.
    """
    config_class, model_class = _CLASSES[family]
    p = dict.fromkeys(_DROPOUTS[family], 0.2 if dropout else 0.0)
    model = (cls or model_class)(config_class(**_SIZES[family] | p | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms that are zeros and ones would hide mistakes.
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def padding(pattern: str) -> Tensor:
    """(4, LENGTH) int64, 1 = token: "right", "left", "holes", or "none"."""
    lengths = torch.tensor([LENGTH, 4, 1, 5])[:, None]
    if pattern == "none":
        return torch.ones(4, LENGTH, dtype=torch.int64)
    if pattern == "right":
        return (torch.arange(LENGTH) < lengths).long()
    if pattern == "left":
        return (torch.arange(LENGTH) >= LENGTH - lengths).long()
    holes = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0], [1] * LENGTH])
    return holes[:, :LENGTH]


def batch(family: str, pattern: str = "right") -> dict[str, Tensor]:
    """What a model of the family is called with: four sequences, with padding where it takes a mask."""
    if family == "vit":
        return {"pixel_values": torch.randn(4, 1, 8, 8)}
    tokens = torch.randint(4, _VOCABULARY, (4, LENGTH))
    if family == "whisper":
        return {"input_features": torch.randn(4, 4, 16), "decoder_input_ids": tokens}
    inputs = {"input_ids": tokens, "attention_mask": padding(pattern)}
    if family in ("bart", "marian"):
        inputs["decoder_input_ids"] = torch.randint(4, _VOCABULARY, (4, 5))
    return inputs

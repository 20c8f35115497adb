"""BERT: a transformer encoder that is trained to fill in masked words.

Devlin et al. 2019, "BERT: Pre-training of deep bidirectional transformers for language understanding". The heads that
it is trained and fine-tuned with are in bert_heads.py.
"""

import dataclasses
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from fasttx.nn import TransformerEmbedding, TransformerEncoder, TransformerEncoderLayer

from ._config import Config
from ._layers import (
    ACTIVATIONS,
    Linear,
    draw_weights,
    require_entries,
    require_layer,
    require_right_padding,
    require_sizes,
)
from ._model import Model, making, require_length, require_token_ids
from ._pretrained import own_activation, read_pretrained, renamed

# Parts of names of weights in Hugging Face's files: what they were once, and what begins those of heads.
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
_HEADS = ("cls.", "classifier.", "qa_outputs.")
# And those of the encoder's, with what they are here, to be replaced in this order.
_THEIR_NAMES = (
    ("embeddings.word_embeddings.", "embedding.token_"),
    ("embeddings.position_embeddings.", "embedding.position_"),
    ("embeddings.token_type_embeddings.", "embedding.segment_"),
    ("embeddings.LayerNorm.", "embedding.norm_"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.output.dense", "self_attn.out_proj"),
    ("attention.output.LayerNorm", "norm1"),
    ("intermediate.dense", "linear1"),
    ("output.dense", "linear2"),
    ("output.LayerNorm", "norm2"),
    ("pooler.dense", "pooler"),
)


@dataclasses.dataclass(frozen=True)
class BertConfig(Config):
    """BERT's sizes. feed_forward: 4 * width where None. activation: "gelu", "gelu_tanh" or "relu".

    dropout: of the embedding, of the attention's weights, of what each half of a layer adds, and, as in torch.nn's
    layers and other than in BERT's, within the feed-forward. pad_id: the token whose embedding begins as zero and
    learns nothing from where it stands; None: no token's. init_std: matrices are drawn from N(0, init_std); a model
    much narrower than 768 trains faster from about width ** -0.5.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    feed_forward: int | None = None
    max_positions: int = 512
    segments: int = 2
    dropout: float = 0.1
    activation: str = "gelu"
    eps: float = 1e-12
    pad_id: int | None = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require_layer(self)
        require_sizes(self, "vocab_size", "layers", "max_positions", "segments")
        require_entries(self.vocab_size, pad_id=self.pad_id)


class Bert(Model):
    """Embeddings of tokens, positions and segments, a post-norm encoder, and a pooler over the first token.

    Padding is removed before the encoder, so that padded tokens cost nothing; their hidden states are zeros. A token's
    hidden state is the same, bit for bit, whatever stands beside its sequence in the batch.
    """

    Config = BertConfig
    config: BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embedding = TransformerEmbedding(
            config.vocab_size, config.width, config.max_positions, config.segments, padding_idx=config.pad_id,
            eps=config.eps, dropout=config.dropout,
        )  # fmt: skip
        layer = TransformerEncoderLayer(
            config.width, config.heads, config.feed_forward or 4 * config.width, config.dropout,
            ACTIVATIONS[config.activation], layer_norm_eps=config.eps, batch_first=True,
        )  # fmt: skip
        self.encoder = TransformerEncoder(layer, config.layers, enable_nested_tensor=False, remove_padding=True)
        self.pooler = Linear(config.width, config.width)
        draw_weights(self, config.init_std)

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """token_ids (B, T) -> the hidden states (B, T, width).

        segment_ids: broadcastable to (B, T), 0 where None. padding (B, T): bool, True = padding, on the right:
        positions are counted from a row's beginning, whatever stands there. Raises TypeError and ValueError for what is
        not so, an empty batch, more tokens than positions, and ids that the embeddings do not have.
        """
        embedded = self._embed(token_ids, segment_ids, padding)
        return self.encoder(embedded, src_key_padding_mask=padding)

    def pooled(self, hidden: Tensor) -> Tensor:
        """tanh(linear(the first token's hidden state)): (B, T, width) -> (B, width)."""
        return torch.tanh(self.pooler(hidden[:, 0]))

    def hidden_states(
        self, token_ids: Tensor, segment_ids: Tensor | None = None, padding: Tensor | None = None
    ) -> list[Tensor]:
        """The embeddings and what each layer makes of them: layers + 1 tensors (B, T, width), the last is forward's."""
        states = [self._embed(token_ids, segment_ids, padding)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1], src_key_padding_mask=padding))
        return states if padding is None else [state.masked_fill(padding[..., None], 0) for state in states]

    def attention_maps(
        self, token_ids: Tensor, segment_ids: Tensor | None = None, padding: Tensor | None = None
    ) -> list[Tensor]:
        """What each layer's heads attend to, (B, heads, T, T): rows are queries, and sum to 1, in a text
        without tokens to 0. Call eval() before.
        """
        states = self.hidden_states(token_ids, segment_ids, padding)
        return [
            layer.self_attn(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
            for layer, x in zip(self.encoder.layers, states, strict=False)
        ]

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "Bert":
        """The model in a folder as Hugging Face saves BERT: config.json beside model.safetensors or pytorch_model.bin.

        The heads of such a checkpoint are left out (BertForSequenceClassification and its like read them); a pooler
        that it lacks is drawn anew, with a warning. dropout is their hidden_dropout_prob, also of attention's weights,
        whatever their attention_probs_dropout_prob is. Raises FileNotFoundError, or ModelFileError for a folder that
        holds no whole BERT.
        """
        config, state, *_ = read_bert(folder)
        with making(cls, folder):
            model = cls(config)
        if draw_missing(state, model, "pooler"):
            warnings.warn(f"{folder} has no pooler: it is drawn anew and has to be trained", stacklevel=2)
        model.load_weights(state, str(folder))
        return model

    def _embed(self, token_ids: Tensor, segment_ids: Tensor | None, padding: Tensor | None) -> Tensor:
        require_token_ids("token_ids", token_ids)
        require_length("token_ids", token_ids.shape[1], self.config.max_positions)
        require_right_padding(padding, token_ids)
        return self.embedding(token_ids, segment_ids)


def read_bert(
    folder: str | os.PathLike,
) -> tuple[BertConfig, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Of Hugging Face's folder: the config, the encoder's weights by their names here, its heads', and config.json.

    Raises as Bert.from_pretrained. Unknown weights keep their names.
    """
    theirs, state = read_pretrained(folder, "bert")
    with making(Bert, folder):
        config = _config_of(theirs)
    state = {renamed(name, _OLD_NAMES): tensor for name, tensor in state.items()}
    heads = {name: state.pop(name) for name in list(state) if name.startswith(_HEADS)}
    return config, _by_own_names(state), heads, theirs


def draw_missing(state: dict[str, Tensor], model: Model, part: str) -> bool:
    """Where `state` has nothing of this part of the model, takes the model's own, in the dtype of the others."""
    if any(name.startswith(f"{part}.") for name in state):
        return False
    dtype = next((tensor.dtype for tensor in state.values()), None)
    drawn = model.get_submodule(part).state_dict()
    state |= {f"{part}.{name}": values.to(dtype) for name, values in drawn.items()}
    return True


def _config_of(theirs: dict[str, Any]) -> BertConfig:
    """Of the values of Hugging Face's config.json; what BERT's first release left out is as it was there."""
    kind = theirs.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"its positions are {kind}, not absolute")
    if theirs.get("is_decoder"):
        raise ValueError("it is a decoder, whose attention is causal")
    return BertConfig(
        vocab_size=theirs["vocab_size"],
        width=theirs["hidden_size"],
        layers=theirs["num_hidden_layers"],
        heads=theirs["num_attention_heads"],
        feed_forward=theirs["intermediate_size"],
        max_positions=theirs["max_position_embeddings"],
        segments=theirs["type_vocab_size"],
        dropout=theirs.get("hidden_dropout_prob", 0.1),
        activation=own_activation(theirs.get("hidden_act", "gelu")),
        eps=theirs.get("layer_norm_eps", 1e-12),
        pad_id=theirs.get("pad_token_id", 0),
    )


def _by_own_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of Hugging Face's encoder by their names here; unknown ones keep their names."""
    own = {}
    for name, tensor in theirs.items():
        name = name.removeprefix("bert.")
        if name != "embeddings.position_ids":
            own[renamed(name, _THEIR_NAMES)] = tensor
    for name in [name for name in own if ".attention.self.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in own for part in parts):
            joined = name.replace("attention.self.query.", "self_attn.in_proj_")
            own[joined] = torch.cat([own.pop(part) for part in parts])
    return own

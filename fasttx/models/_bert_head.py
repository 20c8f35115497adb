"""What every BERT with a head has: the encoder, and where it comes from."""

import dataclasses
import os
import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ._config import Config
from ._layers import draw_weights, require_sizes
from ._model import Model, ModelFileError, making
from ._pretrained import renamed
from .bert import Bert, BertConfig, draw_missing, read_bert

_H = TypeVar("_H", bound="BertHead")

# Hugging Face's BERTs with a head. Classes that others derive from them have names of their own.
_THEIR_HEADS = {
    "BertForMaskedLM", "BertForMultipleChoice", "BertForNextSentencePrediction", "BertForPreTraining",
    "BertForQuestionAnswering", "BertForSequenceClassification", "BertForTokenClassification", "BertLMHeadModel",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BertHeadConfig(Config):
    """A BERT, and how many labels its head tells apart."""

    bert: BertConfig
    labels: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "labels")


class BertHead(Model):
    """A Bert, as `bert`, with a head. Made by a BertConfig, or a BertHeadConfig where there are labels."""

    Config = BertConfig
    # Parts of Hugging Face's names of the head's weights, and of these here; its classes with this head; what a file
    # may lack; and what of that is no part of this model's results.
    _THEIR_NAMES: ClassVar[tuple[tuple[str, str], ...]] = ()
    _THEIR_CLASSES: ClassVar[tuple[str, ...]] = ()
    _OPTIONAL: ClassVar[tuple[str, ...]] = ()
    _UNUSED: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: BertConfig | BertHeadConfig) -> None:
        super().__init__(config)
        self.bert = Bert(config.bert if isinstance(config, BertHeadConfig) else config)
        sizes = self.bert.config
        self.dropout = torch.nn.Dropout(sizes.dropout)
        self._make_head(sizes)
        draw_weights(self, sizes.init_std)

    def _make_head(self, sizes: BertConfig) -> None:
        raise NotImplementedError

    @classmethod
    def from_encoder(cls: type[_H], pretrained: "Bert | BertHead", **own: Any) -> _H:
        """A new head on a copy of a Bert, or of another head's, bound to the same tokenizers.

        own: what the head's config has beside the encoder's: from_encoder(pretrained, labels=3).
        """
        bert = pretrained.bert if isinstance(pretrained, BertHead) else pretrained
        model = cls(cls.Config(bert.config, **own) if own else bert.config).to(bert.pooler.weight)
        model.bert.load_state_dict(bert.state_dict())
        model.tokenizers = dict(pretrained.tokenizers)
        return model

    @classmethod
    def from_pretrained(cls: type[_H], folder: str | os.PathLike) -> _H:
        """The model with its head in a folder as Hugging Face saves it, as Bert.from_pretrained.

        Raises ModelFileError for a checkpoint with another head, or none: from_encoder gives it a new one. What
        BertForPretraining lacks where only masked tokens were learned is drawn anew, with a warning. The head drops
        like the encoder, whatever their classifier_dropout is.
        """
        config, state, theirs, described = read_bert(folder)
        others = set(described.get("architectures") or ()) & _THEIR_HEADS - set(cls._THEIR_CLASSES)
        if others:
            raise ModelFileError(
                f"{folder} holds a {', '.join(others)}, not a {cls.__name__}: from_encoder gives its encoder a new head"
            )
        state = {f"bert.{name}": tensor for name, tensor in state.items()}
        state |= {renamed(name, cls._THEIR_NAMES): tensor for name, tensor in theirs.items()}
        with making(cls, folder):
            model = cls(cls._config_of(config, state, described))
        missing = [part for part in cls._OPTIONAL if draw_missing(state, model, part)]
        if set(missing) - set(cls._UNUSED):
            warnings.warn(f"{folder} has no {', no '.join(missing)}: drawn anew, to be trained", stacklevel=2)
        model.load_weights(state, str(folder))
        return model

    @classmethod
    def _config_of(cls, config: BertConfig, state: dict[str, Tensor], described: dict[str, Any]) -> Config:
        return config

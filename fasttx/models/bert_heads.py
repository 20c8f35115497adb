"""BERT with a head: for its training, and for what it is fine-tuned to.

Devlin et al. 2019, "BERT: Pre-training of deep bidirectional transformers for language understanding", sections 3
and 4.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fasttx import checks
from fasttx.nn import LayerNorm, LinearCrossEntropy

from ._bert_head import BertHead, BertHeadConfig
from ._layers import ACTIVATIONS, IGNORED, Linear, require_padding, valid_targets
from ._model import require_token_ids
from .bert import BertConfig


class PretrainingLosses(NamedTuple):
    """The two parts of BERT's loss, each a mean: over the masked tokens, and over the pairs of sentences."""

    masked: Tensor
    next_sentence: Tensor


class BertForPretraining(BertHead):
    """Masked language modelling, with the token embeddings as output weights, and next-sentence prediction."""

    _THEIR_NAMES = (
        ("cls.predictions.transform.dense.", "transform."),
        ("cls.predictions.transform.LayerNorm.", "norm."),
        ("cls.predictions.decoder.", "decoder."),
        ("cls.predictions.bias", "decoder.bias"),
        ("cls.seq_relationship.", "next_sentence."),
    )
    _THEIR_CLASSES = ("BertForPreTraining", "BertForMaskedLM", "BertLMHeadModel")
    _OPTIONAL = ("bert.pooler", "next_sentence")

    def _make_head(self, sizes: BertConfig) -> None:
        self.transform = Linear(sizes.width, sizes.width)
        self.activation = ACTIVATIONS[sizes.activation]
        self.norm = LayerNorm(sizes.width, eps=sizes.eps)
        self.decoder = LinearCrossEntropy(sizes.width, sizes.vocab_size)
        self.decoder.weight = self.bert.embedding.token_weight
        self.next_sentence = LinearCrossEntropy(sizes.width, 2)

    def forward(
        self, token_ids: Tensor, segment_ids: Tensor | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logits of every token, (B, T, vocab_size), and of the sentences being a pair, (B, 2)."""
        hidden = self.bert(token_ids, segment_ids, padding)
        return self.decoder.logits(self._transformed(hidden)), self.next_sentence.logits(self.bert.pooled(hidden))

    def losses(
        self,
        token_ids: Tensor,
        segment_ids: Tensor | None = None,
        padding: Tensor | None = None,
        *,
        mlm_targets: Tensor,
        nsp_targets: Tensor | None = None,
    ) -> PretrainingLosses:
        """mlm_targets (B, T): the token at a masked position, -100 elsewhere. nsp_targets (B,): a class, 0 or 1.

        Only masked positions reach the head. Without any, or without nsp_targets, that part is 0. The encoder's
        pad_id has an output weight as any other token: training moves it.
        """
        hidden = self.bert(token_ids, segment_ids, padding)
        targets = valid_targets("mlm_targets", mlm_targets, token_ids, padding).flatten()
        masked = (targets != IGNORED).nonzero().squeeze(1)
        chosen = self._transformed(hidden.flatten(0, 1).index_select(0, masked))
        if len(masked):
            mlm = self.decoder(chosen, targets[masked])
        else:  # 0, of which every weight has a gradient
            mlm = self.decoder.logits(chosen).float().sum()
        if nsp_targets is None:
            return PretrainingLosses(mlm, torch.zeros_like(mlm))
        return PretrainingLosses(mlm, self.next_sentence(self.bert.pooled(hidden), nsp_targets))

    def loss(
        self,
        token_ids: Tensor,
        segment_ids: Tensor | None = None,
        padding: Tensor | None = None,
        *,
        mlm_targets: Tensor,
        nsp_targets: Tensor | None = None,
    ) -> Tensor:
        """The sum of `losses`."""
        losses = self.losses(token_ids, segment_ids, padding, mlm_targets=mlm_targets, nsp_targets=nsp_targets)
        return losses.masked + losses.next_sentence

    def _transformed(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.transform(hidden)))


class _BertClassifier(BertHead):
    Config = BertHeadConfig
    config: BertHeadConfig

    def _make_head(self, sizes: BertConfig) -> None:
        self.classifier = LinearCrossEntropy(sizes.width, self.config.labels)

    @classmethod
    def _config_of(cls, config: BertConfig, state: dict[str, Tensor], described: dict[str, Any]) -> BertHeadConfig:
        if "classifier.weight" not in state:
            raise ValueError("the checkpoint has no classifier")
        return BertHeadConfig(config, labels=len(state["classifier.weight"]))


class BertForSequenceClassification(_BertClassifier):
    """One of `labels` for a text, by its pooled first token."""

    _THEIR_CLASSES = ("BertForSequenceClassification",)

    @classmethod
    def _config_of(cls, config: BertConfig, state: dict[str, Tensor], described: dict[str, Any]) -> BertHeadConfig:
        problem = described.get("problem_type")
        if problem not in (None, "single_label_classification"):
            raise ValueError(f"its problem_type is {problem}, and this head tells labels apart")
        return super()._config_of(config, state, described)

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """The logits (B, labels); arguments as Bert's."""
        return self.classifier.logits(self._features(token_ids, segment_ids, padding))

    def loss(
        self, token_ids: Tensor, segment_ids: Tensor | None = None, padding: Tensor | None = None, *, targets: Tensor
    ) -> Tensor:
        """The mean cross-entropy; targets (B,) labels, or -100 to ignore a text."""
        return self.classifier(self._features(token_ids, segment_ids, padding), targets)

    def _features(self, *batch: Tensor | None) -> Tensor:
        return self.dropout(self.bert.pooled(self.bert(*batch)))


class BertForTokenClassification(_BertClassifier):
    """One of `labels` for each token."""

    _THEIR_CLASSES = ("BertForTokenClassification",)
    _OPTIONAL = _UNUSED = ("bert.pooler",)

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """The logits (B, T, labels); arguments as Bert's."""
        return self.classifier.logits(self.dropout(self.bert(token_ids, segment_ids, padding)))

    def loss(
        self, token_ids: Tensor, segment_ids: Tensor | None = None, padding: Tensor | None = None, *, targets: Tensor
    ) -> Tensor:
        """The mean cross-entropy; targets (B, T) labels, or -100 to ignore a token. Padded ones are ignored."""
        hidden = self.dropout(self.bert(token_ids, segment_ids, padding))
        return self.classifier(hidden, valid_targets("targets", targets, token_ids, padding))


class BertForQuestionAnswering(BertHead):
    """Where in a text the answer to a question starts and ends."""

    _THEIR_NAMES = (("qa_outputs.", "ends."),)
    _THEIR_CLASSES = ("BertForQuestionAnswering",)
    _OPTIONAL = _UNUSED = ("bert.pooler",)

    def _make_head(self, sizes: BertConfig) -> None:
        self.ends = Linear(sizes.width, 2)

    def forward(
        self,
        token_ids: Tensor,
        segment_ids: Tensor | None = None,
        padding: Tensor | None = None,
        excluded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits of each token being the answer's first, and its last: two (B, T).

        excluded (B, T): bool, True = no part of an answer, as the question. There, and where padded, logits are -inf.
        """
        require_token_ids("token_ids", token_ids)
        require_padding(excluded, token_ids, "excluded")
        start, end = self.ends(self.bert(token_ids, segment_ids, padding)).unbind(-1)
        for mask in (padding, excluded):
            if mask is not None:
                start, end = start.masked_fill(mask, -torch.inf), end.masked_fill(mask, -torch.inf)
        return start, end

    def loss(
        self,
        token_ids: Tensor,
        segment_ids: Tensor | None = None,
        padding: Tensor | None = None,
        excluded: Tensor | None = None,
        *,
        starts: Tensor,
        ends: Tensor,
    ) -> Tensor:
        """The mean cross-entropy of both; starts and ends (B,): positions, or -100 where the text has no answer.

        Raises ValueError for an answer that starts or ends where none can be.
        """
        start, end = self(token_ids, segment_ids, padding, excluded)
        _require_answers("starts", starts, start)
        _require_answers("ends", ends, end)
        return (cross_entropy(start, starts.long()) + cross_entropy(end, ends.long())) / 2


def _require_answers(name: str, targets: Tensor, logits: Tensor) -> None:
    """Raises unless there is one for each text, -100 or where its logits (B, T) are finite."""
    targets = checks.require_integers(name, targets)
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"{name} must have the shape {tuple(logits.shape[:1])}, got {checks.shape(targets)}")
    given = targets != IGNORED
    checks.require_below(name, targets[given], logits.shape[1])
    if checks.can_be_read(targets) and bool(logits[given, targets[given]].isneginf().any()):
        raise ValueError(f"{name} must not lie where a text is padded or excluded")

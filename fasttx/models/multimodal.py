"""Images and texts together: an encoder for each, and a decoder whose learned queries read both.

The queries are those of Carion et al. 2020, "End-to-end object detection with transformers"; that they make outputs of
any kind from inputs of any, of Jaegle et al. 2022, "Perceiver IO: a general architecture for structured inputs and
outputs".
"""

import dataclasses

import torch
from torch import Tensor

from fasttx import checks
from fasttx.nn import (
    KVCache,
    LayerNorm,
    LinearCrossEntropy,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEmbedding,
)

from ._config import Config
from ._decoding import generate, generating
from ._layers import (
    IGNORED,
    Linear,
    causal_mask,
    draw_weights,
    require_entries,
    require_layer,
    require_right_padding,
    require_sizes,
)
from ._model import Model, require_length, require_token_ids
from .bert import Bert, BertConfig
from .vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class MultimodalConfig(Config):
    """The two encoders' sizes (image without classes), and those of what joins them.

    caption_layers: 0: no captions. Captions have the text's vocabulary, and at most max_caption tokens with their
    bos_id; eos_id ends one, pad_id fills up behind it. feed_forward: 4 * width where None. init_std: as
    BertConfig's, and of the encoders' weights too.
    """

    image: ViTConfig
    text: BertConfig
    width: int
    layers: int
    heads: int
    queries: int
    classes: int
    feed_forward: int | None = None
    dropout: float = 0.0
    eps: float = 1e-5
    caption_layers: int = 0
    max_caption: int = 64
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require_layer(self)
        require_sizes(self, "layers", "queries", "classes", "max_caption")
        if self.image.classes:
            raise ValueError(f"image must be a ViT without a head, got classes={self.image.classes}")
        require_entries(self.text.vocab_size, bos_id=self.bos_id, eos_id=self.eos_id, pad_id=self.pad_id)


class Multimodal(Model):
    """A ViT and a Bert, each projected to one width and marked by a learned vector, and read by learned queries.

    Both modalities' tokens, one after the other and normalised, are the memory of a decoder whose input are the
    queries. What becomes of those is classified by its mean, and is the memory of the decoder that writes captions.

    images (B, C, H, W), token_ids (B, T) and padding (B, T) are as ViT's and Bert's. Either modality may be None for
    the whole batch, which then is not in the memory. Raises ValueError where both are, and as those two models do.
    """

    Config = MultimodalConfig
    config: MultimodalConfig

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__(config)
        self.image_encoder, self.text_encoder = ViT(config.image), Bert(config.text)
        self.image_projection = Linear(config.image.width, config.width)
        self.text_projection = Linear(config.text.width, config.width)
        self.modality_weight = torch.nn.Parameter(torch.empty(2, config.width))  # of images, of text
        self.memory_norm = LayerNorm(config.width, eps=config.eps)
        self.query_weight = torch.nn.Parameter(torch.empty(config.queries, config.width))
        self.decoder = _decoder(config, config.layers)
        self.classifier = LinearCrossEntropy(config.width, config.classes)
        self.caption_decoder = None
        if config.caption_layers:
            vocabulary = config.text.vocab_size
            self.caption_embedding = TransformerEmbedding(
                vocabulary, config.width, config.max_caption, eps=config.eps, dropout=config.dropout
            )
            self.caption_decoder = _decoder(config, config.caption_layers)
            self.caption_head = LinearCrossEntropy(config.width, vocabulary, bias=False)
            self.caption_head.weight = self.caption_embedding.token_weight
        draw_weights(self, config.init_std)

    def forward(
        self, images: Tensor | None = None, token_ids: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """The logits (B, classes)."""
        return self.classifier.logits(self.features(images, token_ids, padding).mean(1))

    def features(
        self, images: Tensor | None = None, token_ids: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """What the queries found: (B, queries, width)."""
        memory, memory_padding = self._memory(images, token_ids, padding)
        queries = self.query_weight.expand(len(memory), -1, -1)
        return self.decoder(queries, memory, memory_key_padding_mask=memory_padding)

    def loss(
        self,
        images: Tensor | None = None,
        token_ids: Tensor | None = None,
        padding: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        captions: Tensor | None = None,
        caption_padding: Tensor | None = None,
    ) -> Tensor:
        """The mean cross-entropy of labels, or of captions, or the sum of both: ValueError where neither is given.

        labels (B,): classes, or -100 to ignore a row. captions (B, L): token ids, of which every one after bos_id, with
        which each begins, is to be told. caption_padding (B, L): bool, True = padding.
        """
        if labels is None and captions is None:
            raise ValueError("labels and captions are both None: there is nothing to learn")
        if captions is None and caption_padding is not None:
            raise ValueError("caption_padding is that of captions, which are None")
        if captions is not None:
            self._require_captions(captions, caption_padding)
        _require_one_batch(images=images, token_ids=token_ids, labels=labels, captions=captions)
        features, losses = self.features(images, token_ids, padding), []
        if labels is not None:
            losses.append(self.classifier(features.mean(1), labels))
        if captions is not None:
            losses.append(self._caption_loss(features, captions, caption_padding))
        return sum(losses)

    def caption(
        self,
        images: Tensor | None = None,
        token_ids: Tensor | None = None,
        padding: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Captions (B, new) after bos_id, new <= max_new_tokens: each ends with eos_id, and is pad_id behind it.

        temperature 0 takes the most likely token; otherwise one is drawn, among the top_k most likely and of those
        among the fewest that have the probability top_p. Without dropout, whatever mode the model is in.
        """
        self._require_caption_decoder()
        checks.require_size("max_new_tokens", max_new_tokens)
        require_length("max_new_tokens", max_new_tokens, self.config.max_caption)
        with generating(self):
            features = self.features(images, token_ids, padding)
            start = torch.full((len(features), 1), self.config.bos_id, device=features.device)
            cache = KVCache(max_length=max_new_tokens)

            def step(tokens: Tensor) -> Tensor:
                embedded = self.caption_embedding(tokens, offset=cache.length())
                return self.caption_head.logits(self.caption_decoder(embedded, features, cache=cache)[:, -1])

            new = generate(
                step, start, max_new_tokens=max_new_tokens, stop=(self.config.eos_id,), pad_id=self.config.pad_id,
                temperature=temperature, top_k=top_k, top_p=top_p, generator=generator,
            )  # fmt: skip
        return new.clone()  # training takes no tensor that was made in inference mode

    def _memory(
        self, images: Tensor | None, token_ids: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The modalities' tokens (B, tokens, width), and where among them padding stands."""
        if images is None and token_ids is None:
            raise ValueError("images and token_ids are both None: there is nothing to look at")
        if token_ids is None and padding is not None:
            raise ValueError("padding is that of token_ids, which are None")
        _require_one_batch(images=images, token_ids=token_ids)
        of_image, of_text = self.modality_weight
        parts = []
        if images is not None:
            parts.append(self.image_projection(self.image_encoder.features(images)) + of_image)
        if token_ids is not None:
            parts.append(self.text_projection(self.text_encoder(token_ids, padding=padding)) + of_text)
        memory = self.memory_norm(torch.cat(parts, 1))
        if padding is not None:
            padding = torch.nn.functional.pad(padding, (memory.shape[1] - padding.shape[1], 0), value=False)
        return memory, padding

    def _caption_loss(self, features: Tensor, captions: Tensor, padding: Tensor | None) -> Tensor:
        before, targets = captions[:, :-1], captions[:, 1:]
        if padding is not None:
            padding, targets = padding[:, :-1], targets.masked_fill(padding[:, 1:], IGNORED)
        later = causal_mask(before.shape[1], before.device)
        hidden = self.caption_decoder(
            self.caption_embedding(before), features, later, tgt_key_padding_mask=padding, tgt_is_causal=True
        )
        return self.caption_head(hidden, targets)

    def _require_caption_decoder(self) -> None:
        if self.caption_decoder is None:
            raise ValueError("this Multimodal writes no captions: its config's caption_layers are 0")

    def _require_captions(self, captions: Tensor, padding: Tensor | None) -> None:
        """Raises for captions that cannot be learned, and their padding."""
        self._require_caption_decoder()
        require_token_ids("captions", captions)
        require_length("captions", captions.shape[1] - 1, self.config.max_caption)
        require_right_padding(padding, captions, "caption_padding")
        if captions.shape[1] == 1:
            raise ValueError("captions must have a token after bos_id")
        if checks.can_be_read(captions) and bool((captions[:, 0] != self.config.bos_id).any()):
            raise ValueError(f"captions must each begin with bos_id, {self.config.bos_id}")


def _decoder(config: MultimodalConfig, layers: int) -> TransformerDecoder:
    layer = TransformerDecoderLayer(
        config.width, config.heads, config.feed_forward or 4 * config.width, config.dropout, "gelu",
        layer_norm_eps=config.eps, batch_first=True, norm_first=True,
    )  # fmt: skip
    return TransformerDecoder(layer, layers, LayerNorm(config.width, eps=config.eps), remove_padding=True)


def _require_one_batch(**tensors: Tensor | None) -> None:
    """Raises unless all that are given have as many rows."""
    rows = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            checks.require_tensor(name, tensor)
            rows[name] = tensor.shape[:1].numel()
    if len(set(rows.values())) > 1:
        raise ValueError("a batch has as many of each: " + ", ".join(f"{n} {name}" for name, n in rows.items()))

"""An encoder and a decoder: the transformer of Vaswani et al. 2017, "Attention is all you need"."""

import dataclasses

import torch
from torch import Tensor

from fasttx import checks, nn

from . import _decoding
from ._config import Config
from ._layers import (
    ACTIVATIONS,
    Linear,
    causal_mask,
    require_entries,
    require_layer,
    require_right_padding,
    require_sizes,
    valid_targets,
)
from ._model import Model, require_length, require_token_ids


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(Config):
    """target_vocab: None where source and target share a vocabulary, and so an embedding.

    feed_forward: 4 * width where None. positions: "sinusoidal", of any number, or "learned", max_positions of them.
    norm_first: pre-norm layers, and a norm after the last. activation: "relu", "gelu" or "gelu_tanh". embedding_width:
    of source and target alike; where it is not the width, linear layers go from it to the width and back. tied: the
    output's weight is that of the target's embedding. The ids are the target's.
    """

    source_vocab: int
    target_vocab: int | None = None
    width: int = 512
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feed_forward: int | None = None
    dropout: float = 0.1
    positions: str = "sinusoidal"
    max_positions: int = 512
    norm_first: bool = False
    activation: str = "relu"
    embedding_width: int | None = None
    tied: bool = True
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_layer(self)
        require_sizes(
            self, "source_vocab", "target_vocab", "encoder_layers", "decoder_layers", "max_positions", "embedding_width"
        )
        if self.positions not in ("sinusoidal", "learned"):
            raise ValueError(f"positions must be sinusoidal or learned, got {self.positions!r}")
        ids = {"pad_id": self.pad_id, "bos_id": self.bos_id, "eos_id": self.eos_id}
        require_entries(self.target_vocab or self.source_vocab, **ids)


class EncoderDecoder(Model):
    """Reads a source and writes a target, token by token.

    source (B, S) and target (B, T) are token ids, int64 or int32; padding is bool, True where there is no token, and on
    the right. A row's results do not depend on its padding, which costs nothing.

    Embeddings are drawn from N(0, 1 / sqrt(embedding_width)) and scaled by sqrt(width), matrices from Xavier's uniform
    distribution (Glorot and Bengio 2010), and biases are 0.
    """

    Config = EncoderDecoderConfig
    config: EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__(config)
        width, inner = config.width, config.embedding_width or config.width
        self.source_embedding, self.source_projection = self._make_embedding(config.source_vocab)
        self.target_embedding, self.target_projection = self.source_embedding, self.source_projection
        if config.target_vocab is not None:
            self.target_embedding, self.target_projection = self._make_embedding(config.target_vocab)
        sinusoidal = config.positions == "sinusoidal"
        self.positions = nn.SinusoidalPositionalEncoding(width, config.dropout) if sinusoidal else None

        sizes = (width, config.heads, config.feed_forward or 4 * width, config.dropout, ACTIVATIONS[config.activation])
        options = {"batch_first": True, "norm_first": config.norm_first}
        norms = [torch.nn.LayerNorm(width) if config.norm_first else None for _ in range(2)]
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*sizes, **options), config.encoder_layers, norms[0], enable_nested_tensor=False,
            remove_padding=True,
        )  # fmt: skip
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(*sizes, **options), config.decoder_layers, norms[1], remove_padding=True
        )

        read, targets = inner if config.tied else width, config.target_vocab or config.source_vocab
        self.output_projection = _projection(width, read)
        self.head = nn.LinearCrossEntropy(read, targets, bias=False, label_smoothing=config.label_smoothing)
        if config.tied:
            self.head.weight = self.target_embedding.token_weight
        self._draw_weights()

    def _make_embedding(self, entries: int) -> tuple[nn.TransformerEmbedding, torch.nn.Module]:
        config = self.config
        learned, inner = config.positions == "learned", config.embedding_width or config.width
        embedding = nn.TransformerEmbedding(
            entries, inner, config.max_positions if learned else None, token_scale=config.width**0.5, norm=False,
            dropout=config.dropout if learned else 0.0,  # others come after the positions
        )  # fmt: skip
        return embedding, _projection(inner, config.width)

    def _draw_weights(self) -> None:
        for name, values in self.named_parameters():
            if "embedding" in name:
                torch.nn.init.normal_(values, std=values.shape[1] ** -0.5)
            elif values.dim() > 1:
                torch.nn.init.xavier_uniform_(values)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(values)

    @torch.no_grad()
    def load_word_vectors(self, vectors: Tensor, side: str = "source", frozen: bool = False) -> None:
        """Begins with these embeddings, (vocabulary, embedding_width): row i is token i's.

        side: "source" or "target". frozen: training leaves them as they are, and the tied output's weight with them;
        `save` does not keep that. The vectors are not scaled: those that the model draws have a root mean square of
        1 / sqrt(embedding_width).
        """
        if side not in ("source", "target"):
            raise ValueError(f"side must be source or target, got {side!r}")
        weight = getattr(self, f"{side}_embedding").token_weight
        checks.require_floating("vectors", vectors)
        if checks.can_be_read(vectors) and not vectors.isfinite().all():
            raise ValueError("vectors must be finite")
        if vectors.shape != weight.shape:
            raise ValueError(f"vectors must be {checks.shape(weight)}, got {checks.shape(vectors)}")
        weight.copy_(vectors)
        weight.requires_grad_(not frozen)

    def encode(self, source: Tensor, source_padding: Tensor | None = None) -> Tensor:
        """What the decoder attends to, the memory: (B, S, width), zeros at padding."""
        require_token_ids("source", source)
        require_right_padding(source_padding, source, "source_padding")
        return self.encoder(self._embed("source", source), src_key_padding_mask=source_padding)

    def forward(
        self, source: Tensor, target: Tensor, source_padding: Tensor | None = None, target_padding: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, target's vocabulary) of the token after each of the target's, given those up to it."""
        return self.head.logits(self._hidden(source, target, source_padding, target_padding))

    def loss(
        self, source: Tensor, target_in: Tensor, target_out: Tensor, source_padding: Tensor | None = None,
        target_padding: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The mean cross-entropy, with label smoothing, of target_out (B, T): the token after each of target_in (B, T).

        -100 does not count, nor does what stands at target_padding. Teacher forcing: target_in is bos and the target,
        target_out the target and eos.
        """
        hidden = self._hidden(source, target_in, source_padding, target_padding)
        return self.head(hidden, valid_targets("target_out", target_out, target_in, target_padding))

    def generate(
        self,
        source: Tensor,
        *,
        source_padding: Tensor | None = None,
        max_new_tokens: int,
        beams: int = 1,
        length_penalty: float = 1.0,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Targets (B, new) of source (B, S), without bos, with eos and then pad_id at the end; new <= max_new_tokens.

        beams above 1: the best sequences that a beam search of this width finds, by the sum of their log-probabilities
        over length ** length_penalty, eos counted. Otherwise the likeliest token at each step, or with a temperature
        one that is drawn, among the top_k likeliest and of those among the fewest that have the probability top_p.
        Without dropout, whatever mode the model is in. Raises TypeError or ValueError before anything is computed.
        """
        checks.require_size("max_new_tokens", max_new_tokens)
        checks.require_size("beams", beams)
        _decoding.check_sampling(temperature, top_k, top_p)
        _decoding.check_length_penalty(length_penalty, max_new_tokens)
        if beams > 1 and (temperature != 0.0 or top_k is not None or top_p is not None):
            raise ValueError(
                "a beam search draws nothing: temperature must be 0, and top_k and top_p None, got "
                f"{temperature}, {top_k} and {top_p}"
            )
        self._require_positions("max_new_tokens", max_new_tokens)
        ends = {"stop": (self.config.eos_id,), "pad_id": self.config.pad_id, "max_new_tokens": max_new_tokens}
        with _decoding.generating(self):
            memory, padding = self.encode(source, source_padding), source_padding
            cache = nn.KVCache(max_length=max_new_tokens)

            def step(tokens: Tensor) -> Tensor:
                x = self._embed("target", tokens, cache.length())
                x = self.decoder(x, memory, memory_key_padding_mask=padding, cache=cache)
                return self.head.logits(self.output_projection(x[:, -1]))

            def reorder(index: Tensor) -> None:
                nonlocal memory, padding
                cache.reorder(index)
                memory, padding = memory[index], None if padding is None else padding[index]

            start = torch.full((len(source), 1), self.config.bos_id, device=source.device)
            if beams > 1:
                new, _ = _decoding.beam_search(step, reorder, start, beams=beams, length_penalty=length_penalty, **ends)
            else:
                sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
                new = _decoding.generate(step, start, **sampling, **ends)
        return new.clone()  # training takes no tensor that was made in inference mode

    def _hidden(
        self, source: Tensor, target: Tensor, source_padding: Tensor | None, target_padding: Tensor | None
    ) -> Tensor:
        """What the head reads, at every position of the target: (B, T, embedding_width), or width where untied."""
        require_token_ids("source", source)
        require_token_ids("target", target)
        require_right_padding(target_padding, target, "target_padding")
        if len(source) != len(target):
            raise ValueError(f"source and target differ in sequences: {len(source)} and {len(target)}")
        x = self._embed("target", target)
        x = self.decoder(
            x, self.encode(source, source_padding), causal_mask(target.shape[1], target.device),
            tgt_key_padding_mask=target_padding, memory_key_padding_mask=source_padding, tgt_is_causal=True,
        )  # fmt: skip
        return self.output_projection(x)

    def _embed(self, side: str, token_ids: Tensor, offset: int = 0) -> Tensor:
        self._require_positions(side, offset + token_ids.shape[1])
        embedding, projection = getattr(self, f"{side}_embedding"), getattr(self, f"{side}_projection")
        x = projection(embedding(token_ids, offset=offset))
        return x if self.positions is None else self.positions(x, offset)

    def _require_positions(self, name: str, length: int) -> None:
        if self.positions is None:
            require_length(name, length, self.config.max_positions)


def _projection(width: int, to: int) -> torch.nn.Module:
    return torch.nn.Identity() if width == to else Linear(width, to, bias=False)

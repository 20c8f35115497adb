"""A decoder-only transformer: GPT-2 of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttx import checks
from fasttx.nn import (
    KVCache,
    LinearCrossEntropy,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerEncoderLayer,
)

from . import _decoding
from ._config import Config
from ._layers import (
    ACTIVATIONS,
    causal_mask,
    draw_weights,
    require_entries,
    require_layer,
    require_padding,
    require_sizes,
    valid_targets,
)
from ._model import Model, making, require_length, require_token_ids
from ._pretrained import own_activation, read_pretrained, renamed

# Parts of Hugging Face's names of weights, and of these here.
_THEIR_NAMES = (
    ("wte.", "embedding.token_"),
    ("wpe.", "embedding.position_"),
    ("h.", "transformer.layers."),
    ("attn.c_attn.", "self_attn.in_proj_"),
    ("attn.c_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "linear1"),
    ("mlp.c_proj", "linear2"),
    ("ln_1", "norm1"),
    ("ln_2", "norm2"),
    ("ln_f", "transformer.norm"),
    ("lm_head", "head"),
)


@dataclasses.dataclass(frozen=True)
class GPTConfig(Config):
    """feed_forward: None for 4 * width. activation: "gelu", "gelu_tanh" (GPT-2's) or "relu".

    dropout: of the embedding, of the attention's weights, and of what each half of a layer adds; as in GPT-2 there is
    none within the feed-forward. tied: the head's weight is the tokens'. init_std: as BertConfig's.
    """

    vocab_size: int
    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int | None = None
    max_positions: int = 1024
    dropout: float = 0.0
    activation: str = "gelu"
    eps: float = 1e-5
    tied: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require_layer(self)
        require_sizes(self, "vocab_size", "layers", "max_positions")


class GPT(Model):
    """Pre-norm layers under a causal mask with a final norm, learned positions, and a head that predicts what follows.

    token_ids (B, T) int64 or int32; padding (B, T) bool, True where there is no token, on either side of a row: tokens
    have the positions that they would have without it. A row's results do not depend on its padding.

    Matrices and embeddings are drawn from N(0, init_std), those that end in a residual from
    N(0, init_std / sqrt(2 * layers)), and biases are 0.
    """

    Config = GPTConfig
    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.embedding = TransformerEmbedding(
            config.vocab_size, config.width, config.max_positions, norm=False, dropout=config.dropout
        )
        layer = TransformerEncoderLayer(
            config.width, config.heads, config.feed_forward or 4 * config.width, config.dropout,
            ACTIVATIONS[config.activation], config.eps, batch_first=True, norm_first=True,
        )  # fmt: skip
        layer.dropout.p = 0.0
        norm = torch.nn.LayerNorm(config.width, config.eps)
        self.transformer = TransformerEncoder(
            layer, config.layers, norm, enable_nested_tensor=False, remove_padding=True
        )
        self.head = LinearCrossEntropy(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.token_weight
        draw_weights(self, config.init_std)
        for layer in self.transformer.layers:
            for ending in (layer.self_attn.out_proj, layer.linear2):
                torch.nn.init.normal_(ending.weight, std=config.init_std / (2 * config.layers) ** 0.5)

    def hidden(
        self,
        token_ids: Tensor,
        *,
        padding: Tensor | None = None,
        cache: KVCache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """What the head reads: (B, T, width), zeros at padding.

        With a fasttx.nn.KVCache, token_ids are the new tokens alone, and padding is over all that it has seen (what
        stands at padding then is of no meaning). position_ids (B, T): by default, how many tokens of the row go before.
        Raises TypeError or ValueError for tokens that are none, and for more than there are positions.
        """
        require_token_ids("token_ids", token_ids)
        before = 0 if cache is None else cache.length()
        length = before + token_ids.shape[1]
        require_length("token_ids", length, self.config.max_positions)
        require_padding(padding, token_ids if cache is None else token_ids.new_empty((len(token_ids), length)))
        if position_ids is None and padding is not None:
            position_ids = (~padding).cumsum(1)[:, before:].sub(1).clamp_(min=0)
        x = self.embedding(token_ids, position_ids=position_ids, offset=before)
        if cache is not None:
            return self.transformer(x, src_key_padding_mask=padding, cache=cache)
        return self.transformer(x, causal_mask(length, x.device), padding, is_causal=True)

    def forward(
        self,
        token_ids: Tensor,
        *,
        padding: Tensor | None = None,
        cache: KVCache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each; arguments as `hidden`'s."""
        return self.head.logits(self.hidden(token_ids, padding=padding, cache=cache, position_ids=position_ids))

    def loss(self, token_ids: Tensor, targets: Tensor, padding: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of targets (B, T): the token after each, or -100 where it does not count.

        What stands at padding does not count either.
        """
        hidden = self.hidden(token_ids, padding=padding)
        return self.head(hidden, valid_targets("targets", targets, token_ids, padding))

    def generate(
        self,
        prompts: Tensor,
        *,
        padding: Tensor | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Iterable[int] = (),
        pad_id: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """prompts (B, T) and what follows them: (B, T + new), new <= max_new_tokens.

        padding (B, T): prompts are padded on the left. temperature 0 takes the likeliest token; otherwise one is drawn,
        among the top_k likeliest and of those among the fewest that have the probability top_p. A row ends with a token
        of `stop`, and is pad_id from there on. Without dropout, whatever mode the model is in. Raises TypeError or
        ValueError before anything is computed.
        """
        require_token_ids("prompts", prompts)
        checks.require_size("max_new_tokens", max_new_tokens)
        require_padding(padding, prompts)
        require_entries(self.config.vocab_size, pad_id=pad_id)
        stop = tuple(stop)
        for id in stop:
            require_entries(self.config.vocab_size, stop=id)
        if padding is not None and bool((padding[:, 1:] & ~padding[:, :-1]).any() or padding[:, -1].any()):
            raise ValueError("padding must be on the left of prompts, and each must have a token")
        length = prompts.shape[1] + max_new_tokens - 1  # the last new token is followed by none
        require_length("prompts with max_new_tokens", length, self.config.max_positions)
        cache = KVCache(max_length=length)

        def step(tokens: Tensor) -> Tensor:
            seen = None
            if padding is not None:
                seen = F.pad(padding, (0, cache.length() + tokens.shape[1] - padding.shape[1]))
            return self.head.logits(self.hidden(tokens, padding=seen, cache=cache)[:, -1])

        with _decoding.generating(self):
            new = _decoding.generate(
                step, prompts, max_new_tokens=max_new_tokens, stop=stop, pad_id=pad_id, temperature=temperature,
                top_k=top_k, top_p=top_p, generator=generator,
            )  # fmt: skip
        return torch.cat((prompts, new), 1)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "GPT":
        """The model of a folder that Hugging Face's GPT2LMHeadModel or GPT2Model was saved to.

        dropout is their resid_pdrop. Raises FileNotFoundError, or ModelFileError for a folder that holds no whole
        GPT-2, and for options of Hugging Face's that a GPT has not.
        """
        theirs, weights = read_pretrained(folder, "gpt2")
        with making(cls, folder):
            model = cls(_config_of(theirs))
        model.load_weights(_by_own_names(weights), str(folder))
        return model


def _config_of(theirs: dict[str, Any]) -> GPTConfig:
    """Of the values of Hugging Face's config.json; what is left out is as it is there."""
    usual = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    unusual = [f"{name}={theirs[name]}" for name, value in usual.items() if theirs.get(name, value) != value]
    if unusual:
        raise ValueError(f"it has {', '.join(unusual)}")
    return GPTConfig(
        vocab_size=theirs["vocab_size"],
        width=theirs["n_embd"],
        layers=theirs["n_layer"],
        heads=theirs["n_head"],
        feed_forward=theirs.get("n_inner"),
        max_positions=theirs["n_positions"],
        dropout=theirs.get("resid_pdrop", 0.1),
        activation=own_activation(theirs.get("activation_function", "gelu_new")),
        eps=theirs.get("layer_norm_epsilon", 1e-5),
        tied=theirs.get("tie_word_embeddings", True),
    )


def _by_own_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of Hugging Face's GPT-2 by their names here; unknown ones keep their names."""
    own = {}
    for name, tensor in theirs.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # a causal mask
        if ".c_" in name and tensor.dim() == 2:
            tensor = tensor.t().contiguous()  # their Conv1D keeps it as (in, out)
        own[renamed(name, _THEIR_NAMES)] = tensor
    return own

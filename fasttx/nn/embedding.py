"""The first layer of a transformer as a module."""

import torch
from torch import Tensor

from fasttx import checks, functional
from fasttx.functional.embedding import check_padding

from ._plain import parameter


class TransformerEmbedding(torch.nn.Module):
    """dropout(layer_norm(token_scale * token + position + segment)), in one pass.

    token_ids (..., T) -> (..., T, embedding_dim), as functional.embedding. token_weight is (num_embeddings,
    embedding_dim); there are a position_weight (max_positions, embedding_dim) and a segment_weight (num_segments,
    embedding_dim) where their sizes are given, norm_weight and norm_bias (embedding_dim,) unless norm is False. Entries
    are drawn from N(0, 1), as torch.nn.Embedding's; that of padding_idx is zero and gets no gradient. A weight may be
    shared with the model's head: `head.weight = embedding.token_weight`.

    Raises TypeError for sizes that are no integers, ValueError for sizes below 1 and a dropout outside of [0, 1).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_positions: int | None = None,
        num_segments: int | None = None,
        *,
        padding_idx: int | None = None,
        token_scale: float = 1.0,
        norm: bool = True,
        eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
        for name, size in (sizes | {"max_positions": max_positions, "num_segments": num_segments}).items():
            if size is not None or name in sizes:
                checks.require_size(name, size)
        checks.require_probability("dropout", dropout)
        self.padding_idx = check_padding(padding_idx, num_embeddings)
        self.token_scale, self.eps, self.dropout = token_scale, eps, dropout

        def made(name: str, *shape: int | None) -> None:
            values = None
            if None not in shape:
                values = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, values)

        made("token_weight", num_embeddings, embedding_dim)
        made("position_weight", max_positions, embedding_dim)
        made("segment_weight", num_segments, embedding_dim)
        for name in ("norm_weight", "norm_bias"):
            made(name, embedding_dim if norm else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the entries anew; the layer norm becomes 1 and 0."""
        for weight in (self.token_weight, self.position_weight, self.segment_weight):
            if weight is not None:
                torch.nn.init.normal_(weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.token_weight[self.padding_idx].zero_()
        if self.norm_weight is not None:
            torch.nn.init.ones_(self.norm_weight)
            torch.nn.init.zeros_(self.norm_bias)

    def forward(
        self,
        token_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """offset: the position of the first token, as in cached decoding; position_ids go before it."""
        weights = (
            parameter(self, name)
            for name in ("token_weight", "position_weight", "segment_weight", "norm_weight", "norm_bias")
        )
        token, position, segment, norm_weight, norm_bias = weights
        return functional.embedding(
            token_ids, token, position, segment_ids, segment, norm_weight, norm_bias, self.eps,
            position_ids=position_ids, offset=offset, token_scale=self.token_scale, dropout_p=self.dropout,
            training=self.training, padding_idx=self.padding_idx,
        )  # fmt: skip

    def extra_repr(self) -> str:
        sizes = {
            name: None if weight is None else len(weight)
            for name, weight in (
                ("max_positions", self.position_weight), ("num_segments", self.segment_weight),
            )
        }  # fmt: skip
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        entries, width = self.token_weight.shape
        return (
            f"{entries}, {width}, {shown}, padding_idx={self.padding_idx}, token_scale={self.token_scale}, "
            f"norm={self.norm_weight is not None}, eps={self.eps}, dropout={self.dropout}"
        )

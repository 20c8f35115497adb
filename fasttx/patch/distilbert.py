"""Hugging Face's DistilBERT: imported only once transformers' own module of it is."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert.modeling_distilbert import (
    FFN,
    DistilBertSelfAttention,
    Transformer,
    TransformerBlock,
)

from fasttx.nn import _blocks
from fasttx.nn._plain import step_aside
from fasttx.patch import _hf, _layers


class FastTransformerBlock(TransformerBlock):
    """TransformerBlock with fused halves: attention, and feed-forward, each with its residual and norm.

    The self-attention and feed-forward modules are called where they are hooked or replaced, and the first while
    attentions are collected; what follows stays fused.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The block on a padded batch (B, T, width)."""
        refusal = self.attention_refusal()
        if refusal is not None:
            step_aside("attention_half", refusal)
        elif _hf.call_refusal(kwargs) is None and _hf.mask_refusal(attention_mask, hidden_states) is None:
            return self._run(hidden_states, mask=attention_mask)
        attended = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)[0]
        return self._feed_forward_half(
            _blocks.add_norm(self.sa_layer_norm, _layers.NO_DROPOUT, attended, hidden_states)
        )

    def run_packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The block on packed sequences (tokens, width)."""
        return self._run(x, cu_seqlens=cu_seqlens)

    def _run(self, x: Tensor, **options: Any) -> Tensor:
        attention, parts = self.attention, self._parts()
        read = _layers.SelfAttention(
            attention, (attention.q_lin, attention.k_lin, attention.v_lin), attention.out_lin,
            attention.n_heads, attention.scaling, self._attention_dropout(),
        )  # fmt: skip
        return self._feed_forward_half(
            _layers.post_norm_attention(
                x,
                lambda x: read.attend(x, **options),
                parts,
                lambda x: read.half(x, parts, norm_first=False, **options),
            )  # fmt: skip
        )

    def _feed_forward_half(self, x: Tensor) -> Tensor:
        refusal = self._feed_forward_refusal()
        if refusal is None:
            return _layers.feed_forward_half(x, self._parts())
        step_aside("feed_forward_half", refusal)
        return _blocks.add_norm(self.output_layer_norm, _layers.NO_DROPOUT, self.ffn(x), x)

    def _parts(self) -> _layers.Parts:
        ffn = self.ffn
        return _layers.Parts(
            _layers.NO_DROPOUT, self.sa_layer_norm,
            ffn.lin1, ffn.activation, _hf.activation_name(ffn.activation), None, ffn.lin2,
            ffn.dropout, self.output_layer_norm,
        )  # fmt: skip

    def _attention_dropout(self) -> float:
        return self.attention.dropout.p if self.attention.training else 0.0

    def attention_refusal(self) -> str | None:
        """Why the self-attention module, as it stands, has to be called."""
        attention = self.attention
        return _layers.attention_refusal(attention, self._attention_dropout(), (attention, DistilBertSelfAttention))

    def _feed_forward_refusal(self) -> str | None:
        if self.ffn.chunk_size_feed_forward:
            return "the feed-forward half is computed in chunks"
        if "ff_chunk" in self.ffn.__dict__:
            return "its ff_chunk was replaced"
        return _layers.why_called((self.ffn, FFN))

    def can_pack(self) -> bool:
        """Whether the block may see packed tokens: nobody who expects a batch looks on."""
        return (
            _hf.is_plain_or_captured(self, FastTransformerBlock)
            and not (self.gradient_checkpointing and self.training)
            and all(reason is None for _, reason in self.parts())
        )

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each submodule's name, and why it is not fused, or None where it is."""
        attention = self.attention_refusal()
        linears = tuple(f"attention.{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin"))
        for name, reason in _layers.describe(self, linears, ("sa_layer_norm",)):
            yield name, attention or reason
        yield "attention.dropout", attention
        feed_forward = self._feed_forward_refusal()
        for name, reason in _layers.describe(
            self, ("ffn.lin1", "ffn.lin2"), ("output_layer_norm",), ("ffn.dropout",), ("ffn.activation",)
        ):
            yield name, feed_forward or reason


class FastTransformer(Transformer):
    """Transformer that packs a padded batch's valid tokens once and runs every block on them alone.

    Valid positions get the padded batch's values, padded ones zeros. Blocks that cannot take packed tokens run on the
    padded batch in between; without padding, or with a mask that is more than padding, all of them do.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """All blocks on a padded batch (B, T, width)."""
        packing = None
        if _hf.call_refusal(kwargs) is None and any(map(_can_pack, self.layer)):
            packing = _hf.packing_of(attention_mask, hidden_states)
        if packing is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        states = _layers.run_packed(
            self.layer, _can_pack, packing, hidden_states,
            lambda layer, hidden_states: layer(hidden_states, attention_mask, **kwargs),
        )  # fmt: skip
        return BaseModelOutput(last_hidden_state=states)


def _can_pack(layer: Module) -> bool:
    return type(layer) is FastTransformerBlock and layer.can_pack()


SWAPS = {TransformerBlock: FastTransformerBlock, Transformer: FastTransformer}
KEEPING = {Transformer: Transformer}

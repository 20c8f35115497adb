"""Hugging Face's BERT, and what RoBERTa has in common with it; imported only once transformers' own module of it is."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import Module
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEncoder,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)
from transformers.pytorch_utils import apply_chunking_to_forward

from fasttx.nn import _blocks
from fasttx.nn._plain import step_aside
from fasttx.patch import _hf, _layers


class LayerMixin:
    """The forward of BertLayer with fused halves: attention, and feed-forward, each with its residual and norm.

    The self-attention module is called where it is hooked or replaced, and where a cache is used or attentions are
    collected, which are its business; cross-attention always is. What follows stays fused.
    """

    # The classes of attention, attention.self, attention.output, intermediate and output.
    known: ClassVar[tuple[type, ...]]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        crosses = self.is_decoder and encoder_hidden_states is not None
        if crosses and not hasattr(self, "crossattention"):
            # For the original's error.
            return super().forward(hidden_states, attention_mask, encoder_hidden_states)
        if past_key_values is None and self._may_read_attention(hidden_states, attention_mask, kwargs):
            is_causal = self.attention.self.is_causal and attention_mask is None
            x = self._read_attention(hidden_states, mask=attention_mask, is_causal=is_causal)
        else:
            x = self._call_attention(
                self.attention, hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )
        if crosses:
            x = self._call_attention(
                self.crossattention, x, attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states, past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        return self._feed_forward_half(x)

    def run_packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The layer on packed sequences (tokens, width)."""
        return self._feed_forward_half(self._read_attention(x, cu_seqlens=cu_seqlens))

    def _may_read_attention(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Whether the fused form may stand for a call of the self-attention module."""
        refusal = self.refusal()
        if refusal is not None:
            step_aside("attention_half", refusal)
            return False
        return _hf.call_refusal(kwargs) is None and _hf.mask_refusal(mask, x) is None

    def _read_attention(self, x: Tensor, **options: Any) -> Tensor:
        attention, parts = self.attention.self, self._parts()
        read = _layers.SelfAttention(
            attention, (attention.query, attention.key, attention.value), self.attention.output.dense,
            attention.num_attention_heads, attention.scaling, self._attention_dropout(),
        )  # fmt: skip
        return _layers.post_norm_attention(
            x, lambda x: read.attend(x, **options), parts, lambda x: read.half(x, parts, norm_first=False, **options)
        )

    def _call_attention(self, attention: Module, x: Tensor, **kwargs: Any) -> Tensor:
        """An attention half by its attention module, or all by the half's own module where that is not plain."""
        container, _, output, *_ = self.known
        if not _hf.is_plain_or_captured(attention, container):
            if attention.is_cross_attention:
                kwargs["encoder_attention_mask"] = kwargs.pop("attention_mask")
            return attention(x, **kwargs)[0]
        attended = attention.self(x, **kwargs)[0]
        if not _hf.is_plain_or_captured(attention.output, output):
            return attention.output(attended, x)
        projected = _blocks.linear(attention.output.dense, attended)
        return _blocks.add_norm(attention.output.LayerNorm, attention.output.dropout, projected, x)

    def _feed_forward_half(self, x: Tensor) -> Tensor:
        refusal = self._feed_forward_refusal()
        if refusal is None:
            return _layers.feed_forward_half(x, self._parts())
        step_aside("feed_forward_half", refusal)
        return apply_chunking_to_forward(self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, x)

    def _parts(self) -> _layers.Parts:
        attended, activation, output = self.attention.output, self.intermediate.intermediate_act_fn, self.output
        return _layers.Parts(
            attended.dropout, attended.LayerNorm,
            self.intermediate.dense, activation, _hf.activation_name(activation), None, output.dense,
            output.dropout, output.LayerNorm,
        )  # fmt: skip

    def refusal(self) -> str | None:
        """Why the self-attention module, as it stands, has to be called."""
        container, attention, output, *_ = self.known
        modules = (self.attention, container), (self.attention.self, attention), (self.attention.output, output)
        return _layers.attention_refusal(self.attention.self, self._attention_dropout(), *modules)

    def _attention_dropout(self) -> float:
        attention = self.attention.self
        return attention.dropout.p if attention.training else 0.0

    def _feed_forward_refusal(self) -> str | None:
        *_, intermediate, output = self.known
        if self.chunk_size_feed_forward:
            return "the feed-forward half is computed in chunks"
        if "feed_forward_chunk" in self.__dict__:
            return "its feed_forward_chunk was replaced"
        return _layers.why_called((self.intermediate, intermediate), (self.output, output))

    def can_pack(self) -> bool:
        """Whether the layer may see packed tokens: nobody who expects a batch looks on."""
        return (
            _hf.is_plain_or_captured(self, type(self))
            and not (self.gradient_checkpointing and self.training)
            and not (self.is_decoder or self.attention.self.is_causal)
            and all(reason is None for _, reason in self.parts())
        )

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each submodule's name, and why it is not fused, or None where it is."""
        attention = self.refusal()
        for name, reason in _layers.describe(
            self,
            linears=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
            norms=("attention.output.LayerNorm",),
            dropouts=("attention.output.dropout",),
        ):
            yield name, attention or reason
        yield "attention.self.dropout", attention
        feed_forward = self._feed_forward_refusal()
        for name, reason in _layers.describe(
            self,
            linears=("intermediate.dense", "output.dense"),
            norms=("output.LayerNorm",),
            dropouts=("output.dropout",),
            activations=("intermediate.intermediate_act_fn",),
        ):
            yield name, feed_forward or reason


class EncoderMixin:
    """The forward of BertEncoder, which packs a padded batch's valid tokens once and runs every layer on them alone.

    Valid positions get the padded batch's values, padded ones zeros. Layers that cannot take packed tokens run on the
    padded batch in between; without padding, or with a mask that is more than padding, all of them do.
    """

    layer_class: ClassVar[type]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        packing = None
        if encoder_hidden_states is past_key_values is None and not use_cache and _hf.call_refusal(kwargs) is None:
            if any(self._can_pack(layer) for layer in self.layer):
                packing = _hf.packing_of(attention_mask, hidden_states)
        if packing is None:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
                past_key_values, use_cache, **kwargs,
            )  # fmt: skip
        states = _layers.run_packed(
            self.layer, self._can_pack, packing, hidden_states,
            lambda layer, hidden_states: layer(hidden_states, attention_mask, **kwargs),
        )  # fmt: skip
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)

    def _can_pack(self, layer: Module) -> bool:
        return type(layer) is self.layer_class and layer.can_pack()


class FastBertLayer(LayerMixin, BertLayer):
    """BertLayer with fused halves."""

    known = (BertAttention, BertSelfAttention, BertSelfOutput, BertIntermediate, BertOutput)


class FastBertEncoder(EncoderMixin, BertEncoder):
    """BertEncoder without padding."""

    layer_class = FastBertLayer


SWAPS = {BertLayer: FastBertLayer, BertEncoder: FastBertEncoder}
KEEPING = {BertEncoder: BertEncoder}

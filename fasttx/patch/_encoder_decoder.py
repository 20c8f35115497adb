"""Layers of the encoder-decoders BART, Marian and Whisper, which share names and differ in the order of their norms."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from transformers.cache_utils import EncoderDecoderCache

from fasttx.nn import _blocks
from fasttx.nn._plain import is_plain, parameter, step_aside
from fasttx.nn._recall import is_observed, recall
from fasttx.patch import _hf, _hf_cache, _layers
from fasttx.patch._decoding import NOT_FUSED, AttentionHalf, FeedForwardHalf, remember_halves
from fasttx.patch._fused_qkv import join


class _LayerMixin:
    """What encoder and decoder layers have in common: self-attention, and the feed-forward half."""

    attention_class: ClassVar[type]
    norm_first: ClassVar[bool]

    def _reads_attention(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Whether the fused form may stand for a call of the self-attention module."""
        refusal = self.attention_refusal()
        if refusal is not None:
            step_aside("attention_half", refusal)
            return False
        return _hf.call_refusal(kwargs) is None and _hf.mask_refusal(mask, x) is None

    def _read_attention(self, parts: _layers.Parts, **options: Any) -> tuple[_layers.Attend, _layers.Half]:
        """Self-attention by its projections, alone and as the half of a layer; `options` as SelfAttention.attend's."""
        attention = self.self_attn
        read = _layers.SelfAttention(
            attention, (attention.q_proj, attention.k_proj, attention.v_proj), attention.out_proj,
            attention.num_heads, attention.scaling, self._attention_dropout(),
        )  # fmt: skip
        return (
            lambda x: read.attend(x, **options),
            lambda x: read.half(x, parts, norm_first=self.norm_first, **options),
        )

    def _parts(self) -> _layers.Parts:
        dropout, activation = _blocks.Dropout(float(self.dropout), self.training), self.activation_fn
        return _layers.Parts(
            dropout, self.self_attn_layer_norm,
            self.fc1, activation, _hf.activation_name(activation),
            _blocks.Dropout(float(self.activation_dropout), self.training), self.fc2,
            dropout, self.final_layer_norm,
        )  # fmt: skip

    def _attention_dropout(self) -> float:
        return float(self.self_attn.dropout) if self.self_attn.training else 0.0

    def attention_refusal(self) -> str | None:
        """Why the self-attention module, as it stands, has to be called."""
        attention = self.self_attn
        return _layers.attention_refusal(attention, self._attention_dropout(), (attention, self.attention_class))

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each submodule's name, and why it is not fused, or None where it is."""
        attention = self.attention_refusal()
        linears = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
        for name, reason in _layers.describe(self, linears):
            yield name, attention or reason
        norms = tuple(name for name, _ in self.named_children() if name.endswith("layer_norm"))
        yield from _layers.describe(self, ("fc1", "fc2"), norms, activations=("activation_fn",))


class EncoderLayerMixin(_LayerMixin):
    """The forward of an encoder layer with fused halves: attention, and feed-forward, each with its residual and norm.

    Of a padded batch it takes the valid tokens alone where it `removes_padding`: valid positions get the padded batch's
    values, padded ones zeros.
    (The loop over the layers is a PreTrainedModel's, so each packs for itself; how is found out once for all.)
    The self-attention module is called where it is hooked or replaced, and while attentions are collected; what
    follows stays fused.
    """

    removes_padding: ClassVar[bool] = True

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """The layer on a batch (B, T, width)."""
        order, parts = _layers.pre_norm if self.norm_first else _layers.post_norm, self._parts()
        if not self._reads_attention(hidden_states, attention_mask, kwargs):
            x = order(
                hidden_states, lambda x: self.self_attn(x, attention_mask=attention_mask, **kwargs)[0], parts
            )  # fmt: skip
            return self._clamped(x)
        packs = self.removes_padding and self.can_pack()
        packing = _hf.packing_of(attention_mask, hidden_states) if packs else None
        if packing is None:
            attend, half = self._read_attention(parts, mask=attention_mask)
            return self._clamped(order(hidden_states, attend, parts, half))
        attend, half = self._read_attention(parts, cu_seqlens=packing.cu_seqlens)
        return self._clamped(packing.unpack(order(packing.pack(hidden_states), attend, parts, half)))

    def can_pack(self) -> bool:
        """Whether the layer's children may see packed tokens: nobody who expects a batch looks on."""
        return all(reason is None for _, reason in self.parts())

    def _clamped(self, x: Tensor) -> Tensor:
        """What the original layer ends with, where float16 overflows."""
        if x.dtype == torch.float16 and (self.norm_first or not torch.isfinite(x).all()):
            limit = torch.finfo(x.dtype).max - 1000
            return x.clamp(-limit, limit)
        return x


class DecoderLayerMixin(_LayerMixin):
    """The forward of a decoder layer with fused halves: attention, and feed-forward, each with its residual and norm.

    With a cache, in inference, the layer is three operations: self-attention, whose cache grows in place,
    cross-attention to what the first call has projected, and feed-forward. Else the self-attention module is called
    where it is hooked or replaced, and where a cache is used or attentions are collected; cross-attention always is.
    What follows them stays fused.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        """The layer on a batch (B, T, width), and the encoder's states (B, S, width) where it crosses over to them."""
        if encoder_hidden_states is not None and isinstance(past_key_values, EncoderDecoderCache):
            output = self._decode(hidden_states, past_key_values, attention_mask, encoder_attention_mask, kwargs)
            if output is not None:
                return output
        parts, half = self._parts(), None
        if past_key_values is None and self._reads_attention(hidden_states, attention_mask, kwargs):
            is_causal = self.self_attn.is_causal and attention_mask is None
            attend, half = self._read_attention(parts, mask=attention_mask, is_causal=is_causal)
        else:

            def attend(x: Tensor) -> Tensor:
                return self.self_attn(x, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)[0]

        if encoder_hidden_states is None:
            order = _layers.pre_norm if self.norm_first else _layers.post_norm
            return order(hidden_states, attend, parts, half)

        def cross(x: Tensor) -> Tensor:
            return self.encoder_attn(
                x, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask,
                past_key_values=past_key_values, **kwargs,
            )[0]  # fmt: skip

        return (self._pre_norm if self.norm_first else self._post_norm)(hidden_states, attend, cross, parts, half)

    def _decode(
        self,
        x: Tensor,
        cache: EncoderDecoderCache,
        mask: Tensor | None,
        memory_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """The layer as three operations found at an earlier call; None where it has no such form.

        The first call with a cache has none: the modules project the encoder's states into it.
        """
        if is_observed() or torch.is_grad_enabled() or _hf.call_refusal(kwargs):
            return None
        if _hf.mask_refusal(mask, x) or _hf.mask_refusal(memory_mask, x):
            return None
        halves = recall(self)
        if halves is None:
            if not isinstance(self.self_attn, self.attention_class):
                return None
            halves = remember_halves(self, self._find_halves, self._weights(), self.self_attn.config)
        if halves is NOT_FUSED:
            return None
        attention, cross, feed_forward = halves
        memory = _hf_cache.memory(cache, cross.index, x)
        room = None if memory is None else _hf_cache.reserve(cache, attention.index, x, attention.heads, mask)
        if room is None or not all(half.can_run(x) for half in halves):
            return None
        layer, kept = room
        tokens = x.shape[1]
        x = attention(x, kept, mask, is_causal=mask is None and tokens > 1)
        layer.fill(kept[2] + tokens)
        return feed_forward(cross(x, memory, memory_mask, is_causal=False))

    def _find_halves(self) -> tuple[AttentionHalf | FeedForwardHalf | None, ...]:
        attention, cross, order = self.self_attn, self.encoder_attn, self.norm_first
        if _layers.why_called((cross, self.attention_class)):
            return (None,)
        joined = join(attention, (attention.q_proj, attention.k_proj, attention.v_proj))
        if joined is None or not all(is_plain(linear, *_blocks.LINEARS) for linear in (cross.q_proj, cross.out_proj)):
            return (None,)
        return (
            AttentionHalf.of(
                (*joined, *_parameters(attention.out_proj)), self.self_attn_layer_norm, order, attention.scaling,
                attention.num_heads, attention.layer_idx,
            ),
            AttentionHalf.of(
                (*_parameters(cross.q_proj), *_parameters(cross.out_proj)), self.encoder_attn_layer_norm, order,
                cross.scaling, cross.num_heads, cross.layer_idx,
            ),
            FeedForwardHalf.of(
                (*_parameters(self.fc1), *_parameters(self.fc2)), self.final_layer_norm, order,
                _hf.activation_name(self.activation_fn),
            ),
        )  # fmt: skip

    def _weights(self) -> Iterator[Tensor | None]:
        """What the halves hold copies of."""
        attention, cross = self.self_attn, self.encoder_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            yield from _parameters(linear)
        for linear in (attention.out_proj, cross.q_proj, cross.out_proj, self.fc1, self.fc2):
            yield linear.weight

    def _post_norm(
        self, x: Tensor, attend: _layers.Attend, cross: _layers.Attend, parts: _layers.Parts, half: _layers.Half | None
    ) -> Tensor:
        x = _layers.post_norm_attention(x, attend, parts, half)
        x = _blocks.add_norm(self.encoder_attn_layer_norm, parts.dropout1, cross(x), x)
        return _layers.feed_forward_half(x, parts)

    def _pre_norm(
        self, x: Tensor, attend: _layers.Attend, cross: _layers.Attend, parts: _layers.Parts, half: _layers.Half | None
    ) -> Tensor:
        norm = self.encoder_attn_layer_norm
        y = None if half is None else half(x)
        if y is None:
            normed, y = _blocks.add_norm_and_sum(norm, parts.dropout1, attend(parts.norm1(x)), x)
        else:
            normed = norm(y)
        normed, y = _blocks.add_norm_and_sum(parts.norm2, parts.dropout1, cross(normed), y)
        hidden = _blocks.feed_forward(
            parts.linear1, parts.activation, parts.dropout_inner, parts.linear2, normed, parts.name
        )
        return y + parts.dropout2(hidden)


def _parameters(linear: Module) -> tuple[Tensor, Tensor | None]:
    return parameter(linear, "weight"), parameter(linear, "bias")

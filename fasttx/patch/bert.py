"""Hugging Face's BERT: imported only once transformers' own module of it is."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
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
from transformers.utils import output_capturing

from fasttx import functional
from fasttx.nn import _blocks
from fasttx.nn._padding import Packing
from fasttx.nn._plain import is_plain, step_aside, why_not_plain
from fasttx.patch._fused_qkv import join, project

# What a layer is handed besides its states and mask, and needs nothing of.
_HARMLESS = {"position_ids", "output_hidden_states", "use_cache", "return_dict"}


class FastBertLayer(BertLayer):
    """BertLayer with fused QKV, attention, feed-forward, and residual + dropout + layer norm.

    Runs BertLayer's own forward for what has no fused form: cross-attention, a decoder, a cache,
    attentions asked for, other attention implementations than eager and sdpa, replaced or hooked
    submodules.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        refusal = _call_refusal(encoder_hidden_states, past_key_values, kwargs)
        refusal = refusal or self.refusal() or _mask_refusal(attention_mask, hidden_states)
        if refusal is not None:
            step_aside("bert_layer", refusal)
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
                past_key_values, **kwargs,
            )  # fmt: skip
        x = self._attention_half(hidden_states, mask=attention_mask)
        if x is None:
            x = self._add_norm(self._attend(hidden_states, attention_mask), hidden_states)
        return self._feed_forward_half(x)

    def run_packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The layer on packed sequences (tokens, width)."""
        half = self._attention_half(x, cu_seqlens=cu_seqlens)
        if half is None:
            half = self._add_norm(self._attend_packed(x, cu_seqlens), x)
        return self._feed_forward_half(half)

    def _attention_half(self, x: Tensor, **options: Any) -> Tensor | None:
        attention, output = self.attention.self, self.attention.output
        joined = join(attention) if is_plain(output.dense, *_blocks.LINEARS) else None
        if joined is None:
            return None
        return _blocks.attention_half(
            x, (*joined, output.dense.weight, output.dense.bias), output.LayerNorm, output.dropout,
            norm_first=False, heads=attention.num_attention_heads, scale=attention.scaling,
            dropout_p=_attention_dropout(attention), **options,
        )  # fmt: skip

    def _add_norm(self, attended: Tensor, x: Tensor) -> Tensor:
        output = self.attention.output
        projected = _blocks.linear(output.dense, attended)
        return _blocks.add_norm(output.LayerNorm, output.dropout, projected, x)

    def _feed_forward_half(self, x: Tensor) -> Tensor:
        intermediate, output = self.intermediate, self.output
        activation = intermediate.intermediate_act_fn
        return _blocks.feed_forward_half(
            intermediate.dense, activation, None, output.dense, output.dropout, output.LayerNorm, x,
            _activation_name(activation),
        )  # fmt: skip

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention in a padded batch: x (B, T, width), mask (B, 1 or H, T, T) as BertLayer takes it."""
        attention = self.attention.self
        sizes = (*x.shape[:-1], attention.num_attention_heads, attention.attention_head_size)
        q, k, v = (t.view(sizes).transpose(1, 2) for t in project(attention, x))
        output = functional.attention(
            q, k, v, attn_mask=mask, scale=attention.scaling,
            dropout_p=_attention_dropout(attention),
        )  # fmt: skip
        return output.transpose(1, 2).flatten(2)

    def _attend_packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Self-attention within each of the packed sequences: x (tokens, width) -> the same."""
        attention = self.attention.self
        sizes = (-1, attention.num_attention_heads, attention.attention_head_size)
        q, k, v = (t.view(sizes) for t in project(attention, x))
        output = functional.attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens,
            scale=attention.scaling, dropout_p=_attention_dropout(attention),
        )  # fmt: skip
        return output.flatten(1)

    def refusal(self) -> str | None:
        """Why the layer as it stands has no fused form."""
        attention = self.attention.self
        if self.is_decoder or self.attention.is_cross_attention or attention.is_causal:
            return "it is a decoder's layer"
        if self.chunk_size_feed_forward:
            return "the feed-forward half is computed in chunks"
        implementation = attention.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            return f"the attention implementation is {implementation!r}"
        for module, known in self._containers():
            if not (is_plain(module, known) or _is_only_captured(module, known)):
                return f"{known.__name__}: {why_not_plain(module, known)}"
        if attention.training and attention.dropout.p >= 1.0:
            return "attention dropout is 1"
        return None

    def can_pack(self) -> bool:
        """Whether the layer may see packed tokens: nobody who expects a batch looks on."""
        output, attended = self.output, self.attention.output
        attention, intermediate = self.attention.self, self.intermediate
        linears = (
            attention.query, attention.key, attention.value,
            attended.dense, intermediate.dense, output.dense,
        )  # fmt: skip
        return (
            (is_plain(self, FastBertLayer) or _is_only_captured(self, FastBertLayer))
            and not (self.gradient_checkpointing and self.training)
            and self.refusal() is None
            and all(is_plain(module, *_blocks.LINEARS) for module in linears)
            and is_plain(attended.LayerNorm, *_blocks.NORMS)
            and is_plain(output.LayerNorm, *_blocks.NORMS)
            and _blocks.is_plain_dropout(attended.dropout)
            and _blocks.is_plain_dropout(output.dropout)
            and _activation_name(intermediate.intermediate_act_fn) is not None
        )

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each submodule's name, and why it is not fused, or None where it is."""
        whole = self.refusal()
        for name in ("attention.self.query", "attention.self.key", "attention.self.value",
                     "attention.output.dense", "intermediate.dense", "output.dense"):  # fmt: skip
            yield name, whole or why_not_plain(self.get_submodule(name), *_blocks.LINEARS)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            yield name, whole or why_not_plain(self.get_submodule(name), *_blocks.NORMS)
        for name in ("attention.output.dropout", "output.dropout"):
            yield name, whole or _blocks.why_no_dropout(self.get_submodule(name))
        yield "attention.self.dropout", whole
        known = _activation_name(self.intermediate.intermediate_act_fn) is not None
        reason = None if known else "it is neither a plain relu nor a plain gelu"
        yield "intermediate.intermediate_act_fn", whole or reason

    def _containers(self) -> tuple[tuple[Module, type], ...]:
        return (
            (self.attention, BertAttention),
            (self.attention.self, BertSelfAttention),
            (self.attention.output, BertSelfOutput),
            (self.intermediate, BertIntermediate),
            (self.output, BertOutput),
        )


class FastBertEncoder(BertEncoder):
    """BertEncoder that packs a padded batch's valid tokens once and runs every layer on them alone.

    Valid positions get the padded batch's values, padded ones zeros. Layers that cannot take packed
    tokens run on the padded batch in between; without padding, or with a mask that is more than
    padding, all of them do.
    """

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
        if _call_refusal(encoder_hidden_states, past_key_values, kwargs) is None and not use_cache:
            packing = self._packing(hidden_states, attention_mask)
        if packing is None:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
                past_key_values, use_cache, **kwargs,
            )  # fmt: skip
        watched = output_capturing._active_collector.get()
        x = packing.pack(hidden_states)
        for layer in self.layer:
            if layer.can_pack():
                x = layer.run_packed(x, packing.cu_seqlens)
                if watched:
                    # The hooks that collect hidden states see the layer as if it ran padded.
                    before, hidden_states = hidden_states, packing.unpack(x)
                    for hook in layer._forward_hooks.values():
                        hook(layer, (before,), hidden_states)
            else:
                hidden_states = layer(packing.unpack(x), attention_mask, **kwargs)
                x = packing.pack(hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=packing.unpack(x))

    def _packing(self, hidden_states: Tensor, mask: Tensor | None) -> Packing | None:
        """How to pack the batch; None where there is no padding, or the mask says more than that."""
        if mask is None or torch.compiler.is_compiling() or hidden_states.dim() != 3:
            return None
        valid = _valid_tokens(mask, hidden_states)
        if valid is None or not any(
            type(layer) is FastBertLayer and layer.can_pack() for layer in self.layer
        ):
            return None
        return None if bool(valid.all()) else Packing.of(valid)


SWAPS = {BertLayer: FastBertLayer, BertEncoder: FastBertEncoder}
PACKING = {FastBertEncoder}


def _call_refusal(
    encoder_hidden_states: Tensor | None, past_key_values: Any, kwargs: dict[str, Any]
) -> str | None:
    """Why this call has no fused form."""
    if encoder_hidden_states is not None:
        return "cross-attention"
    if past_key_values is not None:
        return "a cache of keys and values"
    collected = output_capturing._active_collector.get()
    if collected and ("attentions" in collected or "cross_attentions" in collected):
        return "attention weights are asked for"
    for name, value in kwargs.items():
        if name not in _HARMLESS and value is not None and value is not False:
            return f"the argument {name}"
    return None


def _mask_refusal(mask: Tensor | None, hidden_states: Tensor) -> str | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return "attention_mask has other than four dimensions"
    if mask.dtype not in (torch.bool, torch.float32, hidden_states.dtype):
        return f"attention_mask is {mask.dtype}"
    return None


def _valid_tokens(mask: Tensor, hidden_states: Tensor) -> Tensor | None:
    """(B, T) bool from a mask (B, 1, T, T), bool or to be added, that says the same to every query; else None."""
    if _mask_refusal(mask, hidden_states) is not None or mask.requires_grad:
        return None
    batch, length = hidden_states.shape[:2]
    if tuple(mask.shape) != (batch, 1, length, length) or length == 0:
        return None
    row = mask[:, :, :1]
    if mask.stride(2) != 0 and not bool((mask == row).all()):
        return None
    row = row.reshape(batch, length)
    if mask.dtype == torch.bool:
        return row
    valid = row == 0
    hidden = row <= torch.finfo(mask.dtype).min
    return valid if bool((valid | hidden).all()) else None


def _attention_dropout(attention: BertSelfAttention) -> float:
    return attention.dropout.p if attention.training else 0.0


def _activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """What feed_forward calls a BERT activation; None where it has no name for it."""
    if is_plain(activation, GELUActivation):
        return "gelu" if activation.act is torch.nn.functional.gelu else None
    if is_plain(activation, GELUTanh):
        return "gelu_tanh" if isinstance(activation.act, functools.partial) else None
    if is_plain(activation, NewGELUActivation):
        return "gelu_tanh"
    return _blocks.activation_name(activation)


def _is_only_captured(module: Module, known: type) -> bool:
    """Hooked by nothing but transformers' collectors of outputs, which fused layers serve themselves."""
    if type(module) is not known or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    return bool(module._forward_hooks) and all(
        getattr(hook, "__module__", None) == output_capturing.__name__
        for hook in module._forward_hooks.values()
    )

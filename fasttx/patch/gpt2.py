"""Hugging Face's GPT-2: imported only once transformers' own module of it is."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

from fasttx import functional
from fasttx.nn import _blocks
from fasttx.nn._plain import is_plain, parameter, step_aside, why_not_plain
from fasttx.nn._recall import is_observed, recall
from fasttx.ops.feed_forward_block import feed_forward_block
from fasttx.packing import transposed
from fasttx.patch import _hf, _hf_cache
from fasttx.patch._decoding import NOT_FUSED, AttentionHalf, FeedForwardHalf, remember_halves
from fasttx.patch._layers import NO_DROPOUT
from fasttx.rng import draw_seed


class FastConv1D(Conv1D):
    """Conv1D, a linear layer whose weight is (in, out), on fasttx's linear."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return functional.linear(x, *_weights(self))


_CONVS = (Conv1D, FastConv1D)


class FastGPT2Block(GPT2Block):
    """GPT2Block with fused attention, feed-forward, and residual + dropout + layer norm; a cache grows in place.

    Cross-attention calls its module. So does self-attention that was replaced or hooked, whose weights are collected,
    or whose implementation is neither fasttx's nor eager nor sdpa.
    """

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """One layer: hidden_states (B, T, width) -> the same; all arguments are GPT2Block's."""
        if past_key_values is not None and encoder_hidden_states is None and not torch.is_grad_enabled():
            output = self._decode(hidden_states, past_key_values, attention_mask, kwargs)
            if output is not None:
                return output
        decodes = past_key_values is not None and hidden_states.shape[1] == 1
        refusal = self._refusal() or _hf.call_refusal(kwargs) or _hf.mask_refusal(attention_mask, hidden_states)
        if refusal is not None:
            step_aside("gpt2_attention", refusal)
            attended, _ = self.attn(
                self.ln_1(hidden_states), past_key_values=past_key_values, attention_mask=attention_mask,
                use_cache=use_cache, **kwargs,
            )  # fmt: skip
            dropout = NO_DROPOUT  # the module has applied its own
        else:
            if encoder_hidden_states is None:
                half = self._attention_half(hidden_states, past_key_values, attention_mask)
                if half is not None:
                    return self._feed_forward_half(half, decodes)
            attended = self._attend(self.ln_1(hidden_states), past_key_values, attention_mask)
            dropout = self.attn.resid_dropout
        if encoder_hidden_states is not None:
            hidden_states = hidden_states + dropout(attended)
            attended, _ = self._cross_attention(
                hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask
            )
            dropout = NO_DROPOUT
        if torch.is_grad_enabled():
            normed, x = _blocks.add_norm_and_sum(self.ln_2, dropout, attended, hidden_states)
            return x + self._feed_forward(normed)
        if dropout.training or not is_plain(dropout, *_blocks.DROPOUTS):
            attended = dropout(attended)
        return self._feed_forward_half(hidden_states + attended, decodes)

    def _decode(
        self, x: Tensor, cache: Cache, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The block as two operations found at an earlier call; None where it has no such form."""
        if is_observed() or _hf.call_refusal(kwargs) or _hf.mask_refusal(mask, x):
            return None
        halves = recall(self)
        if halves is None:
            if not isinstance(self.attn, GPT2Attention):
                return None
            halves = remember_halves(self, self._find_halves, self._packed_weights(), self.attn.config)
        if halves is NOT_FUSED:
            return None
        attention, feed_forward = halves
        room = _hf_cache.reserve(cache, attention.index, x, attention.heads, mask)
        if room is None or not (attention.can_run(x) and feed_forward.can_run(x)):
            return None
        layer, kept = room
        tokens = x.shape[1]
        x = attention(x, kept, mask, is_causal=mask is None and tokens > 1)
        layer.fill(kept[2] + tokens)
        return feed_forward(x)

    def _find_halves(self) -> tuple[AttentionHalf | FeedForwardHalf | None, ...]:
        attention, mlp = self.attn, self.mlp
        return (
            AttentionHalf.of(
                (*_weights(attention.c_attn), *_weights(attention.c_proj)), self.ln_1, True, attention.scaling,
                attention.num_heads, attention.layer_idx,
            ),
            FeedForwardHalf.of(
                (*_weights(mlp.c_fc), *_weights(mlp.c_proj)), self.ln_2, True, _hf.activation_name(mlp.act)
            ),
        )  # fmt: skip

    def _packed_weights(self) -> Iterator[Tensor]:
        for conv in (self.attn.c_attn, self.attn.c_proj, self.mlp.c_fc, self.mlp.c_proj):
            yield conv.weight

    def _attention_half(self, x: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor | None:
        """x + self-attention of ln_1(x) as one operation; None where it has no such form."""
        attention = self.attn
        if not (is_plain(attention.c_attn, *_CONVS) and is_plain(attention.c_proj, *_CONVS)):
            return None
        parameters = (*_weights(attention.c_attn), *_weights(attention.c_proj))
        dropout_p = _attention_dropout(attention)
        if cache is not None:
            return _hf_cache.attention_half(
                cache, attention.layer_idx, x, parameters, self.ln_1, attention.resid_dropout,
                norm_first=True, heads=attention.num_heads, scale=attention.scaling, dropout_p=dropout_p, mask=mask,
            )  # fmt: skip
        return _blocks.attention_half(
            x, parameters, self.ln_1, attention.resid_dropout,
            norm_first=True, heads=attention.num_heads, scale=attention.scaling, dropout_p=dropout_p, mask=mask,
            is_causal=mask is None,
        )  # fmt: skip

    def _attend(self, x: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """Self-attention of x (B, T, width) and of what the cache holds, with its projections."""
        attention = self.attn
        batch, length, width = x.shape
        sizes = (batch, length, 3, attention.num_heads, attention.head_dim)
        q, k, v = _linear(attention.c_attn, x, "c_attn").view(sizes).permute(2, 0, 3, 1, 4).unbind()
        if cache is not None:
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            k, v = _hf_cache.update(cache, k, v, attention.layer_idx)
        is_causal = mask is None and length > 1
        if is_causal and k.shape[2] > length:
            # A preallocated cache at its first call: only as many of its places are filled.
            k, v = k[:, :, :length], v[:, :, :length]
        attended = functional.attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=attention.scaling,
            dropout_p=_attention_dropout(attention),
        )  # fmt: skip
        return _linear(attention.c_proj, attended.transpose(1, 2).reshape(batch, length, width), "c_proj")

    def _cross_attention(
        self, x: Tensor, cache: Cache | None, mask: Tensor | None, memory: Tensor, memory_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not hasattr(self, "crossattention"):
            raise ValueError(
                f"If `encoder_hidden_states` are passed, {self} has to be instantiated with cross-attention layers by "
                "setting `config.add_cross_attention=True`"
            )
        return self.crossattention(
            self.ln_cross_attn(x), past_key_values=cache, attention_mask=mask, encoder_hidden_states=memory,
            encoder_attention_mask=memory_mask,
        )  # fmt: skip

    def _feed_forward_half(self, x: Tensor, decodes: bool) -> Tensor:
        """x + f(ln_2(x)): as one operation where it has such a form; `decodes` as there."""
        mlp, norm = self.mlp, self.ln_2
        name = _activation_if_fused(mlp)
        if name is not None and is_plain(norm, *_blocks.NORMS) and _blocks.is_plain_dropout(mlp.dropout):
            tensors = (
                x, *_weights(mlp.c_fc), *_weights(mlp.c_proj), parameter(norm, "weight"), parameter(norm, "bias")
            )  # fmt: skip
            if _blocks._can_fuse("feed_forward_block", tensors, norm, norm_first=True):
                p = mlp.dropout.p if mlp.dropout.training else 0.0
                seed = draw_seed() if p > 0.0 else None
                return feed_forward_block(*tensors, norm.eps, True, name, 0.0, None, p, seed, decodes)
        return x + self._feed_forward(norm(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward network with its dropout."""
        mlp = self.mlp
        name = _activation_if_fused(mlp)
        if name is None:
            step_aside("feed_forward", next(f"{path}: {reason}" for path, reason in self._parts_of_mlp() if reason))
            return mlp(x)
        hidden = functional.feed_forward(x, *_weights(mlp.c_fc), *_weights(mlp.c_proj), activation=name)
        return mlp.dropout(hidden)

    def _refusal(self) -> str | None:
        """Why self-attention has to be called."""
        attention = self.attn
        if not _hf.is_plain_or_captured(attention, GPT2Attention):
            return why_not_plain(attention, GPT2Attention)
        implementation = attention.config._attn_implementation
        if implementation not in _hf.KNOWN_IMPLEMENTATIONS:
            return f"the attention implementation is {implementation!r}"
        if attention.reorder_and_upcast_attn and implementation == "eager":
            return "attention is to be computed in float32 (reorder_and_upcast_attn)"
        if attention.training and attention.attn_dropout.p >= 1.0:
            return "attention dropout is 1"
        return None

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each submodule's name, and why it is not fused, or None where it is."""
        whole = self._refusal()
        yield "ln_1", whole or why_not_plain(self.ln_1, *_blocks.NORMS)
        yield "attn", whole
        if isinstance(self.attn, GPT2Attention):
            for name in ("attn.c_attn", "attn.c_proj"):
                yield name, whole or why_not_plain(self.get_submodule(name), *_CONVS)
            yield "attn.attn_dropout", whole
            yield "attn.resid_dropout", whole or _blocks.why_no_dropout(self.attn.resid_dropout)
        yield "ln_2", why_not_plain(self.ln_2, *_blocks.NORMS)
        yield from self._parts_of_mlp()
        if isinstance(self.mlp, GPT2MLP):
            whole = why_not_plain(self.mlp, GPT2MLP)
            yield "mlp.dropout", whole or _blocks.why_no_dropout(self.mlp.dropout)

    def _parts_of_mlp(self) -> Iterator[tuple[str, str | None]]:
        whole = why_not_plain(self.mlp, GPT2MLP)
        yield "mlp", whole
        if isinstance(self.mlp, GPT2MLP):
            for name in ("mlp.c_fc", "mlp.c_proj"):
                yield name, whole or why_not_plain(self.get_submodule(name), *_CONVS)
            known = _hf.activation_name(self.mlp.act) is not None
            yield "mlp.act", whole or (None if known else _blocks.NO_FUSED_FORM)


SWAPS = {Conv1D: FastConv1D, GPT2Block: FastGPT2Block}
KEEPING: dict[type, type] = {}


def _weights(conv: Module) -> tuple[Tensor, Tensor]:
    """The weight (out, in) and the bias."""
    return transposed(parameter(conv, "weight")), parameter(conv, "bias")


def _linear(conv: Module, x: Tensor, name: str) -> Tensor:
    """A Conv1D, called where it is not plain."""
    if is_plain(conv, *_CONVS):
        return functional.linear(x, *_weights(conv))
    step_aside("linear", f"{name}: {why_not_plain(conv, *_CONVS)}")
    return conv(x)


def _attention_dropout(attention: GPT2Attention) -> float:
    return attention.attn_dropout.p if attention.training else 0.0


def _activation_if_fused(mlp: Module) -> str | None:
    """The activation's name in feed_forward, where the network may be that but for its dropout; else None."""
    if is_plain(mlp, GPT2MLP) and is_plain(mlp.c_fc, *_CONVS) and is_plain(mlp.c_proj, *_CONVS):
        return _hf.activation_name(mlp.act)
    return None

"""The transformer decoder and its layer as modules."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttx import checks

from . import _cached
from ._blocks import (
    activation_name,
    add_norm,
    add_norm_and_sum,
    adopt_children,
    can_pack,
    cross_attention_half,
    feed_forward,
    feed_forward_half,
    parts,
    self_attention_half,
)
from ._padding import run_where_packed, takes_remove_padding
from ._plain import adopt, is_plain, refuse_scripting, step_aside, why_patched
from .cache import KVCache
from .transformer import causal_by, normed, removal_of


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer with fused attention, feed-forward, and add + dropout + layer norm.

    Every constructor argument, mask and layout of torch's; keys and values of the memory are one
    projection. A child that was replaced, subclassed, hooked or parametrized is called, outside the
    fusion that it would have been part of. Queries with nothing to attend to get zeros from the
    attention, where torch gives NaN.

    With a fasttx.nn.KVCache as `cache`, tgt holds the new tokens alone; they attend causally to all that were, without
    tgt_mask or tgt_is_causal. tgt_mask and tgt_key_padding_mask, where given, are over all tokens seen.

    An activation that is a module stays it in copies, and in a TransformerDecoder of them, where torch's become relu.
    """

    __prepare_scriptable__ = refuse_scripting

    @functools.wraps(torch.nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        adopt_children(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's takes an activation that is a module for a missing one, and copies then compute relu instead.
        torch.nn.Module.__setstate__(self, state)
        if not hasattr(self, "activation"):
            self.activation = F.relu

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        _require_tensors(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        nested = "a tensor is nested" if tgt.is_nested or memory.is_nested else None
        refusal = why_patched(self) or nested
        if cache is not None:
            _cached.require_caching_attentions(self, refusal, "self_attn", "multihead_attn")
        elif refusal is not None:
            step_aside("transformer_decoder_layer", refusal)
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip

        cached = {} if cache is None else {"cache": cache}

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask,
                need_weights=False, is_causal=tgt_is_causal, **cached,
            )[0]  # fmt: skip

        def attend_memory(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x, memory, memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask,
                need_weights=False, is_causal=memory_is_causal, **cached,
            )[0]  # fmt: skip

        tgt_masks = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask}
        memory_masks = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask}
        if cache is None:
            half = self._attention_half(tgt, **tgt_masks, is_causal=tgt_is_causal)

            def cross(x: Tensor) -> Tensor | None:
                return cross_attention_half(
                    self.multihead_attn, self.norm2, self.dropout2, x, memory, norm_first=self.norm_first,
                    **memory_masks, is_causal=memory_is_causal,
                )  # fmt: skip

        else:
            _cached.check(self.self_attn, tgt, None, cache, **tgt_masks)
            _cached.check(self.multihead_attn, tgt, memory, cache, **memory_masks)
            half = _cached.self_attention_half(
                self.self_attn, self.norm1, self.dropout1, tgt, cache, norm_first=self.norm_first, **tgt_masks
            )

            def cross(x: Tensor) -> Tensor | None:
                return _cached.cross_attention_half(
                    self.multihead_attn, self.norm2, self.dropout2, x, memory, cache, norm_first=self.norm_first,
                    **memory_masks,
                )  # fmt: skip

        decodes = cache is not None and self.self_attn._length(tgt) == 1
        return self._run(tgt, half, attend, cross, attend_memory, decodes)

    def run_packed(
        self, x: Tensor, memory: Tensor, cu_seqlens: Tensor, cu_seqlens_memory: Tensor, is_causal: bool
    ) -> Tensor:
        """The layer on packed sequences: x (tokens, width), and the memory of each."""

        def attend(x: Tensor) -> Tensor:
            return self.self_attn.attend_packed(x, x, cu_seqlens, cu_seqlens, is_causal)

        def attend_memory(x: Tensor) -> Tensor:
            attention = self.multihead_attn
            return attention.attend_packed(x, memory, cu_seqlens, cu_seqlens_memory, False)

        def cross(x: Tensor) -> Tensor | None:
            return cross_attention_half(
                self.multihead_attn, self.norm2, self.dropout2, x, memory, norm_first=self.norm_first,
                cu_seqlens=(cu_seqlens, cu_seqlens_memory),
            )  # fmt: skip

        half = self._attention_half(x, cu_seqlens=cu_seqlens, is_causal=is_causal)
        return self._run(x, half, attend, cross, attend_memory)

    def _attention_half(self, x: Tensor, **options: Any) -> Tensor | None:
        return self_attention_half(
            self.self_attn, self.norm1, self.dropout1, x, norm_first=self.norm_first, **options
        )

    def _run(
        self,
        x: Tensor,
        half: Tensor | None,
        attend: Callable[[Tensor], Tensor],
        cross: Callable[[Tensor], Tensor | None],
        attend_memory: Callable[[Tensor], Tensor],
        decodes: bool = False,
    ) -> Tensor:
        """The layer on tokens in any layout (..., width), given the attention among them and to the memory.

        half: what the self-attention's half made of x, and cross(x) what the memory's does, where they are one
        operation. decodes: tokens come one at a time.
        """
        name = activation_name(self.activation)
        ends = (self.linear1, self.activation, self.dropout, self.linear2)
        if not self.norm_first:
            x = add_norm(self.norm1, self.dropout1, attend(x), x) if half is None else half
            crossed = cross(x)
            x = add_norm(self.norm2, self.dropout2, attend_memory(x), x) if crossed is None else crossed
            return feed_forward_half(*ends, self.dropout3, self.norm3, x, name, decodes=decodes)
        if half is None:
            normed, x = add_norm_and_sum(self.norm2, self.dropout1, attend(self.norm1(x)), x)
        else:
            crossed = cross(half)
            if crossed is not None:
                return feed_forward_half(
                    *ends, self.dropout3, self.norm3, crossed, name, norm_first=True, decodes=decodes
                )
            normed, x = self.norm2(half), half
        normed, x = add_norm_and_sum(self.norm3, self.dropout2, attend_memory(normed), x)
        return x + self.dropout3(feed_forward(*ends, normed, name))

    def can_pack(self) -> bool:
        """Whether the layer may see packed tokens."""
        return can_pack(self)

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each child's name, and why it is not fused, or None where it is."""
        return parts(self)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder of fasttx's layers.

    remove_padding: True: wherever a key padding mask is given for target or memory, and no mask but a causal one, in
    inference and training, the layers run on the valid tokens alone: valid positions get the padded batch's values,
    padded ones zeros (while torch.compile traces, the layers run padded and the zeros are put there). None or False: on
    the padded batch, as torch.

    `cache`, a fasttx.nn.KVCache, as in TransformerDecoderLayer; padding is not removed then.
    """

    __prepare_scriptable__ = refuse_scripting

    remove_padding: bool | None = None

    @takes_remove_padding(torch.nn.TransformerDecoder)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.layers:
            if type(layer) is torch.nn.TransformerDecoderLayer:
                adopt_children(layer)
                adopt(layer, TransformerDecoderLayer)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        cached = {} if cache is None else {"cache": cache}
        _require_tensors(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        if cache is not None:
            _cached.require_caching_layers(self.layers, TransformerDecoderLayer)
        batch_first = self.layers[0].self_attn.batch_first
        length = tgt.shape[1 if batch_first and tgt.dim() == 3 else 0]
        causal = cache is None and causal_by(tgt_mask, tgt_is_causal, length)

        def padded(layer: torch.nn.Module, x: Tensor) -> Tensor:
            return layer(
                x, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=causal,
                memory_is_causal=memory_is_causal, **cached,
            )  # fmt: skip

        packings = zeroed = None
        nested = tgt.is_nested or memory.is_nested
        if self.remove_padding and cache is None and memory_mask is None and not (memory_is_causal or nested):
            batches = [(tgt, tgt_key_padding_mask), (memory, memory_key_padding_mask)]
            packings, zeroed = removal_of(
                batches, batch_first, tgt_mask, tgt_is_causal, length, causal == (tgt_mask is not None)
            )
        if packings is None:
            x = tgt
            for layer in self.layers:
                x = padded(layer, x)
            return normed(self.norm, x, None if zeroed is None else lambda x: x.masked_fill(zeroed, 0))

        of_tgt, of_memory = packings
        packed_memory = of_memory.pack(memory)

        def packed(layer: torch.nn.Module, x: Tensor) -> Tensor:
            return layer.run_packed(x, packed_memory, of_tgt.cu_seqlens, of_memory.cu_seqlens, causal)

        x = run_where_packed(self.layers, tgt, of_tgt, _can_pack, packed, padded)
        return normed(self.norm, x, of_tgt.unpack)


class PackingTransformerDecoder(TransformerDecoder):
    """TransformerDecoder that removes padding wherever key padding masks allow it; optimize() makes it."""

    remove_padding = True


def _can_pack(layer: torch.nn.Module) -> bool:
    return is_plain(layer, TransformerDecoderLayer) and layer.can_pack()


def _require_tensors(
    tgt: object,
    memory: object,
    tgt_mask: object,
    memory_mask: object,
    tgt_key_padding_mask: object,
    memory_key_padding_mask: object,
) -> None:
    no_mask = tgt_mask is memory_mask is tgt_key_padding_mask is memory_key_padding_mask is None
    if no_mask and type(tgt) is type(memory) is Tensor:
        return
    checks.require_tensor("tgt", tgt)
    checks.require_tensor("memory", memory)
    checks.require_same_device("tgt", tgt, memory=memory)
    checks.require_masks(
        "tgt", tgt, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
    )  # fmt: skip

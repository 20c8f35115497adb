"""The transformer encoder and its layer as modules."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fasttx import checks

from . import _cached
from ._blocks import (
    NORMS,
    activation_name,
    add_norm,
    add_norm_and_sum,
    adopt_children,
    can_pack,
    feed_forward,
    feed_forward_half,
    parts,
    self_attention_half,
)
from ._padding import Packing, packings_of, run_where_packed, takes_remove_padding, zeroed_by_packing
from ._plain import adopt, is_plain, refuse_scripting, step_aside, why_patched
from .attention import MultiheadAttention
from .cache import KVCache


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer with fused attention, feed-forward, and add + dropout + layer norm.

    Every constructor argument, mask and layout of torch's. A child that was replaced, subclassed,
    hooked or parametrized is called, outside the fusion that it would have been part of. Queries
    with nothing to attend to get zeros from the attention, where torch gives NaN. GELU("tanh") is
    the approximation in inference too, where torch's fast path computes the exact function.

    With a fasttx.nn.KVCache as `cache`, src holds the new tokens alone; they attend causally to all that were, without
    src_mask or is_causal: a layer of a decoder-only transformer. src_mask and src_key_padding_mask, where given, are
    over all tokens seen.
    """

    __prepare_scriptable__ = refuse_scripting

    @functools.wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        adopt_children(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        if type(src) is not Tensor:
            checks.require_tensor("src", src)
        if src_mask is not None or src_key_padding_mask is not None:
            checks.require_masks("src", src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        refusal = "src is nested" if src.is_nested else why_patched(self)
        if cache is not None:
            _cached.require_caching_attentions(self, refusal, "self_attn")
            return self._forward_cached(src, cache, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)
        if refusal is not None:
            step_aside("transformer_encoder_layer", refusal)
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = self._attention_half(
            src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal
        )
        if x is not None:
            return self._feed_forward_half(x)
        if type(self.self_attn) is MultiheadAttention:
            refusal = self.self_attn.refusal_of_masks(src, src, src_key_padding_mask, src_mask)
            if refusal is not None:  # torch's layer takes it in inference, or has an error of its own
                step_aside("transformer_encoder_layer", refusal)
                return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        else:
            # Another module gets what torch's layer hands over: masks to be added.
            src_mask = additive(src_mask, src)
            src_key_padding_mask = additive(src_key_padding_mask, src)

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask,
                need_weights=False, is_causal=is_causal,
            )[0]  # fmt: skip

        return self._run(src, attend)

    def _forward_cached(self, src: Tensor, cache: KVCache, **masks: Tensor | None) -> Tensor:
        _cached.check(self.self_attn, src, None, cache, **masks)
        half = _cached.self_attention_half(
            self.self_attn, self.norm1, self.dropout1, src, cache, norm_first=self.norm_first, **masks
        )
        decodes = self.self_attn._length(src) == 1
        if half is not None:
            return self._feed_forward_half(half, decodes)

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, x, x, need_weights=False, cache=cache, **masks)[0]

        return self._run(src, attend, decodes)

    def run_packed(self, x: Tensor, cu_seqlens: Tensor, is_causal: bool) -> Tensor:
        """The layer on packed sequences (tokens, width)."""
        half = self._attention_half(x, cu_seqlens=cu_seqlens, is_causal=is_causal)
        if half is not None:
            return self._feed_forward_half(half)

        def attend(x: Tensor) -> Tensor:
            return self.self_attn.attend_packed(x, x, cu_seqlens, cu_seqlens, is_causal)

        return self._run(x, attend)

    def _attention_half(self, x: Tensor, **options: Any) -> Tensor | None:
        return self_attention_half(
            self.self_attn, self.norm1, self.dropout1, x, norm_first=self.norm_first, **options
        )

    def _feed_forward_half(self, x: Tensor, decodes: bool = False) -> Tensor:
        return feed_forward_half(
            self.linear1, self.activation, self.dropout, self.linear2, self.dropout2, self.norm2, x,
            activation_name(self.activation), self.norm_first, decodes,
        )  # fmt: skip

    def _run(self, x: Tensor, attend: Callable[[Tensor], Tensor], decodes: bool = False) -> Tensor:
        """The layer on tokens in any layout (..., width), given the self-attention over them.

        decodes: tokens come one at a time.
        """
        if not self.norm_first:
            return self._feed_forward_half(add_norm(self.norm1, self.dropout1, attend(x), x), decodes)
        normed, x = add_norm_and_sum(self.norm2, self.dropout1, attend(self.norm1(x)), x)
        name = activation_name(self.activation)
        return x + self.dropout2(
            feed_forward(self.linear1, self.activation, self.dropout, self.linear2, normed, name)
        )

    def can_pack(self) -> bool:
        """Whether the layer may see packed tokens."""
        return can_pack(self)

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each child's name, and why it is not fused, or None where it is."""
        return parts(self)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder, which runs on packed tokens where torch uses nested tensors.

    That is in inference, with a key padding mask and no other, under the conditions of torch's
    nested-tensor path: the valid tokens are packed once, every layer runs on them alone, and padded
    positions hold zeros before the final norm, as there. Otherwise, and while torch.compile traces,
    the layers run on the padded batch.

    remove_padding: None, as said. True: any padding pattern, in inference and in training, beside a causal mask too:
    valid positions get the padded batch's values, padded ones zeros (while torch.compile traces, the layers run padded
    and the zeros are put there). False: never, and padded positions are computed like others, also where torch would
    leave zeros.

    `cache`, a fasttx.nn.KVCache, as in TransformerEncoderLayer; padding is not removed then.
    """

    __prepare_scriptable__ = refuse_scripting

    remove_padding: bool | None = None

    @takes_remove_padding(torch.nn.TransformerEncoder)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.layers:
            if type(layer) is torch.nn.TransformerEncoderLayer:
                adopt_children(layer)
                adopt(layer, TransformerEncoderLayer)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        checks.require_tensor("src", src)
        checks.require_masks("src", src, mask=mask, src_key_padding_mask=src_key_padding_mask)
        if cache is not None:
            _cached.require_caching_layers(self.layers, TransformerEncoderLayer)
            for layer in self.layers:
                src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, cache=cache)
            return normed(self.norm, src, None)
        refusal = "src is nested" if src.is_nested else _refusal_of_padding(self.layers[0], src, src_key_padding_mask)
        if refusal is not None:
            step_aside("transformer_encoder", refusal)
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        batch_first = self.layers[0].self_attn.batch_first
        length = src.shape[1 if batch_first and src.dim() == 3 else 0]
        causal = causal_by(mask, is_causal, length)
        as_torch = self.remove_padding is not False and _torch_would_nest(self, src, mask, src_key_padding_mask)

        def padded(layer: torch.nn.Module, x: Tensor) -> Tensor:
            return self._padded(layer, x, mask, src_key_padding_mask, causal)

        packings = zeroed = None
        if as_torch or (self.remove_padding and src_key_padding_mask is not None):
            batches = [(src, src_key_padding_mask)]
            survives = as_torch or causal == (mask is not None)
            packings, zeroed = removal_of(batches, batch_first, mask, is_causal, length, survives)
        if packings is None:
            for layer in self.layers:
                src = padded(layer, src)
            return normed(self.norm, src, None if zeroed is None else lambda x: x.masked_fill(zeroed, 0))

        (packing,) = packings
        within = causal and mask is not None
        x = run_where_packed(
            self.layers, src, packing, _can_pack,
            lambda layer, x: layer.run_packed(x, packing.cu_seqlens, within), padded,
        )  # fmt: skip
        # torch's nested path normalises the zeros too.
        return normed(self.norm, x, packing.unpack, of_zeros=as_torch)

    @staticmethod
    def _padded(
        layer: torch.nn.Module,
        x: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        if type(layer) is not TransformerEncoderLayer:
            # Another layer gets what torch's encoder hands over: masks to be added.
            mask, key_padding_mask = additive(mask, x), additive(key_padding_mask, x)
        return layer(
            x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=key_padding_mask
        )


class PackingTransformerEncoder(TransformerEncoder):
    """TransformerEncoder that removes padding wherever a key padding mask allows it; optimize() makes it."""

    remove_padding = True


def _refusal_of_padding(layer: torch.nn.Module, src: Tensor, key_padding_mask: Tensor | None) -> str | None:
    """Why torch's forward takes a mask that is none of the documented ones, by an error or in its own way."""
    if key_padding_mask is None or src.dim() != 3 or type(layer.self_attn) is not MultiheadAttention:
        return None
    return layer.self_attn.refusal_of_masks(src, src, key_padding_mask, None)


def _can_pack(layer: torch.nn.Module) -> bool:
    return is_plain(layer, TransformerEncoderLayer) and layer.can_pack()


def additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A bool mask (True = ignore) as one to add; any other as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def normed(
    norm: torch.nn.Module | None, x: Tensor, restore: Callable[[Tensor], Tensor] | None, of_zeros: bool = False
) -> Tensor:
    """The final norm, and `restore`, which puts zeros at padded positions.

    Those come after it, unless it is to see them: where it has to be called, or with `of_zeros`.
    """
    if norm is None:
        return x if restore is None else restore(x)
    if restore is None:
        return norm(x)
    if of_zeros or not is_plain(norm, *NORMS):
        return norm(restore(x))
    return restore(norm(x))


def causal_by(mask: Tensor | None, hint: bool | None, length: int) -> bool:
    """The hint; without one, whether the mask is exactly the causal mask of this length."""
    if hint is not None:
        return hint
    if mask is None or tuple(mask.shape) != (length, length) or torch.compiler.is_compiling():
        return False
    if not checks.has_values(mask):
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False  # torch's attention says that it is no mask
    return bool(_is_causal(mask))


def removal_of(
    batches: list[tuple[Tensor, Tensor | None]],
    batch_first: bool,
    mask: Tensor | None,
    hint: bool | None,
    length: int,
    survives: bool,
) -> tuple[list[Packing] | None, Tensor | None]:
    """How to pack batches, each given with its key padding mask; or, while torch.compile traces, where zeros are to go.

    mask and hint: the first's. Of masks beside the padding only a causal one `survives` packing; the hint alone is
    torch's error. That is not known while it is traced.
    """
    if torch.compiler.is_compiling():
        return None, _where_causal(zeroed_by_packing(batch_first, *batches), mask, hint, length)
    return packings_of(batch_first, *batches) if survives else None, None


def _where_causal(zeroed: Tensor | None, mask: Tensor | None, hint: bool | None, length: int) -> Tensor | None:
    """`zeroed`, if what other mask there is is causal: as by `causal_by`, without a branch on the mask's values."""
    if zeroed is None or mask is None or hint is not None:
        return zeroed if (mask is not None) == bool(hint) else None
    return zeroed & _is_causal(mask) if tuple(mask.shape) == (length, length) else None


def _is_causal(mask: Tensor) -> Tensor:
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return (mask == (later if mask.dtype == torch.bool else additive(later, mask))).all()


def _torch_would_nest(
    encoder: TransformerEncoder, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None
) -> bool:
    """Whether torch's encoder would run this call on nested tensors, and so leave zeros at padded positions."""
    if key_padding_mask is None or mask is not None or src.dim() != 3:
        return False
    # What torch's encoder would do without adapters, with which fasttx.finetune keeps it from nesting.
    nests = getattr(encoder, "_before_lora", getattr(encoder, "use_nested_tensor", False))
    if not nests or encoder.layers[0].training:
        return False
    if torch.compiler.is_compiling() or not torch.backends.mha.get_fastpath_enabled():
        return False
    if not checks.has_values(key_padding_mask):
        return False
    if torch.is_autocast_enabled():
        return False
    if torch.is_grad_enabled():
        if src.requires_grad or any(p.requires_grad for p in encoder.layers[0].parameters()):
            return False
    if not getattr(encoder, "mask_check", True) or key_padding_mask.dim() != 2:
        return True
    # Left aligned: no valid token follows a padded one.
    padded = key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask != 0
    return not bool((padded[:, :-1] & ~padded[:, 1:]).any())

"""Hugging Face's growing cache of keys and values, without a copy of all of it for every token."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from fasttx.nn import _blocks

Sizes = tuple[int, ...]


class GrowingLayer(DynamicLayer):
    """DynamicLayer whose keys and values are the filled part of buffers with room for as many again.

    What lies in a buffer is never overwritten: whoever kept an earlier view keeps its values. Anybody may put other
    tensors in place of `keys` and `values`, as beam search, `crop` and `offload` do: the next update begins anew with
    them.
    """

    # The buffers, and the views of them that are `keys` and `values` as long as nobody replaces those.
    _room: tuple[Tensor, Tensor] | None = None
    _filled: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values (B, H, T, D), and returns all of them."""
        alike = key_states.dtype is value_states.dtype and key_states.device == value_states.device
        room = self.room(key_states, key_states.shape, value_states.shape) if alike else None
        if room is None:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values, start = room
        tokens = key_states.shape[2]
        keys.narrow(2, start, tokens).copy_(key_states)
        values.narrow(2, start, tokens).copy_(value_states)
        return self.fill(start + tokens)

    def room(self, like: Tensor, keys: Sizes, values: Sizes) -> tuple[Tensor, Tensor, int] | None:
        """Buffers with room for keys and values (B, H, T, D) of these sizes, behind as many places as are filled.

        Of the dtype and on the device of `like`. None where what is kept cannot go on with them, or not in a buffer.
        Who writes them there calls `fill`.
        """
        # While it compiles nothing may be written to in place; and a gradient may have been promised to views.
        if is_compiling() or torch.is_grad_enabled() or len(keys) != 4 or len(values) != 4:
            return None
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        start = 0
        # The first keys follow an empty tensor of one dimension.
        if self.keys.dim() == 4:
            if not (_continues(self.keys, like, keys) and _continues(self.values, like, values)):
                return None
            start = self.keys.shape[2]
        end = start + keys[2]
        if not self._has_room(end):
            self._room = (_with_room(self.keys, start, like, keys), _with_room(self.values, start, like, values))
            self.fill(start)
        return *self._room, start

    def fill(self, length: int) -> tuple[Tensor, Tensor]:
        """The buffers' first `length` places are keys and values now."""
        self.keys, self.values = self._filled = tuple(buffer.narrow(2, 0, length) for buffer in self._room)
        return self._filled

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i goes on from what sequence beam_idx[i] has seen: in a buffer with room for the tokens to come."""
        if is_compiling() or torch.is_grad_enabled() or not self._has_room(0):
            return super().reorder_cache(beam_idx)
        length, index = self.keys.shape[2], beam_idx.to(self.keys.device)
        rooms = tuple(buffer.new_empty((len(index), *buffer.shape[1:])) for buffer in self._room)
        for kept, room in zip(self._filled, rooms, strict=True):
            torch.index_select(kept, 0, index, out=room.narrow(2, 0, length))
        self._room = rooms
        self.fill(length)

    def _has_room(self, end: int) -> bool:
        return (
            self._filled is not None
            and self.keys is self._filled[0]
            and self.values is self._filled[1]
            and end <= self._room[0].shape[2]
            # An inference tensor can be written to in inference mode alone.
            and (torch.is_inference_mode_enabled() or not self._room[0].is_inference())
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the buffers: a copy shares none, and makes its own at its next update."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_room", "_filled")}


def _continues(kept: Tensor, like: Tensor, sizes: Sizes) -> bool:
    """Whether keys or values of these sizes, in what `like` is, can follow `kept` (B, H, T, D)."""
    if kept.dtype is not like.dtype or kept.device != like.device:
        return False
    wanted = kept.shape
    return sizes[0] == wanted[0] and sizes[1] == wanted[1] and sizes[3] == wanted[3]


def _with_room(kept: Tensor, length: int, like: Tensor, new: Sizes) -> Tensor:
    """A tensor that begins with the `length` places of `kept`, with room for twice as many as with the new ones."""
    room = like.new_empty((*new[:2], 2 * (length + new[2]), new[3]))
    if length > 0:
        room.narrow(2, 0, length).copy_(kept)
    return room


def update(cache: Cache, key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """cache.update(key, value, index); where that would concatenate, it appends in place from now on."""
    growing(cache, index)
    return cache.update(key, value, index)


def growing(cache: Cache, index: int) -> GrowingLayer | None:
    """The layer `index` of a cache of self-attention where it grows in place, from now on; else None."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = cache.layers
    if index >= len(layers) or cache.offloading or is_compiling():
        return None
    layer = layers[index]
    if type(layer) is DynamicLayer:
        layer.__class__ = GrowingLayer
    return layer if type(layer) is GrowingLayer else None


def attention_half(
    cache: Cache,
    index: int,
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    norm: Module,
    dropout: Module | _blocks.Dropout,
    *,
    norm_first: bool,
    heads: int,
    scale: float,
    dropout_p: float,
    mask: Tensor | None,
) -> Tensor | None:
    """_blocks.attention_half of the tokens x (B, T, width), causal, and of those in the cache, to which they are added.

    None where it has no such form.
    """
    # The room that is made has the dtype and the device of x.
    if dropout_p > 0.0 or not _blocks.can_attend_kept(norm, dropout, (x, *parameters), norm_first):
        return None
    room = reserve(cache, index, x, heads, mask)
    if room is None:
        return None
    layer, kept = room
    tokens = x.shape[1]
    is_causal = mask is None and tokens > 1
    output = _blocks.attend_kept(
        x, parameters, norm, norm_first, kept, mask, is_causal, scale, decodes=x.shape[1] == 1
    )
    layer.fill(kept[2] + tokens)
    return output


def reserve(
    cache: Cache, index: int, x: Tensor, heads: int, mask: Tensor | None
) -> tuple[GrowingLayer, tuple[Tensor, Tensor, int]] | None:
    """The layer that holds the cache's self-attention `index`, and what its `room` gives for tokens x (B, T, width).

    None where these cannot attend as tokens after those that it holds, or where it does not grow in place.
    """
    layer = growing(cache, index)
    if layer is None:
        return None
    batch, length, width = x.shape
    sizes = (batch, heads, length, width // heads)
    kept = layer.room(x, sizes, sizes)
    # Without a mask, one token sees all of them.
    if kept is None or (mask is None and length > 1 and kept[2] > 0):
        return None
    return layer, kept


def memory(cache: EncoderDecoderCache, index: int, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Keys and values (B, H, S, D) that the cache holds of cross-attention `index`, fit for tokens x, and S."""
    layers = cache.cross_attention_cache.layers
    if not cache.is_updated.get(index) or index >= len(layers) or type(layers[index]) is not DynamicLayer:
        return None
    keys, values = layers[index].keys, layers[index].values
    fits = keys.shape == values.shape and len(keys) == len(x) and keys.dtype is x.dtype and values.dtype is x.dtype
    if not (fits and keys.is_cpu and values.is_cpu and keys.stride(3) == 1 and values.stride(3) == 1):
        return None
    return keys, values, keys.shape[2]

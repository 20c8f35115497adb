"""Hugging Face's growing cache of keys and values, without a copy of all of it for every token."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.cache_utils import Cache, DynamicLayer


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
        if (
            not self.is_initialized
            or is_compiling()
            # A gradient may have been promised to views of a buffer.
            or torch.is_grad_enabled()
            or not (_continues(self.keys, key_states) and _continues(self.values, value_states))
        ):
            return super().update(key_states, value_states, *args, **kwargs)
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if not self._has_room(end):
            self._room = (_with_room(self.keys, key_states, end), _with_room(self.values, value_states, end))
        keys, values = self._room
        keys.narrow(2, start, end - start).copy_(key_states)
        values.narrow(2, start, end - start).copy_(value_states)
        self.keys, self.values = self._filled = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        return self._filled

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


def _continues(kept: Tensor, new: Tensor) -> bool:
    """Whether `new` can follow `kept` as it is; the first keys follow an empty tensor of one dimension."""
    if kept.dim() != 4 or new.dim() != 4 or kept.dtype is not new.dtype or kept.device != new.device:
        return False
    sizes, wanted = new.shape, kept.shape
    return sizes[0] == wanted[0] and sizes[1] == wanted[1] and sizes[3] == wanted[3]


def _with_room(kept: Tensor, new: Tensor, length: int) -> Tensor:
    """A tensor that begins with `kept` (B, H, T, D), with room for 2 * length along T."""
    room = new.new_empty((*kept.shape[:2], 2 * length, kept.shape[3]))
    room.narrow(2, 0, kept.shape[2]).copy_(kept)
    return room


def update(cache: Cache, key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """cache.update(key, value, index); where that would concatenate, it appends in place from now on."""
    layers = cache.layers
    if index < len(layers) and type(layers[index]) is DynamicLayer and not cache.offloading and not is_compiling():
        layers[index].__class__ = GrowingLayer
    return cache.update(key, value, index)

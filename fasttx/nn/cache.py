"""Keys and values that decoding step by step keeps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from fasttx import checks
from fasttx._weak import WeakCache

_LEAST_CAPACITY = 64  # tokens


class KVCache:
    """The keys and values of every attention of a model, kept from one decoding step to the next.

    Given as `cache=` to MultiheadAttention, or to a layer or a stack of TransformerDecoder or TransformerEncoder, which
    are then called with the new tokens alone, one or several at a time. Self-attention appends their keys and values in
    place and is causal; cross-attention projects the memory at the first call and does not look at it again until
    `reset`. One cache serves a whole model, for one batch of sequences:

        cache = fasttx.nn.KVCache()
        with torch.inference_mode():
            for _ in range(new_tokens):
                hidden = decoder(embed(tokens[:, cache.length() :]), memory, cache=cache)
                tokens = torch.cat((tokens, head(hidden[:, -1]).argmax(-1, keepdim=True)), dim=1)

    max_length: room for so many tokens is made once, and more raise ValueError; None: the room doubles as it fills.
    window: self-attention goes back window - 1 positions at most, and what lies before them is given up.

    It holds no gradients: calls that want one raise ValueError.
    """

    def __init__(self, max_length: int | None = None, *, window: int | None = None) -> None:
        for name, value in (("max_length", max_length), ("window", window)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
        self.max_length, self.window = max_length, window
        self.reset()

    def reset(self) -> None:
        """Forgets everything: the next call begins another batch of sequences."""
        self._kept, self._projected = WeakCache(), WeakCache()

    def length(self, layer: Module | None = None) -> int:
        """How many tokens the attention `layer` has seen; without one, how many any has."""
        if layer is None:
            return max((kept.length for kept in self._kept.values()), default=0)
        kept = self._kept.get(layer)
        return 0 if kept is None else kept.length

    @property
    def nbytes(self) -> int:
        """The memory that is taken, room for tokens to come included."""
        return sum(one.keys.nbytes + one.values.nbytes for one in (*self._kept.values(), *self._projected.values()))

    def append(self, layer: Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """Adds the keys (B, H, T, D) and values (B, H, T, Dv) of new tokens to those of the attention `layer`.

        Returns the keys and values that those tokens may attend to, as views, and the position of the first of them:
        0 without a window. Raises ValueError where they do not go with those before, or there is no room.
        """
        _check_pair(key, value)
        room = self._reserve(layer, key, key.shape, value, value.shape)
        start, tokens = room.filled, key.shape[2]
        end = start + tokens
        room.keys[:, :, start:end].copy_(key)
        room.values[:, :, start:end].copy_(value)
        room.commit()
        return room.keys[:, :, :end], room.values[:, :, :end], room.first

    def reserve(self, layer: Module, like: Tensor, sizes: tuple[int, int, int, int]) -> "Room":
        """Room for keys and values (B, H, T, D) of these sizes, in the dtype and on the device of `like`.

        For who writes them there itself: the attention `layer` has seen those tokens once the room's `commit` is
        called. Raises as `append`.
        """
        return self._reserve(layer, like, sizes, like, sizes)

    def _reserve(
        self, layer: Module, key: Tensor, key_sizes: tuple[int, ...], value: Tensor, value_sizes: tuple[int, ...]
    ) -> "Room":
        kept = self._kept.get(layer)
        if kept is None:
            kept = _Kept(_empty(key, key_sizes, 0), _empty(value, value_sizes, 0))
        else:
            _check_same("key", key, key_sizes, kept.keys)
            _check_same("value", value, value_sizes, kept.values)
        tokens = key_sizes[2]
        length = kept.length + tokens
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"the cache has room for max_length={self.max_length} tokens, and these make {length}")
        seen = kept.end if self.window is None else min(kept.end, self.window - 1)
        if kept.end + tokens > kept.keys.shape[2]:
            kept.move(seen, self._capacity(seen + tokens))

        def commit() -> None:
            kept.end += tokens
            kept.length = length
            self._kept.set(layer, kept)

        start = kept.end - seen
        return Room(kept.keys[:, :, start:], kept.values[:, :, start:], seen, kept.length - seen, commit)

    def memory(self, layer: Module) -> tuple[Tensor, Tensor] | None:
        """What `project_once` keeps for the attention `layer`, if it does yet."""
        memory = self._projected.get(layer)
        return None if memory is None else (memory.keys, memory.values)

    def project_once(
        self, layer: Module, make: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What `make` gave at the first call for the attention `layer`: the memory's keys and values."""
        memory = self._projected.get(layer)
        if memory is None:
            key, value = make()
            _check_pair(key, value)
            # Read at every step: dense.
            memory = _Memory(key.contiguous(), value.contiguous())
            self._projected.set(layer, memory)
        return memory.keys, memory.values

    def reorder(self, index: Tensor) -> None:
        """Sequence i goes on from what sequence index[i] has seen: beam search. index (B',) in int64; B' may be new."""
        checks.require_tensor("index", index)
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(f"index must be (sequences,) in int64, got {checks.shape(index)} in {index.dtype}")
        everything = (*self._kept.values(), *self._projected.values())
        for one in everything:
            _check_index(index, one.keys)
        for one in everything:
            one.select(index)

    def crop(self, length: int) -> None:
        """Goes back to the first `length` tokens, as when guessed ones are rejected.

        Raises ValueError where a window has given up keys that the token after them needs.
        """
        if type(length) is not int or length < 0:
            raise ValueError(f"length must be an integer of at least 0, got {length!r}")
        dropped = [(kept, kept.length - length) for kept in self._kept.values() if kept.length > length]
        for kept, tokens in dropped:
            if max(kept.end - tokens, 0) < (length if self.window is None else min(length, self.window - 1)):
                raise ValueError(
                    f"length {length} is too far back: of {kept.length} tokens the window of {self.window} has kept "
                    f"the last {kept.end}"
                )
        for kept, tokens in dropped:
            kept.end, kept.length = max(kept.end - tokens, 0), length

    def _capacity(self, tokens: int) -> int:
        """Room to make where so many tokens have to be held."""
        if self.window is None:
            return max(2 * tokens, _LEAST_CAPACITY) if self.max_length is None else self.max_length
        # Tokens in the window are moved to the front once in about `window` tokens.
        capacity = max(tokens, min(2 * self.window, max(2 * tokens, _LEAST_CAPACITY)))
        return capacity if self.max_length is None else min(capacity, self.max_length)


@dataclass(frozen=True)
class Room:
    """Places for new tokens, behind those kept ones that they may attend to.

    keys, values (B, H, places, D): views, of which the first `filled` hold kept tokens and at least as many as there
    are new ones are free. first: the position of the first of them, 0 without a window. commit: makes the new tokens,
    once they are written, seen ones.
    """

    keys: Tensor
    values: Tensor
    filled: int
    first: int
    commit: Callable[[], None]


@dataclass
class _Kept:
    """Buffers (B, H, capacity, D) whose first `end` places hold the last `end` of `length` tokens."""

    keys: Tensor
    values: Tensor
    end: int = 0
    length: int = 0

    def move(self, seen: int, capacity: int) -> None:
        """The last `seen` tokens into new buffers of this capacity: views handed out before stay as they are."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _empty(old, old.shape, capacity)
            new[:, :, :seen].copy_(old[:, :, self.end - seen : self.end])
            setattr(self, name, new)
        self.end = seen

    def select(self, index: Tensor) -> None:
        """The sequences `index`, in new buffers of the same capacity."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _empty(old, (len(index), *old.shape[1:]), old.shape[2])
            new[:, :, : self.end].copy_(old[:, :, : self.end].index_select(0, index))
            setattr(self, name, new)


@dataclass
class _Memory:
    """The keys and values (B, H, S, D) of a memory."""

    keys: Tensor
    values: Tensor

    def select(self, index: Tensor) -> None:
        """The sequences `index`."""
        self.keys, self.values = (tensor.index_select(0, index) for tensor in (self.keys, self.values))


def _empty(like: Tensor, sizes: tuple[int, ...], capacity: int) -> Tensor:
    """(B, H, capacity, D) for sizes (B, H, any, D)."""
    # One made in inference mode could not be appended to outside of it.
    with torch.inference_mode(False):
        return like.new_empty((*sizes[:2], capacity, sizes[3]))


def _check_pair(key: Tensor, value: Tensor) -> None:
    for name, tensor in (("key", key), ("value", value)):
        checks.require_floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, width), got the shape {checks.shape(tensor)}")
        refuse_gradient(name, tensor)
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value differ: {checks.shape(key)} and {checks.shape(value)}")


def refuse_gradient(name: str, tensor: Tensor) -> None:
    """No tensor whose gradient is wanted."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} wants a gradient, and a cache holds none: call it under torch.no_grad() or torch.inference_mode()"
        )


def _check_same(name: str, tensor: Tensor, sizes: tuple[int, ...], before: Tensor) -> None:
    for what, now, then in (
        ("sequences", sizes[0], before.shape[0]),
        ("heads", sizes[1], before.shape[1]),
        ("width", sizes[3], before.shape[3]),
        ("dtype", tensor.dtype, before.dtype),
        ("device", tensor.device, before.device),
    ):
        if now != then:
            raise ValueError(f"{name} differs from the cache's in {what}: {now}, after {then}; reset() begins anew")


def _check_index(index: Tensor, kept: Tensor) -> None:
    if index.device != kept.device:
        raise ValueError(f"index is on {index.device} but the cache is on {kept.device}: move them to one device")
    sequences = kept.shape[0]
    if index.is_cpu and bool(((index < 0) | (index >= sequences)).any()):
        raise ValueError(f"index must lie in [0, {sequences}), got {index.tolist()}")

"""Keys and values that decoding step by step keeps, and attention over them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module
from torch.nn import functional as F

from fasttx import checks, functional
from fasttx._weak import WeakCache

from ._plain import parameter
from .attention import MultiheadAttention, _split_rows

_LEAST_CAPACITY = 64  # tokens


class KVCache:
    """The keys and values of every attention of a model, kept from one decoding step to the next.

    Given as `cache=` to MultiheadAttention, TransformerDecoderLayer or TransformerDecoder, which are then called with
    the new tokens alone, one or several at a time. Self-attention appends their keys and values in place and is causal;
    cross-attention projects the memory at the first call and does not look at it again until `reset`. One cache serves
    a whole model, for one batch of sequences:

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
        kept = self._kept.get(layer)
        if kept is None:
            kept = _Kept(key[:, :, :0], value[:, :, :0])
        else:
            _check_same("key", key, kept.keys)
            _check_same("value", value, kept.values)
        tokens = key.shape[2]
        length = kept.length + tokens
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"the cache has room for max_length={self.max_length} tokens, and these make {length}")
        seen = kept.end if self.window is None else min(kept.end, self.window - 1)
        if kept.end + tokens > kept.keys.shape[2]:
            kept.move(seen, self._capacity(seen + tokens))
        kept.keys[:, :, kept.end : kept.end + tokens].copy_(key)
        kept.values[:, :, kept.end : kept.end + tokens].copy_(value)
        kept.end += tokens
        kept.length = length
        self._kept.set(layer, kept)
        first = kept.end - seen - tokens
        return kept.keys[:, :, first : kept.end], kept.values[:, :, first : kept.end], length - seen - tokens

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
            new = _empty(old, old.shape[0], capacity)
            new[:, :, :seen].copy_(old[:, :, self.end - seen : self.end])
            setattr(self, name, new)
        self.end = seen

    def select(self, index: Tensor) -> None:
        """The sequences `index`, in new buffers of the same capacity."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _empty(old, len(index), old.shape[2])
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


def _empty(like: Tensor, batch: int, capacity: int) -> Tensor:
    # One made in inference mode could not be appended to outside of it.
    with torch.inference_mode(False):
        return like.new_empty((batch, like.shape[1], capacity, like.shape[3]))


def _check_pair(key: Tensor, value: Tensor) -> None:
    for name, tensor in (("key", key), ("value", value)):
        checks.require_floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, width), got the shape {checks.shape(tensor)}")
        _refuse_gradient(name, tensor)
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value differ: {checks.shape(key)} and {checks.shape(value)}")


def _refuse_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} wants a gradient, and a cache holds none: call it under torch.no_grad() or torch.inference_mode()"
        )


def _check_same(name: str, tensor: Tensor, before: Tensor) -> None:
    for what, now, then in (
        ("sequences", tensor.shape[0], before.shape[0]),
        ("heads", tensor.shape[1], before.shape[1]),
        ("width", tensor.shape[3], before.shape[3]),
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


def attend_cached(
    mha: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    cache: KVCache,
) -> tuple[Tensor, Tensor | None]:
    """mha.forward with a cache: causal self-attention where query is key is value, else attention to a memory.

    Masks are over all tokens that have been seen, these included, or over the memory: attn_mask (T, Tk) or
    (B * H, T, Tk), key_padding_mask (B, Tk). Whatever is wrong raises before the cache has changed.
    """
    if is_compiling():
        # Without fullgraph=True, this is where torch.compile leaves the call to eager execution.
        raise RuntimeError(
            "a KVCache cannot be compiled, as it is longer at every call: call the module as it is, or compile without "
            "fullgraph=True, which leaves attention with a cache as it is"
        )
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a fasttx.nn.KVCache, got {type(cache).__name__}")
    if mha.bias_k is not None or mha.add_zero_attn:
        raise ValueError("a cache has no place for keys of the module's own (add_bias_kv, add_zero_attn)")
    of_itself = query is key and key is value
    if of_itself:
        _require(mha, query, query, query)
        q, k, v = map(mha._split_heads, mha._project(query, query, query))
        before = cache.length(mha)
        keys = before + q.shape[2]
    else:

        def project() -> tuple[Tensor, Tensor]:
            _require(mha, query, key, value)
            # With no query, whose projection is not kept.
            return tuple(map(mha._split_heads, mha._project(query[:0], key, value)[1:]))

        _require_layout(mha, query)
        k, v = cache.project_once(mha, project)
        q = mha._split_heads(_project_query(mha, query))
        keys = k.shape[2]
    _refuse_gradient("query", q)
    _check_masks(q, keys, key_padding_mask, attn_mask, query.dim())
    offset, first, window = 0, 0, None
    if of_itself:
        k, v, first = cache.append(mha, k, v)
        offset = before - first
        window = None if cache.window is None else (cache.window - 1, -1)
    mask = mha.mask(
        None if attn_mask is None else attn_mask[..., first:],
        None if key_padding_mask is None else key_padding_mask[..., first:],
        query.dtype,
    )
    # One token sees everything that is kept.
    causal = of_itself and q.shape[2] > 1
    dropout_p = mha.dropout if mha.training else 0.0
    if not need_weights:
        output = functional.attention(
            q, k, v, attn_mask=mask, is_causal=causal, query_offset=offset, window=window if causal else None,
            dropout_p=dropout_p,
        )  # fmt: skip
        return mha._join_heads(output, query.dim()), None
    if causal:
        mask = _within(mask, q, k, offset, cache.window)
    weights = functional.softmax((q * mha.head_dim**-0.5) @ k.transpose(-2, -1), mask=mask)
    weights = F.dropout(weights, dropout_p)
    output = mha._join_heads(weights @ v, query.dim())
    weights = weights.mean(dim=1) if average_attn_weights else weights
    return output, weights if query.dim() == 3 else weights.squeeze(0)


def _require(mha: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    refusal = mha.refusal(query, key, value, None, None, False)
    if refusal is not None:
        raise ValueError(f"attention with a cache cannot take this call: {refusal}")


def _require_layout(mha: MultiheadAttention, query: Tensor) -> None:
    checks.require_floating("query", query)
    if query.dim() not in (2, 3) or query.shape[-1] != mha.embed_dim:
        raise ValueError(f"query must be (batch, length, {mha.embed_dim}) or unbatched, got {checks.shape(query)}")


def _project_query(mha: MultiheadAttention, query: Tensor) -> Tensor:
    weight, bias = parameter(mha, "in_proj_weight"), parameter(mha, "in_proj_bias")
    weight = mha.q_proj_weight if weight is None else _split_rows(weight, mha.embed_dim)[0]
    return functional.linear(query, weight, None if bias is None else _split_rows(bias, mha.embed_dim)[0])


def _check_masks(
    q: Tensor, keys: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None, dims: int
) -> None:
    """Masks for q (B, H, T, D) and so many keys."""
    batch, heads, queries, _ = q.shape
    of_padding = ((batch, keys),) if dims == 3 else ((keys,),)
    for name, mask, shapes in (
        ("key_padding_mask", key_padding_mask, of_padding),
        ("attn_mask", attn_mask, ((queries, keys), (batch * heads, queries, keys))),
    ):
        if mask is None:
            continue
        checks.require_tensor(name, mask)
        if tuple(mask.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have the shape {wanted}, over all tokens seen, got {checks.shape(mask)}")
        if mask.dtype not in (torch.bool, torch.float32, q.dtype):
            raise TypeError(f"{name} must be torch.bool, torch.float32 or {q.dtype}, got {mask.dtype}")
        _refuse_gradient(name, mask)


def _within(mask: Tensor | None, q: Tensor, k: Tensor, offset: int, window: int | None) -> Tensor:
    """The mask, with what causality and the window leave of it."""
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(offset)
    if window is not None:
        allowed = allowed.triu(offset - window + 1)
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)

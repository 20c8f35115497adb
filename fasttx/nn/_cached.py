"""Attention to the keys and values of a KVCache: a module's, and a half of a layer as one operation."""

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module, ModuleList
from torch.nn import functional as F

from fasttx import autocast, checks, functional

from . import _blocks
from ._plain import is_plain, step_aside, why_not_plain
from .attention import MultiheadAttention
from .cache import KVCache, refuse_gradient


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
    of_itself = query is key and key is value
    _check_call(mha, query, key, value, key_padding_mask, attn_mask, cache, of_itself)
    offset, first, window = 0, 0, None
    if of_itself:
        q, k, v = map(mha.split_heads, mha._project(query, query, query))
        before = cache.length(mha)
        k, v, first = cache.append(mha, k, v)
        offset = before - first
        window = None if cache.window is None else (cache.window - 1, -1)
    else:
        k, v = _memory(mha, query, key, value, cache)
        q = mha.split_heads(functional.linear(query, *mha.projection_of_queries()))
    mask = _mask(mha, query, key_padding_mask, attn_mask, first)
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
        mask = _within(mask, q.shape[2], offset, cache.window, q.device)
    weights = functional.softmax((q * mha.head_dim**-0.5) @ k.transpose(-2, -1), mask=mask)
    weights = F.dropout(weights, dropout_p)
    output = mha._join_heads(weights @ v, query.dim())
    weights = weights.mean(dim=1) if average_attn_weights else weights
    return output, weights if query.dim() == 3 else weights.squeeze(0)


def self_attention_half(
    mha: MultiheadAttention,
    norm: Module,
    dropout: Module,
    x: Tensor,
    cache: KVCache,
    *,
    norm_first: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor | None:
    """norm(x + attention), or x + attention of norm(x), of new tokens x: one operation, which adds them to the cache.

    For arguments that `check` has seen. None where it has no such form.
    """
    if not _is_plain(mha):
        return None
    parameters = mha.parameters_of_projections()
    if not mha.can_pack() or (mha.training and mha.dropout > 0.0):
        return None
    # The room that is made has the dtype and the device of x.
    if not _blocks.can_attend_kept(norm, dropout, (x, *parameters), norm_first):
        return None
    tokens = mha._length(x)
    room = cache.reserve(mha, x, (mha._batch(x), mha.num_heads, tokens, mha.head_dim))
    mask = _mask(mha, x, key_padding_mask, attn_mask, room.first)
    if tokens > 1 and cache.window is not None and room.filled + tokens > cache.window:
        mask = _within(mask, tokens, room.filled, cache.window, x.device)
    kept = room.keys, room.values, room.filled
    output = _half(mha, norm, x, parameters, kept, mask, norm_first, is_causal=tokens > 1)
    room.commit()
    return output


def cross_attention_half(
    mha: MultiheadAttention,
    norm: Module,
    dropout: Module,
    x: Tensor,
    memory: Tensor,
    cache: KVCache,
    *,
    norm_first: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor | None:
    """As self_attention_half, of tokens x and the memory, which the cache holds projected from the first call on."""
    if not _is_plain(mha):
        return None
    parameters = (*mha.projection_of_queries(), *mha.parameters_of_projections()[2:])
    if mha.training and mha.dropout > 0.0:
        return None
    keys, values = _memory(mha, x, memory, memory, cache)
    if not _blocks.can_attend_kept(norm, dropout, (x, *parameters, keys, values), norm_first):
        return None
    mask = _mask(mha, x, key_padding_mask, attn_mask, 0)
    return _half(mha, norm, x, parameters, (keys, values, keys.shape[2]), mask, norm_first, is_causal=False)


def require_caching(name: str, child: Module, wanted: type[Module]) -> None:
    """Raises for a child that knows no cache."""
    if not isinstance(child, wanted):
        adapted = "; finetune.merge the adapters first" if hasattr(child, "lora_A") else ""
        raise ValueError(f"cache: {name} is a {type(child).__name__}, not a fasttx.nn.{wanted.__name__}{adapted}")


def require_caching_attentions(layer: Module, refusal: str | None, *names: str) -> None:
    """Raises for a layer that has to run torch's forward, for this reason, or has attentions that know no cache."""
    if refusal is not None:
        raise ValueError(f"a layer with a cache cannot run torch's forward: {refusal}")
    for name in names:
        require_caching(name, getattr(layer, name), MultiheadAttention)


def require_caching_layers(layers: ModuleList, wanted: type[Module]) -> None:
    """Raises for a stack whose layers cannot share a cache."""
    for i, layer in enumerate(layers):
        require_caching(f"layers.{i}", layer, wanted)
    if len({layer.self_attn for layer in layers}) < len(layers):
        raise ValueError("cache: layers share a self_attn, and a cache keeps the keys of one layer for each")


def check(
    mha: MultiheadAttention,
    x: Tensor,
    memory: Tensor | None,
    cache: KVCache,
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Raises for what a half of a layer cannot take, before another half has changed the cache.

    x: tokens in its layout; memory: None for self-attention. What is hooked may change its arguments: passed over.
    """
    if is_plain(mha, MultiheadAttention):
        key = x if memory is None else memory
        _check_call(mha, x, key, key, key_padding_mask, attn_mask, cache, memory is None)


def _check_call(
    mha: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    cache: KVCache,
    of_itself: bool,
) -> None:
    """Raises for whatever attention with a cache cannot take, but for a cache that is full or began with others."""
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
    memory = None if of_itself else cache.memory(mha)
    if memory is None:
        refusal = mha.refusal(query, key, value, None, None, False)
        if refusal is not None:
            raise ValueError(f"attention with a cache cannot take this call: {refusal}")
        keys = mha._length(key) + (cache.length(mha) if of_itself else 0)
    else:
        _check_query(mha, query, memory[0])
        keys = memory[0].shape[2]
    for tensor in (query, *mha.projection_of_queries()):
        if tensor is not None:
            refuse_gradient("query", tensor)
    _check_masks(mha, query, keys, key_padding_mask, attn_mask)


def _is_plain(mha: Module) -> bool:
    reason = why_not_plain(mha, MultiheadAttention)
    if reason is not None:
        step_aside("cached_attention_block", f"attention: {reason}")
    return reason is None


def _half(
    mha: MultiheadAttention,
    norm: Module,
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    kept: tuple[Tensor, Tensor, int],
    mask: Tensor | None,
    norm_first: bool,
    is_causal: bool,
) -> Tensor:
    """_blocks.attend_kept in the layout of x, whatever that is."""
    unbatched, sequence_first = x.dim() == 2, not mha.batch_first
    if unbatched:
        x = x[None]
    elif sequence_first:
        x = x.transpose(0, 1)
    output = _blocks.attend_kept(
        x, parameters, norm, norm_first, kept, mask, is_causal, mha.head_dim**-0.5, decodes=x.shape[1] == 1
    )
    return output[0] if unbatched else output.transpose(0, 1) if sequence_first else output


def _memory(
    mha: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, cache: KVCache
) -> tuple[Tensor, Tensor]:
    # With no query, whose projection is not kept.
    return cache.project_once(mha, lambda: tuple(map(mha.split_heads, mha._project(query[:0], key, value)[1:])))


def _check_query(mha: MultiheadAttention, query: Tensor, memory: Tensor) -> None:
    checks.require_floating("query", query)
    if query.dim() not in (2, 3) or query.shape[-1] != mha.embed_dim:
        raise ValueError(f"query must be (batch, length, {mha.embed_dim}) or unbatched, got {checks.shape(query)}")
    if mha._batch(query) != memory.shape[0]:
        raise ValueError(
            f"query differs from the cache's memory in sequences: {mha._batch(query)}, and {memory.shape[0]}; reset() "
            "begins anew"
        )


def _check_masks(
    mha: MultiheadAttention, query: Tensor, keys: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> None:
    batch, queries, dtype = mha._batch(query), mha._length(query), query.dtype
    if autocast.acts_on(query):
        dtype = torch.get_autocast_dtype(query.device.type)
    for name, mask, shapes in (
        ("key_padding_mask", key_padding_mask, ((batch, keys) if query.dim() == 3 else (keys,),)),
        ("attn_mask", attn_mask, ((queries, keys), (batch * mha.num_heads, queries, keys))),
    ):
        if mask is None:
            continue
        checks.require_tensor(name, mask)
        if tuple(mask.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have the shape {wanted}, over all tokens seen, got {checks.shape(mask)}")
        if mask.dtype not in (torch.bool, torch.float32, dtype):
            raise TypeError(f"{name} must be torch.bool, torch.float32 or {dtype}, got {mask.dtype}")
        refuse_gradient(name, mask)


def _mask(
    mha: MultiheadAttention, query: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, first: int
) -> Tensor | None:
    """torch.nn's masks as the one of fasttx.functional, over the keys from position `first` on."""
    if attn_mask is key_padding_mask is None:
        return None
    return mha.mask(
        None if attn_mask is None else attn_mask[..., first:],
        None if key_padding_mask is None else key_padding_mask[..., first:],
        query.dtype,
    )


def _within(mask: Tensor | None, queries: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """The mask, with what causality and the window leave of it: 4 dims, of the last `queries` of offset + queries."""
    allowed = torch.ones(queries, offset + queries, dtype=torch.bool, device=device).tril(offset)
    if window is not None:
        allowed = allowed.triu(offset - window + 1)
    if mask is None:
        return allowed[None, None]
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)

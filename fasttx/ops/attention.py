"""Attention: padded, (batch, heads, tokens, width), or packed by cu_seqlens, (total tokens, heads, width)."""

import torch
from torch import Tensor

from ._functorch import as_batches
from ._library import (
    accumulate_dtype,
    define,
    differentiate,
    forbid_double_backward,
    given,
    plain_call,
    run,
    wants_grad,
)

# The codes of Weights in csrc/bindings/layers.h: which of the applied weights are wanted.
NONE, EACH, MEAN = 0, 1, 2


def _unit_rows(tensor: Tensor) -> Tensor:
    unit = tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    return tensor if unit else tensor.contiguous()


def _tokens_first(like: Tensor, width: int) -> Tensor:
    if like.dim() == 3:
        return like.new_empty((*like.shape[:2], width))
    batch, heads, tokens, _ = like.shape
    return like.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def _gradient(like: Tensor) -> Tensor:
    like = _unit_rows(like)
    gradient = torch.empty_like(like)
    unit = gradient.shape[-1] <= 1 or gradient.stride(-1) == 1
    return gradient if unit else _tokens_first(like, like.shape[-1])


def _attention_fwd(
    query, key, value, attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes,
    is_causal, query_offset, window_left, window_right, dropout_p, seed, scale, with_lse=True, weights=NONE,
):  # fmt: skip
    shape = query.shape[:-1] if query.dim() == 4 else (query.shape[1], query.shape[0])
    kept = with_lse or weights != NONE
    lse = query.new_empty(shape if kept else 0, dtype=accumulate_dtype(query.dtype))
    stats = lse.new_empty((*shape, 2) if kept else 0)
    applied = new_weights(query, query.shape[:-1], key.shape[-2], weights)
    return _tokens_first(query, value.shape[-1]), lse, stats, applied


def new_weights(like: Tensor, rows: tuple[int, ...], keys: int, weights: int) -> Tensor:
    """The shape function of weights: rows (batch, heads, queries)."""
    if weights == NONE:
        return like.new_empty((0,))
    return like.new_empty((*rows, keys) if weights == EACH else (rows[0], rows[2], keys))


def _attention_bwd(grad, grad_lse, query, key, value, *rest):
    return _gradient(query), _gradient(key), _gradient(value)


def _attention_bias_bwd(grad, grad_lse, query, key, value, output, stats, attn_mask, *rest):
    return attn_mask.new_empty(attn_mask.shape)


def _attention_alibi_bwd(*args):
    slopes = args[11]
    return slopes.new_empty(slopes.shape)


_OPTIONS = (
    " Tensor? attn_mask, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? alibi_slopes, bool is_causal, int query_offset, int window_left, int window_right,"
    " float dropout_p, Tensor? seed, float scale"
)
attention_fwd = define(
    f"attention_fwd(Tensor query, Tensor key, Tensor value,{_OPTIONS}, bool with_lse=True, int weights=0)"
    " -> (Tensor output, Tensor lse, Tensor stats, Tensor applied)",
    _attention_fwd,
    on_cuda=True,
)
_BACKWARD = (
    "Tensor grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output,"
    f" Tensor stats,{_OPTIONS}, Tensor? grad_weights=None"
)
attention_bwd = define(
    f"attention_bwd({_BACKWARD}) -> (Tensor dquery, Tensor dkey, Tensor dvalue)", _attention_bwd, on_cuda=True
)
attention_bias_bwd = define(f"attention_bias_bwd({_BACKWARD}) -> Tensor dmask", _attention_bias_bwd, on_cuda=True)
attention_alibi_bwd = define(f"attention_alibi_bwd({_BACKWARD}) -> Tensor dslopes", _attention_alibi_bwd)


_BATCHES = (
    "grad", "grad_lse", "query", "key", "value", "output", "stats", "attn_mask", "key_lengths", "grad_weights"
)  # fmt: skip
for _op in (attention_fwd, attention_bwd, attention_bias_bwd):
    _names = [argument.name for argument in _op.registered._schema.arguments]
    # The mask that dropout draws depends on a sequence's place in the batch.
    for _each in _op.each():
        _each.vmap_rule = as_batches(
            _each.raw, _names, _BATCHES, ("cu_seqlens_q", "dropout_p"), _op is attention_bias_bwd
        )


def _save(ctx, inputs, output):
    *tensors, ctx.is_causal, ctx.offset, ctx.left, ctx.right, ctx.dropout_p, seed, ctx.scale, _, weights = inputs
    result, _, stats, applied = output
    ctx.save_for_backward(*tensors, seed, result, stats)
    ctx.mark_non_differentiable(stats, *([applied] if weights == NONE else []))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse, _grad_stats, grad_weights):
    query, key, value, *options, seed, output, stats = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(output)
    if grad_lse is not None:
        # Nothing reaches a row without keys, whose 1 / sum is 0: not even an infinity, which 0 would make NaN.
        grad_lse = grad_lse.masked_fill(stats[..., 1] == 0, 0.0)
    arguments = (
        grad, grad_lse, query, key, value, output, stats, *options, ctx.is_causal, ctx.offset,
        ctx.left, ctx.right, ctx.dropout_p, seed, ctx.scale, grad_weights,
    )  # fmt: skip
    *needs, needs_mask = ctx.needs_input_grad[:4]
    gradients = map(given, attention_bwd(*arguments), needs) if any(needs) else [None] * 3
    dmask = attention_bias_bwd(*arguments) if needs_mask else None
    dslopes = attention_alibi_bwd(*arguments) if ctx.needs_input_grad[7] else None
    return (*gradients, dmask, *[None] * 3, dslopes, *[None] * 9)


differentiate(attention_fwd, _backward, _save, lambda inputs: inputs[-2] or inputs[-1] != NONE)
for _op in (attention_bwd, attention_bias_bwd, attention_alibi_bwd):
    forbid_double_backward(_op)
plain_attention = plain_call(attention_fwd, "plain_attention")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    is_causal: bool,
    query_offset: int,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    want_lse: bool = True,
    weights: int = NONE,
    backend: str = "",
) -> tuple[Tensor, ...]:
    """Output and lse, empty where it is not wanted; with weights EACH or MEAN, those too.

    attn_mask has 4 dims that broadcast, and a gradient of its own shape. Weights (batch, heads, queries, keys), or
    their mean over the heads (batch, queries, keys), are those that were applied, dropout included.
    """
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(accumulate_dtype(query.dtype))
    differentiable = wants_grad(query, key, value, attn_mask, alibi_slopes)
    output, lse, _, applied = run(
        attention_fwd.on(backend), differentiable,
        query, key, value, attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes,
        is_causal, query_offset, window_left, window_right, dropout_p, seed, scale,
        want_lse or differentiable, weights,
    )  # fmt: skip
    return (output, lse) if weights == NONE else (output, lse, applied)

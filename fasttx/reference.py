"""The specification: every operation as plain PyTorch, written from its mathematics.

Any floating dtype, any device, differentiable. bfloat16 and float16 are computed in float32 and
rounded once, when an output is stored; float32 and float64 are computed as they are, so
`op(x.double())` is the truth that kernels are measured against. Arguments are taken to be valid:
`fasttx.functional` checks them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fasttx import philox
from fasttx._reference_math import ACTIVATIONS as _ACTIVATIONS
from fasttx._reference_math import GELUS as _GELUS
from fasttx._reference_math import as_shape as _as_shape
from fasttx._reference_math import drop as _drop
from fasttx._reference_math import dropout as _dropout
from fasttx._reference_math import layer_norm as _layer_norm
from fasttx._reference_math import linear as _linear
from fasttx._reference_math import need as _need
from fasttx._reference_math import of_same_lengths as _of_same_lengths
from fasttx._reference_math import softmax as _softmax
from fasttx._reference_math import unpack as _unpack
from fasttx._reference_math import widen as _widen


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    query_offset: int = 0,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T + bias) value, over the keys that each query may attend to.

    query (B, H, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv) in query's
    dtype. Query i sits at position i + query_offset, key j at position j.

    A key is attended to where all of these allow it:
      attn_mask, bool, broadcastable to (B, H, Tq, Tk): True where the query may attend.
      key_lengths (B,), integer: j < key_lengths[b].
      is_causal: keys at or before the query's position.
      window (left, right): keys at most `left` positions before the query and `right` after it; a
        negative side is unlimited.
    Added to the scores: attn_mask, floating; alibi_slopes (H,) as -slope * |distance|.

    scale: 1 / sqrt(D) by default. enable_gqa: query head h reads key head h // (H / Hkv).
    dropout_p > 0: normalised probabilities are dropped by the Philox mask of (seed, batch, head,
    query i, key j). return_lse: also the natural log of the sum of exponentials of the masked
    scores, before dropout: (B, H, Tq) in float32, or float64 for float64 inputs. A query with
    nothing to attend to gives zeros, lse = -inf, and zero gradients. A key that no query may attend
    to, by all of these but a float mask, is never read into a result, whatever it holds.

    Raises ValueError when dropout is active without a seed.
    Sources: Vaswani et al. 2017 (attention), Beltagy et al. 2020 (window), Press et al. 2022
    (ALiBi), Ainslie et al. 2023 (grouped heads).
    """
    output, lse = _attention(
        query,
        key,
        value,
        torch.arange(query.shape[0], device=query.device),
        attn_mask=attn_mask,
        key_lengths=key_lengths,
        is_causal=is_causal,
        query_offset=query_offset,
        window=window,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=enable_gqa,
        seed=seed,
    )
    return (output, lse) if return_lse else output


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each of N packed sequences: equal to it on the padded batch.

    query (total_q, H, D), key (total_k, Hkv, D), value (total_k, Hkv, Dv) -> (total_q, H, Dv), and
    with return_lse (H, total_q). cu_seqlens_q, cu_seqlens_k (N + 1,) integer: sequence n owns the
    rows cu_seqlens[n] up to cu_seqlens[n + 1]. Positions, and dropout's rows and columns, count
    from each sequence's start; dropout's batch is n. Reads the bounds on the host, so torch.compile
    cannot trace it in one graph.

    Raises ValueError when dropout is active without a seed.
    """
    rows_q, rows_k, batches = zip(*_of_same_lengths(cu_seqlens_q, cu_seqlens_k), strict=True)
    outputs, lses = [], []
    for *qkv, batch in zip(_unpack(query, rows_q), _unpack(key, rows_k), _unpack(value, rows_k), batches, strict=True):
        output, lse = _attention(
            *qkv,
            batch,
            is_causal=is_causal,
            window=window,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=enable_gqa,
            seed=seed,
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    order = torch.cat([rows.flatten() for rows in rows_q]).argsort()
    output = torch.cat(outputs).index_select(0, order)
    return (output, torch.cat(lses).index_select(0, order).t().contiguous()) if return_lse else output


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    query_offset: int = 0,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`attention`'s probabilities, (B, H, Tq, Tk) in query's dtype: the exponentials of scores less lse.

    lse (B, H, Tq), None: that of these very scores. A query whose lse is -inf gives zeros. With
    dropout_p > 0 they are dropped by the Philox mask of (seed, batch, head, query, key).

    Raises ValueError when dropout is active without a seed.
    """
    scores, _ = _attention_scores(
        query, key, attn_mask, key_lengths, is_causal, query_offset, window, alibi_slopes, scale, enable_gqa
    )
    if lse is None:
        probabilities = _softmax(scores, -1)[0]
    else:
        empty = (lse == -math.inf)[..., None]
        shifted = scores - _widen(lse)[..., None].masked_fill(empty, 0.0)
        probabilities = shifted.masked_fill(empty, -math.inf).exp()
    batch = torch.arange(query.shape[0], device=query.device)
    return _drop_probabilities(probabilities, dropout_p, seed, batch).to(query.dtype)


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """`attention` over two sets of keys, from its outputs and lse over each.

    out1, out2 (B, H, T, D) and lse1, lse2 (B, H, T), or (total, H, D) and (H, total). Each output
    counts by its part of the sum of exponentials: softmax((lse1, lse2)) weighs them, and the
    logarithm of that softmax's sum is the lse. Both -inf: zeros and -inf.
    """
    shares, lse = _softmax(torch.stack((_widen(lse1), _widen(lse2))), 0)
    if out1.dim() == 3:
        shares = shares.mT
    merged = (shares[..., None] * torch.stack((_widen(out1), _widen(out2)))).sum(0)
    return merged.to(out1.dtype), lse.squeeze(0)


def softmax(
    input: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, dim: int = -1
) -> Tensor:
    """exp(x) / sum(exp(x)) along dim, over the elements that the mask keeps; the others give 0.

    mask, broadcastable to input: bool, True = keep, or floating, added to input. is_causal, with
    dim the last: in the last two dims (rows, columns), columns at or before the row are kept. A
    fully masked row gives zeros and zero gradients. Returns input's shape and dtype.
    """
    scores = _widen(input)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype)
    elif mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if is_causal:
        relative = _relative_positions(*input.shape[-2:], 0, input.device)
        scores = scores.masked_fill(relative > 0, -math.inf)
    return _softmax(scores, dim)[0].to(input.dtype)


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the trailing dims `normalized_shape`.

    weight, bias: normalized_shape or None. The variance is the biased one. Returns input's shape
    and dtype. Source: Ba, Kiros and Hinton 2016.
    """
    return _layer_norm(_widen(input), normalized_shape, weight, bias, eps).to(input.dtype)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    return_sum: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """layer_norm(residual + dropout(input)), and with return_sum the sum itself.

    input, residual: one shape. Both outputs have it, in input's dtype; the sum is normalised before
    it is rounded. Dropout's columns run over the elements of one normalised row, its rows over
    those rows.

    Raises ValueError when dropout is active (training and dropout_p > 0) without a seed.
    """
    added = _widen(input)
    if training and dropout_p > 0:
        added = _dropout(added, dropout_p, seed, len(_as_shape(normalized_shape)))
    total = _widen(residual) + added
    normed = _layer_norm(total, normalized_shape, weight, bias, eps).to(input.dtype)
    return (normed, total.to(input.dtype)) if return_sum else normed


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), Phi the standard normal distribution function.

    approximate: "none", or "tanh" for 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). Any shape;
    returns input's shape and dtype. Source: Hendrycks and Gimpel 2016.
    """
    return _GELUS[approximate](_widen(input)).to(input.dtype)


def bias_gelu(input: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """gelu(input + bias): input (..., width), bias (width,); returns input's shape and dtype."""
    wide = _widen(input)
    return _GELUS[approximate](wide + bias.to(wide.dtype)).to(input.dtype)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input weight^T + bias.

    input (..., in), weight (out, in), bias (out,) or None -> (..., out) in input's dtype.
    """
    return _linear(_widen(input), weight, bias).to(input.dtype)


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """linear(dropout(activation(linear(input, weight1, bias1))), weight2, bias2).

    input (..., in), weight1 (hidden, in), bias1 (hidden,), weight2 (out, hidden), bias2 (out,) ->
    (..., out) in input's dtype; the hidden values are not rounded. activation: "gelu", "gelu_tanh"
    or "relu". Dropout's columns run over the hidden dim, its rows over all the dims before it.

    Raises ValueError when dropout is active (training and dropout_p > 0) without a seed.
    """
    hidden = _ACTIVATIONS[activation](_linear(_widen(input), weight1, bias1))
    if training and dropout_p > 0:
        hidden = _dropout(hidden, dropout_p, seed, 1)
    return _linear(hidden, weight2, bias2).to(input.dtype)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The cross-entropy of softmax(linear(input, weight, bias)) against the classes of target.

    input (..., in), weight (V, in), bias (V,) or None, target (...) int64. A row's loss is
    -sum_c q_c log p_c, where q gives 1 - label_smoothing to its target and spreads label_smoothing
    over all V classes. A row whose target is ignore_index has loss 0 and no part in the mean.
    reduction: "none" -> (...), "sum" -> (), "mean" -> (), which is NaN where no row counts. The
    logits are not rounded; the loss is, to dtype, by default input's.
    Source: Szegedy et al. 2016 (label smoothing).
    """
    logits = _linear(_widen(input), weight, bias)
    counted = target != ignore_index
    picked = logits.gather(-1, target.masked_fill(~counted, 0)[..., None])[..., 0]
    # Where nothing is spread, no logit of -infinity is to meet a zero; nor where all is.
    expected = (1 - label_smoothing) * picked if label_smoothing < 1 else torch.zeros_like(picked)
    if label_smoothing > 0:
        expected = expected + label_smoothing * logits.mean(-1)
    losses = (logits.logsumexp(-1) - expected).masked_fill(~counted, 0.0)
    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean":
        losses = losses.sum() / counted.sum()
    return losses.to(input.dtype if dtype is None else dtype)


def embedding(
    token_ids: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    position_ids: Tensor | None = None,
    offset: int = 0,
    token_scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    padding_idx: int | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """dropout(layer_norm(token_scale * token_weight[t] + position_weight[p] + segment_weight[s])).

    token_ids (..., T) int64; weights (entries, width); -> (..., T, width) in token_weight's dtype.
    A missing weight adds nothing, and without norm_weight nothing is normalised. position_ids,
    broadcastable to token_ids: by default offset + 0, 1, ... along the last dim. segment_ids, as
    position_ids: by default 0. padding_idx: the token whose entry gets no gradient. Dropout's
    columns run over the width, its rows over the tokens.

    Raises ValueError when dropout is active (training and dropout_p > 0) without a seed.
    """
    tokens = _widen(token_weight[token_ids])
    if padding_idx is not None:
        tokens = torch.where((token_ids == padding_idx)[..., None], tokens.detach(), tokens)
    total = token_scale * tokens
    if position_weight is not None:
        if position_ids is None:
            length = token_ids.shape[-1] if token_ids.dim() else 1
            position_ids = (torch.arange(length, device=token_ids.device) + offset).view(token_ids.shape[-1:])
        total = total + _widen(position_weight[position_ids])
    if segment_weight is not None:
        total = total + _widen(segment_weight[0 if segment_ids is None else segment_ids])
    if norm_weight is not None:
        total = _layer_norm(total, total.shape[-1], norm_weight, norm_bias, eps)
    if training and dropout_p > 0:
        total = _dropout(total, dropout_p, seed, 1)
    return total.to(token_weight.dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool,
    query_offset: int = 0,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    seed: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and lse; batch (B,) holds each sequence's index in the dropout counter."""
    scores, unseen = _attention_scores(
        query, key, attn_mask, key_lengths, is_causal, query_offset, window, alibi_slopes, scale, enable_gqa
    )
    probabilities, lse = _softmax(scores, -1)
    probabilities = _drop_probabilities(probabilities, dropout_p, seed, batch)
    v = _widen(value).masked_fill(unseen, 0.0)
    if enable_gqa and scores.shape[1] != v.shape[1]:
        v = v.repeat_interleave(scores.shape[1] // v.shape[1], dim=1)
    return (probabilities @ v).to(query.dtype), lse.squeeze(-1)


def _attention_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    query_offset: int,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    """(B, H, Tq, Tk): scaled and biased, -inf where a query does not attend to a key; and `_unseen`."""
    q, k = _widen(query), _widen(key)
    relative = _relative_positions(q.shape[2], k.shape[2], query_offset, q.device)
    allowed = _attention_allowed(relative, attn_mask, key_lengths, is_causal, window)
    unseen = _unseen(allowed)
    k = k.masked_fill(unseen, 0.0)
    if enable_gqa and q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    bias = _attention_bias(relative, attn_mask, alibi_slopes, q.dtype)
    scores = (q @ k.transpose(-2, -1)) * scale + bias
    return scores.masked_fill(~allowed, -math.inf), unseen


def _unseen(allowed: Tensor) -> Tensor:
    """(B or 1, 1, Tk, 1), of keys that no query attends to: padding, which may hold anything, NaN too."""
    four = allowed[(None,) * (4 - allowed.dim())]
    return ~four.any(2).any(1)[:, None, :, None]


def _drop_probabilities(
    probabilities: Tensor, p: float, seed: int | Tensor | None, batch: Tensor
) -> Tensor:
    """Dropout of (B, H, Tq, Tk), the sequences' indices in its counter being batch (B,)."""
    if p == 0:
        return probabilities
    head = torch.arange(probabilities.shape[1], device=probabilities.device)
    keep = philox.keep_mask(_need(seed), batch, head, *probabilities.shape[2:], p)
    return _drop(probabilities, keep, p)


def _relative_positions(queries: int, keys: int, query_offset: int, device: torch.device) -> Tensor:
    """(Tq, Tk) int64: the key's position minus the query's."""
    positions = torch.arange(queries, device=device) + query_offset
    return torch.arange(keys, device=device) - positions[:, None]


def _attention_allowed(
    relative: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    window: tuple[int, int] | None,
) -> Tensor:
    """Bool, broadcastable to (B, H, Tq, Tk); a float mask's -inf is left to the scores."""
    allowed = torch.ones_like(relative, dtype=torch.bool)
    if is_causal:
        allowed = allowed & (relative <= 0)
    if window is not None:
        left, right = window
        if left >= 0:
            allowed = allowed & (relative >= -left)
        if right >= 0:
            allowed = allowed & (relative <= right)
    if key_lengths is not None:
        columns = torch.arange(relative.shape[1], device=relative.device)
        allowed = allowed & (columns < key_lengths[:, None, None, None])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    return allowed


def _attention_bias(
    relative: Tensor, attn_mask: Tensor | None, alibi_slopes: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Broadcastable to (B, H, Tq, Tk): what is added to the scaled scores."""
    bias = torch.zeros((), dtype=dtype, device=relative.device)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        bias = bias + attn_mask.to(dtype)
    if alibi_slopes is not None:
        bias = bias - alibi_slopes.to(dtype)[:, None, None] * relative.abs().to(dtype)
    return bias

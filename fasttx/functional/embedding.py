"""What a transformer's first layer reads: tokens, positions and segments, summed, normalised and dropped."""

from functools import partial

import torch
from torch import Tensor

from fasttx import autocast, checks, reference
from fasttx.dispatch import choose
from fasttx.ops import embedding as ops
from fasttx.rng import draw_seed


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
    backend: str | None = None,
) -> Tensor:
    """dropout(layer_norm(token_scale * token_weight[t] + position_weight[p] + segment_weight[s])), in one pass.

    token_ids (..., T) int64 or int32, token_weight (entries, width) -> (..., T, width) in the weights' dtype. What is
    None adds nothing; without norm_weight (width,) nothing is normalised. position_ids, broadcastable to token_ids, by
    default offset, offset + 1, ... along the last dimension; segment_ids, likewise, by default 0. Dropout acts when
    `training`, with probability dropout_p in [0, 1). padding_idx: the token whose entry gets no gradient; negative ones
    count from the end. Gradients of the weights are dense, and summed in the order of the rows.

    Raises ValueError for an index outside of its weight, on a CPU; on a GPU, where looking would mean to wait, that
    token's result is NaN, no entry gets a gradient from it, and nothing is read outside of the tensors.
    """
    token_ids = checks.require_integers("token_ids", token_ids)
    width = _check_table("token_weight", token_weight, None)
    position_ids = _check_indices("position_ids", position_ids, "position_weight", position_weight, token_ids, width)
    segment_ids = _check_indices("segment_ids", segment_ids, "segment_weight", segment_weight, token_ids, width)
    checks.require_shape("norm_weight", norm_weight, (width,), "token_weight's width")
    checks.require_shape("norm_bias", norm_bias, (width,), "token_weight's width")
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias needs a norm_weight")
    weights = (token_weight, position_weight, segment_weight, norm_weight, norm_bias)
    checks.require_same_device(
        "token_weight", token_weight, token_ids=token_ids, position_weight=position_weight, segment_ids=segment_ids,
        segment_weight=segment_weight, norm_weight=norm_weight, norm_bias=norm_bias, position_ids=position_ids,
    )  # fmt: skip
    checks.require_probability("dropout_p", dropout_p)
    padding_idx = check_padding(padding_idx, token_weight.shape[0])
    checks.require_below("token_ids", token_ids, token_weight.shape[0])
    if position_weight is not None and position_ids is None:
        _check_offset(offset, token_ids.shape[-1] if token_ids.dim() else 1, position_weight.shape[0])
    if autocast.acts_on(token_weight):
        call = partial(
            _with_weights_first, token_ids=token_ids, segment_ids=segment_ids, eps=eps, position_ids=position_ids,
            offset=offset, token_scale=token_scale, dropout_p=dropout_p, training=training, padding_idx=padding_idx,
            backend=backend,
        )  # fmt: skip
        given = [weight for weight in weights[:3] if weight is not None]
        result = max((weight.dtype for weight in given), key=lambda dtype: torch.finfo(dtype).bits)
        return autocast.following(call, weights[:1], weights[1:], wide_on_gpu=norm_weight is not None).to(result)

    p = dropout_p if training else 0.0
    seed = draw_seed() if p > 0.0 else None
    if choose("embedding", weights, backend) == "reference":
        return reference.embedding(
            token_ids, token_weight, position_weight, segment_ids, segment_weight, norm_weight, norm_bias, eps,
            position_ids=position_ids, offset=offset, token_scale=token_scale, dropout_p=p, training=training,
            padding_idx=padding_idx, seed=seed,
        )  # fmt: skip
    return ops.embedding(
        token_ids, token_weight, position_ids, position_weight, segment_ids, segment_weight, norm_weight, norm_bias,
        float(token_scale), offset, eps, p, seed, -1 if padding_idx is None else padding_idx,
    )  # fmt: skip


def _with_weights_first(
    token_weight: Tensor, position_weight: Tensor | None, segment_weight: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, *, token_ids: Tensor, segment_ids: Tensor | None, eps: float, **options,
) -> Tensor:  # fmt: skip
    return embedding(
        token_ids, token_weight, position_weight, segment_ids, segment_weight, norm_weight, norm_bias, eps, **options
    )


def _check_table(name: str, weight: Tensor, width: int | None) -> int:
    checks.require_floating(name, weight)
    if weight.dim() != 2 or weight.shape[1] == 0 or width not in (None, weight.shape[1]):
        expected = "of a width of at least 1" if width is None else f"{width} wide"
        raise ValueError(f"{name} must have the shape (entries, width), {expected}, got {checks.shape(weight)}")
    return weight.shape[1]


def _check_indices(
    name: str, ids: Tensor | None, weight_name: str, weight: Tensor | None, token_ids: Tensor, width: int
) -> Tensor | None:
    """The indices in the shape of token_ids; those of its weight's entries."""
    if weight is None:
        if ids is not None:
            raise ValueError(f"{name} are given without {weight_name}")
        return None
    _check_table(weight_name, weight, width)
    if ids is None:
        if weight.shape[0] == 0:
            raise ValueError(f"{weight_name} has no entries")
        return None
    ids = checks.require_integers(name, ids)
    checks.require_broadcast(name, ids, tuple(token_ids.shape))
    checks.require_below(name, ids, weight.shape[0])
    return ids.expand(token_ids.shape)


def _check_offset(offset: int, length: int, positions: int) -> None:
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}")
    if offset < 0 or offset + length > positions:
        raise ValueError(
            f"offset must leave room for {length} positions among position_weight's {positions}, got {offset}"
        )


def check_padding(padding_idx: int | None, entries: int) -> int | None:
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be an int or None, got {type(padding_idx).__name__}")
    if not -entries <= padding_idx < entries:
        raise ValueError(f"padding_idx must be in [{-entries}, {entries - 1}], got {padding_idx}")
    return padding_idx % entries

"""What a transformer's first layer reads: tokens, positions and segments, summed, normalised and dropped."""

import torch
from torch import Tensor

from fasttx import autocast, checks, reference
from fasttx.dispatch import choose, runs_on_cpu
from fasttx.ops import embedding as ops
from fasttx.rng import draw_seed

_NONE = -1  # in place of a padding token


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
    weights = (token_weight, position_weight, segment_weight, norm_weight, norm_bias)
    if (
        runs_on_cpu(backend, *weights)
        and _are_plain_indices(token_ids, position_ids, segment_ids)
        and type(dropout_p) is float
        and 0.0 <= dropout_p < 1.0
        and token_weight.dim() == 2
        and (padding_idx is None or (type(padding_idx) is int and 0 <= padding_idx < len(token_weight)))
        and type(offset) is int
        and type(token_scale) is type(eps) is float
    ):
        p = dropout_p if training else 0.0
        try:
            return ops.embedding(
                token_ids, token_weight, position_ids, position_weight, segment_ids, segment_weight, norm_weight,
                norm_bias, token_scale, offset, eps, p, draw_seed() if p > 0.0 else None,
                _NONE if padding_idx is None else padding_idx,
            )  # fmt: skip
        except RuntimeError:
            pass  # the op says what is wrong, and the checks that follow say it by their own kinds of error
    token_ids = checks.require_integers("token_ids", token_ids)
    width = _check_table("token_weight", token_weight, None)
    position_ids = _check_indices("position_ids", position_ids, "position_weight", position_weight, token_ids, width)
    segment_ids = _check_indices("segment_ids", segment_ids, "segment_weight", segment_weight, token_ids, width)
    checks.require_shape("norm_weight", norm_weight, (width,), "token_weight's width")
    checks.require_shape("norm_bias", norm_bias, (width,), "token_weight's width")
    if norm_bias is not None and norm_weight is None:
        raise checks.ArgumentError("norm_bias needs a norm_weight")
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
        options = {
            "eps": eps, "segment_ids": segment_ids, "position_ids": position_ids, "offset": offset,
            "token_scale": token_scale, "dropout_p": dropout_p, "training": training, "padding_idx": padding_idx,
            "backend": backend,
        }  # fmt: skip
        return _under_autocast(token_ids, weights, options)

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
        float(token_scale), offset, eps, p, seed, _NONE if padding_idx is None else padding_idx,
    )  # fmt: skip


def _under_autocast(token_ids: Tensor, weights: tuple[Tensor | None, ...], options: dict[str, object]) -> Tensor:
    """In the dtype that the entries promote to, as torch's sum of them would be."""
    names = ("token_weight", "position_weight", "segment_weight", "norm_weight", "norm_bias")
    given = {name: weight for name, weight in zip(names, weights, strict=True) if weight is not None}
    entries = tuple(weight for name, weight in given.items() if not name.startswith("norm"))

    def call(*cast: Tensor) -> Tensor:
        return embedding(token_ids, **dict(zip(given, cast, strict=True)), **options)

    others = tuple(given.values())[len(entries) :]
    return autocast.following(call, entries, others, wide_on_gpu=bool(others))


def _are_plain_indices(token_ids: Tensor, *others: Tensor | None) -> bool:
    """Whether these are int64 on the CPU and of one shape; whether they fit their weights is left to the op."""
    if type(token_ids) is not Tensor:
        return False
    return all(
        ids is None
        or (type(ids) is Tensor and ids.dtype is torch.int64 and ids.is_cpu and ids.shape == token_ids.shape)
        for ids in (token_ids, *others)
    )


def _check_table(name: str, weight: Tensor, width: int | None) -> int:
    checks.require_floating(name, weight)
    if weight.dim() != 2 or weight.shape[1] == 0 or width not in (None, weight.shape[1]):
        expected = "of a width of at least 1" if width is None else f"{width} wide"
        raise checks.ArgumentError(
            f"{name} must have the shape (entries, width), {expected}, got {checks.shape(weight)}"
        )
    return weight.shape[1]


def _check_indices(
    name: str, ids: Tensor | None, weight_name: str, weight: Tensor | None, token_ids: Tensor, width: int
) -> Tensor | None:
    """The indices in the shape of token_ids; those of its weight's entries."""
    if weight is None:
        if ids is not None:
            raise checks.ArgumentError(f"{name} are given without {weight_name}")
        return None
    _check_table(weight_name, weight, width)
    if ids is None:
        if weight.shape[0] == 0:
            raise checks.ArgumentError(f"{weight_name} has no entries")
        return None
    ids = checks.require_integers(name, ids)
    checks.require_broadcast(name, ids, tuple(token_ids.shape))
    checks.require_below(name, ids, weight.shape[0])
    return ids.expand(token_ids.shape)


def _check_offset(offset: int, length: int, positions: int) -> None:
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}")
    if offset < 0 or offset + length > positions:
        raise checks.PlaceError(
            f"offset must leave room for {length} positions among position_weight's {positions}, got {offset}"
        )


def check_padding(padding_idx: int | None, entries: int) -> int | None:
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be an int or None, got {type(padding_idx).__name__}")
    if not -entries <= padding_idx < entries:
        raise checks.ArgumentError(f"padding_idx must be in [{-entries}, {entries - 1}], got {padding_idx}")
    return padding_idx % entries

"""Token, position and segment entries, summed, normalised and dropped."""

from torch import Tensor

from ._library import define, differentiate, forbid_double_backward, given, map_rows, run, wants_grad


def _fwd(token_ids, token_weight, *rest):
    return token_weight.new_empty((*token_ids.shape, token_weight.shape[1]))


def _bwd(
    grad, token_ids, token_weight, position_ids, position_weight, segment_ids, segment_weight, norm_weight, norm_bias,
    token_scale, offset, eps, dropout_p, seed, padding_idx, *needs,
):  # fmt: skip
    weights = (token_weight, position_weight, segment_weight, norm_weight, norm_bias)
    return tuple(
        token_weight.new_empty(weight.shape if needed else (0,)) for weight, needed in zip(weights, needs, strict=True)
    )


_ARGUMENTS = (
    "Tensor token_ids, Tensor token_weight, Tensor? position_ids, Tensor? position_weight, Tensor? segment_ids,"
    " Tensor? segment_weight, Tensor? norm_weight, Tensor? norm_bias, float token_scale, int offset, float eps,"
    " float dropout_p, Tensor? seed, int padding_idx"
)
embedding_fwd = define(f"embedding_fwd({_ARGUMENTS}) -> Tensor", _fwd)
embedding_bwd = define(
    f"embedding_bwd(Tensor grad, {_ARGUMENTS}, bool needs_token, bool needs_position, bool needs_segment,"
    " bool needs_norm_weight, bool needs_norm_bias)"
    " -> (Tensor dtoken, Tensor dposition, Tensor dsegment, Tensor dnorm_weight, Tensor dnorm_bias)",
    _bwd,
)
# The places of the weights among the arguments, in the order of their gradients.
_WEIGHTS = (1, 3, 5, 6, 7)


def _save(ctx, inputs, output):
    *tensors, ctx.token_scale, ctx.offset, ctx.eps, ctx.dropout_p, seed, ctx.padding_idx = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx, grad):
    *tensors, seed = ctx.saved_tensors
    needs = [ctx.needs_input_grad[place] for place in _WEIGHTS]
    found = embedding_bwd(
        grad, *tensors, ctx.token_scale, ctx.offset, ctx.eps, ctx.dropout_p, seed, ctx.padding_idx, *needs
    )
    gradients = [None] * 14
    for place, gradient, needed in zip(_WEIGHTS, found, needs, strict=True):
        gradients[place] = given(gradient, needed)
    return tuple(gradients)


differentiate(embedding_fwd, _backward, _save)
forbid_double_backward(embedding_bwd)
map_rows(embedding_fwd, "token_ids", "position_ids", "segment_ids", alone=("dropout_p",))


def embedding(
    token_ids: Tensor, token_weight: Tensor, position_ids: Tensor | None, position_weight: Tensor | None,
    segment_ids: Tensor | None, segment_weight: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    token_scale: float, offset: int, eps: float, dropout_p: float, seed: Tensor | None, padding_idx: int,
) -> Tensor:  # fmt: skip
    """The sum of the entries, normalised where there is a norm_weight, and dropped; padding_idx -1 for none."""
    differentiable = wants_grad(token_weight, position_weight, segment_weight, norm_weight, norm_bias)
    return run(
        embedding_fwd, differentiable,
        token_ids, token_weight, position_ids, position_weight, segment_ids, segment_weight, norm_weight, norm_bias,
        token_scale, offset, eps, dropout_p, seed, padding_idx,
    )  # fmt: skip

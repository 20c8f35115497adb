"""The fused steps that transformer layers are made of, each with its way out for children that must be called."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from fasttx import functional
from fasttx.dispatch import takes_kernel
from fasttx.ops._library import wants_grad
from fasttx.ops.attention_block import attention_block
from fasttx.ops.cached_attention_block import cached_attention_block
from fasttx.ops.feed_forward_block import feed_forward_block
from fasttx.rng import draw_seed

from ._plain import adopt, is_plain, parameter, step_aside, why_not_plain, why_patched
from ._recall import is_observed, is_transformed
from .attention import MultiheadAttention
from .gelu import GELU
from .layer_norm import LayerNorm

LINEARS = (torch.nn.Linear,)
NORMS = (torch.nn.LayerNorm, LayerNorm)
DROPOUTS = (torch.nn.Dropout,)
_GELUS = (torch.nn.GELU, GELU)
_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}
_APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
NO_FUSED_FORM = "it is neither a plain relu nor a plain gelu"
# Activations without a fused form, which see each value by itself: packed tokens are as good to
# them as a batch.
_POINTWISE = dict.fromkeys([
    torch.nn.ELU, torch.nn.Hardswish, torch.nn.LeakyReLU, torch.nn.Mish, torch.nn.SELU, torch.nn.SiLU,
    torch.nn.Sigmoid, torch.nn.Softplus, torch.nn.Tanh, F.elu, F.hardswish, F.leaky_relu, F.mish,
    F.selu, F.silu, F.softplus, torch.sigmoid, torch.tanh,
], True)  # fmt: skip


@dataclass(frozen=True)
class Dropout:
    """Dropout of models that keep its probability as a number, where these functions take a module."""

    p: float
    training: bool

    def __call__(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


def adopt_children(layer: Module) -> None:
    """Turns a layer's attentions and norms into fasttx's, in place."""
    for child in layer.children():
        adopt(child, MultiheadAttention)
        adopt(child, LayerNorm)


def parts(layer: Module) -> Iterator[tuple[str, str | None]]:
    """The name of each child of a torch.nn layer, and why it is not fused, or None where it is."""
    for name, child in layer.named_children():
        if name.endswith("attn"):
            yield name, why_not_plain(child, MultiheadAttention)
        elif name.startswith("linear"):
            yield name, why_not_plain(child, *LINEARS)
        elif name.startswith("norm"):
            yield name, why_not_plain(child, *NORMS)
        elif name.startswith("dropout"):
            yield name, why_no_dropout(child)
    known = activation_name(layer.activation) is not None
    yield "activation", None if known else NO_FUSED_FORM


def can_pack(layer: Module) -> bool:
    """Whether a torch.nn layer may see packed tokens: nobody who expects a batch looks on."""
    fused = (reason is None for name, reason in parts(layer) if name != "activation")
    return (
        why_patched(layer) is None
        and all(fused)
        and all(child.can_pack() for child in layer.children() if type(child) is MultiheadAttention)
        and (activation_name(layer.activation) is not None or is_pointwise(layer.activation))
    )


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The activation's name in fasttx.functional.feed_forward, function or module; None without one."""
    if is_plain(activation, torch.nn.ReLU):
        return "relu"
    if is_plain(activation, *_GELUS):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    # Among functions only those known by identity: an unhashable callable is none of them.
    return None if isinstance(activation, Module) else _look_up(_FUNCTIONS, activation)


def is_pointwise(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation without a name there is known to treat each value by itself."""
    if isinstance(activation, Module):
        return is_plain(activation, *_POINTWISE)
    return _look_up(_POINTWISE, activation) or False


def _look_up(table: dict, function: Callable):
    try:
        return table.get(function)
    except TypeError:
        return None


def is_plain_dropout(dropout: object) -> bool:
    """Plain, and with a probability that the kernels take: torch also allows 1."""
    return (type(dropout) is Dropout or is_plain(dropout, *DROPOUTS)) and not (dropout.training and dropout.p >= 1.0)


def why_no_dropout(dropout: object) -> str | None:
    """Why a dropout cannot be part of a fusion."""
    if is_plain_dropout(dropout):
        return None
    reason = None if type(dropout) is Dropout else why_not_plain(dropout, *DROPOUTS)
    return reason or "its probability is 1"


def linear(module: Module, x: Tensor, name: str = "the linear layer") -> Tensor:
    """A linear layer, called where it is not plain; `name`: what the reason calls it."""
    if is_plain(module, *LINEARS):
        return functional.linear(x, parameter(module, "weight"), parameter(module, "bias"))
    step_aside("linear", f"{name}: {why_not_plain(module, *LINEARS)}")
    return module(x)


def add_norm(norm: Module, dropout: Module | Dropout, x: Tensor, residual: Tensor) -> Tensor:
    """norm(residual + dropout(x)): the end of each half of a post-norm layer."""
    if is_plain(norm, *NORMS) and is_plain_dropout(dropout):
        return functional.add_layer_norm(
            x, residual, norm.normalized_shape, parameter(norm, "weight"), parameter(norm, "bias"), norm.eps,
            dropout_p=dropout.p, training=dropout.training,
        )  # fmt: skip
    _call_end("add_layer_norm", norm, dropout)
    return norm(residual + dropout(x))


def add_norm_and_sum(
    norm: Module, dropout: Module | Dropout, x: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """As add_norm, and the sum that was normalised: what joins the halves of a pre-norm layer."""
    if is_plain(norm, *NORMS) and is_plain_dropout(dropout):
        return functional.add_layer_norm(
            x, residual, norm.normalized_shape, parameter(norm, "weight"), parameter(norm, "bias"), norm.eps,
            dropout_p=dropout.p, training=dropout.training, return_sum=True,
        )  # fmt: skip
    _call_end("add_layer_norm", norm, dropout)
    sum = residual + dropout(x)
    return norm(sum), sum


def _call_end(op: str, norm: Module, dropout: Module | Dropout) -> None:
    """Tells why a half's norm and dropout are called, if one of them has to be."""
    for name, reason in (("norm", why_not_plain(norm, *NORMS)), ("dropout", why_no_dropout(dropout))):
        if reason is not None:
            step_aside(op, f"{name}: {reason}")


def feed_forward(
    linear1: Module,
    activation: Callable[[Tensor], Tensor],
    dropout: Module | Dropout | None,
    linear2: Module,
    x: Tensor,
    name: str | None,
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))); `name`: activation_name's, or the caller's own."""
    if (
        name is not None
        and is_plain(linear1, *LINEARS)
        and is_plain(linear2, *LINEARS)
        and (dropout is None or is_plain_dropout(dropout))
    ):
        return functional.feed_forward(
            x, *(parameter(m, part) for m in (linear1, linear2) for part in ("weight", "bias")), activation=name,
            dropout_p=0.0 if dropout is None else dropout.p,
            training=dropout is not None and dropout.training,
        )  # fmt: skip
    if name is None:
        step_aside("feed_forward", f"activation: {NO_FUSED_FORM}")
    hidden = linear(linear1, x, "linear1")
    hidden = functional.gelu(hidden, _APPROXIMATIONS[name]) if name in _APPROXIMATIONS else activation(hidden)
    if dropout is not None:
        reason = why_no_dropout(dropout)
        if reason is not None:
            step_aside("feed_forward", f"dropout: {reason}")
        hidden = dropout(hidden)
    return linear(linear2, hidden, "linear2")


def attention_half(
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    norm: Module,
    dropout: Module | Dropout,
    *,
    norm_first: bool,
    heads: int,
    scale: float,
    dropout_p: float,
    batch_first: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor | None:
    """norm(x + dropout(self-attention of x)), or x + dropout(self-attention of norm(x)), as one operation.

    parameters: the weight and bias of the joined projections of queries, keys and values, and those
    of the one after. None where a child has to be called or the call has no fused form.
    """
    if not (is_plain(norm, *NORMS) and is_plain_dropout(dropout)):
        if norm_first:
            _call_end("attention_block", norm, dropout)
        return None
    if is_transformed():
        return None
    tensors = (x, *parameters, parameter(norm, "weight"), parameter(norm, "bias"))
    op = "attention_block" if cu_seqlens is None else "attention_block_varlen"
    if not _can_fuse(op, tensors, norm, norm_first, mask, parameters[0].shape[0] // (3 * heads)):
        return None
    p = dropout.p if dropout.training else 0.0
    return attention_block(
        *tensors, norm.eps, norm_first, heads, batch_first, mask, cu_seqlens, is_causal, scale,
        dropout_p, _seed(dropout_p), p, _seed(p),
    )  # fmt: skip


def can_attend_kept(
    norm: Module, dropout: Module | Dropout, tensors: tuple[Tensor | None, ...], norm_first: bool
) -> bool:
    """Whether `attend_kept` may run on these tensors, keys and values included: only in inference."""
    if not (is_plain(norm, *NORMS) and is_plain_dropout(dropout)):
        if norm_first:
            _call_end("cached_attention_block", norm, dropout)
        return False
    if (dropout.training and dropout.p > 0.0) or is_observed() or wants_grad(*tensors):
        return False
    return _can_fuse("cached_attention_block", tensors, norm, norm_first)


def attend_kept(
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    norm: Module,
    norm_first: bool,
    kept: tuple[Tensor, Tensor, int],
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    cu_seqlens: tuple[Tensor, Tensor] = (None, None),
    decodes: bool = False,
) -> Tensor:
    """attention_half in inference, to keys and values (B, H, capacity, D) of which so many places are filled.

    kept: keys, values and how many. The joined projections write the tokens of x (B, T, width) behind them; that of
    queries alone writes nothing, and with cu_seqlens, goes from each of x's packed sequences to one of (total, H, D).
    decodes: its tokens come one at a time.
    """
    return cached_attention_block(
        x, *parameters, parameter(norm, "weight"), parameter(norm, "bias"), norm.eps, norm_first, *kept, mask,
        is_causal, scale, *cu_seqlens, decodes,
    )  # fmt: skip


def cross_attention_half(
    attention: Module,
    norm: Module,
    dropout: Module | Dropout,
    x: Tensor,
    memory: Tensor,
    *,
    norm_first: bool,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """norm(x + attention of x to the memory), or x + attention of norm(x), in inference: two operations.

    cu_seqlens: where packed sequences of x and of the memory begin. None where a child has to be called, and in
    training.
    """
    if is_observed() or wants_grad(x, memory, attn_mask):
        return None
    if not is_plain(attention, MultiheadAttention):
        step_aside("cached_attention_block", f"attention: {why_not_plain(attention, MultiheadAttention)}")
        return None
    if not attention.can_pack() or (attention.training and attention.dropout > 0.0):
        return None
    if cu_seqlens is None:
        if x.dim() != 3 or attention.refusal(x, memory, memory, key_padding_mask, attn_mask, is_causal):
            return None
    parameters = (*attention.projection_of_queries(), *attention.parameters_of_projections()[2:])
    of_memory = attention.projection_of_memory()
    if not can_attend_kept(norm, dropout, (x, memory, *parameters, *of_memory), norm_first):
        return None
    kept = functional.linear(memory, *of_memory).chunk(2, -1)
    if cu_seqlens is not None:
        keys, values = (t.unflatten(-1, (attention.num_heads, -1)) for t in kept)
        kept = keys, values, len(keys)
        return attend_kept(x, parameters, norm, norm_first, kept, None, False, attention.head_dim**-0.5, cu_seqlens)
    keys, values = map(attention.split_heads, kept)
    is_causal = is_causal and key_padding_mask is None
    mask = attention.mask(None if is_causal else attn_mask, key_padding_mask, x.dtype)
    output = attend_kept(
        x if attention.batch_first else x.transpose(0, 1), parameters, norm, norm_first,
        (keys, values, keys.shape[2]), mask, is_causal, attention.head_dim**-0.5,
    )  # fmt: skip
    return output if attention.batch_first else output.transpose(0, 1)


def self_attention_half(
    attention: Module,
    norm: Module,
    dropout: Module | Dropout,
    x: Tensor,
    *,
    norm_first: bool,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor | None:
    """attention_half of a MultiheadAttention with its masks, or over packed sequences."""
    if not is_plain(attention, MultiheadAttention):
        step_aside("attention_block", f"attention: {why_not_plain(attention, MultiheadAttention)}")
        return None
    if not attention.can_pack():
        return None
    mask = None
    if cu_seqlens is None:
        if x.dim() != 3 or attention.refusal(x, x, x, key_padding_mask, attn_mask, is_causal):
            return None
        is_causal = is_causal and key_padding_mask is None
        mask = attention.mask(None if is_causal else attn_mask, key_padding_mask, x.dtype)
    return attention_half(
        x, attention.parameters_of_projections(), norm, dropout,
        norm_first=norm_first, heads=attention.num_heads, scale=attention.head_dim**-0.5,
        dropout_p=attention.dropout if attention.training else 0.0,
        batch_first=attention.batch_first, mask=mask, cu_seqlens=cu_seqlens, is_causal=is_causal,
    )  # fmt: skip


def feed_forward_half(
    linear1: Module,
    activation: Callable[[Tensor], Tensor],
    dropout1: Module | Dropout | None,
    linear2: Module,
    dropout2: Module | Dropout,
    norm: Module,
    x: Tensor,
    name: str | None,
    norm_first: bool = False,
    decodes: bool = False,
) -> Tensor:
    """norm(x + dropout2(f(x))), or x + dropout2(f(norm(x))), where f is feed_forward; `name` as there.

    decodes: the tokens come one at a time.
    """
    plain_end = is_plain(norm, *NORMS) and is_plain_dropout(dropout2)
    if (
        name is not None
        and plain_end
        and is_plain(linear1, *LINEARS)
        and is_plain(linear2, *LINEARS)
        and (dropout1 is None or is_plain_dropout(dropout1))
    ):
        tensors = (x, *(parameter(m, name) for m in (linear1, linear2, norm) for name in ("weight", "bias")))
        if _can_fuse("feed_forward_block", tensors, norm, norm_first):
            p1 = dropout1.p if dropout1 is not None and dropout1.training else 0.0
            p2 = dropout2.p if dropout2.training else 0.0
            return feed_forward_block(
                *tensors, norm.eps, norm_first, name, p1, _seed(p1), p2, _seed(p2), decodes
            )
    if norm_first:
        if not plain_end:
            _call_end("feed_forward_block", norm, dropout2)
        return x + dropout2(feed_forward(linear1, activation, dropout1, linear2, norm(x), name))
    return add_norm(norm, dropout2, feed_forward(linear1, activation, dropout1, linear2, x, name), x)


def _can_fuse(
    op: str,
    tensors: tuple[Tensor | None, ...],
    norm: Module,
    norm_first: bool,
    mask: Tensor | None = None,
    head_width: int = 0,
) -> bool:
    """Whether a half of a layer may be one operation on these tensors."""
    if norm.normalized_shape != tensors[0].shape[-1:]:
        return False
    if torch.is_grad_enabled() and mask is not None and mask.requires_grad:
        return False
    # In training it has no gradient; and without one, as in a reentrant checkpoint's first forward, the dropout must be
    # that of the steps which will have it.
    if norm_first and (norm.training or wants_grad(*tensors)):
        return False
    return takes_kernel(op, tensors, head_width)


def _seed(p: float) -> Tensor | None:
    return draw_seed() if p > 0.0 else None

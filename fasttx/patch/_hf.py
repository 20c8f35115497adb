"""What fasttx shares among Hugging Face's models; imported only once one of transformers' own models is.

Importing it registers the attention implementations "fasttx" and "fasttx-eager" with transformers, each with its
masks: every model that takes its attention from transformers' interface can run on them, swapped modules or not.
"fasttx-eager" is the same computation for a model that was "eager", so that the name alone tells restore() where to.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils import output_capturing
from transformers.utils.import_utils import is_tracing

from fasttx import functional
from fasttx._weak import WeakCache
from fasttx.functional.attention import attend
from fasttx.nn import _blocks
from fasttx.nn._padding import Packing
from fasttx.nn._plain import is_plain, step_aside
from fasttx.ops.attention import EACH
from fasttx.rng import draw_seed


class Implementation(str):
    """The name of an attention implementation: a config that is unpickled with one brings its registration along."""


SDPA, EAGER = Implementation("fasttx"), Implementation("fasttx-eager")
_SWITCHED = {"sdpa": SDPA, "eager": EAGER}
_UNSWITCHED = {fast: original for original, fast in _SWITCHED.items()}
# The implementations that compute softmax(scale q k^T + mask) v and nothing else: what fused layers compute.
KNOWN_IMPLEMENTATIONS = (SDPA, EAGER, "sdpa", "eager")
# Arguments of a call that change what attention computes. is_causal is understood, the others are transformers' own.
_FOREIGN = ("softcap", "position_bias", "s_aux", "cache")
CHANGES_ATTENTION = ("is_causal", *_FOREIGN)


def attention_forward(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' interface calls it, and the weights (B, H, Tq, Tk) while a model collects them.

    query (B, H, Tq, D), key and value (B, Hkv, Tk, D) -> (B, Tq, H, D). attention_mask (B, 1 or H, Tq, Tk): bool (True
    = may attend) or floating (added). Without one, more than one query attends causally where the module is causal.
    """
    refusal = next((f"the argument {name}" for name in _FOREIGN if kwargs.get(name) is not None), None)
    if query.shape[0] != key.shape[0]:
        refusal = "query and key differ in batch"
    elif dropout >= 1.0:
        refusal = "attention dropout is 1"
    if refusal is not None:
        step_aside("attention", refusal)
        return _transformers_own(module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(query.shape[2] > 1 and attention_mask is None and causal)
    if causal and key.shape[2] > query.shape[2]:
        # A preallocated cache at its first call: only as many of its places are filled.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        attention_mask = attention_mask.to(query.dtype)
    if collects_attentions():
        output, _, weights = attend(
            query, key, value, attn_mask=attention_mask, is_causal=causal, dropout_p=dropout, scale=scaling,
            seed=draw_seed() if dropout > 0.0 else None, weights=EACH,
        )  # fmt: skip
        return output.transpose(1, 2), weights
    output = functional.attention(
        query, key, value, attn_mask=attention_mask, is_causal=causal, dropout_p=dropout, scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2), None


def _transformers_own(module: Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that computed the module's attention before it was switched."""
    if module.config._attn_implementation == EAGER:
        for cls in type(module).__mro__:
            eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
            if eager is not None:
                return functools.partial(_call_eager, eager)
    return sdpa_attention_forward


def _call_eager(
    eager: Callable, module: Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An eager attention function, which adds its mask, on a mask made by `attention_mask`."""
    if mask is not None and mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, hidden)
    return eager(module, query, key, value, mask, **kwargs)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask (B, 1, Tq, Tk) of a call, bool, True = may attend, or None where it says nothing: sdpa's own.

    Mere padding is one row for all queries, with stride 0, so that nobody has to compare rows to find it so.
    """
    mere_padding = (
        mask_function is bidirectional_mask_function
        and attention_mask is not None
        and attention_mask.dim() == 2
        and not kwargs.get("use_vmap")
    )
    if not mere_padding:
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    valid = prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length]
    # What is in a mask is not known while it is traced.
    if kwargs.get("allow_is_bidirectional_skip") and not is_tracing(valid) and bool(valid.all()):
        return None
    return valid.bool()[:, None, None].expand(batch_size, 1, q_length, kv_length)


AttentionInterface.register(SDPA, attention_forward)
AttentionInterface.register(EAGER, attention_forward)
AttentionMaskInterface.register(SDPA, attention_mask)
AttentionMaskInterface.register(EAGER, attention_mask)


def switch(model: Module) -> None:
    """Puts every Hugging Face model within `model` on fasttx's attention, in place.

    Two models that share a config object are switched together.
    """
    owners: dict[int, list[PreTrainedModel]] = {}
    for owner in _models(model):
        owners.setdefault(id(owner.config), []).append(owner)
    for sharing in owners.values():
        if all(why_not_switched(owner) is None for owner in sharing):
            config = sharing[0].config
            name = config._attn_implementation
            # The public setter would recurse into configs of other models.
            config._attn_implementation_internal = _SWITCHED.get(name, name)


def unswitch(model: Module) -> None:
    """Gives every Hugging Face model within `model` the attention back that it had before `switch`."""
    for owner in _models(model):
        name = owner.config._attn_implementation
        owner.config._attn_implementation_internal = _UNSWITCHED.get(name, name)


def why_not_switched(model: PreTrainedModel) -> str | None:
    """Why a model keeps its attention implementation; None where it is, or can be, switched to fasttx's."""
    config = model.config
    name = config._attn_implementation
    if name not in KNOWN_IMPLEMENTATIONS:
        return f"the attention implementation is {name!r}"
    if not model._can_set_attn_implementation():
        return "it does not take its attention from transformers' interface"
    # transformers refuses to save such a config with any name but "eager".
    if getattr(config, "output_attentions", False):
        return "its config asks for attention weights"
    if getattr(config, "reorder_and_upcast_attn", False):
        return "its config asks for attention in float32 (reorder_and_upcast_attn)"
    if not hasattr(config, "reorder_and_upcast_attn") and _compares_names(type(model).__module__):
        return "its code depends on the name of the attention implementation"
    return None


def _models(model: Module) -> Iterator[PreTrainedModel]:
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


@functools.cache
def _compares_names(module: str) -> bool:
    """Whether a model's source treats "eager" or "sdpa" apart from other names. (GPT-2's does, for one flag.)"""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return True
    return re.search(r"_attn_implementation(_internal)?\s*(==|!=|in\b|not in\b)", source) is not None


def collects_attentions() -> bool:
    """Whether a model that runs now collects attention weights, through hooks on its attention modules."""
    collected = output_capturing._active_collector.get()
    return collected is not None and ("attentions" in collected or "cross_attentions" in collected)


def collects_hidden_states() -> bool:
    """Whether a model that runs now collects the states between layers, through hooks on its layers."""
    collected = output_capturing._active_collector.get()
    return collected is not None and "hidden_states" in collected


def call_refusal(kwargs: dict[str, Any]) -> str | None:
    """Why a call with these further arguments has to call the attention module, or None."""
    if collects_attentions():
        return "attention weights are asked for"
    return next((f"the argument {name}" for name in CHANGES_ATTENTION if kwargs.get(name) is not None), None)


def is_plain_or_captured(module: object, *classes: type) -> bool:
    """`is_plain`, but hooks by which transformers collects outputs do not count: fused layers serve them."""
    if is_plain(module, *classes):
        return True
    if type(module) not in classes or not module._forward_hooks:
        return False
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if "forward" in module.__dict__ or torch_module._has_any_global_hook():
        return False
    return all(
        getattr(hook, "__module__", None) == output_capturing.__name__ for hook in module._forward_hooks.values()
    )


_packings = WeakCache()


def packing_of(mask: Tensor | None, hidden_states: Tensor) -> Packing | None:
    """How to pack hidden_states (B, T, width) by a layer's mask; None without padding, or if it says more than that.

    Made once for each mask, so that every layer of a model may ask.
    """
    if mask is None or hidden_states.dim() != 3 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    state = (hidden_states.shape[:2], None if mask.is_inference() else mask._version)
    known = _packings.get(mask)
    # An inference tensor has no version; if it is expanded, nothing can write to it in place.
    if known is not None and known[0] == state and (state[1] is not None or 0 in mask.stride()):
        return known[1]
    valid = valid_tokens(mask, hidden_states)
    packing = None if valid is None or bool(valid.all()) else Packing.of(valid)
    _packings.set(mask, (state, packing))
    return packing


def valid_tokens(mask: Tensor, hidden_states: Tensor) -> Tensor | None:
    """(B, T) bool from a mask (B, 1, T, T), bool or to be added, that says the same to every query; else None."""
    batch, length = hidden_states.shape[:2]
    if mask_refusal(mask, hidden_states) is not None or mask.requires_grad:
        return None
    if tuple(mask.shape) != (batch, 1, length, length) or length == 0:
        return None
    row = mask[:, :, :1]
    if mask.stride(2) != 0 and not bool((mask == row).all()):
        return None
    row = row.reshape(batch, length)
    if mask.dtype == torch.bool:
        return row
    valid = row == 0
    hidden = row <= torch.finfo(mask.dtype).min
    return valid if bool((valid | hidden).all()) else None


def mask_refusal(mask: Tensor | None, hidden_states: Tensor) -> str | None:
    """Why a fused layer cannot take the mask that it was given."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return "attention_mask has other than four dimensions"
    if mask.dtype not in (torch.bool, torch.float32, hidden_states.dtype):
        return f"attention_mask is {mask.dtype}"
    return None


class FastGELUActivation(GELUActivation):
    """GELUActivation on fasttx's kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """gelu(input)."""
        return functional.gelu(input) if self.act is F.gelu else super().forward(input)


class FastNewGELUActivation(NewGELUActivation):
    """NewGELUActivation on fasttx's kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """gelu(input), by tanh."""
        return functional.gelu(input, approximate="tanh")


class FastGELUTanh(GELUTanh):
    """GELUTanh on fasttx's kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """gelu(input), by tanh."""
        if isinstance(self.act, functools.partial):
            return functional.gelu(input, approximate="tanh")
        return super().forward(input)


# As each family's: by original class, the class that takes its place.
SWAPS = {
    GELUActivation: FastGELUActivation,
    NewGELUActivation: FastNewGELUActivation,
    GELUTanh: FastGELUTanh,
}
KEEPING: dict[type, type] = {}


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """What feed_forward calls a Hugging Face model's activation; None where it has no name for it."""
    if is_plain(activation, NewGELUActivation, FastNewGELUActivation):
        return "gelu_tanh"
    if is_plain(activation, GELUActivation, FastGELUActivation):
        return "gelu" if activation.act is F.gelu else None
    if is_plain(activation, GELUTanh, FastGELUTanh):
        return "gelu_tanh" if isinstance(activation.act, functools.partial) else None
    return _blocks.activation_name(activation)

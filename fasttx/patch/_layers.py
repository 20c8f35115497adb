"""The two orders of a transformer layer, over a Hugging Face layer's parts under whatever names it has them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.nn import Module

from fasttx import functional
from fasttx.nn import _blocks
from fasttx.nn._padding import Packing
from fasttx.nn._plain import is_plain, parameter, why_not_plain
from fasttx.patch import _hf
from fasttx.patch._fused_qkv import join, project

# x -> a tensor of its shape, or for the halves that may have no form as one operation, None.
Attend = Callable[[Tensor], Tensor]
Half = Callable[[Tensor], Tensor | None]

# For a layer that drops nothing where others do.
NO_DROPOUT = _blocks.Dropout(0.0, False)


@dataclass(frozen=True)
class Parts:
    """What a layer is made of besides its attention, in the order in which the data meet it.

    name: the activation's in functional.feed_forward, None without one. dropout_inner: between the activation and
    linear2, where there is one.
    """

    dropout1: Module | _blocks.Dropout
    norm1: Module
    linear1: Module
    activation: Callable[[Tensor], Tensor]
    name: str | None
    dropout_inner: Module | _blocks.Dropout | None
    linear2: Module
    dropout2: Module | _blocks.Dropout
    norm2: Module


@dataclass(frozen=True)
class SelfAttention:
    """Self-attention read from a module's projections instead of calling it; `owner` is who keeps them joined."""

    owner: Module
    linears: tuple[Module, Module, Module]
    out: Module
    heads: int
    scale: float
    dropout_p: float

    def attend(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """out(attention(x)): x (B, T, width) with a mask (B, 1 or H, T, T), or packed (tokens, width)."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in project(self.owner, self.linears, x))
        options = {"is_causal": is_causal, "scale": self.scale, "dropout_p": self.dropout_p}
        if cu_seqlens is not None:
            attended = functional.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, **options)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            attended = functional.attention(q, k, v, attn_mask=mask, **options).transpose(1, 2)
        return _blocks.linear(self.out, attended.flatten(-2), "output projection")

    def half(self, x: Tensor, parts: Parts, norm_first: bool, **options: Any) -> Tensor | None:
        """The attention half of a layer as one operation, or None where it has no such form; `options` as attend's."""
        joined = join(self.owner, self.linears) if is_plain(self.out, *_blocks.LINEARS) else None
        if joined is None or len(joined[0]) != 3 * x.shape[-1]:
            return None
        return _blocks.attention_half(
            x, (*joined, parameter(self.out, "weight"), parameter(self.out, "bias")), parts.norm1, parts.dropout1,
            norm_first=norm_first, heads=self.heads, scale=self.scale, dropout_p=self.dropout_p, **options,
        )  # fmt: skip


def post_norm(x: Tensor, attend: Attend, parts: Parts, half: Half | None = None) -> Tensor:
    """norm2(y + f(y)) of y = norm1(x + attend(x)): x (..., width) in any layout that `attend` takes.

    half(x): y as one operation, or None where it has no such form.
    """
    return feed_forward_half(post_norm_attention(x, attend, parts, half), parts)


def post_norm_attention(x: Tensor, attend: Attend, parts: Parts, half: Half | None = None) -> Tensor:
    """The y of post_norm."""
    y = None if half is None else half(x)
    return _blocks.add_norm(parts.norm1, parts.dropout1, attend(x), x) if y is None else y


def pre_norm(
    x: Tensor, attend: Attend, parts: Parts, half: Half | None = None, feed_forward: Attend | None = None
) -> Tensor:
    """y + dropout2(f(norm2(y))) of y = x + dropout1(attend(norm1(x))); the arguments as post_norm's.

    feed_forward: the f to call, where it is not to be read from the parts.
    """
    y = None if half is None else half(x)
    if y is not None:
        if feed_forward is None:
            return feed_forward_half(y, parts, norm_first=True)
        normed = parts.norm2(y)
    else:
        normed, y = _blocks.add_norm_and_sum(parts.norm2, parts.dropout1, attend(parts.norm1(x)), x)
    if feed_forward is not None:
        hidden = feed_forward(normed)
    else:
        hidden = _blocks.feed_forward(
            parts.linear1, parts.activation, parts.dropout_inner, parts.linear2, normed, parts.name
        )
    return y + parts.dropout2(hidden)


def feed_forward_half(x: Tensor, parts: Parts, norm_first: bool = False) -> Tensor:
    """norm2(x + f(x)), or x + f(norm2(x))."""
    return _blocks.feed_forward_half(
        parts.linear1, parts.activation, parts.dropout_inner, parts.linear2, parts.dropout2, parts.norm2, x,
        parts.name, norm_first,
    )  # fmt: skip


def attention_refusal(attention: Module, dropout_p: float, *modules: tuple[Module, type]) -> str | None:
    """Why a self-attention module has to be called; `modules`: it and those around it, as `why_called`'s.

    dropout_p: that of its weights, 0 in eval mode.
    """
    implementation = attention.config._attn_implementation
    if implementation not in _hf.KNOWN_IMPLEMENTATIONS:
        return f"the attention implementation is {implementation!r}"
    return "attention dropout is 1" if dropout_p >= 1.0 else why_called(*modules)


def why_called(*modules: tuple[Module, type]) -> str | None:
    """Why the first of these modules that is not plainly of the class beside it has to be called, or None."""
    for module, known in modules:
        if not _hf.is_plain_or_captured(module, known):
            return f"{known.__name__}: {why_not_plain(module, known)}"
    return None


def describe(
    layer: Module,
    linears: Iterable[str] = (),
    norms: Iterable[str] = (),
    dropouts: Iterable[str] = (),
    activations: Iterable[str] = (),
) -> Iterator[tuple[str, str | None]]:
    """The name of each of a layer's submodules, given by what it is, and why it is not fused, or None where it is."""
    for name in linears:
        yield name, why_not_plain(layer.get_submodule(name), *_blocks.LINEARS)
    for name in norms:
        yield name, why_not_plain(layer.get_submodule(name), *_blocks.NORMS)
    for name in dropouts:
        yield name, _blocks.why_no_dropout(layer.get_submodule(name))
    for name in activations:
        known = _hf.activation_name(attrgetter(name)(layer)) is not None
        yield name, None if known else _blocks.NO_FUSED_FORM


def run_packed(
    layers: Iterable[Module],
    can_pack: Callable[[Module], bool],
    packing: Packing,
    hidden_states: Tensor,
    padded: Callable[[Module, Tensor], Tensor],
) -> Tensor:
    """Layers one after another on hidden_states (B, T, width), with zeros at padded positions in the end.

    Those that can pack run on the valid tokens alone, by their run_packed(x, cu_seqlens); the others by
    padded(layer, hidden_states) on the padded batch.
    """
    collects = _hf.collects_hidden_states()
    x = packing.pack(hidden_states)
    for layer in layers:
        if can_pack(layer):
            x = layer.run_packed(x, packing.cu_seqlens)
            if collects:
                # The hooks that collect hidden states see the layer as if it ran padded.
                before, hidden_states = hidden_states, packing.unpack(x)
                for hook in layer._forward_hooks.values():
                    hook(layer, (before,), hidden_states)
        else:
            hidden_states = padded(layer, packing.unpack(x))
            x = packing.pack(hidden_states)
    return packing.unpack(x)

"""The halves of a decoder layer in inference with a cache, found once and kept by fasttx.nn._recall."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module

from fasttx.dispatch import takes_kernel
from fasttx.nn._plain import parameter
from fasttx.nn._recall import remember
from fasttx.ops._library import ACTIVATIONS
from fasttx.ops.cached_attention_block import cached_attention_block_fwd
from fasttx.ops.feed_forward_block import feed_forward_block_fwd
from fasttx.packing import packed, settled_state

# What is remembered of a layer whose halves have no such form.
NOT_FUSED = ("not fused",)


@dataclass(frozen=True)
class _Half:
    """weights and biases of two linear layers and a norm; and packed copies of the former, by whether they decode."""

    tensors: tuple[Tensor | None, ...]
    copies: dict[bool, tuple[Tensor, Tensor]]
    eps: float
    norm_first: bool

    @classmethod
    def of(cls, parameters: tuple[Tensor | None, ...], norm: Module, norm_first: bool, *options: object):
        """From weight, bias, weight and bias of the linear layers.

        None where a weight's changes cannot be seen, and where the norm is not of what they take.
        """
        weights = parameters[0], parameters[2]
        if any(settled_state(w) is None for w in weights) or norm.normalized_shape != weights[0].shape[1:]:
            return None
        tensors = (*parameters, parameter(norm, "weight"), parameter(norm, "bias"))
        return cls(tensors, {}, norm.eps, norm_first, *options)

    def packed(self, decodes: bool) -> tuple[Tensor | None, Tensor | None]:
        """Copies of the two weights, made at the first call: a prompt and the steps after it may take others."""
        known = self.copies.get(decodes)
        if known is None:
            known = packed(self.tensors[0], decodes), packed(self.tensors[2], decodes)
            if all(copy is not None for copy in known):
                self.copies[decodes] = known
        return known


@dataclass(frozen=True)
class AttentionHalf(_Half):
    """norm(x + attention), or x + attention of norm(x), to keys and values that a cache keeps as its layer `index`."""

    scale: float
    heads: int
    index: int

    def can_run(self, x: Tensor) -> bool:
        """Whether the operation may run on x (B, T, width)."""
        return takes_kernel("cached_attention_block", (x, *self.tensors))

    def __call__(self, x: Tensor, kept: tuple[Tensor, Tensor, int], mask: Tensor | None, is_causal: bool) -> Tensor:
        """The half's output; kept: keys and values (B, H, capacity, D), and how many of their places are filled."""
        decodes = x.shape[1] == 1
        return cached_attention_block_fwd.raw(
            x, *self.tensors, self.eps, self.norm_first, *kept, mask, None, None, is_causal, self.scale,
            *self.packed(decodes), decodes,
        )  # fmt: skip


@dataclass(frozen=True)
class FeedForwardHalf(_Half):
    """norm(x + f(x)), or x + f(norm(x))."""

    activation: str

    def can_run(self, x: Tensor) -> bool:
        """Whether the operation may run on x (B, T, width)."""
        return takes_kernel("feed_forward_block", (x, *self.tensors))

    def __call__(self, x: Tensor) -> Tensor:
        """The half's output."""
        decodes = x.shape[1] == 1
        return feed_forward_block_fwd.raw(
            x, *self.tensors, self.eps, self.norm_first, ACTIVATIONS[self.activation], 0.0, None, 0.0, None, False,
            *self.packed(decodes), decodes,
        )[0]  # fmt: skip


def remember_halves(
    layer: Module,
    find: Callable[[], tuple[_Half | None, ...]],
    weights: Iterable[Tensor | None],
    config: object,
) -> tuple[_Half, ...] | tuple[str]:
    """Its halves in inference, by `find`, which are remembered until anything about the layer changes; or NOT_FUSED.

    weights: those of which something was made that is not themselves.
    """
    halves = NOT_FUSED
    if all(reason is None for _, reason in layer.parts()) and not any(module.training for module in layer.modules()):
        found = find()
        if None not in found:
            halves = found
    remember(layer, halves, () if halves is NOT_FUSED else (w for w in weights if w is not None), (config,))
    return halves

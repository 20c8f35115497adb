"""Multi-head attention as a module."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttx import autocast, checks, functional
from fasttx._weak import WeakCache
from fasttx.dispatch import runs_on_cpu, takes_kernel
from fasttx.functional.attention import attend
from fasttx.ops._library import has_tangents, wants_grad
from fasttx.ops.attention import EACH, MEAN, NONE
from fasttx.ops.cross_attention import cross_attention
from fasttx.ops.self_attention import self_attention
from fasttx.packing import is_settled, place_of
from fasttx.rng import draw_seed

from ._plain import parameter, refuse_scripting, step_aside
from ._recall import is_observed, is_transformed

if TYPE_CHECKING:
    from .cache import KVCache

# By in_proj_weight and in_proj_bias: where each lay, and its rows for queries and for keys and values. Kept, so that
# each goes on having one packed copy.
_rows = WeakCache()


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention by fasttx.functional.attention, with all its arguments and masks.

    As in torch.nn, True in a bool mask means "ignore". It differs from torch in one thing: a query with nothing to
    attend to gives zeros, before out_proj, and zero weights, where torch gives NaN, or does not say.

    Weights, where they are asked for, come from the fused operation: they are those that it applied, under dropout too,
    and gradients reach the inputs through both. Their mean is taken without writing down those of each head.

    With a fasttx.nn.KVCache as `cache`, query holds the new tokens alone: where it is key and value too, they are
    appended and attend causally to all that were (is_causal need not be given); otherwise key and value are a memory,
    read at the first call only. Masks then are over all tokens seen, or all of the memory.

    Arguments that torch refuses raise torch's errors; nested tensors and tensor subclasses run
    torch's forward.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: "KVCache | None" = None,
    ) -> tuple[Tensor, Tensor | None]:
        if cache is not None:
            from ._cached import attend_cached  # it imports this module

            return attend_cached(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, cache
            )
        refusal = self.refusal(query, key, value, key_padding_mask, attn_mask, is_causal)
        if refusal is not None:
            step_aside("multihead_attention", refusal)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        # The hint stands for the mask where torch lets it: without weights and without padding.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = self.mask(None if is_causal else attn_mask, key_padding_mask, query.dtype)
        wanted = NONE if not need_weights else MEAN if average_attn_weights else EACH
        results = None
        if query is key and key is value:
            results = self._self_attention(query, mask, is_causal, wanted)
        elif key is value and wanted == NONE:
            results = self._cross_attention(query, key, mask, is_causal)
        if results is None:
            q, k, v = map(self.split_heads, self._project(query, key, value))
            k, v, mask = self._extend(k, v, mask)
            dropout_p = self.dropout if self.training else 0.0
            output, _, weights = attend(
                q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p,
                seed=draw_seed() if dropout_p > 0.0 else None, weights=wanted,
            )  # fmt: skip
            results = self._join_heads(output, query.dim()), weights
        output, weights = results
        return output, weights if weights is None or query.dim() == 3 else weights.squeeze(0)

    def _self_attention(
        self, x: Tensor, mask: Tensor | None, is_causal: bool, weights: int, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Projections and attention as one operation; None where the call has no such form."""
        if x.dim() != (3 if cu_seqlens is None else 2) or not self.can_pack() or is_transformed():
            return None
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            return None
        tensors = (x, *self.parameters_of_projections())
        call = partial(self._fused, mask=mask, cu_seqlens=cu_seqlens, is_causal=is_causal, weights=weights)
        return autocast.lowered(call, *tensors) if autocast.acts_on(x) else call(*tensors)

    def _fused(
        self,
        *tensors: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        is_causal: bool,
        weights: int,
    ) -> tuple[Tensor, Tensor | None] | None:
        on_gpu_too = weights == NONE  # else attention itself says that only the CPU's kernels give weights
        if not (on_gpu_too or tensors[0].is_cpu) or not takes_kernel("self_attention", tensors, self.head_dim):
            return None
        dropout_p = self.dropout if self.training else 0.0
        results = self_attention(
            *tensors, self.num_heads, self.batch_first, mask, cu_seqlens, is_causal, self.head_dim**-0.5, dropout_p,
            draw_seed() if dropout_p > 0.0 else None, weights,
        )  # fmt: skip
        return (results, None) if weights == NONE else results

    def _cross_attention(
        self, x: Tensor, memory: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, None] | None:
        """As one node of autograd, in training on the CPU; None elsewhere."""
        if x.dim() != 3 or not self.can_pack() or is_observed() or has_tangents():
            return None
        tensors = (x, memory, *self.parameters_of_projections())
        if not (wants_grad(*tensors) and runs_on_cpu(None, *tensors)):
            return None
        if mask is not None and mask.requires_grad:
            return None
        dropout_p = self.dropout if self.training else 0.0
        seed = draw_seed() if dropout_p > 0.0 else None
        return cross_attention(*tensors, self.num_heads, self.batch_first, mask, is_causal, dropout_p, seed), None

    def parameters_of_projections(self) -> tuple[Tensor | None, ...]:
        """Weight and bias of the joined projections of queries, keys and values, and of the one after."""
        out = self.out_proj
        return (
            parameter(self, "in_proj_weight"), parameter(self, "in_proj_bias"),
            parameter(out, "weight"), parameter(out, "bias"),
        )  # fmt: skip

    def projection_of_queries(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the queries' projection alone."""
        weight, bias = parameter(self, "in_proj_weight"), parameter(self, "in_proj_bias")
        weight = self.q_proj_weight if weight is None else _split_rows(weight, self.embed_dim)[0]
        return weight, None if bias is None else _split_rows(bias, self.embed_dim)[0]

    def projection_of_memory(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the joined projections of keys and values, where they have the queries' width."""
        weight, bias = parameter(self, "in_proj_weight"), parameter(self, "in_proj_bias")
        return _split_rows(weight, self.embed_dim)[1], None if bias is None else _split_rows(bias, self.embed_dim)[1]

    def can_pack(self) -> bool:
        """Whether attention over packed sequences is this module's: one width, and no keys of its own."""
        return (
            self._qkv_same_embed_dim
            and self.bias_k is None
            and not self.add_zero_attn
            and not (self.training and self.dropout >= 1.0)
        )

    def attend_packed(
        self, x: Tensor, memory: Tensor, cu_seqlens: Tensor, cu_seqlens_memory: Tensor, is_causal: bool
    ) -> Tensor:
        """From each packed sequence of x (tokens, embed_dim) to the same one of memory -> (tokens, embed_dim)."""
        results = self._self_attention(x, None, is_causal, NONE, cu_seqlens) if x is memory else None
        if results is not None:
            return results[0]
        sizes = (-1, self.num_heads, self.head_dim)
        q, k, v = (t.view(sizes) for t in self._project(x, memory, memory))
        output = functional.attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens_memory, is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return functional.linear(output.flatten(1), self.out_proj.weight, self.out_proj.bias)

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each child's name, and why it is not fused: torch, too, reads out_proj's weight without calling it."""
        yield "out_proj", None

    def refusal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> str | None:
        """Why torch's forward takes the call: it raises the error, or knows these tensors."""
        if not type(query) is type(key) is type(value) is Tensor:
            for name, tensor in (("query", query), ("key", key), ("value", value)):
                checks.require_tensor(name, tensor)
        if key_padding_mask is not None or attn_mask is not None:
            checks.require_masks("query", query, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
        if query.is_nested or key.is_nested or value.is_nested:
            return "a tensor is nested"
        if not query.layout is key.layout is value.layout is torch.strided:
            return "a tensor is sparse"
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        # What torch.export traces with is a subclass too, but one that knows every operator.
        if not torch.compiler.is_compiling() and torch.overrides.has_torch_function((query, key, value, weight)):
            return "a tensor is of a subclass"
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            return "query, key and value must all have three dimensions, or two"
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (
            self.embed_dim, self.kdim, self.vdim
        ):  # fmt: skip
            return "a width is not the module's"
        if query is not key or key is not value:
            if key.shape[:-1] != value.shape[:-1]:
                return "key and value differ in shape"
            if self._batch(query) != self._batch(key):
                return "query and key differ in batch"
        if not query.dtype == key.dtype == value.dtype == weight.dtype:
            if not torch.is_autocast_enabled(query.device.type):
                return "the inputs' dtypes are not the module's"
        if is_causal and attn_mask is None:
            return "is_causal is a hint about attn_mask, which is missing"
        if self.training and self.dropout >= 1.0:
            return "dropout is 1"
        return self.refusal_of_masks(query, key, key_padding_mask, attn_mask)

    def refusal_of_masks(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> str | None:
        """What is wrong with the masks."""
        batch, queries, keys = self._batch(query), self._length(query), self._length(key)
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != ((batch, keys) if query.dim() == 3 else (keys,)):
                return "key_padding_mask has the wrong shape"
            if key_padding_mask.dtype not in (torch.bool, torch.float32, query.dtype):
                return f"key_padding_mask is {key_padding_mask.dtype}"
        if attn_mask is not None:
            shapes = ((queries, keys), (batch * self.num_heads, queries, keys))
            if tuple(attn_mask.shape) not in shapes:
                return "attn_mask has the wrong shape"
            if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
                return f"attn_mask is {attn_mask.dtype}"
        return None

    def _batch(self, x: Tensor) -> int:
        return 1 if x.dim() == 2 else x.shape[0 if self.batch_first else 1]

    def _length(self, x: Tensor) -> int:
        return x.shape[1 if self.batch_first and x.dim() == 3 else 0]

    def mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """torch.nn's two masks as the one of fasttx.functional, broadcastable to (B, H, Tq, Tk)."""
        masks = []
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3
            sizes = (attn_mask.shape[0] // self.num_heads, self.num_heads) if per_head else (1, 1)
            masks.append(attn_mask.reshape(*sizes, *attn_mask.shape[-2:]))
        if key_padding_mask is not None:
            batched = key_padding_mask.dim() == 2
            masks.append((key_padding_mask if batched else key_padding_mask[None])[:, None, None])
        if not masks:
            return None
        if all(mask.dtype == torch.bool for mask in masks):
            return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
        for i, mask in enumerate(masks):
            if mask.dtype == torch.bool:
                zeros = torch.zeros_like(mask, dtype=dtype)
                masks[i] = zeros.masked_fill_(mask, -torch.inf)
        return masks[0] if len(masks) == 1 else masks[0] + masks[1]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The three projections, fused as far as their inputs are one tensor."""
        weight, bias = parameter(self, "in_proj_weight"), parameter(self, "in_proj_bias")
        if weight is not None and query is key and key is value:
            return functional.linear(query, weight, bias).chunk(3, -1)
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif key is value:
            keys_values = functional.linear(key, *self.projection_of_memory()).chunk(2, -1)
            return functional.linear(query, *self.projection_of_queries()), *keys_values
        else:
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(map(functional.linear, inputs, weights, biases))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, E), (T, B, E) or (T, E) -> (B, H, T, D), a view."""
        x = x.view(*x.shape[:-1], self.num_heads, self.head_dim)
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join_heads(self, x: Tensor, dims: int) -> Tensor:
        """(B, H, T, D) -> the input's layout, through out_proj."""
        if dims == 2:
            x = x.squeeze(0).transpose(0, 1)
        else:
            x = x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)
        out = self.out_proj
        return functional.linear(x.flatten(-2), parameter(out, "weight"), parameter(out, "bias"))

    def _extend(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Appends the learned key and value, and the zero ones, which no mask hides."""
        keys = k.shape[2]
        if self.bias_k is not None:
            per_head = (1, self.num_heads, 1, self.head_dim)
            sizes = (k.shape[0], -1, -1, -1)
            k = torch.cat((k, self.bias_k.view(per_head).expand(sizes)), dim=2)
            v = torch.cat((v, self.bias_v.view(per_head).expand(sizes)), dim=2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added = k.shape[2] - keys
        if mask is not None and added:
            mask = F.pad(mask, (0, added), value=mask.dtype == torch.bool)
        return k, v, mask


def _split_rows(weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first `width` rows, and the others."""
    if not is_settled(weight):
        return weight.split((width, weight.shape[0] - width))
    place = place_of(weight)
    known = _rows.get(weight)
    if known is None or known[0] != place:
        # Detached, so that they do not keep the weight alive that the cache forgets them with.
        known = (place, weight.detach().split((width, weight.shape[0] - width)))
        _rows.set(weight, known)
    return known[1]

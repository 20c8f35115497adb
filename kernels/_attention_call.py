"""A call of attention as its kernels take it: dense rows, strides, sizes, and what no kernel has to find again."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import launch
from ._attention_checks import require_call
from ._attention_configs import LADEN, PADDED, PLAIN, WIDEST_IN_TF32, WIDEST_IN_THREE
from ._attention_lists import list_tiles
from ._attention_tile import ADDITIVE, BOOLEAN, NO_MASK
from .dropout import Dropout
from .matmul import precision

_LOG2E = math.log2(math.e)
# Positions further off than any tensor is long are all alike, and their differences must not overflow 32 bits.
_FAR = 1 << 30


def unit_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dim dense."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    """Of sequence, head and token; packed sequences follow each other on the token axis."""
    if tensor.dim() == 3:
        return 0, tensor.stride(1), tensor.stride(0)
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


class Call:
    """What one call of attention_fwd, attention_bwd or attention_bias_bwd hands to each of its kernels.

    shared: the arguments that end every kernel's; constants_of: those that end its constants; problem: what its
    configuration is chosen by. Raises TypeError or ValueError for what the kernels cannot take.
    """

    def __init__(
        self, query, key, value, attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal,
        query_offset, window_left, window_right, dropout_p, seed, scale,
    ):  # fmt: skip
        require_call(query, key, value, attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
        self.query, self.key, self.value = (unit_rows(x) for x in (query, key, value))
        self.packed = cu_seqlens_q is not None
        self.heads, self.kv_heads = query.shape[1], key.shape[1]
        self.group = self.heads // max(self.kv_heads, 1)
        tokens = 0 if self.packed else 2
        self.queries, self.keys = query.shape[tokens], key.shape[tokens]
        self.sequences = cu_seqlens_q.numel() - 1 if self.packed else query.shape[0]

        mask, seen, kind = self._mask(attn_mask)
        self.mask, self.seen, self.kind, self.key_lengths = mask, seen, kind, launch.dense(key_lengths)
        added = kind == ADDITIVE.value or alibi_slopes is not None
        self.scaled = added or scale <= 0.0
        has_lo, has_hi = window_left >= 0, is_causal or window_right >= 0
        ahead = 0 if window_right < 0 else min(0, window_right) if is_causal else window_right
        self.bounds = (
            _near(query_offset - window_left) if has_lo else 0, _near(query_offset + ahead) if has_hi else 0,
        )  # fmt: skip
        self.has_bounds = has_lo, has_hi
        dropout = Dropout.of(dropout_p, seed)
        seed, threshold, keep_scale = dropout.numbers
        # The scale of scores, what their exponent is multiplied by, and what is kept by dropout.
        self.units = float(scale), _LOG2E if self.scaled else scale * _LOG2E, keep_scale
        self.shared = (
            mask, seen, self.key_lengths, launch.dense(cu_seqlens_q), launch.dense(cu_seqlens_k),
            launch.dense(alibi_slopes), dropout.seed_ptr, seed, threshold, *_mask_strides(mask), _mask_strides(seen)[0],
            self.heads, self.group, self.queries, self.keys, self.sequences,
            *self.bounds, float(query_offset), *self.units,
        )  # fmt: skip
        per_key = mask is not None and mask.shape[2] == 1
        self.width, self.value_width = query.shape[-1], value.shape[-1]
        self.block_d, self.block_dv = (launch.block_of(max(x, 1)) for x in (self.width, self.value_width))
        self.constants = (
            self.width, self.value_width, self.block_d, self.block_dv, has_lo, has_hi, kind, per_key,
            alibi_slopes is not None, self.scaled, dropout.active,
        )  # fmt: skip
        self._precision = precision(query.dtype)
        if self._precision == "tf32" and max(self.block_d, self.block_dv) > WIDEST_IN_TF32:
            self._precision = "ieee"
        bits = 16 if query.element_size() == 2 else 19 if self._precision == "tf32" else 32
        has_seen = seen is not None
        is_laden = dropout.active or kind != NO_MASK.value or alibi_slopes is not None or (has_seen and has_lo)
        laden = LADEN if is_laden else PADDED if has_seen or has_lo else PLAIN
        self.problem = (max(self.block_d, self.block_dv), bits, laden)

    def constants_of(self, kernel: str) -> tuple:
        """What ends a kernel's constants, how it multiplies among them.

        Three products of TF32 halves are as exact as float32, and use the tensor cores.
        """
        width, bits, _ = self.problem
        is_split = bits == 32 and width <= WIDEST_IN_THREE[kernel] and torch.version.hip is None
        return *self.constants, "tf32x3" if is_split else self._precision

    def tiles(self, block: int, *, of_keys: bool = False) -> int:
        """Tiles of `block` tokens of one head: of each sequence, or of packed ones all together."""
        tokens = self.keys if of_keys else self.queries
        return tokens // block + self.sequences if self.packed else -(-tokens // block)

    def programs(self, block: int, *, of_keys: bool = False) -> int:
        """Programs that own one tile of one head each."""
        heads = self.kv_heads if of_keys else self.heads
        return self.tiles(block, of_keys=of_keys) * heads * (1 if self.packed else self.sequences)

    def with_lists(self, arguments: Callable[[tuple], tuple], *, of_keys: bool = False) -> tuple | Callable:
        """A kernel's arguments, given its program's lists of tiles and their strides (sequence, head, tile).

        Lists are made of boolean masks, and of floating ones that heads share; for the kernel that owns keys (of_keys)
        they are lists of queries. As tiles are those of a configuration, so are such arguments.
        """
        is_mask = self.kind == BOOLEAN.value or (self.kind == ADDITIVE.value and self.mask.shape[1] == 1)
        mask, kind = (self.mask, self.kind) if is_mask else (None if of_keys else self.seen, BOOLEAN.value)
        if mask is None or self.sequences * self.heads * self.queries * self.keys == 0:
            return arguments((None, 0, 0, 0))
        lengths, strides = (None, self.key_lengths), _mask_strides(mask)
        sizes, bounds, has_bounds = (self.queries, self.keys), self.bounds, self.has_bounds
        outer = 1 if self.key_lengths is None and mask.shape[0] == 1 else self.sequences, mask.shape[1]
        names = "BLOCK_M", "BLOCK_N"
        if of_keys:
            lengths, sizes, has_bounds, names = lengths[::-1], sizes[::-1], has_bounds[::-1], names[::-1]
            strides, bounds = (*strides[:2], strides[3], strides[2]), (-bounds[1], -bounds[0])

        def of(blocks: dict[str, int]) -> tuple:
            block = tuple(blocks[name] for name in names)
            lists = list_tiles(mask, kind, strides, sizes, bounds, has_bounds, lengths, block, outer)
            return arguments((lists, *_mask_strides(lists)[:2], lists.stride(2)))

        return of

    def _mask(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
        """The mask, broadcast dims being of size 1; which keys any query of a sequence sees; the mask's kind.

        A boolean mask that is the same for all queries of a sequence says nothing but which keys they see.
        """
        if mask is None:
            return None, None, NO_MASK.value
        for dim, stride in enumerate(mask.stride()):
            if stride == 0 and mask.shape[dim] > 1:
                mask = mask.narrow(dim, 0, 1)
        if mask.dtype != torch.bool:
            return mask, None, ADDITIVE.value
        alike = mask.shape[1] == 1 and mask.shape[2] == 1
        seen = mask[:, 0, 0] if alike else mask.any(dim=1).any(dim=1)
        seen = seen.expand(-1, self.keys).contiguous()[:, None, None]
        return (None, seen, NO_MASK.value) if alike else (mask, seen, BOOLEAN.value)

def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Those of the mask's dims, 0 of what is broadcast."""
    if mask is None:
        return (0,) * 4
    return tuple(stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape, strict=True))


def _near(position: int) -> int:
    return max(-_FAR, min(_FAR, position))

"""Tensor maps: what TMA is told of a tensor (CUDA Driver API, "Tensor Map Object Management").

A real CUtensorMap is 128 bytes that only NVIDIA's driver can write. The emulator's are as long and as opaque to
kernels, with a layout of their own, little-endian: a word that says that this is one; the bytes of an item, the rank,
the number of the swizzle, 0; the address; 5 sizes in items and 4 strides in bytes (8 bytes each); 5 extents of the box
and 5 steps, which are 1 (4 bytes each). Dimensions are innermost first, and those that are not there have size 1.
"""

import functools
import struct
from dataclasses import dataclass

from .errors import CheckFailed

SIZE = 128
ALIGNMENT = 64
# By CUtensorMapSwizzle's number: the bytes of a row, and the mask of the row's number that its 16-byte columns are
# xored with, rows counted by 128 bytes.
SWIZZLE_BYTES = (0, 32, 64, 128)
SWIZZLE_MASK = (0, 1, 3, 7)
_LAYOUT = struct.Struct("<I4BQ5Q4Q5I5I")
_LAYOUT_WORD = 0x70616D74
_MOST_DIMENSIONS = 5


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box of it that one instruction copies."""

    address: int
    item: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @property
    def box_bytes(self) -> int:
        size = self.item
        for extent in self.box:
            size *= extent
        return size


def encode(address: int, item: int, sizes: tuple, strides: tuple, box: tuple, swizzle: int = 0) -> bytes:
    """In place of cuTensorMapEncodeTiled: sizes and box in items, strides (of all dimensions but the first) in bytes.

    swizzle: 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes. Raises ValueError where the driver would refuse.
    """
    rank = len(sizes)
    rules = {
        "1 to 5 dimensions": 1 <= rank <= _MOST_DIMENSIONS and len(strides) == rank - 1 and len(box) == rank,
        "an address that is a multiple of 16": address % 16 == 0,
        "items of 1, 2, 4 or 8 bytes": item in (1, 2, 4, 8),
        "sizes of 1 to 2**32": all(1 <= size <= 1 << 32 for size in sizes),
        "strides that are multiples of 16 below 2**40": all(s % 16 == 0 and 0 <= s < 1 << 40 for s in strides),
        "extents of 1 to 256 of the box": all(1 <= extent <= 256 for extent in box),
        "rows of the box of a multiple of 16 bytes": box[0] * item % 16 == 0,
        "rows of the box within the swizzle": not swizzle or box[0] * item <= SWIZZLE_BYTES[swizzle],
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"a tensor map needs {broken[0]}: {address=:#x} {item=} {sizes=} {strides=} {box=} {swizzle=}")

    def padded(values: tuple, count: int, filler: int) -> tuple:
        return (*values, *[filler] * (count - len(values)))

    return _LAYOUT.pack(
        _LAYOUT_WORD,
        *(item, rank, swizzle, 0),
        address,
        *padded(sizes, 5, 1),
        *padded(strides, 4, 0),
        *padded(box, 5, 1),
        *[1] * 5,
    )


@functools.lru_cache(maxsize=256)
def decode(data: bytes) -> TensorMap:
    word, item, rank, swizzle, _, address, *rest = _LAYOUT.unpack(data)
    if word != _LAYOUT_WORD:
        raise CheckFailed("tensor map", "the 128 bytes are no tensor map")
    sizes, strides, box = rest[:5], rest[5:9], rest[9:14]
    return TensorMap(address, item, tuple(sizes[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank]), swizzle)

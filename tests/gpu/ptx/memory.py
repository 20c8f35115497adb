"""Global and shared memory: bytes by address, for all lanes of an instruction at once."""

import bisect
import functools
from dataclasses import dataclass

import numpy as np

from .errors import CheckFailed
from .types import UNSIGNED

_FIRST = 4096  # numpy refuses an array at address 0; no allocation lies on the first page


class _Process:
    """The address space as an array, from _FIRST on: whoever indexes it has checked the addresses."""

    def __init__(self):
        self.__array_interface__ = {"data": (_FIRST, False), "shape": ((1 << 47) - 2 * _FIRST,), "typestr": "|u1"}


_PROCESS = np.asarray(_Process())


@functools.cache
def _words(size: int, unit: int) -> np.ndarray:
    """The address space as aligned accesses of `size` bytes, each of words of `unit` bytes."""
    return as_rows(_PROCESS, size, unit)


def as_rows(data: np.ndarray, size: int, unit: int) -> np.ndarray:
    """Bytes as (accesses, words)."""
    shape, strides = (data.size // size, size // unit), (size, unit)
    return np.lib.stride_tricks.as_strided(data.view(UNSIGNED[8 * unit]), shape, strides)


@dataclass(frozen=True)
class Allocation:
    """Bytes that a kernel may touch."""

    address: int
    size: int
    name: str


class GlobalMemory:
    """The allocations of a launch. Overlapping ones, such as views of one tensor, count as one."""

    def __init__(self, allocations: list[Allocation]):
        merged: list[Allocation] = []
        for item in sorted((a for a in allocations if a.size), key=lambda a: a.address):
            if merged and item.address < merged[-1].address + merged[-1].size:
                last = merged.pop()
                end = max(last.address + last.size, item.address + item.size)
                names = last.name if item.name in last.name.split("+") else f"{last.name}+{item.name}"
                item = Allocation(last.address, end - last.address, names)
            merged.append(item)
        self.allocations = merged
        self._starts = [a.address for a in merged]

    def check(self, addresses: np.ndarray, size: int, what: str) -> None:
        """Raises unless every access lies inside one allocation and is aligned to its size."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        found = bisect.bisect_right(self._starts, low) - 1
        if found < 0 or high > self._starts[found] + self.allocations[found].size:
            self._check_each(addresses, size, what)
        if int(np.bitwise_or.reduce(addresses)) & (size - 1):
            first = int(addresses[np.flatnonzero(addresses & (size - 1))[0]])
            raise CheckFailed("global alignment", f"{what} of {size} bytes at {self.describe(first)}")

    def _check_each(self, addresses: np.ndarray, size: int, what: str) -> None:
        starts = np.array(self._starts, np.int64)
        ends = np.array([a.address + a.size for a in self.allocations], np.int64)
        found = np.searchsorted(starts, addresses, side="right") - 1
        bad = (found < 0) | (addresses + size > ends[np.maximum(found, 0)]) if len(starts) else np.ones(len(addresses))
        if bad.any():
            first = int(addresses[np.flatnonzero(bad)[0]])
            count = int(np.count_nonzero(bad))
            raise CheckFailed(
                "global bounds", f"{what} of {size} bytes by {count} threads, the first at {self.describe(first)}"
            )

    def describe(self, address: int) -> str:
        """An address as an offset from the nearest allocation."""
        if not self.allocations:
            return f"{address:#x}, with no allocation"
        nearest = min(self.allocations, key=lambda a: max(a.address - address, address - a.address - a.size))
        return f"byte {address - nearest.address} of {nearest.name} ({nearest.size} bytes)"

    @staticmethod
    def load(addresses: np.ndarray, size: int, unit: int) -> np.ndarray:
        """The words (accesses, size // unit) at checked addresses."""
        return _words(size, unit)[GlobalMemory.row(addresses, size)]

    @staticmethod
    def store(addresses: np.ndarray, words: np.ndarray) -> None:
        """Stores words (accesses, n) at checked addresses."""
        unit = words.dtype.itemsize
        size = unit * words.shape[1]
        _words(size, unit)[GlobalMemory.row(addresses, size)] = words

    @staticmethod
    def rows(size: int) -> np.ndarray:
        """All of memory as words of `size` bytes, shaped (words, 1)."""
        return _words(size, size)

    @staticmethod
    def row(addresses: np.ndarray, size: int) -> np.ndarray:
        """Which rows of `size` bytes lie at aligned addresses."""
        return (addresses - _FIRST) >> (size.bit_length() - 1)


class SharedMemory:
    """The shared memory of a batch of CTAs, each at a stride; what was never written reads as NaN."""

    def __init__(self, ctas: int, size: int):
        self.size, self.stride = size, -(-max(size, 1) // 1024) * 1024
        self.data = np.empty(ctas * self.stride, np.uint8)
        self.rows = functools.cache(functools.partial(as_rows, self.data))

    def reset(self) -> None:
        self.data.fill(0xFF)

    def check(self, offsets: np.ndarray, size: int, what: str) -> None:
        """Raises unless the accesses at these offsets of a CTA's memory are inside it and aligned."""
        low, high = int(offsets.min()), int(offsets.max()) + size
        if low < 0 or high > self.size:
            bad = np.flatnonzero((offsets < 0) | (offsets + size > self.size))
            raise CheckFailed(
                "shared bounds",
                f"{what} of {size} bytes by {len(bad)} threads, the first at {int(offsets[bad[0]])} of {self.size}",
            )
        if int(np.bitwise_or.reduce(offsets)) & (size - 1):
            raise CheckFailed("shared alignment", f"{what} of {size} bytes at {int(offsets.max())}")

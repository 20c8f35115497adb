"""The register file of all threads, and operands bound to views of it.

Every virtual register is an array over lanes. An instruction is bound once: its operands become numpy views of the
right type, so that executing it is one ufunc call with `out=` and `where=`.
"""

import numpy as np

from .errors import PTXError
from .parser import Immediate, Kernel, Register, Symbol
from .types import SIGNED, UNSIGNED, dtype, immediate, width

GENERIC_SHARED = 1 << 56  # where shared memory lies among generic addresses
GENERIC_LOCAL = 1 << 57
GENERIC_PARAMETER = 1 << 58


class RegisterFile:
    """The registers of `lanes` threads, `threads` in a CTA."""

    def __init__(self, kernel: Kernel, block: tuple, lanes: int, shared_size: int):
        self.kernel, self.lanes = kernel, lanes
        rows = {1: 0, 8: 0, 16: 0, 32: 0, 64: 0}
        place = {}
        for name, bits in kernel.registers.items():
            place[name] = bits, rows[bits]
            rows[bits] += 1
        self._files = {
            bits: np.zeros((count, lanes), bool if bits == 1 else UNSIGNED[bits]) for bits, count in rows.items()
        }
        self._arrays = {name: self._files[bits][row] for name, (bits, row) in place.items()}
        self._place = place
        self._special(block, shared_size)

    def _special(self, block: tuple, shared_size: int) -> None:
        threads = block[0] * block[1] * block[2]
        self.thread = np.arange(self.lanes) % threads
        self.cta = np.arange(self.lanes) // threads
        self.lane = self.thread % 32
        self.warp = self.thread // 32
        values = {
            "%tid.x": self.thread % block[0],
            "%tid.y": self.thread // block[0] % block[1],
            "%tid.z": self.thread // (block[0] * block[1]),
            "%laneid": self.lane,
            "%warpid": self.warp,
            "%nwarpid": threads // 32,
            "%dynamic_smem_size": shared_size - self.kernel.shared_size,
            "%total_smem_size": shared_size,
            "%lanemask_eq": 1 << self.lane,
            "%lanemask_lt": (1 << self.lane) - 1,
            "%lanemask_le": (2 << self.lane) - 1,
            "%lanemask_gt": ~((2 << self.lane) - 1) & 0xFFFFFFFF,
            "%lanemask_ge": ~((1 << self.lane) - 1) & 0xFFFFFFFF,
            "%smid": 0,
            "%nsmid": 1,
            "%clock": 0,
            "%clock_hi": 0,
        }
        values |= {f"%ntid.{axis}": extent for axis, extent in zip("xyz", block, strict=True)}
        # Without clusters, each CTA is a cluster of its own.
        for axis in "xyz":
            values |= {f"%cluster_ctaid.{axis}": 0, f"%cluster_nctaid.{axis}": 1}
        values |= {"%cluster_ctarank": 0, "%cluster_nctarank": 1}
        for name, value in values.items():
            self._arrays[name] = np.broadcast_to(np.asarray(value), self.lanes).astype(np.uint32)
        self._arrays |= {name: np.zeros(self.lanes, np.uint64) for name in ("%clock64", "%globaltimer")}
        for axis in "xyz":
            for name in (f"%ctaid.{axis}", f"%nctaid.{axis}", f"%clusterid.{axis}", f"%nclusterid.{axis}"):
                self._arrays[name] = np.zeros(self.lanes, np.uint32)

    def place_ctas(self, ctas: np.ndarray, grid: tuple) -> None:
        """Gives the lanes the CTAs whose coordinates are the rows of `ctas`."""
        for axis, name in enumerate("xyz"):
            coordinate = np.repeat(ctas[:, axis], self.lanes // len(ctas)).astype(np.uint32)
            self._arrays[f"%ctaid.{name}"][:] = coordinate
            self._arrays[f"%clusterid.{name}"][:] = coordinate
            self._arrays[f"%nctaid.{name}"][:] = grid[axis]
            self._arrays[f"%nclusterid.{name}"][:] = grid[axis]

    def array(self, register: Register) -> np.ndarray:
        """A register's bits over all lanes, unsigned, or bool for a predicate."""
        if register.name not in self._arrays:
            raise PTXError(f"unknown register {register.name}")
        return self._arrays[register.name]

    def read(self, operand, kind: str) -> np.ndarray | np.generic:
        """An operand as values of a type: a view over lanes, or a scalar. A wider register gives its low bits."""
        if isinstance(operand, Immediate):
            return immediate(operand.text, kind)
        if isinstance(operand, Symbol):
            return np.asarray(self.symbol(operand.name)).astype(UNSIGNED[width(kind)])[()].view(dtype(kind))
        array = self.array(operand)
        if kind == "pred" or array.dtype == bool:
            if kind != "pred" or array.dtype != bool:
                raise PTXError(f"{operand.name} read as {kind}")
            return array
        wanted = dtype(kind)
        if array.dtype.itemsize < wanted.itemsize:
            raise PTXError(f"{operand.name} is narrower than {kind}")
        return array.view(wanted)[:: array.dtype.itemsize // wanted.itemsize]

    def symbol(self, name: str) -> int:
        """The address of a variable in its own state space."""
        if name not in self.kernel.variables:
            raise PTXError(f"unknown symbol {name}")
        return self.kernel.variables[name].offset

    def target(self, operand: Register, kind: str) -> np.ndarray:
        """The array that a result of a type is written to: of the type where the widths agree, else sign- or
        zero-extended to the register's width by the assignment."""
        if operand.name == "_":
            return np.empty(self.lanes, dtype(kind))
        array = self.array(operand)
        if array.dtype == bool:
            return array
        bits = array.dtype.itemsize * 8
        if bits == width(kind):
            return array.view(dtype(kind))
        if bits < width(kind):
            raise PTXError(f"{operand.name} is narrower than {kind}")
        return array.view((SIGNED if kind[0] == "s" else UNSIGNED)[bits])

    def rows(self, operands: tuple) -> tuple[np.ndarray, np.ndarray]:
        """The 32-bit registers of a fragment as (file, row numbers), to gather or scatter in one step."""
        places = [self._place[operand.name] for operand in operands]
        if any(bits != 32 for bits, _ in places):
            raise PTXError("a fragment must be of 32-bit registers")
        return self._files[32], np.array([row for _, row in places])

    def predicate(self, operand) -> tuple[np.ndarray | np.generic, bool]:
        """A predicate operand and whether it is negated."""
        if isinstance(operand, Immediate):
            return np.broadcast_to(np.bool_(int(operand.text, 0) != 0), self.lanes), False
        return self.array(operand), operand.negated

"""The least time that a launch can take on a GPU: a bound from counts and data sheets, never a measurement."""

from dataclasses import dataclass

from gpu.chips import CHIPS, LIMITS, Chip
from gpu.ptx import Counts


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def blocks_per_multiprocessor(arch: int, threads: int, registers: int, shared: int) -> int:
    """How many blocks fit at once, by the rules of CUDA's cuda_occupancy.h; 0 if not even one does.

    Registers are given to warps by 256, in four partitions; warps to blocks by 4; shared memory by 128 bytes, of which
    each block uses 1024 more than it asks for.
    """
    limits = LIMITS[arch]
    if threads > limits.block_threads or registers > limits.thread_registers or shared > limits.block_shared:
        return 0
    warps = -(-threads // 32)
    by_threads = limits.threads // 32 // warps
    per_warp = _round_up(max(registers, 1) * 32, 256)
    by_registers = limits.registers // 4 // per_warp * 4 // _round_up(warps, 4)
    by_shared = limits.shared // _round_up(shared + 1024, 128)
    return min(by_threads, by_registers, by_shared, limits.blocks)


@dataclass(frozen=True)
class Bound:
    """A lower bound in seconds, and what it comes from: "matrix", "vector", "special" or "memory"."""

    chip: str
    seconds: float
    limiter: str
    occupancy: float | None

    def __str__(self) -> str:
        warps = "" if self.occupancy is None else f", {self.occupancy:.0%} of the warps"
        return f"{self.chip}: at least {self.seconds * 1e6:.2f} us (bound by {self.limiter}, not measured{warps})"


def bound(counts: Counts, chip: Chip, threads: int = 0, registers: int = 0, shared: int = 0) -> Bound:
    """The bound of one launch; threads, registers and shared bytes of a block add its occupancy.

    Bytes are those that differ: each is fetched or written once. Fewer programs than multiprocessors leave the rest
    idle.
    """
    busy = min(max(counts.programs, 1), chip.multiprocessors) / chip.multiprocessors
    times = {
        "matrix": sum(flops / chip.matrix[kind] for kind, flops in counts.matrix_flops.items()) / busy,
        "vector": counts.flops / chip.vector / busy,
        "special": counts.special / chip.special / busy,
        "memory": (counts.read + counts.written) / chip.bandwidth,
    }
    limiter = max(times, key=times.get)
    occupancy = None
    if threads and chip.arch in LIMITS:
        blocks = blocks_per_multiprocessor(chip.arch, threads, registers, shared)
        occupancy = blocks * threads / LIMITS[chip.arch].threads
    return Bound(chip.name, times[limiter], limiter, occupancy)


def report(name: str, counts: Counts) -> str:
    """The bounds of a launch on every chip, a line each."""
    return "\n".join([name, *(f"  {bound(counts, chip)}" for chip in CHIPS)])

"""Limits and peak rates of the GPUs that the project targets, from NVIDIA's and AMD's documents."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What an architecture gives a multiprocessor and one block (CUDA C++ Programming Guide, "Compute Capabilities").

    shared: bytes of shared memory per multiprocessor; block_shared: the most that one block may ask for.
    """

    shared: int
    block_shared: int
    threads: int
    blocks: int
    registers: int = 65536
    block_threads: int = 1024
    thread_registers: int = 255


_KIB = 1024
LIMITS = {
    80: Limits(164 * _KIB, 163 * _KIB, 2048, 32),
    86: Limits(100 * _KIB, 99 * _KIB, 1536, 16),
    89: Limits(100 * _KIB, 99 * _KIB, 1536, 24),
    90: Limits(228 * _KIB, 227 * _KIB, 2048, 32),
    100: Limits(228 * _KIB, 227 * _KIB, 2048, 32),
    120: Limits(100 * _KIB, 99 * _KIB, 1536, 24),
}


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one block may have; 64 KiB where the architecture is not listed, as on AMD's."""
    return LIMITS[arch].block_shared if arch in LIMITS else 64 * _KIB


# Of a multiprocessor and one clock: float32 multiply-adds, and multiply-adds of 16-bit matrices with float32 sums
# (programming guide, "Arithmetic Instructions"; the architectures' white papers. GeForce's of sm_89 run at half rate).
VECTOR_LANES = {80: 64, 89: 128, 90: 128, 100: 128}
MATRIX_LANES = {80: 1024, 89: 256, 90: 2048, 100: 4096}


@dataclass(frozen=True)
class Chip:
    """A GPU's peak rates: dense, with float32 accumulation (NVIDIA's data sheets and white papers).

    clock: at which `vector` is reached, the highest there is; that of the tensor cores may be lower. matrix:
    tensor-core FLOP/s by operand type; vector: float32 FLOP/s; bandwidth: bytes/s of the device's memory. Where two
    documents differ, the higher rate: a bound must stay one. Special functions: 16 per multiprocessor and clock.
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    matrix: dict
    vector: float
    bandwidth: float

    @property
    def special(self) -> float:
        return 16 * self.multiprocessors * self.clock


def _rates(half: float, tf32: float) -> dict:
    return {"bf16": half * 1e12, "f16": half * 1e12, "tf32": tf32 * 1e12}


CHIPS = [
    Chip("A100", 80, 108, 1.41e9, _rates(312, 156), 19.5e12, 2.039e12),
    Chip("H100", 90, 132, 1.98e9, _rates(989.4, 494.7), 66.9e12, 3.35e12),
    Chip("H200", 90, 132, 1.98e9, _rates(989.4, 494.7), 66.9e12, 4.8e12),
    Chip("RTX 4090", 89, 128, 2.52e9, _rates(165.2, 82.6), 82.6e12, 1.008e12),
    Chip("B200", 100, 148, 2.11e9, _rates(2250, 1125), 80e12, 8e12),
]

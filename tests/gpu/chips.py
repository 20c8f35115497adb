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
    """Bytes of shared memory that one block may have."""
    return LIMITS[arch].block_shared

"""Occupancy by CUDA's rules, and the arithmetic of the bounds."""

from collections import Counter

import pytest

from gpu.bounds import blocks_per_multiprocessor, bound, report
from gpu.chips import CHIPS, MATRIX_LANES, VECTOR_LANES, Chip
from gpu.ptx import Counts

A100, H100 = CHIPS[0], CHIPS[1]


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        (80, 128, 32, 0, 16),  # threads
        (80, 128, 255, 0, 2),  # registers: 8 warps fit
        (80, 256, 128, 0, 2),
        (80, 32, 16, 0, 32),  # blocks
        (80, 128, 64, 48 * 1024, 3),  # shared memory: 164 KiB over 49
        (90, 128, 64, 227 * 1024, 1),
        (90, 128, 64, 228 * 1024, 0),
        (86, 128, 32, 0, 12),
        (89, 1024, 64, 0, 1),
        (90, 384, 168, 0, 1),  # 12 warps, and 12 of 168 registers fit: (16384 // 5376) * 4
    ],
)
def test_blocks_per_multiprocessor(arch: int, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert blocks_per_multiprocessor(arch, threads, registers, shared) == blocks


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_documented_rates_are_those_of_the_units(chip: Chip) -> None:
    per_clock = 2 * chip.multiprocessors
    assert chip.vector == pytest.approx(per_clock * VECTOR_LANES[chip.arch] * chip.clock, rel=2e-3)
    lanes = per_clock * MATRIX_LANES[chip.arch]
    # The tensor cores' clock is the other's or lower, by an eighth at most.
    assert 0.875 * chip.clock <= chip.matrix["bf16"] / lanes <= 1.001 * chip.clock
    assert chip.matrix["f16"] == chip.matrix["bf16"] == 2 * chip.matrix["tf32"]


def test_what_limits_a_launch() -> None:
    memory = Counts(read=2 * 10**9, written=39 * 10**6, programs=1000)
    assert bound(memory, A100).limiter == "memory"
    assert bound(memory, A100).seconds == pytest.approx(1e-3)
    matrix = Counts(matrix_flops=Counter(bf16=312e12), programs=108)
    assert bound(matrix, A100).limiter == "matrix" and bound(matrix, A100).seconds == pytest.approx(1)
    # One program keeps one multiprocessor busy.
    assert bound(Counts(matrix_flops=Counter(bf16=312e12), programs=1), A100).seconds == pytest.approx(108)
    special = Counts(special=16 * 132 * 1.98e9, programs=132)
    assert bound(special, H100).limiter == "special" and bound(special, H100).seconds == pytest.approx(1)


def test_a_bound_is_called_a_bound() -> None:
    text = report("layer norm", Counts(read=10**6, written=10**6, programs=500))
    assert all(chip.name in text for chip in CHIPS)
    assert text.count("not measured") == len(CHIPS) and "at least" in text
    assert "50% of the warps" in str(bound(Counts(read=1, programs=1), A100, threads=256, registers=64))

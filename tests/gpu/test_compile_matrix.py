"""No kernel may take more of an architecture than it did, nor more than there is."""

import dataclasses

import pytest

pytest.importorskip("triton")

from gpu import compile_matrix  # noqa: E402
from gpu.compile_matrix import Resources, complaints  # noqa: E402
from gpu.kernel_cases import CASES  # noqa: E402

EVERY = [pytest.param(case, arch, id=f"{case.name}-{arch}") for case in CASES for arch in case.architectures]
SAMPLE = [param for param in EVERY if param.id.startswith("sample") and param.id.endswith(("sm_80", "sm_90", "gfx942"))]


@pytest.mark.emulated_full
@pytest.mark.parametrize(("case", "arch"), EVERY)
def test_every_kernel_against_the_table(case: compile_matrix.Case, arch: str) -> None:
    assert not compile_matrix.check(case, arch)


@pytest.mark.parametrize(("case", "arch"), SAMPLE)
def test_sample_kernels_against_the_table(case: compile_matrix.Case, arch: str) -> None:
    assert not compile_matrix.check(case, arch)


def test_what_is_worse_is_named() -> None:
    case = compile_matrix.Case("case", lambda: None, matrix=("mm",))
    fine = Resources(threads=128, registers=100, spills=0, shared=1024, matrix=8)
    old = dataclasses.asdict(fine)
    assert complaints(case, "sm_90", "mm", fine, old) == []
    for change, word in [
        ({"registers": 101}, "registers went from 100 to 101"),
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared": 2048}, "shared went from 1024 to 2048"),
        ({"shared": 228 * 1024}, "the chip has 232448"),
        ({"matrix": 4}, "matrix instructions went from 8 to 4"),
        ({"matrix": 0}, "no matrix instructions"),
    ]:
        found = complaints(case, "sm_90", "mm", dataclasses.replace(fine, **change), old)
        assert any(word in text for text in found), (change, found)
    assert complaints(case, "sm_90", "other", dataclasses.replace(fine, matrix=0), old) == []
    assert any("not in the table" in text for text in complaints(case, "sm_90", "mm", fine, None))


def test_every_case_is_in_the_table() -> None:
    table = compile_matrix.read_table()
    for case in CASES:
        assert set(table.get(case.name, ())) == set(case.architectures), f"{case.name}: run compile_matrix --write"

"""Attention's CUDA C++ kernels, broken by one barrier, wait, guard or stride: the checks, or float64, must notice."""

from collections import Counter
from functools import partial

import pytest

pytest.importorskip("triton")

from gpu import binary, mutations  # noqa: E402
from gpu.attention_trials import causal  # noqa: E402
from gpu.launchers import BINARY, full  # noqa: E402
from gpu.mutations import DATA, EDGES, SYNCHRONISATION, Trial  # noqa: E402

pytestmark = pytest.mark.skipif(binary.missing is not None, reason=str(binary.missing))
trial = partial(causal, on_cuda=True)


# Of each kernel's trials the first has several sequences and heads; in the second there are blocks that meet no tile.
NONE_MET = (200, 161, -130)


def forward() -> list[Trial]:
    """Tiles of 128 queries by 64 keys: each row and column of a thread is the first outside in one."""
    sizes = [
        (70, 420, 350), (60, 60, 0), (200, 200, 0), (232, 232, 0), (9, 65, 90), (300, 97, -210), (128, 150, 60),
        (128, 180, 60),
    ]  # fmt: skip
    columns = (8 * j + e for j in range(8) for e in (1, 2))
    return [
        trial(131, 161, 30, several=True),
        trial(*NONE_MET),
        *(trial(*size) for size in sizes),
        *(trial(9, keys, 400, cold=2.0) for keys in columns),
    ]


def queries() -> list[Trial]:
    """Tiles of 64 queries by 64 keys, of which a thread has 16 columns."""
    of = partial(trial, part="dq")
    sizes = [(70, 150, 60), (9, 65, 90), (20, 60, 0), (9, 260, 400), (60, 100, 50), (70, 60, -3), (70, 9, -66)]
    columns = (8 * j + e for j in range(8) for e in (1, 2))
    return [
        of(131, 161, 30, several=True),
        of(*NONE_MET),
        *(of(*size) for size in sizes),
        of(9, 66, 400, cold=4.0),
        *(of(9, keys, 400, cold=4.0) for keys in columns),
    ]


def keys() -> list[Trial]:
    """Tiles of 64 queries by 64 keys, where all queries but a few see them, and where only the last of a tile does."""
    of = partial(trial, part="dkdv")
    sizes = [
        (110, 70, -10), (40, 64, 0), (170, 9, 400), (20, 60, 0), (170, 70, -40), (110, 70, -40), (40, 9, -24),
        (40, 8, -25), (200, 64, 0), (66, 64, 0), *((rows, 60, 0) for rows in (17, 24, 25, 65)),
        *((rows, 9, 400) for rows in (1, 2, 63)),
    ]  # fmt: skip
    return [of(131, 161, 30, several=True), of(*NONE_MET), *(of(*size) for size in sizes)]


# By kernel: its trials, and its name.
KERNELS = {
    "forward": (forward, "attention_fwd_plain_64_bf16"),
    "queries": (queries, "attention_bwd_queries_plain_64_bf16"),
    "keys": (keys, "attention_bwd_keys_plain_64_bf16"),
}
EQUIVALENT: dict[tuple[str, str], dict[str, tuple[int, str]]] = {}


def survivors(kernel: str, kinds: list[str], most: int | None = None, trials: int | None = None) -> tuple[list, list]:
    make, name = KERNELS[kernel]
    return mutations.survivors(BINARY, make()[:trials], kinds, most=most, kernel=name)


@full
@pytest.mark.parametrize("kinds", [SYNCHRONISATION + DATA, EDGES], ids=["data", "edges"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_of_them(kernel: str, kinds: list[str]) -> None:
    left, outcomes = survivors(kernel, kinds)
    allowed = {kind: EQUIVALENT.get((kernel, kind), (0,))[0] for kind in kinds}
    found = Counter(mutation.kind for mutation in left)
    assert {kind: found[kind] for kind in kinds} == allowed, "\n".join(map(str, left))
    assert outcomes


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_of_them(kernel: str) -> None:
    left, outcomes = survivors(kernel, ["dropped barrier", "dropped wait"], trials=2)
    assert not left and outcomes, "\n".join(map(str, left))

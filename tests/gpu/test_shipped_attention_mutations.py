"""Attention's masks, guards and strides, broken by one: the checks, or the comparison with float64, must notice."""

from collections import Counter

import pytest

pytest.importorskip("triton")

from gpu import mutations  # noqa: E402
from gpu.attention_trials import causal  # noqa: E402
from gpu.launchers import full  # noqa: E402
from gpu.mutations import EDGES, Trial  # noqa: E402

KINDS = [*EDGES, "wrong stride"]


# Of each kernel's trials the first has several sequences and heads, and notices any store without a guard.
def forward() -> list[Trial]:
    """Tiles of 128 queries by 64 keys: each row and column of a thread is the first outside in one."""
    sizes = [
        (70, 420, 350), (60, 60, 0), (200, 200, 0), (232, 232, 0), (9, 65, 90), (300, 97, -210), (128, 150, 60),
        (128, 180, 60),
    ]  # fmt: skip
    columns = (8 * j + e for j in range(8) for e in (1, 2))
    return [
        causal(131, 161, 30, several=True),
        *(causal(*size) for size in sizes),
        *(causal(9, keys, 400, cold=2.0) for keys in columns),
    ]


def queries() -> list[Trial]:
    """Tiles of 64 queries by 64 keys, of which a thread has 16 columns."""
    sizes = [
        (70, 150, 60), (9, 65, 90), (20, 60, 0), (9, 260, 400), (60, 100, 50), (70, 60, -3),
        (70, 9, -66),  # The first tile's rows see nothing.
    ]  # fmt: skip
    columns = (8 * j + e for j in range(8) for e in (1, 2))
    return [
        causal(9, 20, 5, several=True, part="dq"),
        *(causal(*size, part="dq") for size in sizes),
        causal(9, 66, 400, cold=4.0, part="dq"),
        *(causal(9, keys, 400, cold=4.0, part="dq") for keys in columns),
    ]


def keys() -> list[Trial]:
    """Tiles of 32 queries by 64 keys; where all queries but a few see them, where only the last of a tile does."""
    sizes = [
        (110, 70, -10), (40, 64, 0), (170, 9, 400), (20, 60, 0), (170, 70, -40), (110, 70, -40), (40, 9, -24),
        (40, 8, -25),
    ]  # fmt: skip
    return [causal(9, 20, 5, several=True, part="dkdv"), *(causal(*size, part="dkdv") for size in sizes)]


# By kernel: the trials, and its name.
KERNELS = {
    "attention": (forward, "_attention_fwd_kernel"),
    "attention, gradient of queries": (queries, "_attention_bwd_dq_kernel"),
    "attention, gradients of keys": (keys, "_attention_bwd_dkdv_kernel"),
}
_MULTIPLES = "what whole tiles begin and end at is a multiple of their size"
_INFINITE = "whether what a logarithm is taken of is infinite, which no sum of exponentials is"
_PACKED = "a program beyond its sequence's rows, which only packed ones have"
_NOT_STORED = "rows beyond the last, which are not stored"
_ONE_MORE = "one more tile, or one more copied ahead: of keys that no row sees"
_FIRST = "the first whole tile of a row that sees all keys before it is the first of all: 0 by any stride"
_TWO = "a buffer beyond the second, where the loop of partly seen tiles has two steps at most"
_THREE = "a buffer beyond the third, where the loop of partly seen tiles has three steps at most"
_GROUP = "a group of one head, which is a kernel of its own"
_LAST = "a second tile after the whole ones, where there is one at most"
_ABSENT = "rows beyond the last, whose factor is 0"
_WHOLE = "rows of whole tiles, which are all there"
_ALL_SEE = "what rows after whole tiles see: all keys; only the first row may have the last at its edge"
# Survivors that change nothing, by kind: how many, and why.
EQUIVALENT: dict[tuple[str, str], dict[str, tuple[int, str]]] = {
    ("attention", "sm_80"): {
        "off by one": (3, f"{_MULTIPLES}; {_INFINITE} (2)"),
        "off by one (register)": (6, f"{_PACKED}; {_NOT_STORED} (2); {_ONE_MORE} (3)"),
        "wrong stride": (3, _FIRST),
    },
    ("attention", "sm_90"): {
        "off by one": (4, f"{_MULTIPLES}; {_THREE}; {_INFINITE} (2)"),
        "off by one (register)": (7, f"{_PACKED}; {_NOT_STORED} (2); {_ONE_MORE} (4)"),
        "wrong stride": (3, _FIRST),
    },
    ("attention, gradient of queries", "sm_90"): {
        "off by one": (3, f"{_MULTIPLES}; {_TWO} (2)"),
        "off by one (register)": (4, f"{_PACKED}; {_ONE_MORE} (3)"),
        "wrong stride": (2, _FIRST),
    },
    ("attention, gradients of keys", "sm_90"): {
        "off by one": (3, f"{_GROUP}; {_LAST} (2)"),
        "off by one (register)": (
            46,
            f"{_PACKED}; {_NOT_STORED} (2); {_ABSENT} (16); {_ONE_MORE} (7); {_WHOLE} (2); {_LAST} (4); "
            f"{_ALL_SEE} (14)",
        ),
        "wrong stride": (4, _LAST),
    },
}


@full
@pytest.mark.parametrize(("kernel", "target"), EQUIVALENT)
def test_masks_guards_and_strides_are_right_to_the_element(kernel: str, target: str) -> None:
    make, name = KERNELS[kernel]
    left, outcomes = mutations.survivors(target, make(), KINDS, kernel=name)
    allowed = {kind: count for kind, (count, _) in EQUIVALENT[kernel, target].items()}
    assert Counter(mutation.kind for mutation in left) == allowed, "\n".join(map(str, left))
    assert {"global bounds", "result"} <= {outcome.check for outcome in outcomes}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_of_them(kernel: str) -> None:
    make, name = KERNELS[kernel]
    left, outcomes = mutations.survivors("sm_90", make()[:1], ["unguarded store"], most=3, kernel=name)
    assert not left and outcomes, "\n".join(map(str, left))

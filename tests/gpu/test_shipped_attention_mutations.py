"""Attention's masks, guards and strides, broken by one: the checks, or the comparison with float64, must notice."""

from collections import Counter

import pytest

pytest.importorskip("triton")

from gpu import mutations  # noqa: E402
from gpu.attention_trials import causal  # noqa: E402
from gpu.launchers import full  # noqa: E402
from gpu.mutations import EDGES, Trial  # noqa: E402

KINDS = [*EDGES, "wrong stride"]


# Of each kernel's trials the first has several sequences and heads.
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
        (40, 8, -25), (33, 64, 0), (34, 64, 0),
        # Where a tile's queries end, of which a thread of sm_80 has 8: some see a part of the keys, or all see all.
        *((rows, 60, 0) for rows in (17, 24, 25)),
        *((rows, 9, 400) for rows in (1, 2, 9, 17, 18, 25, 26)),
    ]  # fmt: skip
    return [causal(9, 20, 5, several=True, part="dkdv"), *(causal(*size, part="dkdv") for size in sizes)]


def split() -> list[Trial]:
    """Splits of 256 keys, four tiles of which at most two are seen in part; queries and heads lie in 16 rows."""
    return [
        causal(3, 300, 280, several=True),
        *(causal(*size) for size in ((2, 600, 700), (8, 300, 0), (5, 300, 40), (8, 300, 60))),
        causal(8, 300, 249, cold=2.0),  # The last row sees the key after the first split.
        *(causal(1, keys, 300, cold=2.0) for keys in (257, 258, 290, 291)),
        *(causal(8, keys, 313) for keys in (310, 325, 340, 355, 370)),
    ]


def join() -> list[Trial]:
    """Splits of 256 keys, 16 of them at a time: 2, 17, 9 and 16."""
    return [causal(3, 300, 280, several=True), *(causal(1, keys, 9000) for keys in (4200, 2303, 4095))]


# By kernel: the trials, its name, and mutations of which the first trial notices all.
KERNELS = {
    "attention": (forward, "_attention_fwd_kernel", "unguarded store"),
    "attention, gradient of queries": (queries, "_attention_bwd_dq_kernel", "unguarded store"),
    "attention, gradients of keys": (keys, "_attention_bwd_dkdv_kernel", "unguarded store"),
    "decoding, splits": (split, "_attention_split_kernel", "unguarded store"),
    "decoding, join": (join, "_attention_join_kernel", "unguarded load"),
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
_LOADED = "rows beyond the last, which load the last head's again and are not stored"
_SOME = "whether there are queries at all"
_AHEAD = "one more tile copied ahead, which no step reads"
_THIRD = "a third tile that is seen in part, or its copy, where there are two at most"
_ROOM = "where warps leave what is summed up across them: wider apart, as they are read"
_ALIKE = "threads that store what another does at the same place"
_SPLITS = "whether there are splits: two at least"
_NO_SPLIT = "where a step would begin after the last split, and add nothing"
# Survivors that change nothing, by kind: how many, and why.
_OF_SPLITS = {
    "unguarded load": (1, _LOADED),
    "off by one": (2, f"{_SOME}; {_TWO}"),
    "off by one (register)": (8, f"{_LOADED}; {_AHEAD} (2); {_THIRD} (5)"),
    "wrong stride": (4, f"{_ROOM} (2); {_THIRD} (2)"),
}
_OF_JOIN = {
    "unguarded store": (4, _ALIKE),
    "off by one": (2, f"{_SPLITS}; {_INFINITE}"),
    "off by one (register)": (1, _NO_SPLIT),
    "wrong stride": (2, _SPLITS),
}
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
    ("attention, gradient of queries", "sm_80"): {
        "off by one": (1, _MULTIPLES),
        "off by one (register)": (3, f"{_PACKED}; {_ONE_MORE} (2)"),
        "wrong stride": (2, _FIRST),
    },
    ("attention, gradient of queries", "sm_90"): {
        "off by one": (3, f"{_MULTIPLES}; {_TWO} (2)"),
        "off by one (register)": (4, f"{_PACKED}; {_ONE_MORE} (3)"),
        "wrong stride": (2, _FIRST),
    },
    ("attention, gradients of keys", "sm_80"): {
        "unguarded load": (24, _WHOLE),
        "off by one": (1, _GROUP),
        "off by one (register)": (
            21,
            f"{_PACKED}; {_NOT_STORED} (2); {_WHOLE} (8); {_ONE_MORE}; {_LAST}; {_ALL_SEE} (8)",
        ),
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
    ("decoding, splits", "sm_80"): _OF_SPLITS,
    ("decoding, splits", "sm_90"): _OF_SPLITS,
    ("decoding, join", "sm_80"): _OF_JOIN,
    ("decoding, join", "sm_90"): _OF_JOIN,
}


@full
@pytest.mark.parametrize(("kernel", "target"), EQUIVALENT)
def test_masks_guards_and_strides_are_right_to_the_element(kernel: str, target: str) -> None:
    make, name, _ = KERNELS[kernel]
    left, outcomes = mutations.survivors(target, make(), KINDS, kernel=name)
    allowed = {kind: count for kind, (count, _) in EQUIVALENT[kernel, target].items()}
    assert Counter(mutation.kind for mutation in left) == allowed, "\n".join(map(str, left))
    assert {"global bounds", "result"} <= {outcome.check for outcome in outcomes}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_of_them(kernel: str) -> None:
    make, name, kind = KERNELS[kernel]
    left, outcomes = mutations.survivors("sm_90", make()[:1], [kind], most=3, kernel=name)
    assert not left and outcomes, "\n".join(map(str, left))

"""Attention's CUDA C++ kernels, broken by one barrier, wait, guard or stride: the checks, or float64, must notice."""

from collections import Counter
from functools import partial

import pytest

pytest.importorskip("triton")

from gpu import binary, mutations  # noqa: E402
from gpu.attention_trials import causal  # noqa: E402
from gpu.launchers import BINARY, full  # noqa: E402
from gpu.mutations import DATA, SYNCHRONISATION, Trial  # noqa: E402

pytestmark = pytest.mark.skipif(binary.missing is not None, reason=str(binary.missing))


# Of each kernel's trials the first has several sequences and heads; in the second there are blocks that meet no tile.
NONE_MET = (200, 161, -130)
SIZES = [(200, 200, 0), (128, 150, 60)]


def trials(part: str) -> list[Trial]:
    of = partial(causal, on_cuda=True, part=part)
    return [of(131, 161, 30, several=True), of(*NONE_MET), *(of(*size) for size in SIZES)]


# By kernel: the part of attention that its trials look at, and its name.
KERNELS = {
    "forward": ("forward", "attention_fwd_plain_64_bf16"),
    "queries": ("dq", "attention_bwd_queries_plain_64_bf16"),
    "keys": ("dkdv", "attention_bwd_keys_plain_64_bf16"),
}
KINDS = [*SYNCHRONISATION, *DATA, "unguarded store"]
_INDEX = "an index into the lengths, or the starts of packed sequences, which these calls have none of"
_WIDTH = "whether a column is beyond the heads' width, which fills the tile"
# Survivors that change nothing, by kernel and kind: how many, and why.
EQUIVALENT = {
    ("forward", "wrong stride"): (9, f"{_INDEX} (8); {_WIDTH}"),
    ("queries", "wrong stride"): (9, f"{_INDEX} (8); {_WIDTH}"),
    ("keys", "wrong stride"): (11, _INDEX),
}


@full
@pytest.mark.parametrize("kernel", KERNELS)
def test_barriers_waits_fragments_and_strides(kernel: str) -> None:
    part, name = KERNELS[kernel]
    left, outcomes = mutations.survivors(BINARY, trials(part), KINDS, kernel=name)
    allowed = {kind: EQUIVALENT.get((kernel, kind), (0,))[0] for kind in KINDS}
    found = Counter(mutation.kind for mutation in left)
    assert {kind: found[kind] for kind in KINDS} == allowed, "\n".join(map(str, left))
    assert {"global bounds", "shared race", "result"} <= {outcome.check for outcome in outcomes}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_of_them(kernel: str) -> None:
    part, name = KERNELS[kernel]
    left, outcomes = mutations.survivors(BINARY, trials(part)[:2], ["dropped barrier", "dropped wait"], kernel=name)
    assert not left and outcomes, "\n".join(map(str, left))

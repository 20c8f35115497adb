"""The lists of tiles that attention makes of a mask, against the mask itself; and what a program reads of one."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from attention_calls import draw_inputs, run_eager, run_op, run_reference
from budget import assert_op_within_budget
from torch import Tensor

pytest.importorskip("triton")

from fasttx.kernels import configs, tune  # noqa: E402
from fasttx.kernels._attention_lists import list_tiles  # noqa: E402
from fasttx.kernels._attention_tile import ADDITIVE, BOOLEAN  # noqa: E402

from gpu import mutations  # noqa: E402
from gpu.launchers import TARGETS, counted, full, on_triton  # noqa: E402
from gpu.mutations import EDGES, SYNCHRONISATION, Trial  # noqa: E402

by_target = pytest.mark.parametrize("target", [TARGETS[-1], *(pytest.param(x, marks=full) for x in TARGETS[:-1])])
_FAR = 10**6


def expected(mask: Tensor, bounds: tuple[int, int], lengths: tuple, blocks: tuple[int, int], outer: tuple) -> list:
    """By sequence, head and tile of rows: the entries. mask (sequences, heads, rows, columns), True or added."""
    rows, columns = mask.shape[-2:]
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    places = (column >= row + bounds[0]) & (column <= row + bounds[1])
    found = []
    for sequence in range(outer[0]):
        sizes = zip(lengths, (rows, columns), strict=True)
        row_count, count = (size if x is None else int(x[sequence]) for x, size in sizes)
        allowed = places & (row < row_count) & (column < count)
        for head in range(outer[1]):
            own = mask[min(sequence, mask.shape[0] - 1), min(head, mask.shape[1] - 1)]
            seen = own if own.dtype == torch.bool else own != -math.inf
            for first in range(0, rows, blocks[0]):
                band = slice(first, min(first + blocks[0], row_count))
                entries = []
                for tile in range(0, columns, blocks[1]):
                    kept = (allowed & seen)[band, tile : tile + blocks[1]]
                    if kept.any():
                        whole = kept.all() and kept.shape[1] == blocks[1] and own.dtype == torch.bool
                        whole &= lengths[0] is None or first + blocks[0] <= row_count
                        entries.append(2 * (tile // blocks[1]) + (not whole))
                found.append(entries)
    return found


def read(lists: Tensor) -> list:
    return [row[1 : 1 + row[0]].tolist() for row in lists.flatten(0, 2)]


def masks(rows: int, columns: int) -> dict[str, Tensor]:
    """Masks in which whole tiles are seen, seen partly, and not seen."""
    by_tile = torch.rand(2, 3, -(-rows // 16), -(-columns // 16))
    blocks = by_tile.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :rows, :columns]
    noise = torch.rand(2, 3, rows, columns) > 0.5
    keep = (blocks > 0.6) | ((blocks > 0.4) & noise)
    return {
        "each": keep,
        "shared": keep[:1, :1],
        "everything": torch.ones_like(keep),
        "nothing": torch.zeros_like(keep),
        "added": torch.zeros(keep[:, :1].shape).masked_fill(~keep[:, :1], -math.inf),
        "transposed": keep.transpose(-1, -2).contiguous().transpose(-1, -2),
    }


def listed(mask: Tensor, bounds: tuple[int, int], has_bounds, lengths: tuple, blocks: tuple[int, int], outer) -> Tensor:
    kind = BOOLEAN.value if mask.dtype == torch.bool else ADDITIVE.value
    strides = [stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape, strict=True)]
    return list_tiles(mask, kind, strides, mask.shape[-2:], bounds, has_bounds, lengths, blocks, outer)


_LENGTHS = torch.tensor([40, 300])
# By name: bounds, which of them there are, and how many rows and columns there are.
PLACES = {
    "all": ((0, 0), (False, False), (None, None)),
    "causal": ((0, 20), (False, True), (None, None)),
    "window": ((-30, 9), (True, True), (None, None)),
    "lengths": ((0, 0), (False, False), (None, _LENGTHS)),
    "rows' lengths": ((-70, 0), (True, False), (_LENGTHS.clamp(max=90), None)),
}


@by_target
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("blocks", ((32, 16), pytest.param((16, 32), marks=full), pytest.param((64, 64), marks=full)))
def test_lists_are_those_of_the_mask(places, blocks, target):
    bounds, has, lengths = PLACES[places]
    wide = tuple(bound if there else end for bound, there, end in zip(bounds, has, (-_FAR, _FAR), strict=True))
    with on_triton(target):
        for name, mask in masks(90, 300).items():
            varies = mask.shape[0] > 1 or any(x is not None for x in lengths)
            outer = 2 if varies else 1, mask.shape[1]
            found = read(listed(mask, bounds, has, lengths, blocks, outer))
            assert found == expected(mask, wide, lengths, blocks, outer), name


def test_a_mask_without_memory_of_its_own():
    """Broadcast over rows, as padding is, or over columns."""
    keep = torch.rand(2, 1, 1, 300) > 0.9
    rows = torch.rand(2, 1, 90, 1) > 0.5
    with on_triton(TARGETS[0]):
        for mask in (keep.expand(2, 1, 90, 300), rows.expand(2, 1, 90, 300)):
            strides = mask.stride()
            found = list_tiles(
                mask, BOOLEAN.value, strides, (90, 300), (0, 0), (False, False), (None, None), (32, 16), (2, 1)
            )
            assert read(found) == expected(mask, (-_FAR, _FAR), (None, None), (32, 16), (2, 1))


@counted
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_that_are_seen_whole_take_nothing_of_the_mask(target):
    inputs = [x.bfloat16() for x in draw_inputs(1, 1, 1, 256, 256, 64, 64).values()]
    everything = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    noise = torch.rand(everything.shape) > 0.1
    loaded = []
    for mask in (everything, noise):
        with on_triton(target) as machine:
            run_op(*inputs, attn_mask=mask)
        (launch,) = (x for x in machine.launches if x.name == "_attention_fwd_kernel")
        loaded.append(launch.counts.loaded_bytes)
    assert loaded[1] - loaded[0] >= mask.numel()


@by_target
def test_keys_beyond_a_length_have_no_gradient_of_tiles_seen_whole(target):
    inputs = draw_inputs(2, 1, 1, 90, 90, 16, 16)
    options = {"attn_mask": torch.ones(1, 1, 90, 90, dtype=torch.bool), "key_lengths": torch.tensor([90, 40])}
    with on_triton(target):
        assert_op_within_budget(
            lambda **x: run_op(**x, **options),
            eager=lambda **x: run_eager(**x, **options),
            reference=lambda **x: run_reference(**x, **options),
            inputs=inputs,
            dtype=torch.bfloat16,
        )
        leaves = [x.bfloat16().requires_grad_() for x in inputs.values()]
        gradients = torch.autograd.grad(run_op(*leaves, **options)[0].sum(), leaves)
    assert not any(x[1, :, 40:].any() for x in gradients[1:])


@counted
def test_lists_have_the_tiles_that_tuning_chose(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTTX_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setenv("FASTTX_TUNE", "1")
    monkeypatch.setattr(configs, "tuned", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tried = []

    def last(candidates, run, synchronize):
        for config in candidates:
            run(config)
            tried.append(tuple(config.blocks.values()))
        return candidates[-1], {}

    monkeypatch.setattr(tune, "fastest", last)
    keep = torch.rand(1, 1, 150, 170) > 0.5
    with on_triton("sm_80"):
        assert_op_within_budget(
            lambda **x: run_op(**x, attn_mask=keep),
            eager=lambda **x: run_eager(**x, attn_mask=keep),
            reference=lambda **x: run_reference(**x, attn_mask=keep),
            inputs=draw_inputs(1, 1, 1, 150, 170, 16, 16),
            dtype=torch.bfloat16,
            gradients=False,
        )
    assert len(set(tried)) > 1


def _trials() -> list[Trial]:
    """Of 32 sequences and two heads, by tiles of 32 rows and 16 columns; all that launch the same kernel."""
    row, column = torch.arange(63)[:, None], torch.arange(290)
    every = torch.ones(32, 2, 63, 290, dtype=torch.bool)
    # Each sequence has one row that sees its first or last column, or the one before or after; in tiles of their own.
    alone = every & (row % 32 == torch.arange(32)[:, None, None, None])
    inside = torch.stack([column == row - 20, column == row + 30]) & alone
    outside = torch.stack([column == row - 21, column == row + 31]) & alone
    holes = torch.rand(32, 2, 2, 19, generator=torch.Generator().manual_seed(0)) > 0.5
    holes = holes.repeat_interleave(32, 2).repeat_interleave(16, 3)[..., :63, :290]
    whole, some = torch.full((32,), 290), torch.tensor([290, 48, 0, 272, *range(1, 29)])
    trials = []
    for mask, bounds, lengths in (
        (inside, (-20, 30), whole), (outside, (-20, 30), whole), (holes, (-_FAR, _FAR), whole),
        (every, (-_FAR, _FAR), some), (every, (-20, 30), some),
    ):  # fmt: skip
        wanted = expected(mask, bounds, (None, lengths), (32, 16), (32, 2))
        # In memory of its own, which nothing lies behind.
        call = partial(listed, mask.clone(), bounds, (True, True), (None, lengths), (32, 16), (32, 2))
        trials.append(Trial(call, lambda lists, wanted=wanted: read(lists) == wanted))
    return trials


# What changes nothing: a barrier between a warp's reading of bytes and its own writing of them (in both reductions);
# that one thread alone writes how many tiles there are; one more step, of columns beyond the last (3).
EQUIVALENT = Counter({"dropped barrier": 2, "unguarded store": 1, "off by one (register)": 3})


@counted
@full
@pytest.mark.parametrize("target", TARGETS)
def test_mutations_of_lists_are_caught(target):
    left, outcomes = mutations.survivors(target, _trials(), [*SYNCHRONISATION, *EDGES])
    assert Counter(mutation.kind for mutation in left) == EQUIVALENT, "\n".join(map(str, left))
    assert {"global bounds", "global race", "result"} <= {outcome.check for outcome in outcomes}

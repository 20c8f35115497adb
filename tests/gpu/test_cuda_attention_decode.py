"""Attention of few queries by the CUDA C++ kernels that split its keys, on the emulator against float64."""

import math

import pytest
import torch
from attention_calls import SEED, draw_inputs, run_eager, run_op, run_reference
from budget import assert_op_within_budget, poisoned
from properties import draw, same_bits
from torch import Tensor

pytest.importorskip("triton")  # whose wheel has cuobjdump

from gpu import mutations  # noqa: E402
from gpu.launchers import BINARY, counted, full, needs_binary, on_kernels  # noqa: E402
from gpu.mutations import SYNCHRONISATION, Trial  # noqa: E402

pytestmark = needs_binary
BF16, FP16 = torch.bfloat16, torch.float16
SPLIT = 256
KEEP = torch.rand(2, 4, 2, 600, generator=torch.Generator().manual_seed(1)) > 0.3
CASES = {
    "one query": ((2, 4, 2, 1, 600, 64, 64), {}),
    "one split": ((2, 2, 2, 1, 200, 64, 64), {}),
    "one key": ((2, 2, 1, 2, 1, 8, 8), {}),
    "a whole split": ((1, 2, 1, 1, 256, 32, 32), {}),
    "causal": ((2, 4, 2, 2, 600, 32, 32), {"is_causal": True, "query_offset": 530}),
    "window": ((1, 2, 2, 3, 900, 16, 16), {"window": (300, 2), "query_offset": 600}),
    "lengths": ((4, 2, 1, 2, 600, 32, 32), {"key_lengths": torch.tensor([600, 1, 257, 256])}),
    "a mask of each query": ((2, 4, 2, 2, 600, 64, 32), {"attn_mask": KEEP}),
    "padding by a mask": ((2, 4, 4, 2, 600, 32, 32), {"attn_mask": KEEP[:, :1, :1]}),
    "additive": ((2, 4, 2, 2, 600, 32, 32), {"attn_mask": torch.randn(1, 4, 2, 600)}),
    "alibi": ((1, 4, 1, 2, 600, 32, 32), {"alibi_slopes": torch.linspace(0.01, 0.2, 4), "query_offset": 598}),
    "dropout": ((2, 4, 2, 2, 600, 32, 32), {"dropout_p": 0.3, "seed": SEED}),
    "a negative scale": ((1, 2, 2, 2, 300, 16, 16), {"scale": -0.4}),
    "everything": (
        (2, 4, 2, 2, 600, 40, 24),
        {
            "attn_mask": KEEP[:, :1], "key_lengths": torch.tensor([600, 311]), "is_causal": True, "query_offset": 300,
            "window": (290, -1), "alibi_slopes": torch.linspace(0.01, 0.2, 4), "dropout_p": 0.2, "seed": SEED,
            "scale": 0.3,
        },
    ),
}  # fmt: skip
QUICK = ("one query", "one split", "lengths", "everything")


def run(**given) -> tuple[Tensor, Tensor]:
    return run_op(**given, backend="cuda")


def split_kernels(machine) -> list[str]:
    return [launch.name for launch in machine.launches if launch.name.startswith(("attention_split", "attention_join"))]


def check(inputs: dict[str, Tensor], dtype: torch.dtype, *, gradients: bool = False, **options) -> None:
    """Outputs and lse within the budget, by the kernels that are meant; gradients by the general ones."""
    with on_kernels(BINARY) as machine:
        assert_op_within_budget(
            lambda **x: run(**x, **options),
            eager=lambda **x: run_eager(**x, **options),
            reference=lambda **x: run_reference(**x, **options),
            inputs=inputs,
            dtype=dtype,
            gradients=gradients,
        )
    assert machine is None or len(split_kernels(machine)) == (1 if inputs["key"].shape[2] <= SPLIT else 2)


@pytest.mark.parametrize("dtype", (BF16, pytest.param(FP16, marks=full)))
@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=full) for case in CASES])
def test_attention(case, dtype):
    shape, options = CASES[case]
    check(draw_inputs(*shape), dtype, **options)


@pytest.mark.parametrize("case", [case if case == "one split" else pytest.param(case, marks=full) for case in CASES])
def test_gradients(case):
    # From the statistics that these kernels leave.
    shape, options = CASES[case]
    check(draw_inputs(*shape), BF16, gradients=True, **options)


@full
@pytest.mark.parametrize("rows", (1, 2, 3, 4, 5, 8))
@pytest.mark.parametrize("width", (8, 16, 32, 40, 64, 80, 96, 104, 128))
def test_widths_and_rows(width, rows):
    # Rows are queries of two heads, or of one; a value of another width.
    heads, queries = (2, rows // 2) if rows % 2 == 0 else (1, rows)
    check(draw_inputs(2, heads, 1, queries, 300, width, max(8, width - 8)), FP16)


def test_more_rows_are_left_to_tiles():
    inputs = {name: x.bfloat16() for name, x in draw_inputs(1, 3, 1, 3, 300, 16, 16).items()}
    with on_kernels(BINARY) as machine:
        run(**inputs)
    assert machine is None or not split_kernels(machine)


@pytest.mark.parametrize("options", ({}, pytest.param({"window": (90, -1), "is_causal": True}, marks=full)))
def test_padding_and_the_batch_do_not_change_a_bit(options):
    lengths = [600, 7, 300, 256]
    whole = {name: x.bfloat16() for name, x in draw_inputs(4, 2, 1, 2, 600, 32, 32).items()}
    for b, length in enumerate(lengths):  # what is in the padding must not matter
        whole["key"][b, :, length:] = whole["value"][b, :, length:] = math.nan
    mask = (torch.arange(600) < torch.tensor(lengths)[:, None])[:, None, None]
    with on_kernels(BINARY), poisoned():
        padded = run(**whole, key_lengths=torch.tensor(lengths), **options)
        by_mask = run(**whole, attn_mask=mask, **options)
        for b, length in enumerate(lengths):
            alone = {"query": whole["query"][b : b + 1]} | {
                name: whole[name][b : b + 1, :, :length] for name in ("key", "value")
            }
            for of_lengths, of_mask, part in zip(padded, by_mask, run(**alone, **options), strict=True):
                assert same_bits(of_lengths[b : b + 1], part)
                assert same_bits(of_mask[b : b + 1], part)


def test_a_row_does_not_depend_on_what_is_beside_it():
    # Alone, with another query, and with another head of its group: kernels of other numbers of rows.
    inputs = {name: x.half() for name, x in draw_inputs(1, 2, 1, 4, 600, 32, 32).items()}
    with on_kernels(BINARY):
        whole = run(**inputs)
        for heads, first, last in ((2, 1, 3), (1, 0, 1), (1, 1, 4)):
            part = inputs | {"query": inputs["query"][:, :heads, first:last]}
            for x, y in zip(whole, run(**part), strict=True):
                assert same_bits(x[:, :heads, first:last], y)


NOTHING_SEEN = {
    "lengths": {"key_lengths": torch.tensor([600, 0])},
    "mask": {"attn_mask": (torch.arange(2) < 1)[:, None, None, None].expand(2, 1, 1, 600)},
    "mask of -inf": {"attn_mask": torch.zeros(2, 1, 1, 1).index_fill(0, torch.tensor([1]), -math.inf)},
    "places": {"is_causal": True, "query_offset": -700},
}


@pytest.mark.parametrize("case", NOTHING_SEEN)
def test_rows_that_see_nothing_give_zeros(case):
    inputs = {name: x.bfloat16() for name, x in draw_inputs(2, 2, 1, 2, 600, 32, 32).items()}
    with on_kernels(BINARY), poisoned():
        output, lse = run(**inputs, **NOTHING_SEEN[case])
    dead = slice(None) if case == "places" else slice(1, None)
    assert not output[dead].any() and (lse[dead] == -math.inf).all()
    assert case == "places" or (output[0].any() and lse[0].isfinite().all())


def test_no_keys():
    inputs = {name: x.bfloat16() for name, x in draw_inputs(2, 2, 1, 1, 0, 32, 16).items()}
    with on_kernels(BINARY), poisoned():
        output, lse = run(**inputs)
    assert not output.any() and (lse == -math.inf).all()


def test_what_no_row_may_see_can_be_anything():
    inputs = {name: x.bfloat16() for name, x in draw_inputs(2, 2, 1, 2, 600, 32, 32).items()}
    keep = torch.rand(2, 1, 2, 600) > 0.5
    with on_kernels(BINARY):
        for mask in (keep, keep[:, :, :1]):
            expected = run(**inputs, attn_mask=mask)
            unseen = ~mask.any(2, keepdim=True).mT
            dirty = inputs | {name: inputs[name].masked_fill(unseen, math.nan) for name in ("key", "value")}
            assert all(same_bits(x, y) for x, y in zip(run(**dirty, attn_mask=mask), expected, strict=True))


def test_masks_and_tensors_of_any_stride():
    inputs = {name: x.bfloat16() for name, x in draw_inputs(2, 2, 1, 2, 300, 16, 16).items()}
    moved = {n: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for n, x in inputs.items()}
    cache = {n: torch.cat([x, x], 2)[:, :, :300] if n != "query" else x for n, x in inputs.items()}
    mask = (torch.rand(300, 2, 2, 4) > 0.3).permute(3, 2, 1, 0)[::2]
    with on_kernels(BINARY):
        expected = run(**inputs, attn_mask=mask.contiguous())
        for given, of in ((inputs, mask), (moved, mask.contiguous()), (cache, mask.contiguous())):
            assert all(same_bits(x, y) for x, y in zip(run(**given, attn_mask=of), expected, strict=True))


@counted
@pytest.mark.parametrize(
    ("options", "seen", "blocks"),
    (
        ({}, 600, 3),
        ({"key_lengths": torch.tensor([520])}, 520, 3),
        ({"window": (99, -1), "is_causal": True, "query_offset": 561}, 100, 2),
    ),
)
def test_keys_and_values_are_read_once_16_bytes_at_a_time(options, seen, blocks):
    # Of four heads that share them.
    inputs = {name: x.bfloat16() for name, x in draw_inputs(1, 4, 1, 1, 600, 64, 128).items()}
    with on_kernels(BINARY) as machine:
        run(**inputs, **options)
    split, join = (launch.counts for launch in machine.launches)
    queries = blocks * 4 * 128 // 2  # each thread reads its chunk of them; half of the lanes have one
    assert split.loads[16] == seen * (64 + 128) // 8 + queries
    assert set(split.loads) == ({16, 8} if "key_lengths" in options else {16})
    # Parts are written once, and read once: those of splits in which something is seen.
    assert split.stores[16] == join.loads[16] == blocks * 4 * 128 // 4


def _trial(inputs: dict[str, Tensor]) -> Trial:
    expected = run_reference(**{name: x.double() for name, x in inputs.items()})[0]

    def call() -> Tensor:
        with poisoned():
            return run(**inputs)[0]

    return Trial(call, lambda y: bool(((y.double() - expected).abs() <= 2**-9).all()))


@counted
@pytest.mark.parametrize(("kernel", "barriers"), (("attention_split", 4), ("attention_join", 2)))
def test_missing_synchronisation_is_caught(kernel, barriers):
    inputs = {name: x.half() for name, x in draw_inputs(1, 2, 1, 2, 400, 32, 32).items()}
    left, outcomes = mutations.survivors(BINARY, [_trial(inputs)], SYNCHRONISATION, kernel=kernel)
    assert not left, "\n".join(map(str, left))
    assert len(outcomes) == barriers and {outcome.check for outcome in outcomes} <= {
        "shared race", "warp race", "uninitialised shared memory",
    }  # fmt: skip


def test_draws_are_those_of_every_backend():
    inputs = {"query": torch.zeros(1, 1, 2, 8), "key": torch.zeros(1, 1, 300, 8), "value": draw(1, 1, 300, 16)}
    check(inputs, FP16, dropout_p=0.4, seed=SEED)

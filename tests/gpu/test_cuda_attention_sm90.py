"""Hopper's forward of attention, by TMA and wgmma, on the emulator against float64 by the error budget."""

import math
from collections import Counter

import pytest
import torch
from attention_calls import SEED, draw_inputs, run_eager, run_op, run_reference
from budget import assert_op_within_budget, poisoned
from properties import same_bits
from torch import Tensor

pytest.importorskip("triton")  # whose wheel has cuobjdump

from fasttx.dispatch import cuda_architectures  # noqa: E402
from gpu import mutations  # noqa: E402
from gpu.launchers import BINARY, BINARY_SM90, ON_GPU, full, on_kernels  # noqa: E402
from gpu.mutations import SYNCHRONISATION, Trial  # noqa: E402
from gpu.test_cuda_attention import check_packed  # noqa: E402
from gpu.test_shipped_mutations import trial  # noqa: E402

pytestmark = [
    pytest.mark.skipif("sm_90" not in cuda_architectures.split(), reason="the binary is not for sm_90"),
    pytest.mark.skipif(ON_GPU, reason="test_cuda_attention.py runs whatever the device takes"),
]
BF16, FP16 = torch.bfloat16, torch.float16
KERNEL = "attention_fwd_sm90"

# By name: batch, heads, kv heads, queries, keys, width, value width; and options. Tiles are of 128 queries and 128
# keys, of which there is room for two.
CASES = {
    "one tile": ((1, 1, 1, 128, 128, 64, 64), {}),
    "part of a tile": ((1, 2, 2, 25, 7, 64, 64), {}),
    "several tiles": ((1, 2, 2, 150, 700, 64, 64), {}),
    "several tiles of 128": ((1, 1, 1, 150, 530, 128, 128), {}),
    "groups of heads": ((2, 4, 2, 70, 200, 64, 64), {}),
    "causal": ((1, 2, 1, 300, 300, 64, 64), {"is_causal": True}),
    "causal, of 128": ((2, 2, 1, 260, 300, 128, 128), {"is_causal": True, "query_offset": 40}),
    "window": ((1, 2, 2, 300, 600, 64, 64), {"window": (150, 20), "query_offset": 250}),
    "lengths": ((3, 2, 1, 60, 400, 64, 64), {"key_lengths": torch.tensor([400, 1, 200])}),
    "lengths, of 128": ((2, 1, 1, 60, 300, 128, 128), {"key_lengths": torch.tensor([257, 128]), "is_causal": True}),
    "other widths": ((1, 2, 2, 140, 150, 40, 72), {}),
    "wide values": ((1, 1, 1, 70, 150, 8, 120), {"scale": 0.3}),
    "few queries": ((2, 4, 2, 20, 290, 128, 128), {}),
}
QUICK = ("several tiles", "causal, of 128", "lengths", "other widths")


def run(**given) -> tuple[Tensor, Tensor]:
    return run_op(**given, backend="cuda")


@pytest.mark.parametrize("dtype", (BF16, pytest.param(FP16, marks=full)))
@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=full) for c in CASES])
def test_attention(case, dtype):
    shape, options = CASES[case]
    with on_kernels(BINARY_SM90) as machine:
        assert_op_within_budget(
            lambda **x: run(**x, **options),
            eager=lambda **x: run_eager(**x, **options),
            reference=lambda **x: run_reference(**x, **options),
            inputs=draw_inputs(*shape),
            dtype=dtype,
            gradients=case in ("causal", "lengths"),
        )
    assert machine.launches[0].name.startswith(KERNEL)


def test_packed_sequences():
    launches = check_packed(BINARY_SM90, 64, FP16, gradients=False, is_causal=True)
    assert launches[0].name.startswith(KERNEL)


@pytest.mark.parametrize("options", ({"is_causal": True, "window": (90, -1)}, pytest.param({}, marks=full)))
def test_padding_the_batch_and_the_place_do_not_change_a_bit(options):
    lengths = [330, 7, 200, 0]
    inputs = {name: x.bfloat16() for name, x in draw_inputs(4, 2, 1, 330, 330, 64, 64).items()}
    for b, length in enumerate(lengths):  # what is in the padding must not matter
        inputs["key"][b, :, length:] = inputs["value"][b, :, length:] = math.nan
    with on_kernels(BINARY_SM90), poisoned():
        whole = run(**inputs, key_lengths=torch.tensor(lengths), **options)
        for b, length in enumerate(lengths[:3]):
            alone = {name: x[b : b + 1, :, : length if name != "query" else None] for name, x in inputs.items()}
            for x, y in zip(whole, run(**alone, **options), strict=True):
                assert same_bits(x[b : b + 1], y)
        part = {name: x[:1, :, 47 if name == "query" else 0 :] for name, x in inputs.items()}
        for x, y in zip(whole, run(**part, **options, query_offset=47), strict=True):
            assert same_bits(x[:1, :, 47:], y)
    assert not whole[0][3].any() and (whole[1][3] == -math.inf).all()


def launched(target: str = BINARY_SM90, shape: tuple = (2, 2, 2, 20, 7, 64, 64), **options) -> str:
    inputs = {name: x.half() for name, x in draw_inputs(*shape).items()}
    if options.pop("expanded", False):
        inputs["key"] = inputs["key"][:1].expand(2, -1, -1, -1)
    with on_kernels(target) as machine:
        run(**inputs, **options)
    return machine.launches[0].name


def test_which_calls_it_takes():
    assert launched() == "attention_fwd_sm90_64_fp16"
    assert launched(shape=(1, 1, 1, 20, 7, 64, 72)) == "attention_fwd_sm90_128_fp16"
    assert launched(shape=(1, 1, 1, 1, 7, 64, 64)).startswith("attention_split_64")
    assert launched(BINARY) == "attention_fwd_plain_64_fp16"
    assert launched(shape=(1, 1, 1, 20, 7, 32, 32)) == "attention_fwd_plain_32_fp16"
    assert launched(shape=(1, 1, 1, 20, 0, 64, 64)) == "attention_fwd_plain_64_fp16"
    assert launched(expanded=True) == "attention_fwd_plain_64_fp16"
    assert launched(dropout_p=0.1, seed=SEED) == "attention_fwd_laden_64_fp16"


def test_what_it_executes():
    """Products of whole warpgroups alone, and each row of a tile copied once; what is out of sight is left out."""
    inputs = {name: x.half() for name, x in draw_inputs(1, 1, 1, 512, 512, 64, 64).items()}
    with on_kernels(BINARY_SM90, checks=False) as machine:
        run(**inputs)
        run(**inputs, is_causal=True)
    whole, half = (x.counts for x in machine.launches)
    assert sum(whole.matrix_flops.values()) == 4 * 512 * 512 * 64
    assert sum(half.matrix_flops.values()) == 4 * 512 * 512 * 64 * 10 / 16
    assert whole.loads[16] == (512 + 4 * 2 * 512) * 64 * 2 / 16
    assert not any(name.startswith("mma") for name in whole.instructions)


def attend(queries: int, keys: int, lengths: tuple[int, ...] = ()) -> Trial:
    """Two heads over one of keys, queries in the middle of them; what is beyond the lengths are no numbers."""
    inputs = {n: x.half() for n, x in draw_inputs(len(lengths) or 1, 2, 1, queries, keys, 64, 64).items()}
    options = {"is_causal": True, "query_offset": keys - queries // 2}
    if lengths:
        options["key_lengths"] = torch.tensor(lengths)
    truth = run_reference(**{n: x.double() for n, x in inputs.items()}, **options)
    for b, length in enumerate(lengths):
        inputs["value"][b, :, length:] = math.nan
    return trial(lambda: run(**inputs, **options), truth, 2**-9)


# By kind, mutations that change nothing: how many, and why.
EQUIVALENT = {
    "dropped warp barrier": (1, "before a warp's rows are laid out: a barrier of the warpgroup has come before"),
    "dropped wgmma fence": (1, "in the loop, of sums: that of the scores follows whatever touched their registers too"),
}


@pytest.mark.parametrize("count", [1, pytest.param(None, marks=full)])
def test_missing_synchronisation_is_caught(count):
    kinds = ["dropped phase", "dropped bytes", "late phase"] if count else SYNCHRONISATION
    trials = [attend(140, 529, (520, 390)), attend(140, 520)]
    left, outcomes = mutations.survivors(BINARY_SM90, trials, kinds, count)
    found = Counter(mutation.kind for mutation in left)
    beyond = [str(m) for m in left if count or found[m.kind] != EQUIVALENT.get(m.kind, (0, ""))[0]]
    assert not beyond, "\n".join(beyond)
    caught = {outcome.check for outcome in outcomes}
    assert {"asynchronous copy", "hang"} <= caught and "malformed" not in caught

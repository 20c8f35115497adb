"""Attention's CUDA C++ kernels on the emulator, forward and backward, against float64 by the error budget."""

import math

import pytest
import torch
from attention_calls import SEED, draw_inputs, run_eager, run_op, run_reference
from budget import assert_op_within_budget, poisoned
from properties import assert_same_bits, draw, results, same_bits
from torch import Tensor

pytest.importorskip("triton")  # whose wheel has cuobjdump

from fasttx import philox  # noqa: E402
from fasttx.ops import attention as ops  # noqa: E402
from gpu import binary  # noqa: E402
from gpu.launchers import BINARY, counted, full, on_kernels  # noqa: E402
from gpu.test_attention import CASES, INVARIANT, SKIPPED, _sees_nothing, packed_reference  # noqa: E402

pytestmark = pytest.mark.skipif(binary.missing is not None, reason=str(binary.missing))
BF16, FP16 = torch.bfloat16, torch.float16
WIDTHS = (8, 16, 32, 40, 64, 80, 96, 104, 128)
# Of the Triton kernels' cases those whose widths there are kernels for; the others' closest.
FITTING = {
    name: (shape[:5] + tuple(min(128, -(-width // 8) * 8) for width in shape[5:]), options)
    for name, (shape, options) in CASES.items()
}
QUICK = ("several tiles", "causal", "window", "dropout", "a mask of each query", "everything")


def run(**given) -> tuple[Tensor, Tensor]:
    return run_op(**given, backend="cuda")


def check(inputs: dict[str, Tensor], dtype: torch.dtype = BF16, **options) -> None:
    """Outputs, lse and gradients of every floating input within the budget."""
    with on_kernels(BINARY):
        assert_op_within_budget(
            lambda **x: run(**x, **options),
            eager=lambda **x: run_eager(**x, **options),
            reference=lambda **x: run_reference(**x, **options),
            inputs=inputs,
            dtype=dtype,
        )


@pytest.mark.parametrize("dtype", (BF16, pytest.param(FP16, marks=full)))
@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=full) for c in FITTING])
def test_attention(case, dtype):
    shape, options = FITTING[case]
    check(draw_inputs(*shape), dtype, **options)


@pytest.mark.parametrize("laden", (False, True))
@pytest.mark.parametrize("width", [x if x == 128 else pytest.param(x, marks=full) for x in WIDTHS])
def test_widths(width, laden):
    # More than one tile of either, and a value of another width.
    options = {"dropout_p": 0.1, "seed": SEED} if laden else {}
    check(draw_inputs(1, 2, 1, 140, 70, width, max(8, width - 8)), FP16, is_causal=True, **options)


# One number alone, rounded to bfloat16, would be held to one draw's luck of eager PyTorch.
OF_A_MASK = [
    (shape, dtype)
    for shape in ((1, 4, 90, 70), (2, 1, 1, 70), (1, 1, 90, 1), (2, 4, 90, 70), (1, 1, 1, 1))
    for dtype in (torch.float32, BF16)
    if shape != (1, 1, 1, 1) or dtype is torch.float32
]


@pytest.mark.parametrize(
    ("shape", "mask_dtype"), [OF_A_MASK[0], *(pytest.param(*x, marks=full) for x in OF_A_MASK[1:])]
)
def test_the_gradient_of_a_mask(shape, mask_dtype):
    options = {
        "is_causal": True, "query_offset": 5, "dropout_p": 0.2, "seed": SEED, "key_lengths": torch.tensor([70, 51])
    }  # fmt: skip

    def op(query, key, value, attn_mask):
        return ops.attention(
            query, key, value, attn_mask.to(mask_dtype), options["key_lengths"], None, None, None, True, 5, -1, -1, 0.2,
            SEED, query.shape[-1] ** -0.5, backend="cuda",
        )  # fmt: skip

    with on_kernels(BINARY):
        assert_op_within_budget(
            op,
            eager=lambda **x: run_eager(**x, **options),
            reference=lambda **x: run_reference(**x, **options),
            inputs=draw_inputs(2, 4, 2, 90, 70, 64, 32) | {"attn_mask": draw(*shape)},
            dtype=BF16,
        )


def run_packed(offsets: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, **options):
    return ops.attention(
        query, key, value, None, None, *offsets, None, options.get("is_causal", False), 0,
        *options.get("window", (-1, -1)), options.get("dropout_p", 0.0), options.get("seed"), query.shape[-1] ** -0.5,
        backend="cuda",
    )  # fmt: skip


def check_packed(target: str, width: int, dtype: torch.dtype, gradients: bool = True, **options) -> list:
    """Sequences of 150, no, one and 131 queries within the budget; gives the launches."""
    starts = torch.tensor([0, 150, 150, 151, 282]), torch.tensor([0, 160, 163, 164, 304])
    inputs = {"query": draw(282, 4, width) / 2, "key": draw(304, 2, width), "value": draw(304, 2, width)}

    def eager(**x):
        # PyTorch has no row for a sequence without queries.
        there = [n for n in range(4) if starts[0][n] < starts[0][n + 1]]
        spans = [[(s[n], s[n + 1]) for n in there] for s in starts]
        of_sequences = [[slice(*q), slice(*k), slice(*k)] for q, k in zip(*spans, strict=True)]
        parts = [
            run_eager(*(x[n][s].transpose(0, 1)[None] for n, s in zip(x, spans, strict=True)), **options)
            for spans in of_sequences
        ]
        return torch.cat([o[0].transpose(0, 1) for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)

    with on_kernels(target) as machine:
        assert_op_within_budget(
            lambda **x: run_packed(starts, **x, **options),
            eager=eager,
            reference=lambda **x: packed_reference(starts, **x, **options),
            inputs=inputs,
            dtype=dtype,
            gradients=gradients,
        )
    return [] if machine is None else machine.launches


@pytest.mark.parametrize("options", ({"is_causal": True}, pytest.param({"window": (9, 2)}, marks=full)))
def test_packed_sequences(options):
    check_packed(BINARY, 16, BF16, **options)


def test_packed_dropout_is_that_of_the_padded_batch():
    lengths, options = ((70, 90), (40, 5)), {"dropout_p": 0.4, "seed": SEED}
    starts = torch.tensor([0, 70, 110]), torch.tensor([0, 90, 95])
    inputs = {name: x.half() for name, x in draw_inputs(2, 4, 2, 70, 90, 16, 8).items()}
    packed = {
        name: torch.cat([x[n, :, : lengths[n][name != "query"]].transpose(0, 1) for n in range(2)])
        for name, x in inputs.items()
    }
    with on_kernels(BINARY):
        output, _ = run_packed(starts, **packed, **options)
        padded, _ = run(**inputs, **options, key_lengths=torch.tensor([90, 5]))
    for n, (queries, _) in enumerate(lengths):
        assert same_bits(output[starts[0][n] : starts[0][n + 1]].transpose(0, 1), padded[n, :, :queries])


def test_dropout_regenerates_its_mask():
    # With an identity for values, a row's output is the probabilities that were kept, and dV those by its slope.
    queries, keys = 70, 128
    query, key = torch.zeros(2, 1, queries, 16).half(), torch.zeros(2, 1, keys, 16).half()
    value = torch.eye(keys).half().expand(2, 1, keys, keys).requires_grad_()
    keep = philox.keep_mask(SEED, torch.arange(2), torch.zeros(1).long(), queries, keys, 0.25)
    with on_kernels(BINARY):
        output, _ = run(query=query, key=key, value=value, dropout_p=0.25, seed=SEED)
        assert torch.equal(output != 0, keep)
        (slope,) = torch.autograd.grad(output, value, torch.eye(keys)[:queries].half().expand_as(output))
    assert torch.equal(slope[..., :queries] != 0, keep.mT)


def differentiate(inputs: dict[str, Tensor], slope: Tensor, **options) -> list[Tensor]:
    """Output, lse, and the gradients of query, key and value."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    output, lse = run(**leaves, **options)
    return [output, lse, *torch.autograd.grad(output, list(leaves.values()), slope)]


@pytest.mark.parametrize("options", INVARIANT)
def test_padding_and_the_batch_do_not_change_a_bit(options):
    lengths = [330, 7, 200, 1]
    whole = {name: x.bfloat16() for name, x in draw_inputs(4, 2, 1, 330, 330, 16, 24).items()}
    slope = draw(4, 2, 330, 24).bfloat16()
    for b, length in enumerate(lengths):  # what is in the padding must not matter
        whole["key"][b, :, length:] = whole["value"][b, :, length:] = math.nan
        slope[b, :, length:] = 0
    with on_kernels(BINARY, checks=False), poisoned():
        padded = differentiate(whole, slope, key_lengths=torch.tensor(lengths), **options)
        mask = (torch.arange(330) < torch.tensor(lengths)[:, None])[:, None, None]
        by_mask = differentiate(whole, slope, attn_mask=mask, **options)
        assert all(not x[b, :, n:].any() for x in padded[3:] for b, n in enumerate(lengths))
        for b, length in enumerate(lengths):
            alone = {name: x[b : b + 1, :, :length] for name, x in whole.items()}
            found = differentiate(alone, slope[b : b + 1, :, :length], **options)
            for of_lengths, of_mask, part in zip(padded, by_mask, found, strict=True):
                assert same_bits(of_lengths[b : b + 1, :, : part.shape[2]], part)
                assert same_bits(of_mask[b : b + 1, :, : part.shape[2]], part)


@pytest.mark.parametrize("options", INVARIANT)
def test_a_row_does_not_depend_on_its_place(options):
    inputs = {name: x.bfloat16() for name, x in draw_inputs(1, 2, 2, 200, 300, 16, 16).items()}
    with on_kernels(BINARY, checks=False):
        whole = run(**inputs, **options)
        for first, last in ((1, 60), (47, 130), (130, 200)):
            part = inputs | {"query": inputs["query"][:, :, first:last]}
            for x, y in zip(whole, run(**part, **options, query_offset=first), strict=True):
                assert same_bits(x[:, :, first:last], y)


@pytest.mark.parametrize(("options", "dead"), _sees_nothing())
@pytest.mark.parametrize("width", (16, 64))
def test_rows_that_see_nothing_give_zeros(options, dead, width):
    inputs = {n: x.bfloat16() for n, x in draw_inputs(2, 2, 2, 60, 150, width, width).items()}
    with on_kernels(BINARY), poisoned():
        found = results(lambda **x: run(**x, **options), inputs)
    rows = dead[:, None].expand(2, 2, 60)
    assert torch.equal(found["output 1"] == -math.inf, rows)
    for result in ("output 0", "d query"):
        assert not found[result][rows].any() and found[result][~rows].any(-1).all()
    assert all(found[f"d {n}"].isfinite().all() for n in inputs)


def test_what_no_row_may_see_can_be_anything():
    inputs = {name: x.bfloat16() for name, x in draw_inputs(2, 2, 2, 60, 200, 16, 16).items()}
    each_query = (torch.rand(2, 1, 60, 200) > 0.3) & (torch.arange(200) < 130)
    with on_kernels(BINARY):
        for options in ({"attn_mask": each_query[:, :, :1]}, {"attn_mask": each_query}):
            expected = results(lambda options=options, **x: run(**x, **options), inputs)
            for garbage in (math.nan, math.inf):
                dirty = {n: x.clone() for n, x in inputs.items()}
                for name in ("key", "value"):
                    unseen = ~options["attn_mask"].any(2, keepdim=True).mT
                    dirty[name].masked_fill_(unseen, garbage)
                assert_same_bits(results(lambda options=options, **x: run(**x, **options), dirty), expected)


@pytest.mark.parametrize("lowest", (torch.finfo(torch.float32).min, torch.finfo(BF16).min))
def test_rows_of_the_lowest_finite_mask(lowest):
    mask = torch.full((20, 40), lowest)
    mask[:4, :20] = 0
    with on_kernels(BINARY):
        assert_op_within_budget(
            lambda **x: run(**x, attn_mask=mask)[0],
            eager=lambda **x: run_eager(**x, attn_mask=mask)[0],
            reference=lambda **x: run_reference(**x, attn_mask=mask.double())[0],
            inputs=draw_inputs(1, 2, 2, 20, 40, 16, 16),
            dtype=BF16,
            gradients=False,
        )


@pytest.mark.parametrize("kind", ("bool", pytest.param("float", marks=full)))
def test_masks_of_any_stride(kind):
    inputs = {name: x.bfloat16() for name, x in draw_inputs(2, 3, 3, 50, 37, 8, 8).items()}
    values = torch.rand(37, 50, 3, 4) - 0.3
    values = values > 0 if kind == "bool" else values
    with on_kernels(BINARY):
        for mask in (
            values.permute(3, 2, 1, 0)[::2],  # the keys far apart
            values[0, :, 0].repeat(2, 37)[:37, :100:2].t().expand(2, 3, 50, 37),
            values[:, 0, :1, :1].expand(37, 1, 1)[:, 0].t()[:, None, None].expand(1, 1, 1, 37),  # strided padding
            values[0, :, :1, :1].expand(50, 1, 37)[:, 0],  # one value for a whole row
        ):
            dense = mask.expand(2, 3, 50, 37).contiguous()
            found = [
                results(lambda query, key, value, m=m: run(query=query, key=key, value=value, attn_mask=m), inputs)
                for m in (mask, dense)
            ]
            for name, x in found[0].items():
                torch.testing.assert_close(x, found[1][name])


def test_tokens_before_heads_give_gradients_in_the_same_order():
    projected = torch.randn(2, 30, 3, 4, 8).half()  # as one projection gives them: query, key, value
    inputs = [x.transpose(1, 2).requires_grad_() for x in projected.unbind(2)]
    with on_kernels(BINARY):
        output, lse = run(**dict(zip(("query", "key", "value"), inputs, strict=True)))
        gradients = torch.autograd.grad(output.sum() + lse.sum(), inputs)
    assert output.transpose(1, 2).is_contiguous()
    assert all(x.transpose(1, 2).is_contiguous() for x in gradients)


def test_tensors_that_do_not_begin_where_16_bytes_do():
    inputs = {name: x.bfloat16() for name, x in draw_inputs(1, 2, 2, 20, 30, 16, 16).items()}
    moved = {n: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for n, x in inputs.items()}
    wide = {n: torch.cat([x, x[..., :1]], -1)[..., :16] for n, x in inputs.items()}
    with on_kernels(BINARY):
        expected = results(run, inputs)
        assert_same_bits(results(run, moved), expected)
        assert_same_bits(results(run, wide), expected)


@pytest.mark.parametrize(
    "shape", ((0, 2, 2, 5, 7, 8, 8), (2, 2, 2, 0, 7, 8, 8), (2, 2, 1, 50, 0, 8, 16), (2, 0, 0, 5, 7, 8, 8))
)
def test_empty_sizes(shape):
    inputs = {name: x.bfloat16() for name, x in draw_inputs(*shape).items()}
    truth = results(run_reference, inputs)
    with on_kernels(BINARY), poisoned():
        found = results(run, inputs)
    for name, x in found.items():
        torch.testing.assert_close(x, truth[name])


def products(inputs: dict[str, Tensor], **options) -> dict[str, float]:
    """FLOPs of the matrix products that each kernel of a forward and backward does."""
    with on_kernels(BINARY, checks=False) as machine:
        leaves = {n: x.bfloat16().requires_grad_() for n, x in inputs.items()}
        output, _ = run(**leaves, **options)
        output.sum().backward()
    return {x.name: sum(x.counts.matrix_flops.values()) for x in machine.launches if x.name.startswith("attention")}


# Keys of one tile number 64, where Triton's number what its table says.
@counted
@pytest.mark.parametrize("case", [c if c == "a mask with holes" else pytest.param(c, marks=full) for c in SKIPPED])
def test_tiles_that_no_row_sees_are_skipped(case):
    options, share = SKIPPED[case]
    inputs = draw_inputs(1, 1, 1, 512, 512, 64, 64)
    mask = options.get("attn_mask")
    everything = None if mask is None else torch.full((512, 512), mask.dtype == torch.bool, dtype=mask.dtype)
    whole = products(inputs, attn_mask=everything)
    found = products(inputs, **options)
    assert all(found[name] <= share * flops for name, flops in whole.items()), (found, whole)


EXECUTED = {
    "plain": {},
    "a mask": {"attn_mask": torch.rand(1, 1, 512, 512) > 0.3},
    "a bias": {"attn_mask": torch.randn(1, 1, 512, 512)},
    "dropout": {"dropout_p": 0.1, "seed": SEED},
}


@counted
@pytest.mark.parametrize("case", [c if c == "plain" else pytest.param(c, marks=full) for c in EXECUTED])
def test_instructions_and_shared_memory(case):
    """A product takes at most 1.3 times the instructions of Triton's kernel; of plain calls half its traffic."""
    inputs = {name: x.bfloat16() for name, x in draw_inputs(1, 1, 1, 512, 512, 64, 64).items()}
    found = {}
    for target, backend in ((BINARY, "cuda"), ("sm_80", "triton")):
        with on_kernels(target, checks=False) as machine, torch.no_grad():
            run_op(**inputs, **EXECUTED[case], backend=backend)
        counts = max((launch.counts for launch in machine.launches), key=lambda x: sum(x.matrix_flops.values()))
        multiplied = sum(n for name, n in counts.instructions.items() if name.startswith("mma"))
        found[backend] = sum(counts.instructions.values()) / multiplied, counts.shared_bytes / multiplied
    assert found["cuda"][0] <= 1.3 * found["triton"][0], found
    assert case != "plain" or found["cuda"][1] <= 0.6 * found["triton"][1], found


def _inputs(dtype: torch.dtype = BF16, width: int = 16, value_width: int = 16) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in draw_inputs(1, 2, 2, 5, 7, width, value_width).items()}


REFUSED = {
    "float32": (_inputs(torch.float32), {}, "are for bfloat16 and float16"),
    "a wide head": (_inputs(width=136), {}, "up to 128 wide"),
    "an odd width": (_inputs(value_width=12), {}, "a multiple of 8"),
    "a mask of another dtype": (_inputs(), {"attn_mask": torch.ones(5, 7).half()}, "attn_mask must be bool"),
    "lengths of another dtype": (_inputs(), {"key_lengths": torch.ones(1).int()}, "key_lengths must be int64"),
    "lengths of another shape": (_inputs(), {"key_lengths": torch.ones(2).long()}, "key_lengths must be int64"),
    "slopes of another shape": (_inputs(), {"alibi_slopes": torch.ones(3)}, "alibi_slopes must be float32"),
    "dropout without a seed": (_inputs(), {"dropout_p": 0.5}, "needs a seed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused(case):
    inputs, options, reason = REFUSED[case]
    with on_kernels(BINARY) as machine, pytest.raises(RuntimeError, match=reason):
        run(**inputs, **options)
    assert machine is None or not machine.launches


@counted
def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(RuntimeError, match="tensors on a CUDA device, got one on the CPU"):
        run(**_inputs())

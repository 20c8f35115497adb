"""Attention in Triton on the emulator, forward and backward, against float64 by the error budget."""

import math
from itertools import accumulate

import pytest
import torch
from attention_calls import SEED, draw_inputs, run_eager, run_op, run_reference
from budget import assert_op_within_budget, poisoned
from fasttx.kernels import register
from properties import assert_same_bits, draw, results, same_bits
from test_raw_ops import RAW, f32
from torch import Tensor

from fasttx import philox, reference
from fasttx.ops import attention as ops
from gpu.launchers import TARGETS, by_dtype, counted, full, on_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_target = pytest.mark.parametrize("target", [TARGETS[-1], *(pytest.param(x, marks=full) for x in TARGETS[:-1])])
KEEP = torch.rand(2, 3, 150, 170, generator=torch.Generator().manual_seed(0), device="cpu") > 0.4
KEEP = KEEP.to(torch.get_default_device())
KEEP[..., 0] = True

# By name: batch, heads, kv heads, queries, keys, width, value width; and options.
CASES = {
    "several tiles": ((1, 2, 2, 150, 170, 64, 64), {}),
    "odd widths": ((2, 2, 1, 50, 131, 33, 7), {}),
    "width 16": ((1, 3, 3, 37, 53, 16, 16), {}),
    "width 80": ((1, 1, 1, 70, 90, 80, 80), {}),
    "width 128": ((1, 1, 1, 140, 90, 128, 128), {}),
    "width 256": ((1, 1, 1, 40, 70, 256, 200), {}),
    "one key": ((2, 1, 1, 50, 1, 8, 8), {}),
    "a negative scale": ((2, 2, 2, 20, 30, 16, 16), {"scale": -0.4, "is_causal": True}),
    "scale 0": ((2, 1, 1, 20, 30, 16, 16), {"scale": 0.0, "is_causal": True}),
    "causal": ((1, 2, 1, 150, 150, 32, 32), {"is_causal": True}),
    "causal with an offset": ((2, 2, 2, 40, 205, 24, 24), {"is_causal": True, "query_offset": 165}),
    "window": ((1, 2, 2, 140, 160, 8, 8), {"window": (20, 3), "query_offset": 10}),
    "window to the left": ((1, 2, 2, 200, 200, 8, 8), {"window": (70, -1), "is_causal": True}),
    "lengths": ((3, 2, 2, 20, 190, 16, 16), {"key_lengths": torch.tensor([190, 1, 145])}),
    "alibi": ((2, 2, 2, 60, 140, 8, 8), {"alibi_slopes": torch.tensor([0.5, 0.0625]), "query_offset": 80}),
    "dropout": ((2, 2, 1, 60, 140, 16, 16), {"dropout_p": 0.3, "seed": SEED}),
    "padding by a mask": ((2, 2, 2, 40, 170, 16, 16), {"attn_mask": KEEP[:, :1, :1]}),
    "a mask of each query": ((2, 3, 3, 150, 170, 16, 16), {"attn_mask": KEEP}),
    "a mask of all heads": ((2, 3, 1, 150, 170, 16, 16), {"attn_mask": KEEP[:1, :1]}),
    "everything": (
        (2, 6, 2, 90, 170, 20, 12),
        {
            "attn_mask": KEEP[:, :1, :90], "key_lengths": torch.tensor([170, 133]), "is_causal": True,
            "query_offset": 60, "window": (150, -1), "alibi_slopes": torch.linspace(0.01, 0.2, 6), "dropout_p": 0.2,
            "seed": SEED, "scale": 0.3,
        },
    ),
    "one query": ((2, 4, 2, 1, 290, 64, 64), {}),
    "decoding": ((2, 4, 2, 2, 630, 33, 70), {"is_causal": True, "query_offset": 601}),
    "decoding, laden": (
        (2, 4, 1, 3, 530, 16, 24),
        {
            "key_lengths": torch.tensor([300, 9]), "dropout_p": 0.2, "seed": SEED, "window": (300, -1),
            "alibi_slopes": torch.rand(4), "query_offset": 280,
        },
    ),
    "decoding, masked": ((2, 3, 3, 2, 170, 24, 16), {"attn_mask": KEEP[:, :, :2]}),
}  # fmt: skip


# What runs by default, each in one of the ways.
QUICK = ("several tiles", "odd widths", "causal", "window", "lengths", "dropout", "everything", "decoding, laden")


def each_way(cases, quick) -> list:
    """All cases on every target in every dtype; of those in `quick` one way runs by default, all else with `full`."""
    ways = [(target, dtype) for target in TARGETS for dtype in DTYPES]
    return [
        pytest.param(
            case, *way, id=f"{case}-{way[0]}-{str(way[1])[6:]}",
            marks=() if case in quick and at == quick.index(case) % len(ways) else full,
        )
        for case in cases
        for at, way in enumerate(ways)
    ]  # fmt: skip


def check(target: str, dtype: torch.dtype, inputs: dict[str, Tensor], **options) -> None:
    """Outputs, lse and gradients of every floating input within the budget; `inputs` may hold a floating attn_mask."""
    with on_triton(target):
        assert_op_within_budget(
            lambda **x: run_op(**x, **options),
            eager=lambda **x: run_eager(**x, **options),
            reference=lambda **x: run_reference(**x, **options),
            inputs=inputs,
            dtype=dtype,
        )


@pytest.mark.parametrize(("case", "target", "dtype"), each_way(CASES, QUICK))
def test_attention(case, target, dtype):
    shape, options = CASES[case]
    check(target, dtype, draw_inputs(*shape), **options)


@pytest.mark.parametrize(
    ("shape", "target", "dtype"),
    each_way([(2, 4, 50, 90), (1, 4, 50, 90), (2, 1, 1, 90), (1, 1, 50, 1), (1, 1, 1, 90)], [(1, 4, 50, 90)]),
)
def test_the_gradient_of_a_mask(shape, target, dtype):
    options = {"is_causal": True, "query_offset": 40, "dropout_p": 0.2, "seed": SEED}

    def op(query, key, value, attn_mask):
        return ops.attention(
            query, key, value, attn_mask, torch.tensor([90, 71]), None, None, None, True, 40, -1, -1, 0.2, SEED,
            query.shape[-1] ** -0.5,
        )  # fmt: skip

    options |= {"key_lengths": torch.tensor([90, 71])}
    with on_triton(target):
        assert_op_within_budget(
            op,
            eager=lambda **x: run_eager(**x, **options),
            reference=lambda **x: run_reference(**x, **options),
            inputs=draw_inputs(2, 4, 2, 50, 90, 16, 8) | {"attn_mask": draw(*shape)},
            dtype=dtype,
        )


@full
@by_target
@pytest.mark.parametrize("width", (16, 24, 48, 64, 80, 96, 128, 160, 192, 256))
@by_dtype
def test_widths(target, dtype, width):
    laden = {"dropout_p": 0.1, "seed": SEED} if width % 3 else {}
    check(target, dtype, draw_inputs(1, 2, 1, 140, 70, width, width), is_causal=True, **laden)
    check(target, dtype, draw_inputs(1, 2, 1, 3, 300, width, width), is_causal=True, query_offset=297, **laden)


def packed(lengths_q: list[int], lengths_k: list[int]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    inputs = {
        "query": draw(sum(lengths_q), 4, 16) / 2,
        "key": draw(sum(lengths_k), 2, 16),
        "value": draw(sum(lengths_k), 2, 9),
    }
    return inputs, tuple(torch.tensor([0, *accumulate(n)]) for n in (lengths_q, lengths_k))


def run_packed(offsets, query, key, value, **options):
    return ops.attention(
        query, key, value, None, None, *offsets, None, options.get("is_causal", False), 0,
        *options.get("window", (-1, -1)), options.get("dropout_p", 0.0), options.get("seed"), query.shape[-1] ** -0.5,
    )  # fmt: skip


def eager_packed(offsets, query, key, value, **options):
    outputs, lses = [], []
    for q0, q1, k0, k1 in zip(*(x for o in offsets for x in (o[:-1], o[1:])), strict=True):
        padded = (query[q0:q1], key[k0:k1], value[k0:k1])
        output, lse = run_eager(*(x.transpose(0, 1)[None] for x in padded), **options)
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, -1)


def packed_reference(offsets, **given):
    return reference.attention_varlen(
        **given, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], enable_gqa=True, return_lse=True
    )


PACKED = {"plain": {}, "causal": {"is_causal": True}, "window": {"window": (9, 2)}}


@pytest.mark.parametrize(("case", "target", "dtype"), each_way(PACKED, ["causal"]))
def test_packed_sequences(case, target, dtype):
    options = PACKED[case]
    inputs, offsets = packed([150, 1, 131], [160, 1, 140])
    with on_triton(target):
        assert_op_within_budget(
            lambda **x: run_packed(offsets, **x, **options),
            eager=lambda **x: eager_packed(offsets, **x, **options),
            reference=lambda **x: packed_reference(offsets, **x, **options),
            inputs=inputs,
            dtype=dtype,
        )


@pytest.mark.parametrize(("lengths_q", "lengths_k"), (([], []), ([0, 5, 0], [3, 0, 0]), ([0], [0])))
def test_packed_sequences_without_queries_or_keys(lengths_q, lengths_k):
    inputs, offsets = packed(lengths_q, lengths_k)
    inputs = {name: x.float() for name, x in inputs.items()}
    truth = results(lambda **x: packed_reference(offsets, **x), inputs)
    with on_triton(TARGETS[0]), poisoned():
        found = results(lambda **x: run_packed(offsets, **x), inputs)
    for name, x in found.items():  # zeros, and -inf
        assert torch.equal(x, truth[name]), name


@full
def test_packed_empty_sequences_between_others():
    inputs, offsets = packed([4, 0, 70], [9, 8, 7])
    with on_triton(TARGETS[0]):
        assert_op_within_budget(
            lambda **x: run_packed(offsets, **x),
            eager=lambda **x: eager_packed(offsets, **x),
            reference=lambda **x: packed_reference(offsets, **x),
            inputs=inputs,
            dtype=torch.float32,
        )


@by_target
def test_packed_dropout_is_that_of_the_padded_batch(target):
    inputs, offsets = packed([70, 3], [90, 5])
    inputs = {name: x.float() for name, x in inputs.items()}
    options = {"dropout_p": 0.4, "seed": SEED}
    with on_triton(target):
        output, _ = run_packed(offsets, **inputs, **options)
    truth = reference.attention_varlen(
        **inputs, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], **options, enable_gqa=True
    )
    torch.testing.assert_close(output, truth)


@by_target
@pytest.mark.parametrize("queries", (pytest.param(70, marks=full), 2))
def test_dropout_regenerates_its_mask(target, queries):
    # With an identity for values, a row's output is the probabilities that were kept, and dV those by its slope.
    query, key = torch.zeros(2, 1, queries, 16), torch.zeros(2, 1, 150, 16)
    value = torch.eye(150).expand(2, 1, 150, 150).requires_grad_()
    keep = philox.keep_mask(SEED, torch.arange(2), torch.zeros(1).long(), queries, 150, 0.25)
    with on_triton(target):
        output, _ = run_op(query, key, value, dropout_p=0.25, seed=SEED)
        assert torch.equal(output != 0, keep)
        (slope,) = torch.autograd.grad(output, value, torch.eye(150)[:queries].expand_as(output))
    torch.testing.assert_close(slope[..., :queries] * 150 * 0.75, keep.mT.float())


# What a row may not depend on is tried with all of these.
INVARIANT = (
    pytest.param({}, id="plain", marks=full),
    pytest.param({"is_causal": True, "window": (90, -1)}, id="causal window"),
    pytest.param({"alibi_slopes": torch.tensor([0.3, 0.1])}, id="alibi", marks=full),
)


def differentiate(inputs: dict[str, Tensor], slope: Tensor, **options) -> list[Tensor]:
    """Output, lse, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    output, lse = run_op(*leaves, **options)
    return [output, lse, *torch.autograd.grad(output, leaves, slope)]


@by_target
@pytest.mark.parametrize("options", INVARIANT)
@pytest.mark.parametrize("queries", (None, pytest.param(2, marks=full)))
def test_padding_and_the_batch_do_not_change_a_bit(target, options, queries):
    lengths = [330, 7, 200, 1]
    full_inputs = {name: x.bfloat16() for name, x in draw_inputs(4, 2, 1, queries or 330, 330, 16, 24).items()}
    slope = draw(4, 2, queries or 330, 24).bfloat16()
    for b, length in enumerate(lengths):  # what is in the padding must not matter
        full_inputs["key"][b, :, length:] = full_inputs["value"][b, :, length:] = math.nan
        slope[b, :, length:] = 0
    with on_triton(target), poisoned():
        padded = differentiate(full_inputs, slope, key_lengths=torch.tensor(lengths), **options)
        by_mask = differentiate(
            full_inputs, slope, attn_mask=(torch.arange(330) < torch.tensor(lengths)[:, None])[:, None, None], **options
        )
        assert all(not x[b, :, n:].any() for x in padded[3:] for b, n in enumerate(lengths))
        for b, length in enumerate(lengths):
            alone = {
                name: x[b : b + 1, :, : queries if name == "query" and queries else length]
                for name, x in full_inputs.items()
            }
            found = differentiate(alone, slope[b : b + 1, :, : queries or length], **options)
            for whole, masked, part in zip(padded, by_mask, found, strict=True):
                assert same_bits(whole[b : b + 1, :, : part.shape[2]], part)
                torch.testing.assert_close(masked[b : b + 1, :, : part.shape[2]], part)


@by_target
@pytest.mark.parametrize("options", INVARIANT)
def test_a_row_does_not_depend_on_its_place(target, options):
    inputs = {name: x.bfloat16() for name, x in draw_inputs(1, 2, 2, 200, 300, 16, 16).items()}
    with on_triton(target):
        whole = run_op(**inputs, **options)
        for first, last in ((1, 60), (47, 130), (130, 200)):
            part = inputs | {"query": inputs["query"][:, :, first:last]}
            for x, y in zip(whole, run_op(**part, **options, query_offset=first), strict=True):
                assert same_bits(x[:, :, first:last], y)


def _sees_nothing() -> list:
    keep = torch.rand(2, 1, 60, 150) > 0.5
    keep[:, :, [5, 50]] = False
    dead = torch.zeros(2, 60, dtype=torch.bool)
    early, short = dead.clone(), dead.clone()
    dead[:, [5, 50]], early[:, :30], short[0] = True, True, True
    minus = torch.zeros(keep.shape).masked_fill(~keep, -math.inf)
    cases = {
        "bool": ({"attn_mask": keep}, dead),
        "float": ({"attn_mask": minus}, dead),
        "causal": ({"is_causal": True, "query_offset": -30}, early),
        "lengths": ({"key_lengths": torch.tensor([0, 9])}, short),
        "all": ({"attn_mask": torch.zeros(1, 1, 1, 150, dtype=torch.bool)}, ~torch.zeros_like(dead)),
    }
    return [pytest.param(*case, id=name, marks=() if name == "bool" else full) for name, case in cases.items()]


@by_target
@pytest.mark.parametrize(("options", "dead"), _sees_nothing())
def test_rows_that_see_nothing_give_zeros(target, options, dead):
    inputs = {n: x.bfloat16() for n, x in draw_inputs(2, 2, 2, 60, 150, 16, 16).items()}
    with on_triton(target), poisoned():
        found = results(lambda **x: run_op(**x, **options), inputs)
    rows = dead[:, None].expand(2, 2, 60)
    assert torch.equal(found["output 1"] == -math.inf, rows)
    for result in ("output 0", "d query"):
        assert not found[result][rows].any() and found[result][~rows].any(-1).all()
    assert all(found[f"d {n}"].isfinite().all() for n in inputs)


@by_target
def test_what_no_row_may_see_can_be_anything(target):
    inputs = {name: x.bfloat16() for name, x in draw_inputs(2, 2, 2, 60, 200, 16, 16).items()}
    each_query = (torch.rand(2, 1, 60, 200) > 0.3) & (torch.arange(200) < 130)
    with on_triton(target):
        for options in ({"attn_mask": each_query[:, :, :1]}, {"attn_mask": each_query}):
            expected = results(lambda options=options, **x: run_op(**x, **options), inputs)
            for garbage in (math.nan, math.inf):
                dirty = {n: x.clone() for n, x in inputs.items()}
                for name in ("key", "value"):
                    unseen = ~options["attn_mask"].any(2, keepdim=True).mT
                    dirty[name].masked_fill_(unseen, garbage)
                assert_same_bits(results(lambda options=options, **x: run_op(**x, **options), dirty), expected)


@by_target
def test_rows_of_the_lowest_finite_mask(target):
    lowest = torch.full((20, 40), torch.finfo(torch.float32).min)
    lowest[:4, :20] = 0
    with on_triton(target):
        assert_op_within_budget(
            lambda **x: run_op(**x, attn_mask=lowest)[0],
            eager=lambda **x: run_eager(**x, attn_mask=lowest)[0],
            reference=lambda **x: run_reference(**x, attn_mask=lowest.double())[0],
            inputs=draw_inputs(1, 2, 2, 20, 40, 16, 16),
            dtype=torch.float32,
            gradients=False,
        )


@by_target
def test_large_scores_do_not_overflow(target):
    query = torch.tensor([1e19, -1e19, 1e4]).reshape(1, 1, 3, 1)
    key = torch.tensor([1.0, -1.0, 0.5]).reshape(1, 1, 3, 1) * 1e18
    with on_triton(target):
        output, _ = run_op(query, key, torch.eye(3)[None, None], scale=1.0)
    torch.testing.assert_close(output[0, 0], torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]))


@by_target
@pytest.mark.parametrize("kind", ("bool", pytest.param("float", marks=full)))
def test_masks_of_any_stride(target, kind):
    inputs = {name: x.bfloat16() for name, x in draw_inputs(2, 3, 3, 50, 37, 8, 8).items()}
    values = torch.rand(37, 50, 3, 4) - 0.3
    values = values > 0 if kind == "bool" else values
    with on_triton(target):
        for mask in (
            values.permute(3, 2, 1, 0)[::2],  # the keys far apart
            values[0, :, 0].repeat(2, 37)[:37, :100:2].t().expand(2, 3, 50, 37),
            values[0, :, :1, :1].expand(50, 1, 37)[:, 0],  # one value for a whole row
        ):
            dense = mask.expand(2, 3, 50, 37).contiguous()
            found = [
                results(lambda query, key, value, m=m: run_op(query, key, value, attn_mask=m), inputs)
                for m in (mask, dense)
            ]
            for name, x in found[0].items():
                torch.testing.assert_close(x, found[1][name])


def test_tokens_before_heads_give_gradients_in_the_same_order():
    projected = torch.randn(2, 30, 3, 4, 8)  # as one projection gives them: query, key, value
    inputs = [x.transpose(1, 2).requires_grad_() for x in projected.unbind(2)]
    with on_triton(TARGETS[0]):
        output, lse = run_op(*inputs)
        gradients = torch.autograd.grad(output.sum() + lse.sum(), inputs)
    assert output.transpose(1, 2).is_contiguous()
    assert all(x.transpose(1, 2).is_contiguous() for x in gradients)
    truth, truth_lse = run_reference(*inputs)
    for x, y in zip(gradients, torch.autograd.grad(truth.sum() + truth_lse.sum(), inputs), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "shape", ((0, 2, 2, 5, 7, 8, 8), (2, 2, 2, 0, 7, 8, 8), (2, 2, 1, 50, 0, 8, 6), (2, 2, 1, 5, 0, 8, 6),
              (2, 0, 0, 5, 7, 8, 8), (2, 2, 2, 5, 7, 8, 0))
)  # fmt: skip
def test_empty_sizes(shape):
    inputs = {name: x.float() for name, x in draw_inputs(*shape).items()}
    truth = results(run_reference, inputs)
    with on_triton(TARGETS[0]), poisoned():
        found = results(run_op, inputs)
    for name, x in found.items():
        torch.testing.assert_close(x, truth[name])


@pytest.mark.parametrize("target", TARGETS)
def test_tf32_only_where_pytorch_may_use_it(target):
    inputs = {name: x.float() for name, x in draw_inputs(1, 2, 2, 50, 70, 64, 64).items()}
    truth = results(run_reference, {name: x.double() for name, x in inputs.items()})
    errors = {}
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            with on_triton(target):
                found = results(run_op, inputs)
            errors[precision] = {name: (x - truth[name]).abs().max().item() for name, x in found.items()}
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert next(iter(errors["ieee"].values())) < 2e-6  # of the output
    assert all(1e-5 < error < 1e-2 for error in errors["tf32"].values()), errors["tf32"]


def _shows(change: dict) -> bool:
    """Whether what is wrong shows without a look at values, which would wait for the GPU."""
    indices = [change[name] for name in ("key_lengths", "cu_seqlens_k") if name in change]
    return not any(x.dtype == torch.int64 and x.shape == (2,) for x in indices)


@counted
@pytest.mark.parametrize("name", ("attention_fwd", "attention_bwd", "attention_bias_bwd"))
def test_arguments_that_do_not_fit_are_refused(name):
    launcher = next(x for x in register.LAUNCHERS if x.__name__ == name)
    good, changes = RAW[name]
    with on_triton("sm_80") as machine:
        for change in filter(_shows, changes):
            with pytest.raises((TypeError, ValueError)):
                launcher(**good | change)
        wide = {n: f32(*x.shape[:-1], 257) if n in ("query", "key", "value") else x for n, x in good.items()}
        with pytest.raises(ValueError, match="257 wide"):
            launcher(**wide)
        with pytest.raises(TypeError, match="float64"):
            launcher(**good | {n: good[n].double() for n in ("query", "key", "value")})
    assert not machine.launches


_PLACE = torch.arange(512)
# By name: what a call of 512 queries and keys is laden with, and what of its products that leaves at most, the tiles of
# 128 queries by 64 keys and the like being whole.
SKIPPED = {
    "causal": ({"is_causal": True}, 0.65),
    "window": ({"window": (63, 0)}, 0.4),
    "lengths": ({"key_lengths": torch.tensor([128])}, 0.25),
    "right padding": ({"attn_mask": (_PLACE < 128)[None, None, None]}, 0.25),
    "left padding": ({"attn_mask": (_PLACE >= 384)[None, None, None]}, 0.25),
    "padding at both ends": ({"attn_mask": ((_PLACE >= 192) & (_PLACE < 320))[None, None, None]}, 0.25),
    "a causal mask": ({"attn_mask": (_PLACE <= _PLACE[:, None])[None, None]}, 0.65),
    "a mask of blocks": ({"attn_mask": (_PLACE // 128 == _PLACE[:, None] // 128)[None, None]}, 0.25),
    "a mask with holes": ({"attn_mask": (_PLACE // 64 % 4 == _PLACE[:, None] // 128 % 2 * 2)[None, None]}, 0.25),
    "a float mask with holes": (
        {"attn_mask": torch.zeros(512, 512).masked_fill(_PLACE // 64 % 4 != _PLACE[:, None] // 128 % 2 * 2, -math.inf)},
        0.25,
    ),
    "padding with holes": ({"attn_mask": (_PLACE // 64 % 4 == 1)[None, None, None]}, 0.25),
    "nothing": ({"attn_mask": (_PLACE < 0)[None, None, None]}, 0.0),
}


def products(target: str, inputs: dict[str, Tensor], **options) -> dict[str, float]:
    """FLOPs of the matrix products that each kernel of a forward and backward does."""
    with on_triton(target) as machine:
        leaves = [x.bfloat16().requires_grad_() for x in inputs.values()]
        output, _ = run_op(*leaves, **options)
        output.sum().backward()
    return {launch.name: sum(launch.counts.matrix_flops.values()) for launch in machine.launches}


@counted
@by_target
@pytest.mark.parametrize("case", [c if c == "left padding" else pytest.param(c, marks=full) for c in SKIPPED])
def test_tiles_that_no_row_sees_are_skipped(case, target):
    options, share = SKIPPED[case]
    inputs = draw_inputs(1, 1, 1, 512, 512, 64, 64)
    # A mask of every query that allows everything has the same tiles.
    mask = options.get("attn_mask")
    is_laden = mask is not None and mask.shape[-2] > 1
    everything = mask.new_ones(512, 512) if is_laden else None
    whole = products(target, inputs, attn_mask=everything)
    found = products(target, inputs, **options)
    assert all(found[name] <= share * flops for name, flops in whole.items()), (found, whole)


@counted
@by_target
def test_tiles_that_no_row_sees_are_skipped_by_splits(target):
    inputs = draw_inputs(1, 1, 1, 1, 1024, 64, 64)
    seen = (torch.arange(1024) >= 448) & (torch.arange(1024) < 576)  # a quarter of two splits of four
    each_way = [products(target, inputs, **options) for options in ({}, {"attn_mask": seen[None, None, None]})]
    whole, found = (flops["_attention_split_kernel"] for flops in each_way)
    assert found == whole / 8

"""Timing and the error budget: their arithmetic, and that they notice what they are there for."""

import contextlib
import gc
import math
import time

import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, assert_op_within_budget, assert_within_budget, poisoned

from fasttx import functional, measure, reference
from fasttx.dispatch import extension
from fasttx.measure import Interval, Measurement, Standard

HALVES = (torch.bfloat16, torch.float16)


def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def samples(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 20, 99, 100, 2000])
def test_interval_of_the_median_leaves_out_at_most_two_and_a_half_per_cent_a_side(count):
    outside = measure._outside(count)

    def chance_of_missing(k):
        # At most k of `count` samples fall below the median, which then lies left of the interval.
        return sum(math.comb(count, i) for i in range(k + 1)) / 2**count

    assert 0 <= outside <= count // 2
    if outside > 0:
        assert chance_of_missing(outside) <= 0.025
    if count >= 6:
        assert chance_of_missing(outside + 1) > 0.025


def test_interval_of_the_median_covers_it_as_often_as_it_says():
    draws = torch.rand(2000, 25, dtype=torch.float64).exp()
    covered = 0
    for row in draws:
        interval = Measurement({"a": row}).median("a")
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= math.exp(0.5) <= interval.high
    # 25 samples: 95.7 %; five standard deviations either way.
    assert abs(covered / 2000 - 0.957) < 0.023


def test_ratio_is_that_of_the_medians_and_pairs_the_rounds():
    # The machine slows down fivefold half-way: each alone varies widely, their ratio hardly.
    drift = torch.linspace(1, 5, 101, dtype=torch.float64)
    wobble = 1 + 0.01 * torch.randn(101, dtype=torch.float64)
    times = Measurement({"base": 2 * drift * wobble, "fast": drift})
    ratio = times.ratio("base", "fast")
    medians = times.median("base").value / times.median("fast").value
    assert ratio.value == pytest.approx(medians)
    assert 1.9 < ratio.low <= ratio.value <= ratio.high < 2.1
    assert times.median("base").high > 1.2 * times.median("base").low
    assert times.ratio("base", "fast") == ratio
    assert times.ratio("fast", "base").value == pytest.approx(1 / ratio.value)


def test_median_of_an_even_number_is_between_the_two_in_the_middle():
    assert Measurement({"a": samples(4, 1, 3, 2)}).median("a") == Interval(2.5, 1.0, 4.0)


def test_interval_in_other_units():
    interval = Interval(2.0, 1.0, 4.0)
    assert interval.scaled(10) == Interval(20.0, 10.0, 40.0)
    assert interval.inverse(8.0) == Interval(4.0, 2.0, 8.0)
    assert f"{interval:.1f}" == "2.0 [1.0, 4.0]"


def test_interleave_times_every_variant_in_every_round():
    calls = []
    variants = {
        "short": lambda: (calls.append("short"), busy(0.001)),
        "long": lambda: (calls.append("long"), busy(0.003)),
    }
    times = measure.interleave(variants, seconds=0.2, warm_up=0.05)
    assert times.rounds >= 7
    assert set(times.samples) == {"short", "long"}
    assert len(times.samples["short"]) == len(times.samples["long"]) == times.rounds
    measured = calls[-2 * times.rounds :]
    rounds = [set(measured[i : i + 2]) for i in range(0, len(measured), 2)]
    assert all(names == {"short", "long"} for names in rounds)
    # In both orders, so that neither always runs after the other.
    assert {tuple(measured[i : i + 2]) for i in range(0, len(measured), 2)} == {
        ("short", "long"),
        ("long", "short"),
    }
    assert times.median("short").value >= 0.001
    assert times.median("long").value >= 0.003


def test_interleave_warms_up_and_keeps_to_its_rounds():
    started = time.perf_counter()
    first_sample = []
    variants = {"a": lambda: first_sample.append(time.perf_counter())}
    times = measure.interleave(variants, seconds=0.0, warm_up=0.1, least_rounds=3, most_rounds=3)
    assert times.rounds == 3
    assert time.perf_counter() - started > 0.1
    # A call far shorter than the clock's step is repeated within a sample.
    assert len(first_sample) > 100


def test_interleave_leaves_the_garbage_collector_as_it_was():
    def fail():
        calls.append(gc.isenabled())
        if len(calls) > 3:
            raise KeyError("broken")

    calls = []
    assert gc.isenabled()
    with pytest.raises(KeyError):
        measure.interleave({"a": fail}, warm_up=0.0)
    assert gc.isenabled() and calls[0] and not calls[-1]


def test_interleave_waits_for_an_asynchronous_device():
    waits = []
    times = measure.interleave(
        {"a": lambda: None},
        seconds=0.0,
        warm_up=0.0,
        least_rounds=7,
        synchronize=lambda: (waits.append(1), busy(0.001)),
    )
    # Twice while warming up.
    assert len(waits) == times.rounds + 2


def test_a_primed_sample_follows_an_untimed_call():
    calls = []

    def call(name):
        calls.append(name)
        busy(0.002 if calls[-2:-1] == [name] else 0.02)

    variants = {name: lambda name=name: call(name) for name in "ab"}
    running = measure.Interleaving(variants, primed=True)
    warm = running.warm_up(0.0)
    calls.clear()
    for _ in range(5):
        running.round()
    assert all(calls[i] == calls[i + 1] for i in range(0, len(calls), 2)) and len(calls) == 20
    # The first call after the other's takes ten times as long, and is not what is timed.
    times = running.measurement()
    assert all(0.002 <= times.median(name).value < 0.01 and warm[name] < 0.01 for name in "ab")


@pytest.mark.parametrize("options", [{"least_rounds": 0}, {"least_rounds": 9, "most_rounds": 8}])
def test_interleave_refuses_impossible_rounds(options):
    with pytest.raises(ValueError, match="rounds"):
        measure.interleave({"a": lambda: None}, **options)
    with pytest.raises(ValueError, match="nothing to time"):
        measure.interleave({})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, 1.5, 1.999, 2.0, 0.0, 3e-5, -100.0])
def test_ulp_is_the_distance_to_the_next_number(dtype, value):
    rounded = torch.tensor(abs(value), dtype=dtype)
    above = torch.nextafter(rounded, torch.tensor(math.inf, dtype=dtype))
    assert measure.ulp(rounded.item(), dtype) == above.item() - rounded.item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_stays_within_the_dtypes_range(dtype):
    info = torch.finfo(dtype)
    below = torch.nextafter(torch.tensor(info.max, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    assert measure.ulp(math.inf, dtype) == measure.ulp(info.max, dtype) == info.max - below.item()


def test_budget_is_twice_eagers_error_and_one_ulp():
    truth = torch.tensor([-3.0, 1.0, math.nan, math.inf], dtype=torch.float64)
    for dtype in (torch.float32, *HALVES):
        expected = 2 * 0.25 + 2 * torch.finfo(dtype).eps
        assert measure.error_budget(0.25, truth, dtype) == expected
    scale = 2.0**-29
    expected = 2 * 0.25 * scale + 2 * torch.finfo(torch.float64).eps
    assert measure.error_budget(0.25, truth, torch.float64) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_judge_passes_up_to_the_budget_and_not_beyond(dtype):
    truth = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    step = torch.finfo(dtype).eps
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    eager = truth.to(eager_dtype)
    eager[1] += torch.finfo(eager_dtype).eps
    # Eager is wrong by eps, and an ulp of the largest value is eps: three times eps are allowed.
    for wrong, passes in ((0, True), (3, True), (4, False)):
        actual = truth.to(dtype, copy=True)
        actual[2] += wrong * step
        verdict = measure.judge(actual, eager, truth)
        assert (verdict.error, verdict.budget) == (wrong * step, 3 * step)
        assert verdict.passed is passes
        assert verdict.eager_error == torch.finfo(eager_dtype).eps


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("right", [math.nan, math.inf, -math.inf, 1.0])
def test_values_that_are_not_finite_must_agree_in_place_and_kind(right, wrong):
    truth = torch.tensor([2.0, right], dtype=torch.float64)
    actual = torch.tensor([2.0, wrong], dtype=torch.float32)
    verdict = measure.judge(actual, truth.float(), truth)
    same = right == wrong or (math.isnan(right) and math.isnan(wrong))
    assert verdict.passed is same
    if not same and not (math.isfinite(right) and math.isfinite(wrong)):
        assert "first at (1,)" in str(verdict)


def test_what_overflows_the_dtype_must_be_infinite():
    truth = torch.tensor([1e5, 1.0], dtype=torch.float64)
    eager = truth.to(torch.float16)
    assert measure.judge(torch.tensor([math.inf, 1.0]).half(), eager, truth).passed
    assert not measure.judge(torch.tensor([65504.0, 1.0]).half(), eager, truth).passed


def test_eagers_nan_buys_nothing():
    truth = torch.tensor([1.0, 0.0], dtype=torch.float64)
    eager = torch.tensor([1.0, math.nan])
    verdict = measure.judge(torch.tensor([1.0, 1e-6]), eager, truth)
    assert verdict.eager_error == 0.0 and not verdict.passed


def test_judge_of_nothing_passes():
    empty = torch.empty(0, 3)
    assert measure.judge(empty, empty, empty.double()).passed


def test_judge_wants_the_right_dtypes_and_shapes():
    x = torch.ones(3)
    with pytest.raises(TypeError, match="truth float64"):
        measure.judge(x, x, x)
    with pytest.raises(TypeError, match="eager must be torch.float32"):
        measure.judge(x.double(), x.double(), x.double())
    with pytest.raises(ValueError, match="shapes differ"):
        measure.judge(x, x, torch.ones(1, 3).double())


def test_failure_reports_the_three_numbers():
    truth = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError) as failure:
        assert_within_budget(actual=torch.zeros(4), eager=truth.float(), truth=truth, name="dx")
    assert "dx: error 1.000e+00, eager PyTorch's 0.000e+00, budget 1.192e-07" in str(failure.value)


def gelu_inputs():
    return {"input": torch.randn(7, 33, dtype=torch.float64)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_standard_measures_outputs_and_gradients_on_the_rounded_inputs(dtype):
    standard = assert_op_within_budget(
        reference.gelu, eager=F.gelu, reference=reference.gelu, inputs=gelu_inputs(), dtype=dtype
    )
    assert standard.inputs["input"].dtype == dtype
    results = standard.run(F.gelu)
    assert set(results) == {"output", "d input"}
    assert all(result.dtype == dtype for result in results.values())
    assert all(truth.dtype == torch.float64 for truth in standard.truth.values())
    wide = standard.inputs["input"].double()
    assert torch.equal(standard.truth["output"], reference.gelu(wide))
    if dtype == torch.float64:
        assert standard.eager["output"].dtype == torch.float32
        assert not torch.equal(standard.eager_truth["output"], standard.truth["output"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_standard_notices_a_wrong_gradient(dtype):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.gelu(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 1.05 * grad * x.sigmoid()

    with pytest.raises(AssertionError, match="d input: error") as failure:
        assert_op_within_budget(
            lambda input: Wrong.apply(input),
            eager=F.gelu,
            reference=reference.gelu,
            inputs=gelu_inputs(),
            dtype=dtype,
        )
    assert "output" not in str(failure.value)


def test_standard_leaves_alone_what_is_frozen_and_what_is_no_number():
    inputs = {"x": torch.randn(3, 4), "mask": torch.ones(4, dtype=torch.bool), "s": torch.ones(4)}

    def op(x, mask, s):
        assert mask.dtype == torch.bool and not s.requires_grad
        return x * mask * s, x.sum()

    standard = Standard(reference=op, eager=op, inputs=inputs, dtype=torch.bfloat16, frozen=["s", "absent"])
    assert set(standard.run(op)) == {"output 0", "output 1", "d x"}
    without = Standard(reference=op, eager=op, inputs=inputs, dtype=torch.float32, frozen=["s"], gradients=False)
    assert set(without.run(op)) == {"output 0", "output 1"}


def test_standard_keeps_the_strides_of_what_has_the_dtype():
    x = torch.randn(4, 6).t()
    standard = Standard(reference=F.relu, eager=F.relu, inputs={"input": x}, dtype=torch.float32, gradients=False)
    assert standard.inputs["input"] is x


def test_poisoned_memory_is_nan_and_the_settings_return():
    with poisoned():
        for fresh in (torch.empty(5), torch.empty_like(torch.ones(5)), torch.ones(1).new_empty(5)):
            assert fresh.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), poisoned():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("clean", [True, False])
def test_poison_reaches_what_the_extension_allocates(needs_extension, clean):
    x = torch.randn(3, 8)

    def filled():
        before = extension.poison_results(False)
        with contextlib.nullcontext() if clean else poisoned():
            functional.layer_norm(x, 8, backend="cpu")
        return extension.poison_results(False) - before

    assert filled() == (0 if clean else 1)  # the output


def test_poison_uncovers_an_output_that_is_not_written():
    def forgetful(input):
        output = torch.empty_like(input)
        output[:-1] = F.gelu(input[:-1])
        return output

    with pytest.raises(AssertionError, match="1 of 7 values differ in being finite"):
        assert_op_within_budget(
            forgetful,
            eager=F.gelu,
            reference=reference.gelu,
            inputs={"input": torch.randn(7)},
            dtype=torch.float32,
            gradients=False,
        )

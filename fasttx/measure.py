"""Measuring: how long calls take, one variant against another, and how wrong results may be.

Times are taken interleaved, every variant once a round in a fresh order, so that whatever else the
machine does falls on all of them alike. Errors are judged against the error that eager PyTorch
makes in the same dtype on the same input.
"""

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """The same in another unit; `factor` is positive."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def inverse(self, numerator: float = 1.0) -> "Interval":
        """numerator / value: a rate from a time, or a time from a rate."""
        return Interval(numerator / self.value, numerator / self.high, numerator / self.low)

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


class Measurement:
    """Interleaved samples: samples[name] (rounds,) float64, seconds a call, round for round."""

    def __init__(self, samples: Mapping[str, Tensor]):
        self.samples = dict(samples)

    @property
    def rounds(self) -> int:
        """How often every variant was timed."""
        return len(next(iter(self.samples.values())))

    def median(self, name: str) -> Interval:
        """Median seconds a call; the interval is its order statistics', so distribution-free."""
        ordered = self.samples[name].sort().values
        outside = _outside(len(ordered))
        value = _middle(ordered).item()
        return Interval(value, ordered[outside].item(), ordered[-1 - outside].item())

    def ratio(self, baseline: str, name: str) -> Interval:
        """median(baseline) / median(name): above 1, `name` is that much faster.

        The interval is bootstrapped over whole rounds, so what slows both in a round cancels. Efron
        1979 (percentiles).
        """
        base, other = self.samples[baseline], self.samples[name]
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(base), (2000, len(base)), generator=generator)
        ratios = _middle(base[picks].sort().values) / _middle(other[picks].sort().values)
        low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype))
        value = _middle(base.sort().values) / _middle(other.sort().values)
        return Interval(value.item(), low.item(), high.item())


class Interleaving:
    """Variants that are timed once a round, in random order.

    A call shorter than `shortest_sample` seconds is repeated within one sample, so that the clock does not count.
    `synchronize` waits for an asynchronous device and is timed with each sample. `primed`: before each sample its
    variant runs once untimed, so that none pays for what another left in the caches.
    """

    def __init__(
        self,
        variants: Mapping[str, Callable[[], object]],
        *,
        shortest_sample: float = 1e-4,
        synchronize: Callable[[], object] | None = None,
        primed: bool = False,
    ):
        if not variants:
            raise ValueError("nothing to time: variants is empty")
        self._variants, self._synchronize, self._shortest = dict(variants), synchronize, shortest_sample
        self._primed = primed
        self._order, self._shuffle = list(variants), random.Random(0).shuffle
        self._repeats = dict.fromkeys(variants, 1)
        self._samples: dict[str, list[float]] = {name: [] for name in variants}

    def warm_up(self, seconds: float) -> dict[str, float]:
        """Runs every variant, twice at least, for more than `seconds`; returns how long the fastest sample took."""
        fastest = dict.fromkeys(self._variants, math.inf)
        start, passes = time.perf_counter(), 0
        while passes < 2 or time.perf_counter() - start <= seconds:
            for name in self._variants:
                fastest[name] = min(fastest[name], self._sample(name))
            passes += 1
        self._repeats = {name: max(1, math.ceil(self._shortest / max(once, 1e-7))) for name, once in fastest.items()}
        return {name: once * self._repeats[name] for name, once in fastest.items()}

    def round(self) -> None:
        """Times every variant once more."""
        self._shuffle(self._order)
        for name in self._order:
            self._samples[name].append(self._sample(name))

    def measurement(self) -> Measurement:
        """All rounds so far."""
        return Measurement({name: torch.tensor(s, dtype=torch.float64) for name, s in self._samples.items()})

    def _sample(self, name: str) -> float:
        call, repeats = self._variants[name], self._repeats[name]
        if self._primed:
            call()
            if self._synchronize is not None:
                self._synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if self._synchronize is not None:
            self._synchronize()
        return (time.perf_counter() - start) / repeats


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collects once, and then not before the end."""
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    warm_up: float = 1.0,
    least_rounds: int = 7,
    most_rounds: int = 1000,
    shortest_sample: float = 1e-4,
    synchronize: Callable[[], object] | None = None,
) -> Measurement:
    """Times every variant once a round, in random order, for about `seconds` in all.

    Before that they run for more than `warm_up` seconds untimed. `shortest_sample` and `synchronize` are
    Interleaving's. At least `least_rounds` and at most `most_rounds` rounds are taken. Python's garbage collector rests
    meanwhile.
    """
    if least_rounds < 1 or most_rounds < least_rounds:
        raise ValueError(f"rounds must be 1 <= {least_rounds=} <= {most_rounds=}")
    running = Interleaving(variants, shortest_sample=shortest_sample, synchronize=synchronize)
    running.warm_up(warm_up)
    with no_garbage_collection():
        start = time.perf_counter()
        for done in range(most_rounds):
            if done >= least_rounds and time.perf_counter() - start >= seconds:
                break
            running.round()
    return running.measurement()


def _outside(count: int) -> int:
    """How many of `count` ordered samples lie outside the median's 95 % interval, at each end."""
    # The median lies below the (k+1)-th smallest as often as at most k of `count` coins show heads.
    below, k = 0.0, 0
    while k < count // 2:
        log = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        below += math.exp(log - count * math.log(2))
        if below > 0.025:
            break
        k += 1
    return max(k - 1, 0)


def _middle(ordered: Tensor) -> Tensor:
    """The median of the last dim, which is sorted."""
    count = ordered.shape[-1]
    return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The spacing of dtype's normal numbers at this magnitude, bounded to their range."""
    info = torch.finfo(dtype)
    bounded = min(max(abs(magnitude), info.tiny), info.max)
    return info.eps * 2.0 ** (math.frexp(bounded)[1] - 1)


def largest_error(actual: Tensor, truth: Tensor) -> float:
    """The largest |actual - truth|, in float64, where both are finite; 0 where nothing is."""
    if actual.shape != truth.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(truth.shape)}")
    difference = (actual.double() - truth.double()).abs()
    difference = difference[torch.isfinite(difference)]
    return difference.max().item() if difference.numel() else 0.0


def error_budget(eager_error: float, truth: Tensor, dtype: torch.dtype) -> float:
    """What error a kernel in `dtype` may make: twice eager's, and one ulp of the largest truth.

    `eager_error` is that of eager PyTorch in `dtype`. For float64, whose truth is no better than
    eager itself, give float32 eager's error: it is scaled by the ratio of the two precisions.
    """
    if dtype == torch.float64:
        eager_error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    finite = truth[torch.isfinite(truth)].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return 2 * eager_error + ulp(largest, dtype)


@dataclass(frozen=True)
class Verdict:
    """A result's error, eager PyTorch's, and the budget.

    `misplaced` says where NaN or infinities differ from what they should be, None where they agree.
    """

    error: float
    eager_error: float
    budget: float
    misplaced: str | None = None

    @property
    def passed(self) -> bool:
        """Within the budget, and infinite or NaN just where it should be."""
        return self.misplaced is None and self.error <= self.budget

    def __str__(self) -> str:
        text = f"error {self.error:.3e}, eager PyTorch's {self.eager_error:.3e}"
        text += f", budget {self.budget:.3e}"
        return text if self.misplaced is None else f"{text}; {self.misplaced}"


def judge(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    eager_truth: Tensor | None = None,
    truth_error: float = 0.0,
) -> Verdict:
    """Judges `actual` by the error budget of its dtype.

    actual, eager and truth have one shape. truth is float64, of the same inputs. eager is PyTorch's
    own result in actual's dtype; in float32 where actual is float64, with `eager_truth` the truth
    of the inputs rounded to float32 (where absent: truth). truth_error, an estimate of truth's own,
    widens the budget. What is not finite in truth, rounded to actual's dtype, must be the same in
    actual.
    """
    wanted = torch.float32 if actual.dtype == torch.float64 else actual.dtype
    if eager.dtype != wanted or truth.dtype != torch.float64:
        raise TypeError(
            f"to judge {actual.dtype}, eager must be {wanted} and truth float64, got {eager.dtype} and {truth.dtype}"
        )
    error = largest_error(actual, truth)
    eager_error = largest_error(eager, truth if eager_truth is None else eager_truth)
    budget = error_budget(eager_error, truth, actual.dtype) + truth_error
    return Verdict(error, eager_error, budget, _misplaced(actual, truth.to(actual.dtype)))


def _misplaced(actual: Tensor, expected: Tensor) -> str | None:
    """Where NaN and infinities differ, in words."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    wrong = ~same & ~(torch.isfinite(actual) & torch.isfinite(expected))
    if not wrong.any():
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} values differ in being finite: "
        f"first at {first}, {actual[first].item()} where {expected[first].item()} is right"
    )


class Standard:
    """What an op is measured by on one input: its truth, and eager PyTorch's results.

    reference(**inputs) and eager(**inputs) give a tensor or a tuple of them. inputs holds tensors:
    the floating ones are rounded to `dtype` (what has it already is used as it is, strides and
    all), and those not named in `frozen` are differentiated, through a random linear function of
    the outputs that is the same for all. Results are named "output" ("output 0", ...) and
    "d <input>".
    """

    def __init__(
        self,
        *,
        reference: Callable[..., object],
        eager: Callable[..., object],
        inputs: Mapping[str, Tensor],
        dtype: torch.dtype,
        frozen: Sequence[str] = (),
        gradients: bool = True,
    ):
        self.inputs = cast(inputs, dtype)
        self.dtype, self.frozen, self.gradients = dtype, tuple(frozen), gradients
        self.truth = self._results(reference, cast(self.inputs, torch.float64), dtype)
        self.eager_truth = self.truth
        self.truth_error = dict.fromkeys(self.truth, 0.0)
        eager_inputs, eager_dtype = self.inputs, dtype
        if dtype == torch.float64:
            eager_inputs, eager_dtype = cast(self.inputs, torch.float32), torch.float32
            wide = cast(eager_inputs, torch.float64)
            self.eager_truth = self._results(reference, wide, eager_dtype)
            # The truth is rounded to float64 as well: by the error of the reference in float32.
            narrow = self._results(reference, eager_inputs, eager_dtype)
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            self.truth_error = {name: ratio * largest_error(x, self.eager_truth[name]) for name, x in narrow.items()}
        self.eager = self._results(eager, eager_inputs, eager_dtype)

    def run(self, op: Callable[..., object]) -> dict[str, Tensor]:
        """The op's outputs and gradients on these inputs, by name."""
        return self._results(op, self.inputs, self.dtype)

    def judge(self, op: Callable[..., object]) -> dict[str, Verdict]:
        """A verdict for each of the op's outputs and gradients."""
        return {
            name: judge(
                actual,
                self.eager[name],
                self.truth[name],
                eager_truth=self.eager_truth[name],
                truth_error=self.truth_error[name],
            )
            for name, actual in self.run(op).items()
        }

    def _results(
        self, function: Callable[..., object], inputs: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        wanted = [n for n, x in inputs.items() if x.is_floating_point() and n not in self.frozen]
        if not self.gradients:
            wanted = []
        leaves = {name: x.detach().requires_grad_() if name in wanted else x for name, x in inputs.items()}
        with torch.set_grad_enabled(bool(wanted)):
            outputs = function(**leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        names = ["output"] if len(outputs) == 1 else [f"output {i}" for i in range(len(outputs))]
        results = {name: x.detach() for name, x in zip(names, outputs, strict=True)}
        if wanted:
            slopes = _slopes(outputs, dtype)
            given = torch.autograd.grad(outputs, [leaves[name] for name in wanted], slopes)
            results |= {f"d {name}": x for name, x in zip(wanted, given, strict=True)}
        return results


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every floating tensor in `dtype`, the others as they are."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def _slopes(outputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Repeatable gradients of the outputs, of values that `dtype` holds."""
    generator = torch.Generator().manual_seed(0)
    wide = {"dtype": torch.float64, "device": "cpu"}  # a default device, as in tests on a GPU, has no part in it
    return [torch.randn(x.shape, generator=generator, **wide).to(dtype).to(x) for x in outputs]

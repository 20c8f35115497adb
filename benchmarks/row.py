"""One row measured: error first, then, where that is within budget, speed."""

from collections.abc import Callable, Mapping

from fasttx.measure import Interleaving, Interval, Measurement, Verdict, no_garbage_collection

from .case import Call, Case, Growth, dtype_name
from .machine import Machine, OtherLoad

Row = dict[str, object]
# Runs a round this often: pytest-benchmark's pedantic(), or a loop.
Rounds = Callable[[Call, int], object]

_WARM_UP = 0.2
_PRIMED = 2  # calls a sample, of those that are not repeated anyway
_LEAST, _MOST = 7, 1000
_HOPELESS = 1.5  # a rival this many times slower than the fastest is not timed further


def identity(case: Case | Growth) -> Row:
    """What names the row."""
    return {"id": case.id, "op": case.op, "name": case.name, "shape": case.shape, "dtype": dtype_name(case.dtype)}


def measure(case: Case | Growth, machine: Machine, seconds: float, rounds: Rounds) -> Row:
    """The row's results as plain data, whose meaning is report.py's. Raises NotMeasured, or what the row's calls do."""
    others = OtherLoad()
    if isinstance(case, Growth):
        results = {"growth": _against(Interval(*case.measure(seconds)), case.bar) | {"unit": case.unit}}
    else:
        work = case.work()
        verdict = work.judge()
        results = {"error": _error(verdict)}
        if verdict.passed:
            others = OtherLoad()
            results |= _speed(case, work.rivals, work.fasttx, machine, seconds, rounds)
    return results | {"others": others.share()}


def passed(row: Row) -> bool:
    """Whether the row ran, with an error within budget where it has one; one that cannot be measured here passes."""
    return "failed" not in row and ("error" not in row or row["error"]["passed"])


def _error(verdict: Verdict) -> Row:
    return {
        "value": verdict.error, "eager": verdict.eager_error, "budget": verdict.budget, "passed": verdict.passed,
        "misplaced": verdict.misplaced,
    }  # fmt: skip


def _speed(
    case: Case, rivals: Mapping[str, Call], fasttx: Call, machine: Machine, seconds: float, rounds: Rounds
) -> Row:
    once = Interleaving(rivals, primed=True).warm_up(_WARM_UP)
    fast = min(once.values())
    variants = {name: call for name, call in rivals.items() if once[name] <= _HOPELESS * fast} | {"fasttx": fasttx}
    limit = machine.limit(case) if case.roofline is not None else None
    if limit is not None:
        variants["limit"] = limit.call
    running = Interleaving(variants, primed=True)
    round_seconds = _PRIMED * sum(running.warm_up(_WARM_UP).values())
    with no_garbage_collection():
        rounds(running.round, min(max(int(seconds / round_seconds), _LEAST), _MOST))
    timed = running.measurement()

    rival = min(rivals.keys() & variants.keys(), key=lambda name: timed.median(name).value)
    results = {
        "times": {name: _interval(timed.median(name)) for name in (rival, "fasttx")},
        "rival": rival,
        "rounds": timed.rounds,
        "ratio": _against(timed.ratio(rival, "fasttx"), case.bar),
    }
    return results | {"roofline": _roofline(case, machine, timed, limit) | {"limit": case.limit}}


def _roofline(case: Case, machine: Machine, timed: Measurement, limit) -> Row:
    """The share of what the machine can do: beside the limit where a bar asks for it, else by the run's figures."""
    if limit is None:
        return _against(timed.median("fasttx").inverse(machine.least_seconds(case)), None)
    work = case.flops if case.limit == "flops" else case.bytes
    return _against(timed.ratio("limit", "fasttx").scaled(work / limit.amount), case.roofline)


def _interval(value: Interval) -> Row:
    return {"value": value.value, "low": value.low, "high": value.high}


def _against(value: Interval, bar: float | None) -> Row:
    return _interval(value) | {"bar": bar}

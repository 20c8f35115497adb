"""python -m benchmarks.gpu: the tests on the device, tuning, benchmarks and a report, within ten minutes.

Results go to a folder: tests.txt, tuning.json, results.json, results.md. What was not reached in time is named.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from fasttx.measure import Interleaving, no_garbage_collection

from . import limits, report, tests
from .cases import Case, Variant, agrees, all_cases, standard

_ROOT = Path(__file__).parents[2]
_TESTS_SHARE = 0.4  # of the time
_ROUNDS = 20


class OutOfTime(BaseException):
    """Time is up. No Exception: a rival that fails is left out, and this is not to be taken for one."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what is inside once so many seconds have gone by; at once if there are none.

    Where it strikes is anywhere, and may be between a switch of gradients and what would switch them back: they are
    as before at the end.
    """

    def stop(*_: object) -> None:
        raise OutOfTime

    if seconds <= 0:
        raise OutOfTime
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(case: Case, device: str, machine: limits.Limits, seconds: float) -> report.Row:
    """Checks and times every variant of a case."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    offered: dict[str, Variant | str] = {"fasttx": case.fasttx, "eager": case.eager, **case.rivals, **case.backends}
    calls, errors, left_out, against = {}, {}, {}, standard(case)
    for name, variant in offered.items():
        if isinstance(variant, str):
            left_out[name] = variant
            continue
        try:
            errors[name] = agrees(case, variant, against)
            calls[name] = case.call(variant)
            calls[name]()
            synchronize()
        except Exception as error:  # a rival that cannot take the case; fasttx's own failure is a failure
            if name in ("fasttx", "eager"):
                raise
            calls.pop(name, None)
            left_out[name] = _in_a_line(error)
    del against
    timing = Interleaving(calls, shortest_sample=1e-3, synchronize=synchronize)
    timing.warm_up(seconds / 4)
    end = time.perf_counter() + seconds
    with no_garbage_collection():
        for done in range(10 * _ROUNDS):
            if done >= _ROUNDS and time.perf_counter() > end:
                break
            timing.round()
    return report.row(case, timing.measurement(), errors, left_out, machine)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def run(
    folder: Path,
    device: str,
    cases: Iterable[Case],
    machine: limits.Limits,
    deadline: float,
    seconds: float,
    about: Mapping[str, object] | None = None,
) -> tuple[list[report.Row], dict[str, str]]:
    """Measures cases until the deadline; gives their rows, and of those that failed the reason.

    The report, which begins with what there is to say `about` the run, is written after each of them: an interrupted
    run has one, and neither an error in one case nor too little memory for it is the end of the others.
    """
    rows, failed, late, about = [], {}, [], report.environment(device) | dict(about or {})
    for case in cases:
        try:
            with at_most(deadline - time.monotonic()):
                rows.append(measure(case, device, machine, seconds))
        except OutOfTime:
            late.append(case.name)
            about["not reached in time"] = ", ".join(late)
        except Exception as error:
            failed[case.name] = _in_a_line(error)
            print(case.name, "FAILED", failed[case.name], flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
        else:
            print(case.name, rows[-1]["speed_against_best"], rows[-1]["best_rival"], flush=True)
        report.write(folder, about, machine, rows, failed)
        torch.compiler.reset()
    return rows, failed


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 where the tests passed, something was measured and nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=_ROOT / "results" / "gpu", help="the folder for the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="how long all of it may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that the program runs")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, and no tests on the device")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["FASTTX_TUNING"] = str(options.out / "tuning.json")
    os.environ["FASTTX_TUNE"] = "1"
    tested = None
    if not options.quick and options.device == "cuda":
        tested = tests.run(options.out, 60 * options.minutes * _TESTS_SHARE)
        print("tests on the device:", tested, f"(see {options.out / 'tests.txt'})", flush=True)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    size, side = (2**30, 8192) if options.device == "cuda" else (2**22, 128)
    machine = limits.measure(options.device, synchronize, size=size, side=side, seconds=0.05 if options.quick else 0.5)
    deadline = start + 60 * options.minutes - 30
    seconds = 0.01 if options.quick else 0.5
    cases, about = all_cases(options.device, options.quick), {"tests on the device": str(tested or "not run")}
    rows, failed = run(options.out, options.device, cases, machine, deadline, seconds, about)
    print(f"results in {options.out}")
    return 0 if rows and not failed and (tested is None or tested.is_good) else 1


if __name__ == "__main__":
    sys.exit(main())

"""python -m benchmarks.gpu: the tests on the device, tuning, benchmarks and a report, within ten minutes.

Results go to a folder: tests.txt, tuning.json, results.json, results.md. What was not reached in time is named.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from fasttx.measure import Interleaving, no_garbage_collection

from . import limits, report
from .cases import Case, Variant, agrees, all_cases

_ROOT = Path(__file__).parents[2]
_TESTS_SHARE = 0.4  # of the time
_ROUNDS = 20


def run_tests(folder: Path, seconds: float) -> bool:
    """The Triton kernels' tests on the device; those that do not end in time are stopped."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        str(_ROOT / "tests/gpu"),
        "-m",
        "emulated_full or not emulated_full",
    ]
    with (folder / "tests.txt").open("w") as output:
        try:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=_ROOT, timeout=seconds,
                env={**os.environ, "FASTTX_TEST_DEVICE": "cuda"}, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            output.write(f"\nstopped after {seconds:.0f} s\n")
            return False
    return done.returncode == 0


def measure(case: Case, device: str, machine: limits.Limits, seconds: float) -> report.Row:
    """Checks and times every variant of a case."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    offered: dict[str, Variant | str] = {"fasttx": case.fasttx, "eager": case.eager, **case.rivals}
    calls, errors, left_out = {}, {}, {}
    for name, variant in offered.items():
        if isinstance(variant, str):
            left_out[name] = variant
            continue
        try:
            errors[name] = agrees(case, variant)
            calls[name] = case.call(variant)
            calls[name]()
            synchronize()
        except Exception as error:  # a rival that cannot take the case; fasttx's own failure is a failure
            if name in ("fasttx", "eager"):
                raise
            calls.pop(name, None)
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    timing = Interleaving(calls, shortest_sample=1e-3, synchronize=synchronize)
    timing.warm_up(seconds / 4)
    end = time.perf_counter() + seconds
    with no_garbage_collection():
        for done in range(10 * _ROUNDS):
            if done >= _ROUNDS and time.perf_counter() > end:
                break
            timing.round()
    return report.row(case, timing.measurement(), errors, left_out, machine)


def run(
    folder: Path, device: str, cases: Iterable[Case], machine: limits.Limits, deadline: float, seconds: float
) -> list:
    """Measures cases until the deadline; the report is written after each, so that an interrupted run has one."""
    rows, about, skipped = [], report.environment(device), []
    for case in cases:
        if time.monotonic() > deadline:
            skipped.append(case.name)
            continue
        rows.append(measure(case, device, machine, seconds))
        print(case.name, rows[-1]["speed_against_best"], rows[-1]["best_rival"], flush=True)
        report.write(folder, about, machine, rows)
        torch.compiler.reset()
    if skipped:
        report.write(folder, about | {"not reached in time": ", ".join(skipped)}, machine, rows)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 where the tests passed and something was measured."""
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
    passed = True
    if not options.quick and options.device == "cuda":
        passed = run_tests(options.out, 60 * options.minutes * _TESTS_SHARE)
        print("tests:", "passed" if passed else "FAILED", f"(see {options.out / 'tests.txt'})", flush=True)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    size, side = (2**30, 8192) if options.device == "cuda" else (2**22, 128)
    machine = limits.measure(options.device, synchronize, size=size, side=side, seconds=0.05 if options.quick else 0.5)
    deadline = start + 60 * options.minutes - 30
    seconds = 0.01 if options.quick else 0.5
    rows = run(options.out, options.device, all_cases(options.device, options.quick), machine, deadline, seconds)
    print(f"results in {options.out}")
    return 0 if passed and rows else 1


if __name__ == "__main__":
    sys.exit(main())

"""`python -m fasttx compare`: every kernel's error against float64, beside eager PyTorch's own."""

import argparse
import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fasttx.cli import CommandError, console, need
from fasttx.cli.cases import CASES, OPS, Case
from fasttx.dispatch import UnsupportedError, extension, extension_missing
from fasttx.measure import Standard, Verdict

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Row:
    """One case in one dtype on one instruction set: verdicts by result, or why there are none."""

    case: Case
    dtype: str
    isa: str
    verdicts: Mapping[str, Verdict]
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and all(verdict.passed for verdict in self.verdicts.values())

    def worst(self, gradients: bool) -> tuple[str, Verdict] | None:
        """The gradient, or the output, that comes nearest to its budget or goes furthest beyond."""
        chosen = {n: v for n, v in self.verdicts.items() if n.startswith("d ") == gradients}
        if not chosen:
            return None
        name = max(chosen, key=lambda n: (not chosen[n].passed, chosen[n].error / chosen[n].budget))
        return name, chosen[name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--op, --dtype, --isa: each any number of times; all of them by default."""
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="ops to compare")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES), help="dtypes")
    parser.add_argument("--isa", nargs="+", help="instruction sets; all that this machine has")


def run(args: argparse.Namespace) -> int:
    """Compares and prints; 1 where anything is outside the budget."""
    screen = console()
    isas = _instruction_sets(args.isa)
    if extension is None:
        screen.print(f"There are no kernels to compare: {extension_missing}.")
        screen.print("What follows is the reference path in each dtype.")
    screen.print(
        "Largest absolute error against float64, on the same rounded inputs. Budget: twice eager "
        "PyTorch's error in the same dtype and one ulp of the largest value."
    )
    start, rows = time.perf_counter(), []
    with _as_before():
        # Waking threads takes longer than these small inputs do, and changes no bit.
        torch.set_num_threads(1)
        for op in dict.fromkeys(args.op):
            with screen.status(op):
                of_op = [
                    row
                    for case in CASES
                    if case.op == op
                    for dtype in dict.fromkeys(args.dtype)
                    for row in _rows(case, dtype, isas)
                ]
            screen.print(_table(op, of_op))
            rows += of_op
    failed = [row for row in rows if not row.passed]
    for row in failed:
        screen.print(_explanation(row), markup=False)
    verdict = "all pass" if not failed else f"{len(failed)} FAIL"
    screen.print(
        f"{len(rows)} comparisons ({len(set(args.op))} ops; {', '.join(dict.fromkeys(args.dtype))}; "
        f"{', '.join(isas)}) in {time.perf_counter() - start:.0f} s: {verdict}"
    )
    return 1 if failed else 0


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Puts threads, instruction set and random state back as they were."""
    threads = torch.get_num_threads()
    in_use = extension.isa() if extension else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        if extension:
            extension.set_isa(in_use)


def _instruction_sets(wanted: list[str] | None) -> list[str]:
    """Those to compare: "reference" alone where there is no extension."""
    if extension is None:
        if wanted:
            raise CommandError(f"no instruction set can be chosen: {extension_missing}")
        return ["reference"]
    present = [name for name, supported in extension.isas() if supported]
    for name in wanted or ():
        if name not in present:
            raise CommandError(f"this machine cannot use {name!r}, only {', '.join(present)}")
    return list(dict.fromkeys(wanted or present))


def _rows(case: Case, dtype: str, isas: list[str]) -> list[Row]:
    standard = case.standard(DTYPES[dtype])
    return [_row(case, dtype, isa, standard) for isa in isas]


def _row(case: Case, dtype: str, isa: str, standard: Standard) -> Row:
    backend = "reference"
    if extension:
        extension.set_isa(isa)
        backend = "cpu"
    try:
        return Row(case, dtype, isa, standard.judge(case.call(backend)))
    except UnsupportedError as error:
        return Row(case, dtype, isa, {}, str(error))
    except RuntimeError as error:
        # One kernel that breaks is a failure to report beside the others, not the end of them.
        return Row(case, dtype, isa, {}, f"raised: {error}")


def _table(op: str, rows: list[Row]):
    table = need("rich.table").Table(title=op, title_justify="left", title_style="bold")
    for name in ("case", "dtype", "ISA"):
        table.add_column(name, no_wrap=True)
    for name in ("forward", "eager", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst gradient", no_wrap=True)
    for name in ("error", "eager", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    previous = None
    for row in rows:
        key = (row.case.name, row.dtype)
        shown = key if key != previous else ("", "")
        if previous is not None and previous[0] != row.case.name:
            table.add_section()
        previous = key
        forward, gradient = row.worst(gradients=False), row.worst(gradients=True)
        table.add_row(
            *shown,
            row.isa,
            *(_numbers(forward[1]) if forward else ("", "", "")),
            gradient[0] if gradient else "",
            *(_numbers(gradient[1]) if gradient else ("", "", "")),
            "[green]pass[/]" if row.passed else "[bold red]FAIL[/]",
        )
    return table


def _numbers(verdict: Verdict) -> tuple[str, str, str]:
    return tuple(f"{x:.2e}" for x in (verdict.error, verdict.eager_error, verdict.budget))


def _explanation(row: Row) -> str:
    where = f"{row.case.op}, {row.case.name}, {row.dtype}, {row.isa}: "
    if row.failure is not None:
        return where + row.failure
    return where + "; ".join(f"{n}: {v}" for n, v in row.verdicts.items() if not v.passed)

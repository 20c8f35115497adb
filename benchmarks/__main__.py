"""`python -m benchmarks`: every op, layer and model against the best that PyTorch offers, and against its bar.

Each allocator's rows are measured in a process of their own, by pytest-benchmark (`pytest benchmarks`). A row whose
error is over budget shows no speed. `of machine` is the larger share of two limits measured in the same run: the
multiply-add peak in that dtype, and moving as many bytes. Exits with 1 where an error is over budget, with 2 where a
run broke off.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from . import allocators, report
from .row import passed
from .rows import OPS, STEMS

_ROOT = Path(__file__).parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("stems", nargs="*", help=f"of {', '.join(STEMS)}; or `ops`, the first {len(OPS)}")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="only rows of this dtype")
    parser.add_argument("--row", action="append", help="only rows with this in their name; may be repeated")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of each row")
    parser.add_argument("--threads", type=int, help="threads; PyTorch's default otherwise")
    parser.add_argument(
        "--allocators", choices=("current", "both", *allocators.LIBRARIES), default="current",
        help="current: whatever this process runs under; both: the system's, then tcmalloc",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="file to write everything to")
    parser.add_argument("--show", type=Path, nargs="+", help="measure nothing: show what --json wrote to these files")
    given = parser.parse_args(arguments)
    stems = [stem for name in given.stems for stem in (OPS if name == "ops" else (name,))]
    unknown = set(stems) - set(STEMS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 220
    runs = tuple(allocators.LIBRARIES) if given.allocators == "both" else (given.allocators,)
    reports = report.joined(json.loads(path.read_text()) for path in given.show or ())
    for name in () if given.show else runs:
        environment = dict(os.environ) if name == "current" else allocators.environment(name)
        if environment is None:
            console.print(f"{name}: not measured: {allocators.MISSING}")
            continue
        found = measure(pytest_options(given, stems), environment)
        if found is None:
            return 2
        reports[name] = found
    if given.json is not None:
        given.json.write_text(json.dumps(reports, indent=1))
    show(console, reports)
    if any("ended" in found for found in reports.values()):
        return 2
    return 0 if all(passed(row) for found in reports.values() for row in found["rows"]) else 1


def pytest_options(given: argparse.Namespace, stems: list[str]) -> list[str]:
    """What selects the same rows of test_rows.py."""
    options = [f"--seconds={given.seconds}"]
    options += [f"--threads={given.threads}"] if given.threads else []
    options += [f"--stem={stem}" for stem in stems]
    options += [f"--dtype={dtype}" for dtype in given.dtype or ()]
    return options + [f"--row={row}" for row in given.row or ()]


def measure(options: list[str], environment: dict[str, str]) -> dict | None:
    """One allocator's report; None, after pytest's own words, where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--benchmark-quiet", "-p",
                   "no:cacheprovider", "-v", "--tb=line", "--disable-warnings", f"--rows={rows}", *options]  # fmt: skip
        # The report is this process's output; how it is going is not.
        code = subprocess.run(command, cwd=_ROOT, env=environment, stdout=sys.stderr).returncode
        if not rows.exists():
            return None
        found = json.loads(rows.read_text())
        # 0 and 1 are pytest's for tests that passed and that failed: all of them ran.
        return found if code in (0, 1) else found | {"ended": f"exit code {code}"}


def show(console: Console, reports: dict) -> None:
    """Prints what was measured."""
    if not reports:
        return
    for line in report.machine_lines(reports):
        console.print(line)
    for table in (report.speed_table(reports), report.growth_table(reports)):
        if table is not None and table.row_count:
            console.print(table)
    console.print(report.summary(reports))


if __name__ == "__main__":
    sys.exit(main())

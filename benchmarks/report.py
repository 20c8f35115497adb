"""The tables: what was measured under each allocator, beside the bars."""

from collections.abc import Iterable, Iterator, Mapping

from rich.table import Table

from .row import passed

_OTHERS = 0.1  # of the processors' time, from which on other processes are worth a word
Report = Mapping[str, Mapping]  # by allocator, what conftest.py wrote


def joined(runs: Iterable[Report]) -> dict[str, dict]:
    """Several runs as one: of a row that was measured twice, the later; the machine as the first run found it."""
    reports = {}
    for run in runs:
        for name, report in run.items():
            first = reports.setdefault(name, {**report, "rows": []})
            rows = {row["id"]: row for row in (*first["rows"], *report["rows"])}
            first["rows"] = list(rows.values())
    return reports


def met(check: Mapping, at_least: bool = True) -> bool:
    """Whether a value with a bar clears it: by its median, whose interval is shown beside."""
    return check["value"] >= check["bar"] if at_least else check["value"] <= check["bar"]


def judging(reports: Report) -> str:
    """The allocator whose figures are held to the bars: tcmalloc, the harder case, where it was measured."""
    return "tcmalloc" if "tcmalloc" in reports else next(iter(reports))


def outcomes(reports: Report) -> list[tuple[str, bool]]:
    """For every bar that was measured, its row's id with what is barred, and whether it is met."""
    found = []
    for row, _ in _aligned(reports):
        for what in ("ratio", "roofline", "growth"):
            check = row.get(what)
            if check is not None and check["bar"] is not None:
                found.append((f"{row['id']} {what}", met(check, at_least=what != "growth")))
    return found


def speed_table(reports: Report) -> Table:
    """A line for every row that is compared with somebody."""
    table = Table(title="times the fastest rival's speed, with 95 % intervals", title_justify="left")
    for heading in ("row", "shape", "dtype", "error", "allowed", "rival", "rival ms", "fasttx ms"):
        table.add_column(heading, no_wrap=heading != "row")
    for name in reports:
        table.add_column(f"ratio, {name}", no_wrap=True)
    for heading in ("bar", "met", "of machine", "bar", "met"):
        table.add_column(heading, no_wrap=True)

    previous = None
    for row, same in _aligned(reports):
        if "growth" in row:
            continue
        if previous not in (None, row["op"]):
            table.add_section()
        previous = row["op"]
        table.add_row(*_speed_cells(row, same), style=None if passed(row) else "red")
    return table


def _aligned(reports: Report) -> Iterator[tuple[Mapping, list[Mapping]]]:
    """Every row as it is judged, and as each allocator has it: empty where it was not run."""
    by_id = {name: {row["id"]: row for row in report["rows"]} for name, report in reports.items()}
    first = [by_id[judging(reports)], *by_id.values()]
    for id in dict.fromkeys(id for rows in first for id in rows):
        yield next(rows[id] for rows in first if id in rows), [rows.get(id, {}) for rows in by_id.values()]


def _speed_cells(row: Mapping, by_allocator: list[Mapping]) -> list[str]:
    cells = [f"{row['op']} {row['name']}", row["shape"], row["dtype"]]
    for problem in ("not_measured", "failed"):
        if problem in row:
            return [*cells, "", "", f"{problem.replace('_', ' ')}: {row[problem]}"]
    error = row["error"]
    cells += [f"{error['value']:.1e}", f"{error['budget']:.1e}"]
    if not error["passed"]:
        return [*cells, error["misplaced"] or "over budget: no speed"]
    times = (row["times"][name]["value"] * 1e3 for name in (row["rival"], "fasttx"))
    cells += [row["rival"], *(f"{time:.3f}" for time in times)]
    cells += [_interval(same["ratio"]) if "ratio" in same else "" for same in by_allocator]
    cells += _bar(row["ratio"], ".2f")
    share = row["roofline"]
    return [*cells, f"{share['value']:.0%}", *_bar(share, ".0%")]


def _interval(check: Mapping) -> str:
    return f"{check['value']:.2f} [{check['low']:.2f}, {check['high']:.2f}]"


def _bar(check: Mapping, spec: str, at_least: bool = True) -> list[str]:
    if check["bar"] is None:
        return ["", ""]
    return [format(check["bar"], spec), "yes" if met(check, at_least) else "[bold]NO[/]"]


def growth_table(reports: Report) -> Table | None:
    """Memory and time per token, which must not grow; None where there are no such rows."""
    rows = [(row, same) for row, same in _aligned(reports) if "growth" in row]
    if not rows:
        return None
    table = Table("row", "shape", "dtype", *reports, "at most", "met", title="growth", title_justify="left")
    for row, same in rows:
        unit = row["growth"]["unit"]
        cells = [f"{_interval(found['growth'])} {unit}" if "growth" in found else "" for found in same]
        table.add_row(
            f"{row['op']} {row['name']}", row["shape"], row["dtype"], *cells, *_bar(row["growth"], "g", at_least=False)
        )
    return table


def machine_lines(reports: Report) -> list[str]:
    """What ran where, and the limits of each run."""
    lines = []
    for name, report in reports.items():
        limits = report["machine"]
        peaks = ", ".join(
            f"{dtype} {peak['flops_per_second'] / 1e9:.0f} GFLOP/s ({peak['isa']})"
            for dtype, peak in limits["peak"].items()
        )
        lines += [
            *report["about"],
            f"{name}: multiply-add peak {peaks}; copy {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
            f"read {limits['read_bytes_per_second'] / 1e9:.0f} GB/s",
        ]
    return list(dict.fromkeys(lines))


def summary(reports: Report) -> str:
    """How many bars are met, and which are not."""
    checks = outcomes(reports)
    missed = [name for name, cleared in checks if not cleared]
    text = f"{len(checks) - len(missed)} of {len(checks)} bars met under {judging(reports)}"
    text += "".join(f"\n  not met: {name}" for name in missed)
    for name, report in reports.items():
        if "ended" in report:
            text += f"\n{name}: the run ended early: {report['ended']}"
    disturbed = sorted({row["id"] for report in reports.values() for row in report["rows"] if _disturbed(row)})
    return text + "".join(f"\n  other processes were busy during: {name}" for name in disturbed)


def _disturbed(row: Mapping) -> bool:
    return (row.get("others") or 0.0) > _OTHERS

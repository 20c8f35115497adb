"""What `pytest benchmarks` takes, and the rows that it leaves in a file; `python -m benchmarks` runs it."""

import json
from pathlib import Path

import pytest
import torch

from fasttx.cli.machine import allocator, summary
from fasttx.dispatch import extension, extension_missing

from . import machine, rows


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fasttx's benchmarks")
    group.addoption("--stem", action="append", choices=rows.STEMS, help="an op, layer or model; may be repeated")
    group.addoption("--dtype", action="append", default=[], choices=("float32", "bfloat16"), help="only rows of it")
    group.addoption("--row", action="append", default=[], help="only rows with this in their name; may be repeated")
    group.addoption("--seconds", type=float, default=1.0, help="measuring time of each row")
    group.addoption("--threads", type=int, help="threads; PyTorch's default otherwise")
    group.addoption("--rows", type=Path, help="file for the rows and the machine's limits, as JSON")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        cases = rows.select(option("stem") or rows.STEMS, option("dtype"), option("row"))
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest):
    """What this run finds, written to --rows after every row, so that an interrupted run leaves something."""
    if threads := request.config.getoption("threads"):
        torch.set_num_threads(threads)
    return {"allocator": allocator(), "about": list(summary()), "machine": None, "rows": []}


@pytest.fixture(scope="session")
def limits(report) -> machine.Machine:
    """The machine's limits; measuring them warms the process up."""
    if extension is None:
        pytest.skip(extension_missing)
    found = machine.measure()
    report["machine"] = found.as_dict()
    return found


@pytest.fixture
def keep(request: pytest.FixtureRequest, report):
    """keep(row): adds it to the report."""
    path = request.config.getoption("rows")

    def keep(row) -> None:
        report["rows"].append(row)
        if path is not None:
            path.write_text(json.dumps(report, indent=1))

    return keep

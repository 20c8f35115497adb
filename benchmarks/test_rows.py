"""Every row as a test of pytest-benchmark: one round times each of the row's variants once, in random order.

So its statistics are those of a round; each variant's times are in `extra_info`. A row fails when its error is over
budget, and is then not timed; bars are the report's business.
"""

import pytest

from .case import NotMeasured
from .row import identity, measure, passed


def test_row(case, benchmark, limits, keep, pytestconfig):
    row = identity(case)
    try:
        row |= measure(
            case, limits, pytestconfig.getoption("seconds"), lambda target, n: benchmark.pedantic(target, rounds=n)
        )
    except NotMeasured as reason:
        row["not_measured"] = str(reason)
        pytest.skip(str(reason))
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        keep(row)
    benchmark.extra_info.update(row)
    assert passed(row), f"over budget: {row['error']}"

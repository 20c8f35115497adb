"""The Triton kernels' tests, run on the device: the sample that `make test` runs here first, then all others."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_MOST_PROCESSES = 8  # each compiles its kernels on the CPU, which takes longer than to run them


@dataclass(frozen=True)
class Outcome:
    """How many tests passed and failed, and after how many seconds the rest was stopped (None: nothing was)."""

    passed: int
    failed: int
    stopped: float | None = None

    @property
    def is_good(self) -> bool:
        """Whether some passed and none failed; what time did not suffice for counts for neither."""
        return self.passed > 0 and self.failed == 0

    def __str__(self) -> str:
        rest = "" if self.stopped is None else f", the others were stopped after {self.stopped:.0f} s"
        return f"{self.passed} passed, {self.failed} failed{rest}"


def command(marker: str) -> list[str]:
    """pytest over the kernels' tests with that marker, which prints a line for each."""
    processes = str(max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2)))
    return [
        sys.executable, "-m", "pytest", "-v", "--tb=short", "-n", processes, str(_ROOT / "tests/gpu"), "-m", marker
    ]  # fmt: skip


def run(folder: Path, seconds: float, commands: list[list[str]] | None = None) -> Outcome:
    """Runs them for so many seconds at most; what pytest prints goes to tests.txt."""
    end, file, crashed, stopped = time.monotonic() + seconds, folder / "tests.txt", 0, None
    with file.open("w") as output:
        for arguments in commands or [command("not emulated_full"), command("emulated_full")]:
            process = subprocess.Popen(
                arguments, stdout=output, stderr=subprocess.STDOUT, cwd=_ROOT,
                env={**os.environ, "FASTTX_TEST_DEVICE": "cuda", "PYTHONUNBUFFERED": "1"}, start_new_session=True,
            )  # fmt: skip
            try:
                # 1: some failed, which are counted; 5: there are none.
                crashed += process.wait(timeout=max(end - time.monotonic(), 0)) not in (0, 1, 5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
                process.wait()
                stopped = seconds
                break
    words = re.findall(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR)", file.read_text(), re.MULTILINE)
    passed = words.count("PASSED")
    return Outcome(passed, max(len(words) - passed, crashed), stopped)

"""What this machine can do at most, measured in the same run as everything else, and on as many threads."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fasttx.dispatch import extension
from fasttx.measure import interleave

from .case import DTYPES, Case, dtype_name

_STEPS = 10_000  # of the multiply-add loop, to see how long they take
_LOOP_SECONDS = 2e-3  # long beside the waking of threads
_BLOCK = 2**28  # bytes: more than caches hold
_BRIEFLY = 0.05  # seconds
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Limit:
    """A call, and how many FLOP or bytes it is."""

    call: Callable[[], object]
    amount: float


@dataclass(frozen=True)
class Machine:
    """Rates in FLOP and bytes a second, the latter of a block that no cache holds.

    `isas` names, by dtype, the instruction set whose products are fastest.
    """

    peak: dict[torch.dtype, float]
    isas: dict[torch.dtype, str]
    copy: float
    read: float

    def least_seconds(self, case: Case) -> float:
        """No faster than its multiply-adds, nor than moving a block as large as all that it reads and writes once."""
        return max(case.flops / self.peak[case.dtype], case.bytes / _rate(_moving(case), _BRIEFLY))

    def limit(self, case: Case) -> Limit:
        """What a row with a roofline bar is timed beside: its limit, for memory on a block as large as its own data."""
        return _multiply_adds(self.isas[case.dtype], case.dtype) if case.limit == "flops" else _moving(case)

    def as_dict(self) -> dict[str, object]:
        """For the report."""
        peak = {
            dtype_name(dtype): {"flops_per_second": rate, "isa": self.isas[dtype]} for dtype, rate in self.peak.items()
        }
        return {
            "peak": peak,
            "copy_bytes_per_second": self.copy,
            "read_bytes_per_second": self.read,
        }


def measure(seconds: float = 0.5) -> Machine:
    """Warms the process up on the way: all of it runs for more than a second."""
    isas = [name for name, present in extension.isas() if present]
    peak, fastest = {}, {}
    for dtype in DTYPES:
        loops = {isa: _multiply_adds(isa, dtype) for isa in isas}
        timed = interleave({isa: loop.call for isa, loop in loops.items()}, seconds=seconds)
        rates = {isa: loop.amount / timed.median(isa).value for isa, loop in loops.items()}
        fastest[dtype] = max(rates, key=rates.get)
        peak[dtype] = rates[fastest[dtype]]
    return Machine(peak, fastest, copy=_rate(_copying(_BLOCK), seconds), read=_rate(_reading(_BLOCK), seconds))


def _rate(limit: Limit, seconds: float) -> float:
    return limit.amount / interleave({"it": limit.call}, seconds=seconds, warm_up=seconds).median("it").value


def _moving(case: Case) -> Limit:
    return (_reading if case.limit == "read" else _copying)(int(case.bytes))


def _multiply_adds(isa: str, dtype: torch.dtype) -> Limit:
    index = extension.dtypes.index(dtype_name(dtype))
    threads = torch.get_num_threads()
    out = torch.empty(threads, dtype=torch.float64)
    args = extension.Peak()
    args.items, args.steps, args.out = threads, _STEPS, out.data_ptr()

    def call() -> Tensor:
        extension.launch_peak(isa, index, args)
        return out

    once = interleave({"loop": call}, seconds=0.0, warm_up=0.0).median("loop").value
    args.steps = max(_STEPS, int(_STEPS * _LOOP_SECONDS / once))
    return Limit(call, extension.peak_step_flops(isa, index) * args.steps * threads)


def _copying(size: int) -> Limit:
    """`size` bytes, half of them read and half written."""
    source = torch.ones(size // 8)
    target = torch.empty_like(source)
    return Limit(lambda: target.copy_(source), 2 * source.nbytes)


def _reading(size: int) -> Limit:
    """About `size` bytes: whole chunks."""
    chunks = max(1, size // (4 * extension.read_chunk))
    source, sums = torch.ones(chunks * extension.read_chunk), torch.empty(chunks)
    args = extension.Read()
    args.x, args.count, args.sums = source.data_ptr(), source.numel(), sums.data_ptr()

    def call() -> tuple[Tensor, Tensor]:
        extension.launch_read(extension.isa(), 0, args)
        return source, sums

    return Limit(call, source.nbytes)


class OtherLoad:
    """How much of the processors' time goes to other processes, from now on: it is no time to measure then."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """None where the system does not tell."""
        if not _STAT.exists():
            return None
        busy, idle, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / max(busy + idle, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of all processors busy, and idle, and busy for this process and its children."""
        if not _STAT.exists():
            return 0.0, 0.0, 0.0
        # user nice system idle iowait irq softirq steal, in ticks; the last is the host's other guests.
        ticks = [int(count) / os.sysconf("SC_CLK_TCK") for count in _STAT.read_text().split(maxsplit=9)[1:9]]
        idle = ticks[3] + ticks[4]
        return sum(ticks) - idle, idle, sum(os.times()[:4]) + _children_seconds()


def _children_seconds() -> float:
    """Of processors, for children that still run: those that ended are in os.times()."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, in brackets: state, parent, ..., and at 11 and 12 user and system ticks.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")

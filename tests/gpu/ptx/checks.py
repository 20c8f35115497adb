"""Who wrote and who read each byte: initialisation and races, by vector clocks.

Shared memory: the agents are the warps of a CTA. Each has a clock of every other's progress that it knows of; barriers
join clocks. Two accesses of which one writes race unless the earlier one's clock is known to the later one's warp.
Within a warp, another lane's write must be followed by a barrier of the warp. Data of cp.async may not be touched
before the wait, nor operands of wgmma written before theirs, and wgmma sees writes only through a proxy fence.

The copies that arrive at an mbarrier are an agent too, whose clock counts the barrier's phases: a warp knows of them
once it has waited for the phase, or has it from one that did. Arrivals leave their warp's clock with the barrier, where
waits find it.

Global memory: the agents are CTAs, which nothing orders but acquire-release atomics.
"""

import numpy as np

from .errors import CheckFailed
from .memory import GlobalMemory

_WARP_BITS = 6


class SharedShadow:
    """State per granule (the smallest access of the kernel) of the shared memory of a batch of CTAs."""

    def __init__(self, ctas: int, stride: int, granule: int, warps: int, copiers: int, registers):
        """copiers: how many mbarriers there may be of a CTA, agents that are numbered after the warps."""
        self.granule, self.warps, self.ctas, self.copiers = granule, warps, ctas, copiers
        agents = warps + copiers
        count = ctas * stride // granule
        self.initialised = np.zeros(count, bool)
        self.writer = np.zeros(count, np.int32)  # clock << _WARP_BITS | warp
        self.writer_lane = np.zeros(count, np.uint8)
        self.reads = np.zeros((count, warps), np.int32)  # the clock of each warp's last read
        self.copying = np.zeros(count, np.int16)  # cp.async under way
        self.reading = np.zeros(count, np.int16)  # wgmma under way
        self.clock = np.zeros((ctas, warps, agents), np.int32)
        self.fenced = np.zeros_like(self.clock)  # what is known to have passed a proxy fence
        # By mbarrier, what its phase's arrivals released, and what phases that are complete did: clock and fenced.
        self.arriving = np.zeros((2, ctas, copiers, agents), np.int32)
        self.released = np.zeros_like(self.arriving)
        self.objects = np.zeros(count if copiers else 0, bool)  # bytes of mbarriers
        self.lane = registers.lane.astype(np.uint8)
        self.warp = registers.warp
        self.cta = registers.cta
        self._row = (self.cta * warps + self.warp) * agents
        self._diagonal = np.arange(warps)

    def reset(self) -> None:
        self.initialised.fill(False)
        for array in (self.writer, self.reads, self.copying, self.reading, self.clock, self.fenced):
            array.fill(0)
        for array in (self.arriving, self.released, self.objects):
            array.fill(0)
        self.clock[:, self._diagonal, self._diagonal] = 1
        self._clocks_changed()

    def _clocks_changed(self) -> None:
        own = self.clock[self.cta, self.warp, self.warp]
        self.own = own
        self.key = (own << _WARP_BITS) | self.warp.astype(np.int32)
        # Every warp knows of every other's progress up to here: accesses no later need no further look.
        self._floor = int(self.clock[:, :, : self.warps].min())

    def join(self, arrived: np.ndarray) -> None:
        """A barrier of the warps marked in arrived (ctas, warps)."""
        for cta in np.flatnonzero(arrived.any(1)):
            warps = np.flatnonzero(arrived[cta])
            for table in (self.clock, self.fenced):
                table[cta, warps] = table[cta, warps].max(0)
            self.clock[cta, warps, warps] += 1
        self._clocks_changed()

    def join_all(self) -> None:
        """A barrier of all warps of all CTAs."""
        for table in (self.clock, self.fenced):
            table[:] = table.max(1, keepdims=True)
        self.clock[:, self._diagonal, self._diagonal] += 1
        self._clocks_changed()

    def tick(self, warps: np.ndarray) -> None:
        """A barrier within each warp marked in warps (ctas, warps)."""
        cta, warp = np.nonzero(warps)
        self.clock[cta, warp, warp] += 1
        self._clocks_changed()

    def fence_proxy(self, warps: np.ndarray) -> None:
        """What the marked warps know of has passed a proxy fence."""
        cta, warp = np.nonzero(warps)
        self.fenced[cta, warp] = self.clock[cta, warp]
        self.clock[cta, warp, warp] += 1
        self._clocks_changed()

    def granules(self, offsets: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """The granules of accesses at byte offsets into the batch's memory, and how many each has."""
        count = max(size // self.granule, 1)
        first = offsets // self.granule
        return (first if count == 1 else (first[:, None] + np.arange(count)).ravel()), count

    def _known(self, lanes: np.ndarray, warp: np.ndarray, clock: np.ndarray) -> np.ndarray:
        return self.clock.ravel()[self._row[lanes] + warp] >= clock

    def require_initialised(self, granules: np.ndarray) -> None:
        if not self.initialised[granules].all():
            count = int(np.count_nonzero(~self.initialised[granules]))
            raise CheckFailed("uninitialised shared memory", f"{count * self.granule} bytes read were never written")

    def read(self, granules: np.ndarray, lanes: np.ndarray) -> None:
        """Checks and records reads; `lanes` says whose each granule is."""
        self.require_initialised(granules)
        self._require_no_object(granules)
        self._check_writer(granules, lanes, "read")
        self.reads[granules, self.warp[lanes]] = self.own[lanes]

    def _require_no_object(self, granules: np.ndarray) -> None:
        if self.copiers and self.objects[granules].any():
            raise CheckFailed("mbarrier", "its bytes are touched by something that is no operation on it")

    def _check_writer(self, granules: np.ndarray, lanes: np.ndarray, what: str) -> None:
        if self.copying[granules].any():
            raise CheckFailed("asynchronous copy", f"{what} of bytes that cp.async may still be writing")
        writer = self.writer[granules]
        own = writer == self.key[lanes]
        if own.any():
            other = own & (self.writer_lane[granules] != self.lane[lanes])
            if other.any():
                first = np.flatnonzero(other)[0]
                raise CheckFailed(
                    "warp race",
                    f"{what} by lane {self.lane[lanes[first]]} of what lane {self.writer_lane[granules[first]]} "
                    "of the same warp wrote, with no barrier of the warp between",
                )
        if not self.copiers and int(writer.max()) >> _WARP_BITS <= self._floor:
            return
        warp, clock = writer & ((1 << _WARP_BITS) - 1), writer >> _WARP_BITS
        race = ~self._known(lanes, warp, clock)
        if race.any():
            first = np.flatnonzero(race)[0]
            if warp[first] >= self.warps:
                raise CheckFailed(
                    "asynchronous copy",
                    f"{what} by warp {self.warp[lanes[first]]} of {int(race.sum()) * self.granule} bytes that a bulk "
                    "copy may still be writing: the phase of its mbarrier was not waited for",
                )
            raise CheckFailed(
                "shared race",
                f"{what} by warp {self.warp[lanes[first]]} of what warp {warp[first]} wrote with no barrier between "
                f"({int(race.sum()) * self.granule} bytes)",
            )

    def check_write(self, granules: np.ndarray, lanes: np.ndarray) -> None:
        """Raises where a write now would race with an earlier access."""
        self._check_writer(granules, lanes, "overwriting")
        self._require_no_object(granules)
        if self.reading[granules].any():
            raise CheckFailed("asynchronous read", "overwriting an operand of a wgmma that was not waited for")
        reads = self.reads[granules]
        if int(reads.max()) <= self._floor:
            return
        known = self.clock[self.cta[lanes], self.warp[lanes], : self.warps]
        race = reads > known
        if race.any():
            first, warp = np.argwhere(race)[0]
            raise CheckFailed(
                "shared race",
                f"overwriting by warp {self.warp[lanes[first]]} of what warp {warp} read with no barrier between "
                f"({int(race.any(1).sum()) * self.granule} bytes)",
            )

    def write(self, granules: np.ndarray, lanes: np.ndarray) -> None:
        """Checks and records writes, also against each other."""
        self.check_write(granules, lanes)
        self.record_write(granules, lanes)

    def record_write(self, granules: np.ndarray, lanes: np.ndarray) -> None:
        self.writer[granules] = self.key[lanes]
        self.writer_lane[granules] = self.lane[lanes]
        self.initialised[granules] = True

    def end_wgmma(self, granules: np.ndarray, first_lane: int) -> None:
        """A wgmma was waited for: each warp of its group has read the operand by now, and knows so of itself only."""
        self.reading[granules] -= 1
        for lane in range(first_lane, first_lane + 128, 32):
            self.reads[granules, self.warp[lane]] = self.own[lane]

    def read_by_wgmma(self, granules: np.ndarray, lane: int) -> None:
        """Checks the operand of a wgmma, which lane's warp begins."""
        self.read(granules, np.full(granules.size, lane))
        if not self.is_fenced(granules, lane):
            raise CheckFailed("proxy fence", "wgmma reads what was written with no fence.proxy.async since")

    def is_fenced(self, granules: np.ndarray, lane: int) -> bool:
        """Whether what was written has passed a proxy fence that lane's warp knows of."""
        writer = self.writer[granules]
        warp, clock = writer & ((1 << _WARP_BITS) - 1), writer >> _WARP_BITS
        return not (self.fenced[self.cta[lane], self.warp[lane]][warp] < clock).any()

    def write_by_copy(self, granules: np.ndarray, lane: int, agent: int, phase: int) -> None:
        """Checks and records what a bulk copy writes that lane begins, by the phase of the mbarrier's agent."""
        self.check_write(granules, np.full(granules.size, lane))
        if not self.is_fenced(granules, lane):
            raise CheckFailed("proxy fence", "a bulk copy overwrites what was written with no fence.proxy.async since")
        self.writer[granules] = phase << _WARP_BITS | agent
        self.initialised[granules] = True

    def begin_object(self, granules: np.ndarray, lane: int) -> None:
        """The bytes become an mbarrier."""
        self.write(granules, np.full(granules.size, lane))
        self.objects[granules] = True

    def end_object(self, granules: np.ndarray, lane: int) -> None:
        """The mbarrier becomes bytes again, of no value."""
        self.objects[granules] = False
        self.write(granules, np.full(granules.size, lane))
        self.initialised[granules] = False

    def use_object(self, granules: np.ndarray, lane: int) -> None:
        """An operation on an mbarrier that must know that it was initialised, and not meet its end."""
        self._check_writer(granules, np.full(granules.size, lane), "use")
        self.reads[granules, self.warp[lane]] = self.own[lane]

    def release(self, lane: int, agent: int) -> None:
        """Leaves what lane's warp knows with the mbarrier's phase."""
        cta, warp = self.cta[lane], self.warp[lane]
        arriving = self.arriving[:, cta, agent - self.warps]
        for table, left in zip((self.clock, self.fenced), arriving, strict=True):
            np.maximum(left, table[cta, warp], out=left)
        self.clock[cta, warp, warp] += 1
        self._clocks_changed()

    def complete(self, cta: int, agent: int, phase: int) -> None:
        """The mbarrier's phase is complete, and with it its copies."""
        arriving, released = (table[:, cta, agent - self.warps] for table in (self.arriving, self.released))
        np.maximum(released, arriving, out=released)
        released[:, agent] = phase
        arriving.fill(0)

    def knows_phase(self, lane: int, agent: int, copies: bool) -> bool:
        """Whether lane's warp knows of all arrivals of the mbarrier's complete phases, and of the last one's copies."""
        cta = self.cta[lane]
        known, released = self.clock[cta, self.warp[lane]], self.released[0, cta, agent - self.warps]
        arrivals = (known[: self.warps] >= released[: self.warps]).all()
        return bool(arrivals and (not copies or known[agent] >= released[agent]))

    def acquire(self, lane: int, agent: int) -> None:
        """Lane's warp has waited for a phase, the last that is complete."""
        cta, warp = self.cta[lane], self.warp[lane]
        for table, found in zip((self.clock, self.fenced), self.released[:, cta, agent - self.warps], strict=True):
            np.maximum(table[cta, warp], found, out=table[cta, warp])
        self._clocks_changed()


class GlobalShadow:
    """The last writer and reader of each granule of global memory, CTAs numbered from 1."""

    MANY = -1
    ATOMIC = -2

    def __init__(self, memory: GlobalMemory, granule: int):
        self.granule = granule
        self._starts = np.array([a.address // granule * granule for a in memory.allocations], np.int64)
        sizes = np.array([-(-a.size // granule) + 2 for a in memory.allocations], np.int64)
        self._places = np.concatenate([[0], np.cumsum(sizes)])
        total = int(self._places[-1])
        self.writer = np.zeros(total, np.int32)
        self.reader = np.zeros(total, np.int32)
        self.memory = memory
        # What each CTA has acquired: the CTAs that released to it; and what each address has been released with.
        self._acquired: dict[int, set[int]] = {}
        self._released: dict[int, set[int]] = {}

    def granules(self, addresses: np.ndarray, size: int) -> np.ndarray:
        found = np.searchsorted(self._starts, addresses, side="right") - 1
        first = (addresses - self._starts[found]) // self.granule + self._places[found]
        count = max(size // self.granule, 1)
        return first if count == 1 else (first[:, None] + np.arange(count)).ravel()

    def _race(self, other: np.ndarray, ctas: np.ndarray, what: str, addresses: np.ndarray, size: int) -> None:
        conflict = np.flatnonzero((other != 0) & (other != ctas))
        for i in conflict:
            first, second = int(other[i]), int(ctas[i])
            if first > 0 and first in self._acquired.get(second, ()):
                continue
            who = {self.MANY: "several programs", self.ATOMIC: "an atomic of another program"}.get(first)
            place = self.memory.describe(int(addresses[i * len(addresses) // len(other)]))
            raise CheckFailed("global race", f"program {second - 1} {what} {who or f'program {first - 1}'}, at {place}")

    def read(self, addresses: np.ndarray, size: int, ctas: np.ndarray) -> None:
        granules, ctas = self._expand(addresses, size, ctas)
        writer = self.writer[granules]
        if writer.any():
            self._race(writer, ctas, "reads what was written by", addresses, size)
        reader = self.reader[granules]
        self.reader[granules] = np.where((reader == 0) | (reader == ctas), ctas, self.MANY)
        # Several CTAs of this very instruction may have read the same bytes.
        self.reader[granules] = np.where(self.reader[granules] == ctas, ctas, self.MANY)

    def write(self, addresses: np.ndarray, size: int, ctas: np.ndarray) -> None:
        granules, ctas = self._expand(addresses, size, ctas)
        writer = self.writer[granules]
        if writer.any():
            self._race(writer, ctas, "overwrites what was written by", addresses, size)
        reader = self.reader[granules]
        if reader.any():
            self._race(reader, ctas, "overwrites what was read by", addresses, size)
        self.writer[granules] = ctas
        self._race(self.writer[granules], ctas, "writes the same bytes as", addresses, size)

    def atomic(self, addresses: np.ndarray, size: int, ctas: np.ndarray) -> None:
        """Atomics race with plain accesses only."""
        granules, ctas = self._expand(addresses, size, ctas)
        writer = self.writer[granules]
        self._race(np.where(writer == self.ATOMIC, 0, writer), ctas, "updates what was written by", addresses, size)
        self.writer[granules] = np.where(writer == 0, self.ATOMIC, writer)

    def synchronise(self, addresses: np.ndarray, ctas: np.ndarray, acquire: bool, release: bool) -> None:
        """An atomic with acquire or release semantics orders its program after those that released to its address."""
        for address, cta in sorted({(int(a), int(c)) for a, c in zip(addresses, ctas, strict=True)}):
            known = self._acquired.setdefault(cta, set())
            if acquire:
                known |= self._released.get(address, set())
            if release:
                self._released.setdefault(address, set()).update(known | {cta})

    def _expand(self, addresses: np.ndarray, size: int, ctas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        granules = self.granules(addresses, size)
        return granules, np.repeat(ctas, len(granules) // len(addresses)) if len(granules) != len(addresses) else ctas

    def touched(self) -> tuple[int, int]:
        """Distinct bytes read and written: what must move even with a perfect cache."""
        return (
            int(np.count_nonzero(self.reader)) * self.granule,
            int(np.count_nonzero(self.writer)) * self.granule,
        )

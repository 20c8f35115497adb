"""mbarrier: barriers that lie in shared memory and count arrivals and bytes (PTX ISA, "mbarrier").

A phase is complete once its arrivals and its bytes are. Arriving releases what the warp has done, and a wait that
succeeds acquires what was released in the phases up to it. A warp whose wait fails is not run again before a phase of
its CTA has completed, unless nobody else can go on. With checks, the first wait of a warp for a phase that it does not
know to be complete fails, as it may on the hardware: one that is not repeated is found out.
"""

from dataclasses import dataclass

import numpy as np

from .errors import CheckFailed, PTXError
from .instructions import Mask, Operation, instruction, lanes_of, store
from .load_store import bind_address
from .parser import Register

MOST = 32  # barriers of one CTA
_SIZE = 8
_MOST_BYTES = (1 << 20) - 1
_MOST_ARRIVALS = (1 << 20) - 1


@dataclass
class MemoryBarrier:
    """One object: what its phase still waits for, and the agent (checks.py) that copies to be counted by it are."""

    offset: int
    agent: int
    count: int
    pending: int
    initialiser: int
    completed: int  # phases, of all barriers that have lain here
    fenced: bool = False
    bytes: int = 0
    phase: int = 0
    copying: bool = False  # whether copies arrive in this phase
    copied: bool = False  # and in the last


class MemoryBarriers:
    """The barriers of a batch of CTAs."""

    def __init__(self, machine):
        self.machine = machine
        self._live: list[dict[int, MemoryBarrier]] = []
        self._ever: list[dict[int, MemoryBarrier]] = []
        self._waits: dict[int, tuple[int, MemoryBarrier]] = {}  # by warp: where, and for what
        self._refused: set[tuple[int, int, int]] = set()  # warp, agent and phase

    def reset(self) -> None:
        self._live = [{} for _ in range(self.machine.ctas)]
        self._ever = [{} for _ in range(self.machine.ctas)]
        self._waits.clear()
        self._refused.clear()

    def initialise(self, lane: int, offset: int, count: int) -> None:
        machine, cta = self.machine, int(self.machine.registers.cta[lane])
        self._check_place(offset)
        if not 1 <= count <= _MOST_ARRIVALS:
            raise CheckFailed("mbarrier", f"initialised for {count} arrivals")
        if offset in self._live[cta]:
            raise CheckFailed("mbarrier", f"initialised at {offset}, where there is one")
        before = self._ever[cta].get(offset)
        agent = machine.threads // 32 + len(self._ever[cta]) if before is None else before.agent
        if agent >= machine.threads // 32 + MOST:
            raise PTXError(f"more than {MOST} mbarriers are not implemented")
        barrier = MemoryBarrier(
            offset, agent, count, count, int(machine.registers.warp[lane]), before.completed if before else 0
        )
        self._live[cta][offset] = self._ever[cta][offset] = barrier
        if machine.shadow:
            machine.shadow.begin_object(self._granules(lane, offset), lane)

    def invalidate(self, lane: int, offset: int) -> None:
        self.find(lane, offset)
        if self.machine.shadow:
            self.machine.shadow.end_object(self._granules(lane, offset), lane)
        del self._live[int(self.machine.registers.cta[lane])][offset]

    def find(self, lane: int, offset: int, by_copy: bool = False) -> MemoryBarrier:
        """The barrier at an address, which lane's thread, or a copy that it begins, may use by now."""
        machine, cta = self.machine, int(self.machine.registers.cta[lane])
        self._check_place(offset)
        barrier = self._live[cta].get(offset)
        if barrier is None:
            raise CheckFailed("mbarrier", f"there is none at {offset}")
        if machine.shadow:
            granules = self._granules(lane, offset)
            machine.shadow.use_object(granules, lane)
            if by_copy and not barrier.fenced and not machine.shadow.is_fenced(granules, lane):
                raise CheckFailed("proxy fence", "a copy arrives at a barrier initialised with no fence since")
        return barrier

    def fence(self, warps: np.ndarray) -> None:
        """fence.mbarrier_init by the warps marked in (ctas, warps)."""
        for cta, warp in np.argwhere(warps).tolist():
            for barrier in self._live[cta].values():
                barrier.fenced |= barrier.initialiser == warp

    def arrive(self, lane: int, barrier: MemoryBarrier, count: int) -> int:
        """Returns the state: the phase arrived at."""
        if count > barrier.pending or count < 1:
            raise CheckFailed(
                "mbarrier", f"{count} arrivals where {self._missing(barrier)} missing, of {barrier.count} arrivals"
            )
        if self.machine.shadow:
            self.machine.shadow.release(lane, barrier.agent)
        phase = barrier.phase
        barrier.pending -= count
        self._advance(lane, barrier)
        return phase

    def expect(self, lane: int, barrier: MemoryBarrier, size: int) -> None:
        """Adds to the bytes that the phase waits for; a copy that is done takes them off."""
        barrier.bytes += size
        barrier.copying |= size < 0
        if abs(barrier.bytes) > _MOST_BYTES:
            raise CheckFailed("mbarrier", f"a phase is to wait for {barrier.bytes} bytes")
        self._advance(lane, barrier)

    def _advance(self, lane: int, barrier: MemoryBarrier) -> None:
        if barrier.pending or barrier.bytes:
            return
        barrier.phase += 1
        barrier.completed += 1
        barrier.pending = barrier.count
        barrier.copied, barrier.copying = barrier.copying, False
        cta = int(self.machine.registers.cta[lane])
        if self.machine.shadow:
            self.machine.shadow.complete(cta, barrier.agent, barrier.completed)
        self.machine.wake(cta)

    def poll(self, lane: int, offset: int, value: int, parity: bool) -> bool:
        """Whether the phase of a state, or of a parity, is complete: lane's warp then acquires it, else it waits."""
        barrier = self.find(lane, offset)
        if not parity and value not in (barrier.phase, barrier.phase - 1):
            raise CheckFailed("mbarrier", f"a wait for phase {value} in phase {barrier.phase}")
        if parity and value > 1:
            raise CheckFailed("mbarrier", f"a wait for parity {value}")
        if (value & 1) == (barrier.phase & 1):
            self._waits[lane // 32] = self.machine.at, barrier
            self.machine.asleep[lane // 32] = True
            return False
        shadow, question = self.machine.shadow, (lane // 32, barrier.agent, barrier.completed)
        if shadow:
            if question not in self._refused and not shadow.knows_phase(lane, barrier.agent, barrier.copied):
                self._refused.add(question)
                return False
            shadow.acquire(lane, barrier.agent)
        return True

    def explain(self) -> str:
        """Who waits for what, when nobody can go on."""
        warp = int(np.flatnonzero(self.machine.asleep)[0])
        place, barrier = self._waits[warp]
        line = self.machine.kernel.code[place].line
        return (
            f"{int(self.machine.asleep.sum())} warps wait for phases that never complete, one at PTX line {line} for "
            f"phase {barrier.phase} of the mbarrier at {barrier.offset}, to which {self._missing(barrier)} missing"
        )

    @staticmethod
    def _missing(barrier: MemoryBarrier) -> str:
        return f"{barrier.pending} arrivals and {barrier.bytes} bytes are"

    def _check_place(self, offset: int) -> None:
        self.machine.shared.check(np.array([offset]), _SIZE, "mbarrier")

    def _granules(self, lane: int, offset: int) -> np.ndarray:
        return self.machine.shadow.granules(np.array([offset]) + self.machine.shared_base[lane], _SIZE)[0]


def _wants_shared(ins) -> None:
    if ins.has("shared::cluster") or not ins.has("shared", "shared::cta"):
        raise PTXError("an mbarrier of another CTA, or by a generic address, is not implemented")


@instruction("mbarrier")
def _mbarrier(machine, ins) -> Operation:
    action, barriers = ins.modifiers[0], machine.memory_barriers
    if ins.has("noComplete", "pending_count") or action not in _ACTIONS:
        raise PTXError("this operation on an mbarrier is not implemented")
    _wants_shared(ins)
    has_state = action == "arrive"
    operands = list(ins.operands)
    state = operands.pop(0) if has_state else Register("_")
    target = machine.registers.target(state, "b64")
    address = bind_address(machine, operands[0])
    amount = machine.registers.read(operands[1], "u32") if len(operands) > 1 else np.uint32(1)
    act = _ACTIONS[action] if not ins.has("expect_tx") or action == "expect_tx" else _arrive_expecting

    def run(mask: Mask) -> None:
        lanes = machine.lane_numbers[lanes_of(mask, machine.lanes)]
        amounts = np.broadcast_to(amount, machine.lanes)[lanes].tolist()
        for lane, offset, number in zip(lanes.tolist(), address(lanes).tolist(), amounts, strict=True):
            target[lane] = act(barriers, lane, offset, number) or 0

    return run


def _arrive(barriers: MemoryBarriers, lane: int, offset: int, count: int) -> int:
    return barriers.arrive(lane, barriers.find(lane, offset), count)


def _arrive_expecting(barriers: MemoryBarriers, lane: int, offset: int, size: int) -> int:
    barrier = barriers.find(lane, offset)
    barriers.expect(lane, barrier, size)
    return barriers.arrive(lane, barrier, 1)


_ACTIONS = {
    "init": lambda barriers, lane, offset, count: barriers.initialise(lane, offset, count),
    "inval": lambda barriers, lane, offset, _: barriers.invalidate(lane, offset),
    "arrive": _arrive,
    "expect_tx": lambda barriers, lane, offset, size: barriers.expect(lane, barriers.find(lane, offset), size),
    "complete_tx": lambda barriers, lane, offset, size: barriers.expect(lane, barriers.find(lane, offset), -size),
}


def bind_wait(machine, ins, resume: int):
    """test_wait and try_wait: a function from the mask to the next block, or None where a wait failed."""
    _wants_shared(ins)
    parity = ins.has("parity")
    target = machine.registers.target(ins.operands[0], "pred")
    address = bind_address(machine, ins.operands[1])
    value = machine.registers.read(ins.operands[2], "u32" if parity else "u64")
    warp_of = machine.lane_numbers // 32

    def end(mask: Mask) -> int | None:
        lanes = machine.lane_numbers[lanes_of(mask, machine.lanes)]
        values = np.broadcast_to(value, machine.lanes)[lanes].astype(np.int64)
        asked = np.stack([warp_of[lanes], address(lanes), values])
        questions, first, which = np.unique(asked, axis=1, return_index=True, return_inverse=True)
        answers = [
            machine.memory_barriers.poll(int(lanes[at]), int(offset), int(number), parity)
            for at, (_, offset, number) in zip(first, questions.T, strict=True)
        ]
        done = np.zeros(machine.lanes, bool)
        done[lanes] = np.array(answers)[which.ravel()]
        store(target, done, mask)
        if all(answers):
            return resume
        machine.pc[lanes] = resume
        return None

    return end

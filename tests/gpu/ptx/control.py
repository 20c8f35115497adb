"""Branches, barriers and fences: what ends a basic block, and what orders memory."""

import numpy as np

from .errors import CheckFailed, PTXError
from .instructions import Mask, Operation, instruction, store
from .parser import Immediate
from .tensor_core import require_lanes
from .warp import require_whole_warps

BRANCHES = ("bra", "ret", "exit", "brx", "trap")
BARRIERS = ("bar", "barrier")


def ends_block(ins) -> bool:
    return ins.name in BRANCHES or (ins.name in BARRIERS and not ins.has("warp")) or is_memory_wait(ins)


def is_memory_wait(ins) -> bool:
    """Whether it asks an mbarrier, and others have to be let run where the answer is no."""
    return ins.name == "mbarrier" and ins.has("test_wait", "try_wait")


class Barriers:
    """The named barriers of each CTA: who waits, and where they go on."""

    def __init__(self, machine):
        self.machine = machine
        self.waiting = np.full(machine.lanes, -1, np.int64)  # which barrier
        self.arrived = np.full(machine.lanes, -1, np.int64)  # by bar.arrive, which does not wait
        self.resume = np.zeros(machine.lanes, np.int64)
        self.place = np.zeros(machine.lanes, np.int64)  # the instruction that waits

    def reset(self) -> None:
        self.waiting.fill(-1)
        self.arrived.fill(-1)

    def arrive(self, mask: Mask, number: int, threads: int, resume: int, waits: bool) -> None:
        """Parks the lanes, and lets those of the CTAs go whose barrier is complete."""
        machine = self.machine
        lanes = np.arange(machine.lanes) if mask is True else np.flatnonzero(mask)
        if not waits:
            self.arrived[lanes] = number
            machine.pc[lanes] = resume
        else:
            self.waiting[lanes] = number
            self.resume[lanes] = resume
            self.place[lanes] = machine.at
            machine.pc[lanes] = machine.blocked
        parked = ((self.waiting == number) | (self.arrived == number)).reshape(machine.ctas, -1)
        complete = np.flatnonzero(parked.sum(1) == threads)
        if len(complete):
            self._release(complete, parked, number)

    def require_one_place(self, mask: np.ndarray, number: int) -> None:
        """A barrier of all threads must be reached by all at one instruction: at another they would wait for each other
        too, which the hardware may allow and no compiler here means."""
        machine = self.machine
        here = mask.reshape(machine.ctas, -1).any(1)
        elsewhere = (self.waiting == number).reshape(machine.ctas, -1)[here]
        elsewhere &= (self.place != machine.at).reshape(machine.ctas, -1)[here]
        if elsewhere.any():
            count = int(elsewhere.sum(1).max())
            raise CheckFailed("divergent barrier", f"{count} of {machine.threads} threads of a program wait at another")

    def _release(self, ctas: np.ndarray, parked: np.ndarray, number: int) -> None:
        machine = self.machine
        joined = np.zeros_like(parked)
        joined[ctas] = parked[ctas]
        if machine.shadow:
            machine.shadow.join(joined.reshape(machine.ctas, -1, 32).any(2))
        go = joined.ravel() & (self.waiting == number)
        machine.pc[go] = self.resume[go]
        self.waiting[go] = -1
        self.arrived[joined.ravel()] = -1

    def explain(self) -> str:
        """Who waits for whom, when nobody can go on."""
        lanes = np.flatnonzero(self.waiting >= 0)
        cta = lanes[0] // self.machine.threads
        here = slice(cta * self.machine.threads, (cta + 1) * self.machine.threads)
        waiting = self.waiting[here] >= 0
        lines = sorted({self.machine.kernel.code[i].line for i in self.place[here][waiting].tolist()})
        return (
            f"{int(waiting.sum())} of {self.machine.threads} threads wait at PTX line "
            f"{', '.join(map(str, lines))} for others that never come"
        )


def bind_barrier(machine, ins, resume: int):
    """bar.sync, bar.arrive and bar.red: a function from the mask to the next block, or None once lanes are parked."""
    action = next((m for m in ins.modifiers if m in ("sync", "arrive", "red")), None)
    if action is None:
        raise PTXError("this barrier is not implemented")
    operands = list(ins.operands)
    reduction = _reduction(machine, ins, operands) if action == "red" else None
    number = _constant(operands[0]) if operands else 0
    threads = _constant(operands[1]) if len(operands) > 1 else machine.threads
    waits = action != "arrive"
    whole = threads == machine.threads and waits

    def end(mask: Mask) -> int | None:
        require_whole_warps(machine, mask, ins.opcode)
        if reduction is not None:
            reduction(mask)
        if mask is True and whole and not machine.pending_arrivals():
            if machine.shadow:
                machine.shadow.join_all()
            return resume
        if whole and mask is not True:
            machine.barriers.require_one_place(mask, number)
        machine.barriers.arrive(mask, number, threads, resume, waits)
        return None

    return end


def _constant(operand) -> int:
    if not isinstance(operand, Immediate):
        raise PTXError("a barrier with its number or count in a register is not implemented")
    return int(operand.text, 0)


def _reduction(machine, ins, operands: list):
    """bar.red.popc.u32 d, a, p and bar.red.{and,or}.pred p, a, q. Leaves the operands of the barrier itself."""
    target = machine.registers.target(operands.pop(0), "u32" if ins.has("popc") else "pred")
    predicate, negated = machine.registers.predicate(operands.pop())

    def run(mask: Mask) -> None:
        holds = (~predicate if negated else predicate).reshape(machine.ctas, -1)
        active = np.ones(holds.shape, bool) if mask is True else mask.reshape(machine.ctas, -1)
        if ins.has("popc"):
            result = (holds & active).sum(1)
        else:
            result = (holds & active).any(1) if ins.has("or") else (holds | ~active).all(1)
        store(target, np.repeat(result, machine.threads), mask)

    return run


def bind_branch(machine, ins, following: int, target: int):
    """A function from the mask to the next block, or None where lanes part."""
    if ins.name == "trap":

        def trap(mask: Mask) -> int | None:
            raise CheckFailed("trap", "the kernel trapped")

        return _conditional(machine, ins, trap, following) if ins.guard else trap
    if ins.guard is None:
        return lambda mask: target
    predicate, negated = machine.registers.array(ins.guard), ins.guard.negated

    def end(mask: Mask) -> int | None:
        taken = ~predicate if negated else predicate
        if mask is not True:
            taken = taken & mask
        count = np.count_nonzero(taken)
        if count == 0:
            return following
        if count == machine.active:
            return target
        machine.pc[slice(None) if mask is True else mask] = following
        machine.pc[taken] = target
        return None

    return end


def _conditional(machine, ins, action, following: int):
    predicate, negated = machine.registers.array(ins.guard), ins.guard.negated

    def end(mask: Mask) -> int | None:
        holds = (~predicate if negated else predicate) & mask
        return action(holds) if holds.any() else following

    return end


@instruction("bar", "barrier")
def _warp_barrier(machine, ins) -> Operation:
    def run(mask: Mask) -> None:
        require_whole_warps(machine, mask, ins.opcode)
        if machine.shadow:
            active = np.ones(machine.lanes, bool) if mask is True else mask
            machine.shadow.tick(active.reshape(machine.ctas, -1, 32).any(2))

    return run


@instruction("fence", "membar")
def _fence(machine, ins) -> Operation:
    """Only fences of the proxy and of mbarriers' initialisation change what the checks know; for global memory, see
    GlobalShadow."""
    if not ins.has("proxy", "mbarrier_init") or not machine.shadow:
        return lambda mask: None
    fence = machine.shadow.fence_proxy if ins.has("proxy") else machine.memory_barriers.fence

    def run(mask: Mask) -> None:
        active = np.ones(machine.lanes, bool) if mask is True else mask
        fence(active.reshape(machine.ctas, -1, 32).any(2))

    return run


@instruction("griddepcontrol")
def _no_effect(machine, ins) -> Operation:
    return lambda mask: None


@instruction("setmaxnreg")
def _set_registers(machine, ins) -> Operation:
    """Changes nothing here, where registers are without number."""
    count = _constant(ins.operands[0])
    if count % 8 or not 24 <= count <= 256:
        raise PTXError(f"{count} registers: a multiple of 8 from 24 to 256 is needed")
    if machine.threads % 128:
        raise PTXError("setmaxnreg needs whole warpgroups")

    def run(mask: Mask) -> None:
        require_lanes(mask, machine.lanes, 128, ins.name)

    return run

"""Exchange within a warp: shuffles, votes, matches and reductions."""

import numpy as np

from .errors import CheckFailed
from .instructions import Mask, Operation, instruction, store
from .parser import Pair


def require_whole_warps(machine, mask: Mask, what: str) -> None:
    """Raises where only part of a warp executes an instruction that all of its threads must."""
    if mask is True:
        return
    count = mask.reshape(-1, 32).sum(1)
    if ((count != 0) & (count != 32)).any():
        warp = int(np.flatnonzero((count != 0) & (count != 32))[0])
        raise CheckFailed("warp divergence", f"{what} by {count[warp]} of the 32 threads of warp {warp}")


def _check_members(machine, members, mask: Mask) -> None:
    """Every thread that a member mask names must take part, and every thread taking part must be named."""
    if mask is True and np.ndim(members) == 0 and members == 0xFFFFFFFF:
        return
    active = np.ones(machine.lanes, bool) if mask is True else mask
    active = active.reshape(-1, 32)
    present = (active.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
    named = np.broadcast_to(members, machine.lanes).reshape(-1, 32)
    wrong = active & (named != present[:, None])
    if wrong.any():
        warp = int(np.flatnonzero(wrong.any(1))[0])
        named_here = int(named[warp][active[warp]][0])
        raise CheckFailed(
            "warp divergence", f"member mask {named_here:#x}, but {int(present[warp]):#x} take part in warp {warp}"
        )


@instruction("shfl")
def _shuffle(machine, ins) -> Operation:
    """shfl.sync.mode.b32 d[|p], a, b, c, members."""
    mode = ins.modifiers[1]
    destination = ins.operands[0]
    pair = (destination.first, destination.second) if isinstance(destination, Pair) else (destination, None)
    target = machine.registers.target(pair[0], "b32")
    flag = machine.registers.target(pair[1], "pred") if pair[1] is not None else None
    source, amount, clamp, members = (
        machine.registers.read(operand, kind)
        for operand, kind in zip(ins.operands[1:5], ("b32", "u32", "u32", "u32"), strict=True)
    )
    lane = machine.registers.lane
    warps = machine.lanes // 32 * 32
    first_lane = np.arange(warps) - lane

    def sources() -> tuple[np.ndarray, np.ndarray]:
        b, c = np.asarray(amount).astype(np.int64) & 31, np.asarray(clamp).astype(np.int64)
        segment, limit = (c >> 8) & 31, c & 31
        low, high = lane & segment, (lane & segment) | (limit & ~segment)
        picked = {"bfly": lane ^ b, "up": lane - b, "down": lane + b, "idx": low | (b & ~segment)}[mode]
        inside = picked >= high if mode == "up" else picked <= high
        return first_lane + np.where(inside, picked, lane), inside

    fixed = sources() if np.ndim(amount) == 0 and np.ndim(clamp) == 0 else None

    def run(mask: Mask) -> None:
        _check_members(machine, members, mask)
        index, inside = fixed or sources()
        if mask is not True and not (mask[index] | ~mask).all():
            raise CheckFailed("warp divergence", "a shuffle reads from a thread that does not take part")
        store(target, np.broadcast_to(source, machine.lanes)[index], mask)
        if flag is not None:
            store(flag, inside, mask)

    return run


@instruction("vote")
def _vote(machine, ins) -> Operation:
    mode = ins.modifiers[1]
    predicate, negated = machine.registers.predicate(ins.operands[1])
    members = machine.registers.read(ins.operands[2], "u32")
    target = machine.registers.target(ins.operands[0], ins.kind)
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)

    def run(mask: Mask) -> None:
        _check_members(machine, members, mask)
        holds = (~predicate if negated else predicate).reshape(-1, 32)
        active = np.ones(holds.shape, bool) if mask is True else mask.reshape(-1, 32)
        if mode == "ballot":
            result = ((holds & active) * weights).sum(1).astype(np.uint32)
        elif mode == "any":
            result = (holds & active).any(1)
        elif mode == "all":
            result = (holds | ~active).all(1)
        else:
            result = (holds | ~active).all(1) | ~(holds & active).any(1)
        store(target, np.repeat(result, 32), mask)

    return run


@instruction("activemask")
def _active_mask(machine, ins) -> Operation:
    target = machine.registers.target(ins.operands[0], "b32")
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)

    def run(mask: Mask) -> None:
        active = np.ones((machine.lanes // 32, 32), bool) if mask is True else mask.reshape(-1, 32)
        store(target, np.repeat((active * weights).sum(1).astype(np.uint32), 32), mask)

    return run


@instruction("match")
def _match(machine, ins) -> Operation:
    """match.any.sync: who has my value; match.all.sync d|p: all members, if they agree."""
    everyone = ins.modifiers[0] == "all"
    destination = ins.operands[0]
    pair = (destination.first, destination.second) if isinstance(destination, Pair) else (destination, None)
    target = machine.registers.target(pair[0], "b32")
    flag = machine.registers.target(pair[1], "pred") if pair[1] is not None else None
    source = machine.registers.read(ins.operands[1], ins.kind)
    members = machine.registers.read(ins.operands[2], "u32")
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)

    def run(mask: Mask) -> None:
        _check_members(machine, members, mask)
        values = np.broadcast_to(source, machine.lanes).reshape(-1, 32)
        active = np.ones(values.shape, bool) if mask is True else mask.reshape(-1, 32)
        same = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        who = (same * weights).sum(2).astype(np.uint32)
        if everyone:
            agree = (same | ~active[:, None, :]).all(2)
            who = np.where(agree, who, 0)
            if flag is not None:
                store(flag, agree.ravel(), mask)
        store(target, who.ravel(), mask)

    return run


@instruction("redux")
def _reduce(machine, ins) -> Operation:
    kind = ins.kind
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[ins.modifiers[1]]
    source = machine.registers.read(ins.operands[1], kind)
    members = machine.registers.read(ins.operands[2], "u32")
    target = machine.registers.target(ins.operands[0], kind)

    def run(mask: Mask) -> None:
        _check_members(machine, members, mask)
        values = np.broadcast_to(source, machine.lanes).reshape(-1, 32)
        result = np.zeros(values.shape[0], values.dtype)
        for warp, row in enumerate(values):
            chosen = row if mask is True else row[mask.reshape(-1, 32)[warp]]
            if chosen.size:
                result[warp] = function.reduce(chosen, dtype=values.dtype)
        store(target, np.repeat(result, 32), mask)

    return run


@instruction("elect")
def _elect(machine, ins) -> Operation:
    """elect.sync d|p, members: the lowest active thread of each warp leads."""
    destination = ins.operands[0]
    members = machine.registers.read(ins.operands[1], "u32")
    target = machine.registers.target(destination.first, "b32")
    flag = machine.registers.target(destination.second, "pred")
    lane = machine.registers.lane.reshape(-1, 32)

    def run(mask: Mask) -> None:
        _check_members(machine, members, mask)
        active = np.ones(lane.shape, bool) if mask is True else mask.reshape(-1, 32)
        leader = np.argmax(active, 1)[:, None]
        store(target, np.repeat(leader, 32), mask)
        store(flag, (lane == leader).ravel(), mask)

    return run

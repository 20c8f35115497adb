"""How an instruction becomes a function: the table that the other files fill."""

from collections.abc import Callable

import numpy as np

from .errors import PTXError

# A lane mask: True for all lanes, else a bool array. It is passed on to numpy as `where=`.
Mask = bool | np.ndarray
Operation = Callable[[Mask], None]

BINDERS: dict[str, Callable] = {}


def instruction(*names: str) -> Callable:
    """Registers a binder: (machine, Instruction) -> Operation, for all opcodes that begin with one of the names."""

    def register(binder: Callable) -> Callable:
        for name in names:
            BINDERS[name] = binder
        return binder

    return register


def bind(machine, ins) -> Operation:
    binder = BINDERS.get(ins.name)
    if binder is None:
        raise PTXError(f"line {ins.line}: {ins.opcode} is not implemented")
    try:
        operation = binder(machine, ins)
    except (PTXError, KeyError, IndexError) as error:
        raise PTXError(f"line {ins.line}: {ins.opcode}: {error}") from error
    if ins.guard is None:
        return operation
    return _guarded(machine, ins, operation)


def _guarded(machine, ins, operation: Operation) -> Operation:
    """Runs the operation in the lanes whose predicate holds, and counts them."""
    predicate, negated = machine.registers.array(ins.guard), ins.guard.negated
    lanes, issued, pc = machine.lanes, machine.guarded_lanes, machine.binding_pc

    def run(mask: Mask) -> None:
        active = ~predicate if negated else predicate
        if mask is not True:
            active = active & mask
        count = np.count_nonzero(active)
        if count:
            issued[pc] += count
            operation(True if count == lanes else active)

    return run


def lanes_of(mask: Mask, lanes: int) -> slice | np.ndarray:
    """An index of the active lanes: everything, or their numbers."""
    return slice(None) if mask is True else np.flatnonzero(mask)


def store(target: np.ndarray, values, mask: Mask) -> None:
    """Writes values, converted to the register's type, to the active lanes."""
    np.copyto(target, values, where=mask, casting="unsafe")

"""Logic, shifts and bit fields."""

import numpy as np

from .instructions import Mask, Operation, instruction, store
from .types import UNSIGNED, dtype, width

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@instruction(*_LOGIC)
def _logic(machine, ins) -> Operation:
    function = _LOGIC[ins.name] if ins.kind != "pred" or ins.name != "not" else np.logical_not
    if ins.kind != "pred":
        sources = [machine.registers.read(operand, ins.kind) for operand in ins.operands[1:]]
    else:
        places = [machine.registers.predicate(operand) for operand in ins.operands[1:]]
        if any(negated for _, negated in places):
            target = machine.registers.target(ins.operands[0], "pred")
            return lambda mask: store(target, function(*[~p if n else p for p, n in places]), mask)
        sources = [predicate for predicate, _ in places]
    target = machine.registers.target(ins.operands[0], ins.kind)
    return lambda mask: function(*sources, out=target, where=mask)


@instruction("cnot")
def _logical_not(machine, ins) -> Operation:
    source = machine.registers.read(ins.operands[1], ins.kind)
    target = machine.registers.target(ins.operands[0], ins.kind)
    return lambda mask: store(target, source == 0, mask)


@instruction("shl", "shr")
def _shift(machine, ins) -> Operation:
    """Shifts of the whole width or more give 0, or the sign for shr.s."""
    bits = width(ins.kind)
    kind = ins.kind if ins.name == "shr" else f"u{bits}"
    source = machine.registers.read(ins.operands[1], kind)
    amount = machine.registers.read(ins.operands[2], "u32")
    target = machine.registers.target(ins.operands[0], kind)
    shift = np.left_shift if ins.name == "shl" else np.right_shift
    if np.ndim(amount) == 0 and amount < bits:
        count = dtype(kind).type(amount)
        return lambda mask: shift(source, count, out=target, where=mask)
    signed = kind[0] == "s"

    def run(mask: Mask) -> None:
        result = shift(source, np.minimum(amount, bits - 1).astype(dtype(kind)))
        store(target, result if signed else np.where(amount >= bits, 0, result), mask)

    return run


@instruction("shf")
def _funnel_shift(machine, ins) -> Operation:
    low, high, amount = (machine.registers.read(operand, "u32") for operand in ins.operands[1:4])
    target = machine.registers.target(ins.operands[0], "b32")
    left, wrap = ins.has("l"), ins.has("wrap")

    def run(mask: Mask) -> None:
        count = (amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
        value = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        result = ((value << count) >> np.uint64(32)) if left else value >> count
        store(target, result, mask)

    return run


@instruction("bfe")
def _extract(machine, ins) -> Operation:
    """A field of bits; a signed one is filled up with its top bit, or the register's if it reaches beyond."""
    bits, signed = width(ins.kind), ins.kind[0] == "s"
    source = machine.registers.read(ins.operands[1], ins.kind)
    position, length = (machine.registers.read(operand, "u32") for operand in ins.operands[2:4])
    target = machine.registers.target(ins.operands[0], ins.kind)
    final = source.dtype.type

    def run(mask: Mask) -> None:
        start, count = position & np.uint32(255), length & np.uint32(255)
        value = source >> np.minimum(start, bits - 1).astype(source.dtype)
        if not signed:
            value = np.where(start >= bits, final(0), value)
        # Shifting the field to the top and back again cuts what is above it, and copies the sign.
        above = (bits - np.clip(count, 1, bits)).astype(source.dtype)
        store(target, np.where(count == 0, final(0), (value << above) >> above), mask)

    return run


@instruction("bfi")
def _insert(machine, ins) -> Operation:
    bits = width(ins.kind)
    field, base = (machine.registers.read(operand, ins.kind) for operand in ins.operands[1:3])
    position, length = (machine.registers.read(operand, "u32") for operand in ins.operands[3:5])
    target = machine.registers.target(ins.operands[0], ins.kind)
    unsigned = UNSIGNED[bits].type

    def run(mask: Mask) -> None:
        start, count = position & np.uint32(255), length & np.uint32(255)
        shift = np.minimum(start, bits - 1).astype(UNSIGNED[bits])
        ones = (unsigned(1) << np.minimum(count, bits - 1).astype(UNSIGNED[bits])) - unsigned(1)
        ones = np.where(count >= bits, ~unsigned(0), ones)
        cover = np.where(start >= bits, unsigned(0), ones << shift)
        store(target, (base & ~cover) | ((field << shift) & cover), mask)

    return run


@instruction("lop3")
def _logic3(machine, ins) -> Operation:
    a, b, c = (machine.registers.read(operand, "b32") for operand in ins.operands[1:4])
    table = int(ins.operands[4].text, 0)
    target = machine.registers.target(ins.operands[0], "b32")

    def run(mask: Mask) -> None:
        result = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        store(target, result, mask)

    return run


@instruction("prmt")
def _permute(machine, ins) -> Operation:
    """Picks bytes of two registers; bit 3 of a selector replicates the byte's sign instead."""
    a, b, selector = (machine.registers.read(operand, "b32") for operand in ins.operands[1:4])
    target = machine.registers.target(ins.operands[0], "b32")
    lanes = np.arange(machine.lanes)

    def run(mask: Mask) -> None:
        both = np.broadcast_arrays(a, b, target)[:2]
        data = np.stack([(x >> np.uint32(8 * i)) & np.uint32(255) for x in both for i in range(4)])
        result = np.zeros(machine.lanes, np.uint32)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = data[choice & np.uint32(7), lanes]
            byte = np.where(choice & np.uint32(8), np.where(byte & np.uint32(128), 255, 0), byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        store(target, result, mask)

    return run


def _leading_zeros(x: np.ndarray, bits: int) -> np.ndarray:
    """Counts by halving; exact for all widths, unlike a logarithm."""
    count, value = np.full(np.shape(x), bits, np.int64), x.copy()
    step = bits // 2
    while step:
        high = value >> value.dtype.type(step)
        count = np.where(high != 0, count - step, count)
        value = np.where(high != 0, high, value)
        step //= 2
    return count - (value != 0)


def _reversed_bits(x: np.ndarray, bits: int) -> np.ndarray:
    result = np.zeros_like(x)
    for i in range(bits):
        result |= ((x >> x.dtype.type(i)) & x.dtype.type(1)) << x.dtype.type(bits - 1 - i)
    return result


@instruction("popc", "clz", "brev", "bfind")
def _count(machine, ins) -> Operation:
    bits = width(ins.kind)
    source = machine.registers.read(ins.operands[1], f"u{bits}")
    result = ins.kind if ins.name == "brev" else "u32"
    target = machine.registers.target(ins.operands[0], result)
    signed, amount = ins.kind[0] == "s", ins.has("shiftamt")

    def find(x: np.ndarray) -> np.ndarray:
        x = np.where(x >> x.dtype.type(bits - 1), ~x, x) if signed else x
        zeros = _leading_zeros(x, bits)
        return np.where(x == 0, 0xFFFFFFFF, zeros if amount else bits - 1 - zeros)

    function = {
        "popc": np.bitwise_count,
        "clz": lambda x: _leading_zeros(x, bits),
        "brev": lambda x: _reversed_bits(x, bits),
        "bfind": find,
    }[ins.name]
    return lambda mask: store(target, function(np.asarray(source)), mask)

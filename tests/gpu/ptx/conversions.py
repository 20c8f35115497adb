"""mov, cvt and the conversion of addresses."""

import numpy as np

from .arithmetic import decode, encode, flush
from .errors import PTXError
from .instructions import Mask, Operation, instruction, store
from .parser import Symbol, Vector
from .registers import GENERIC_LOCAL, GENERIC_PARAMETER, GENERIC_SHARED
from .types import NUMERIC, PACKED, UNSIGNED, dtype, f32_to_bf16, f32_to_tf32, is_float, width

_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("mov")
def _move(machine, ins) -> Operation:
    destination, source = ins.operands
    kind = ins.kind
    if isinstance(destination, Vector) and not isinstance(source, Vector):
        return _unpack(machine, destination, source, kind)
    if isinstance(source, Vector):
        return _pack(machine, destination, source, kind)
    if kind == "pred":
        value, negated = machine.registers.predicate(source)
        target = machine.registers.target(destination, kind)
        return lambda mask: store(target, ~value if negated else value, mask)
    if isinstance(source, Symbol):
        value = np.asarray(machine.symbol_address(source.name)).astype(UNSIGNED[width(kind)])
    else:
        value = machine.registers.read(source, kind)
    target = machine.registers.target(destination, kind)
    if target.dtype == np.dtype(bool):
        raise PTXError("a predicate is moved with mov.pred")
    return lambda mask: np.copyto(target, value, where=mask)


def _unpack(machine, destination: Vector, source, kind: str) -> Operation:
    parts, bits = len(destination.items), width(kind) // len(destination.items)
    value = machine.registers.read(source, f"u{width(kind)}")
    targets = [machine.registers.target(item, f"u{bits}") for item in destination.items]
    if np.ndim(value) == 0:
        pieces = [np.asarray(value).reshape(1).view(UNSIGNED[bits])[i] for i in range(parts)]
    else:
        # Copies: a piece may be written over the register that is being taken apart.
        pieces = [value.view(UNSIGNED[bits])[i::parts] for i in range(parts)]
    return lambda mask: [store(t, p, mask) for t, p in zip(targets, [np.copy(p) for p in pieces], strict=True)]


def _pack(machine, destination, source: Vector, kind: str) -> Operation:
    parts, bits = len(source.items), width(kind) // len(source.items)
    pieces = [machine.registers.read(item, f"u{bits}") for item in source.items]
    if isinstance(destination, Vector):
        targets = [machine.registers.target(item, f"u{bits}") for item in destination.items]
        return lambda mask: [store(t, p, mask) for t, p in zip(targets, [np.copy(p) for p in pieces], strict=True)]
    target = machine.registers.target(destination, f"u{width(kind)}")

    def run(mask: Mask) -> None:
        whole = np.empty((machine.lanes, parts), UNSIGNED[bits])
        for i, piece in enumerate(pieces):
            whole[:, i] = piece
        store(target, whole.view(UNSIGNED[width(kind)])[:, 0], mask)

    return run


_WINDOWS = {
    "shared": GENERIC_SHARED,
    "shared::cta": GENERIC_SHARED,
    "local": GENERIC_LOCAL,
    "param": GENERIC_PARAMETER,
}


@instruction("cvta")
def _convert_address(machine, ins) -> Operation:
    """Generic addresses: global ones are themselves, other spaces have windows of their own."""
    window = next((start for space, start in _WINDOWS.items() if ins.has(space)), 0)
    operand, kind = ins.operands[1], ins.kind
    target = machine.registers.target(ins.operands[0], kind)
    if isinstance(operand, Symbol):
        source = np.uint64(machine.symbol_address(operand.name))
    else:
        source = machine.registers.read(operand, kind)
    offset = np.uint64(window)
    if ins.has("to"):
        return lambda mask: store(target, source.astype(np.uint64) - offset, mask)
    return lambda mask: store(target, source.astype(np.uint64) + offset, mask)


@instruction("cvt")
def _convert(machine, ins) -> Operation:
    kinds = [m for m in ins.modifiers if NUMERIC.match(m)]
    if len(kinds) != 2:
        raise PTXError(f"conversions among {kinds} are not implemented")
    to, of = kinds
    target = machine.registers.target(ins.operands[0], to)
    convert = _conversion(ins, to, of)
    bits = UNSIGNED[width(of)]
    if to in PACKED:
        high, low = (machine.registers.read(operand, of) for operand in ins.operands[1:3])
        mode, relu = ("rz" if ins.has("rz") else "rn"), ins.has("relu")

        def run(mask: Mask) -> None:
            pair = np.stack(np.broadcast_arrays(low, high))
            store(target, encode(np.maximum(pair, 0) if relu else pair, to, mode), mask)

        return run
    source = machine.registers.read(ins.operands[1], of)
    if of in ("bf16", "f16"):
        source = source.view(bits)
        return lambda mask: store(target, convert(decode(source, of)), mask)
    if not is_float(to) and not is_float(of):
        return lambda mask: np.copyto(target, source, where=mask, casting="unsafe")
    return lambda mask: store(target, convert(source), mask)


def _conversion(ins, to: str, of: str):
    """The function from values of one type (half precision given as float32) to those, or the bits, of the other."""
    mode = next((m for m in ins.modifiers if m in _ROUNDINGS), "rn")
    if to == "bf16":
        return lambda x: f32_to_bf16(np.maximum(x, 0) if ins.has("relu") else x.astype(np.float32), mode)
    if to == "tf32":
        return lambda x: f32_to_tf32(x, mode)
    if to == "f16" and mode == "rz":
        return lambda x: encode(x, "f16", "rz").view(np.float16)
    integral = next((_TO_INTEGER[m] for m in ins.modifiers if m in _TO_INTEGER), None)
    if is_float(to):
        if integral:
            return lambda x: integral(x)
        if mode not in ("rn", "rz"):
            raise PTXError(f"rounding {mode} is not implemented")
        if mode == "rz" and is_float(of):
            raise PTXError("truncation between floats is implemented for half precision only")
        final = dtype(to)
        if ins.has("ftz") and to == "f32":
            return lambda x: flush(x.astype(final))
        if ins.has("sat"):
            return lambda x: np.clip(np.nan_to_num(x, nan=0.0), 0, 1).astype(final)
        return lambda x: x.astype(final)
    if is_float(of):
        return _float_to_integer(integral or np.trunc, dtype(to))
    limits = np.iinfo(dtype(to))
    return (lambda x: np.clip(x, limits.min, limits.max)) if ins.has("sat") else (lambda x: x)


def _float_to_integer(integral, final: np.dtype):
    """Clamps to the type's range; NaN becomes 0."""
    limits = np.iinfo(final)
    top = float(limits.max) + 1 if final.itemsize == 8 else float(limits.max)

    def convert(x: np.ndarray) -> np.ndarray:
        whole = np.nan_to_num(integral(np.asarray(x, np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
        inside = np.clip(whole, float(limits.min), np.nextafter(top, 0) if final.itemsize == 8 else top)
        return np.where(whole >= top, final.type(limits.max), inside.astype(final))

    return convert

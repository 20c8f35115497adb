"""Integer and floating-point arithmetic, comparison and selection."""

import numpy as np

from .errors import PTXError
from .instructions import Mask, Operation, instruction, store
from .parser import Pair
from .types import PACKED, SIGNED, UNSIGNED, bf16_to_f32, dtype, f32_to_bf16, is_float, width

_TINY = np.float32(2.0**-126)  # the smallest normal number; `.ftz` takes what is below it for zero


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Half-precision values as float32; a packed pair becomes (2, lanes), the low half first."""
    if kind in PACKED:
        halves = np.stack([np.asarray(bits).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)])
        return decode(halves, PACKED[kind])
    if kind == "bf16":
        return bf16_to_f32(np.asarray(bits))
    return np.asarray(bits).view(np.float16).astype(np.float32)


def encode(values: np.ndarray, kind: str, mode: str = "rn") -> np.ndarray:
    """The inverse of decode: float32 or float64 rounded to half precision, as bits."""
    if kind in PACKED:
        halves = encode(values, PACKED[kind], mode).astype(np.uint32)
        return halves[0] | (halves[1] << np.uint32(16))
    if kind == "bf16":
        return f32_to_bf16(values.astype(np.float32), mode)
    if mode == "rz":
        rounded = values.astype(np.float16)
        beyond = np.abs(rounded.astype(np.float64)) > np.abs(values.astype(np.float64))
        return np.where(beyond, np.nextafter(rounded, np.float16(0)), rounded).view(np.uint16)
    return values.astype(np.float16).view(np.uint16)


def flush(values: np.ndarray) -> np.ndarray:
    """Subnormal float32 as zero of the same sign."""
    return np.where(np.abs(values) < _TINY, np.copysign(np.float32(0), values), values)


def _elementwise(machine, ins, function) -> Operation:
    """A float or integer operation whose result has the type of its operands."""
    kind = ins.kind
    sources = [machine.registers.read(operand, kind) for operand in ins.operands[1:]]
    target = machine.registers.target(ins.operands[0], kind)
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        bits = UNSIGNED[width(kind)]
        target, sources = target.view(bits), [source.view(bits) for source in sources]
        relu = ins.has("relu")

        def run(mask: Mask) -> None:
            result = function(*[decode(source, kind) for source in sources])
            store(target, encode(np.maximum(result, 0) if relu else result, kind), mask)

    elif isinstance(function, np.ufunc) and not ins.has("ftz", "sat"):

        def run(mask: Mask) -> None:
            function(*sources, out=target, where=mask)

    else:
        ftz, saturate = ins.has("ftz") and kind == "f32", ins.has("sat")

        def run(mask: Mask) -> None:
            result = function(*([flush(source) for source in sources] if ftz else sources))
            if saturate:
                result = np.clip(np.nan_to_num(result, nan=0.0), 0, 1)
            store(target, flush(result.astype(np.float32)) if ftz else result, mask)

    return run


_FLOAT_AND_INTEGER = {"add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs}


@instruction(*_FLOAT_AND_INTEGER)
def _simple(machine, ins) -> Operation:
    if ins.has("cc") or (ins.has("sat") and not is_float(ins.kind)):
        raise PTXError("carries and saturation are not implemented for integers")
    return _elementwise(machine, ins, _FLOAT_AND_INTEGER[ins.name])


@instruction("mul", "mad", "fma", "mul24", "mad24")
def _multiply(machine, ins) -> Operation:
    kind = ins.kind
    if is_float(kind):
        if ins.name == "mul":
            return _elementwise(machine, ins, np.multiply)
        return _elementwise(machine, ins, _fused if kind != "f64" else lambda a, b, c: a * b + c)
    read, bits = machine.registers.read, width(kind)
    first, second = (read(operand, kind) for operand in ins.operands[1:3])
    if ins.has("wide"):
        wide = kind[0] + str(2 * bits)
        target = machine.registers.target(ins.operands[0], wide)
        addend = read(ins.operands[3], wide) if len(ins.operands) > 3 else None

        def run(mask: Mask) -> None:
            product = np.multiply(first, second, dtype=target.dtype)
            np.copyto(target, product if addend is None else product + addend, where=mask)

        return run
    target = machine.registers.target(ins.operands[0], kind)
    addend = read(ins.operands[3], kind) if len(ins.operands) > 3 else None
    high = ins.has("hi")

    def run(mask: Mask) -> None:
        product = _high_half(first, second, bits) if high else np.multiply(first, second, dtype=target.dtype)
        store(target, product if addend is None else product + addend, mask)

    return run


def _fused(a, b, c) -> np.ndarray:
    """a * b + c of float32 with (all but) one rounding: the product is exact in float64."""
    product = np.multiply(a, b, dtype=np.float64)
    return np.add(product, c, out=product) if isinstance(product, np.ndarray) else product + c


def _high_half(a, b, bits: int) -> np.ndarray:
    if bits == 64:
        # Beyond numpy's integers; rare (division by constants), so Python's will do.
        a, b = np.broadcast_arrays(a, b)
        high = [(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in zip(a, b, strict=True)]
        return np.array(high, np.uint64).view(a.dtype)
    wide = (SIGNED if np.asarray(a).dtype.kind == "i" else UNSIGNED)[2 * bits]
    return np.right_shift(np.multiply(a, b, dtype=wide), wide.type(bits)).astype(np.asarray(a).dtype)


@instruction("min", "max")
def _extremum(machine, ins) -> Operation:
    if is_float(ins.kind) and not ins.has("NaN"):
        return _elementwise(machine, ins, np.fmin if ins.name == "min" else np.fmax)
    function = np.minimum if ins.name == "min" else np.maximum
    if len(ins.operands) == 4:
        return _elementwise(machine, ins, lambda a, b, c: function(function(a, b), c))
    return _elementwise(machine, ins, function)


@instruction("sad")
def _absolute_difference(machine, ins) -> Operation:
    """|a - b| + c."""
    return _elementwise(machine, ins, lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c)


@instruction("dp4a")
def _byte_products(machine, ins) -> Operation:
    """c + the sum of the products of four bytes, each register's signed or not."""
    target, read = machine.registers.target(ins.operands[0], "s32"), machine.registers.read
    kinds = [modifier for modifier in ins.modifiers if modifier in ("s32", "u32")]
    values, addend = [read(operand, "u32") for operand in ins.operands[1:3]], read(ins.operands[3], "s32")

    def run(mask: Mask) -> None:
        total = np.asarray(addend, np.int64)
        for shift in (0, 8, 16, 24):
            a, b = (
                (np.asarray(x, np.uint32) >> np.uint32(shift)).astype(np.int8 if kind == "s32" else np.uint8)
                for x, kind in zip(values, kinds, strict=True)
            )
            total = total + a.astype(np.int64) * b
        store(target, total.astype(np.int32), mask)

    return run


@instruction("div")
def _divide(machine, ins) -> Operation:
    if not is_float(ins.kind):
        return _elementwise(machine, ins, _truncated_quotient)
    if ins.kind == "f32" and ins.has("full", "approx"):
        return _elementwise(machine, ins, _fast_quotient)
    return _elementwise(machine, ins, np.divide)


def _fast_quotient(a, b) -> np.ndarray:
    """div.full and div.approx give 0 for finite a where 2**126 < |b| < 2**128."""
    size = np.abs(b)
    huge = (size > 2.0**126) & np.isfinite(size) & np.isfinite(a)
    return np.where(huge, np.float32(0), np.divide(a, b))


def _truncated_quotient(a, b) -> np.ndarray:
    a, b = np.broadcast_arrays(a, b)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // np.where(b == 0, a.dtype.type(1), b))
    quotient = a // np.where(b == 0, a.dtype.type(1), b)
    uneven = (quotient * b != a) & ((a < 0) != (b < 0))
    return np.where(b == 0, a.dtype.type(-1), quotient + uneven.astype(a.dtype))


@instruction("rem")
def _remainder(machine, ins) -> Operation:
    return _elementwise(machine, ins, lambda a, b: np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b))))


_FUNCTIONS = {
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1 / np.sqrt(x.astype(np.float64)),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@instruction(*_FUNCTIONS)
def _special_function(machine, ins) -> Operation:
    return _elementwise(machine, ins, _FUNCTIONS[ins.name])


@instruction("copysign")
def _copysign(machine, ins) -> Operation:
    return _elementwise(machine, ins, lambda sign, size: np.copysign(size, sign))


@instruction("testp")
def _test_property(machine, ins) -> Operation:
    source = machine.registers.read(ins.operands[1], ins.kind)
    target = machine.registers.target(ins.operands[0], "pred")
    tiny = np.finfo(source.dtype).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda x: ~np.isnan(x),
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }[ins.modifiers[0]]
    return lambda mask: store(target, test(source), mask)


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, kind: str):
    """The function of a comparison's name; for floats, `ne` is ordered and a trailing u makes any unordered."""
    if not is_float(kind):
        return _COMPARISONS[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name == "neu":
        return np.not_equal
    if name in ("equ", "ltu", "leu", "gtu", "geu"):
        ordered = _COMPARISONS[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    return _COMPARISONS[name]


@instruction("setp")
def _set_predicate(machine, ins) -> Operation:
    kind, read = ins.kind, machine.registers.read
    compare = _comparison(ins.modifiers[0], kind)
    first, second = (read(operand, kind) for operand in ins.operands[1:3])
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        bits = UNSIGNED[width(kind)]
        halves, on_floats = [first.view(bits), second.view(bits)], compare
        compare = lambda a, b: on_floats(decode(a, kind), decode(b, kind))  # noqa: E731
        first, second = halves
    destination = ins.operands[0]
    pair = (destination.first, destination.second) if isinstance(destination, Pair) else (destination, None)
    target = machine.registers.target(pair[0], "pred")
    other = machine.registers.target(pair[1], "pred") if pair[1] is not None else None
    combine = next((_COMBINATIONS[m] for m in ins.modifiers[1:-1] if m in _COMBINATIONS), None)
    predicate, negated = machine.registers.predicate(ins.operands[3]) if combine else (None, False)
    packed = kind in PACKED

    def run(mask: Mask) -> None:
        holds = compare(first, second)
        if packed:
            store(target, holds[0], mask)
            store(other, holds[1], mask)
            return
        opposite = ~holds if other is not None else None
        if combine is not None:
            given = ~predicate if negated else predicate
            holds = combine(holds, given)
            opposite = combine(opposite, given) if other is not None else None
        store(target, holds, mask)
        if other is not None:
            store(other, opposite, mask)

    if combine is None and other is None and isinstance(compare, np.ufunc) and not packed:
        return lambda mask: compare(first, second, out=target, where=mask)
    return run


@instruction("set")
def _set(machine, ins) -> Operation:
    """set.CmpOp.dtype.stype: 1.0 for floats or all ones for integers where the comparison holds."""
    result, kind = ins.modifiers[-2:]
    compare = _comparison(ins.modifiers[0], kind)
    if is_float(kind) and kind not in ("f32", "f64"):
        bits = UNSIGNED[width(kind)]
        a, b = (machine.registers.read(operand, kind).view(bits) for operand in ins.operands[1:3])
        values = lambda: compare(decode(a, kind), decode(b, kind))  # noqa: E731
    else:
        a, b = (machine.registers.read(operand, kind) for operand in ins.operands[1:3])
        values = lambda: compare(a, b)  # noqa: E731
    target = machine.registers.target(ins.operands[0], result)
    if result in PACKED or result == "bf16":
        return lambda mask: store(target, encode(values().astype(np.float32), result), mask)
    one = dtype(result).type(1 if is_float(result) else -1 if result[0] == "s" else (1 << width(result)) - 1)
    return lambda mask: store(target, np.where(values(), one, one.dtype.type(0)), mask)


@instruction("selp")
def _select(machine, ins) -> Operation:
    kind = ins.kind
    first, second = (machine.registers.read(operand, kind) for operand in ins.operands[1:3])
    predicate, negated = machine.registers.predicate(ins.operands[3])
    if negated:
        first, second = second, first
    target = machine.registers.target(ins.operands[0], kind)
    return lambda mask: store(target, np.where(predicate, first, second), mask)


@instruction("slct")
def _select_by_sign(machine, ins) -> Operation:
    kind, by = ins.modifiers[-2:]
    first, second = (machine.registers.read(operand, kind) for operand in ins.operands[1:3])
    sign = machine.registers.read(ins.operands[3], by)
    target = machine.registers.target(ins.operands[0], kind)
    return lambda mask: store(target, np.where(sign >= 0, first, second), mask)

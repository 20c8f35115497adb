"""Loads, stores and atomics of every state space."""

import numpy as np

from .arithmetic import decode, encode
from .errors import CheckFailed
from .instructions import Mask, Operation, instruction, lanes_of, store
from .parser import Address, Register, Symbol, Vector
from .registers import GENERIC_LOCAL, GENERIC_PARAMETER, GENERIC_SHARED
from .types import PACKED, UNSIGNED, dtype, width

SPACES = {
    "global": "global",
    "const": "global",
    "shared": "shared",
    "shared::cta": "shared",
    "local": "local",
    "param": "param",
    "param::entry": "param",
}
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def space_of(ins) -> str:
    return next((SPACES[m] for m in ins.modifiers if m in SPACES), "generic")


def access_size(ins) -> tuple[int, int]:
    """Bytes of a whole access and of each of its words."""
    unit = width(ins.kind) // 8
    return unit * next((_VECTORS[m] for m in ins.modifiers if m in _VECTORS), 1), unit


def bind_address(machine, address: Address):
    """A function from lane numbers to byte addresses, int64."""
    base, offset = address.base, address.offset
    if base is None or isinstance(base, Symbol):
        value = offset + (machine.symbol_address(base.name) if base is not None else 0)
        constant = np.full(machine.lanes, value, np.int64)
        return lambda index: constant[index]
    array = machine.registers.array(base)
    if array.dtype == np.uint64:
        array = array.view(np.int64)
        return lambda index: array[index] + offset
    return lambda index: array[index].astype(np.int64) + offset


class _Space:
    """One state space as the loads and stores see it: checked access to words by lane."""

    def __init__(self, machine):
        self.machine = machine


class GlobalSpace(_Space):
    def load(self, addresses, size, unit, index, ordered):
        machine = self.machine
        machine.global_memory.check(addresses, size, "load")
        if machine.global_shadow and not ordered:
            machine.global_shadow.read(addresses, size, machine.program[index])
        return machine.global_memory.load(addresses, size, unit)

    def store(self, addresses, words, index, ordered):
        machine, size = self.machine, words.shape[1] * words.dtype.itemsize
        machine.global_memory.check(addresses, size, "store")
        if machine.global_shadow:
            track = machine.global_shadow.atomic if ordered else machine.global_shadow.write
            track(addresses, size, machine.program[index])
        machine.global_memory.store(addresses, words)
        if machine.global_shadow and not ordered:
            differs = (machine.global_memory.load(addresses, size, words.dtype.itemsize) != words).any(1)
            if differs.any():
                place = machine.global_memory.describe(int(addresses[np.argmax(differs)]))
                raise CheckFailed("global race", f"threads write different values to the same bytes, at {place}")


class SharedSpace(_Space):
    def _rows(self, addresses, size, index, what):
        machine = self.machine
        machine.shared.check(addresses, size, what)
        return addresses + machine.shared_base[index]

    def load(self, addresses, size, unit, index, ordered):
        machine = self.machine
        offsets = self._rows(addresses, size, index, "load")
        if machine.shadow:
            granules, count = machine.shadow.granules(offsets, size)
            machine.shadow.read(granules, np.repeat(machine.lane_numbers[index], count))
        return machine.shared.rows(size, unit)[offsets // size]

    def store(self, addresses, words, index, ordered):
        machine, unit = self.machine, words.dtype.itemsize
        size = words.shape[1] * unit
        offsets = self._rows(addresses, size, index, "store")
        if machine.shadow:
            granules, count = machine.shadow.granules(offsets, size)
            machine.shadow.write(granules, np.repeat(machine.lane_numbers[index], count))
        rows = machine.shared.rows(size, unit)
        rows[offsets // size] = words
        won = rows[offsets // size]
        if machine.shadow and (won != words).any():
            self._clash(offsets, words, won, machine.lane_numbers[index])

    def _clash(self, offsets, words, won, lanes):
        """Lanes wrote different values to the same bytes. Where whole warps repeat each other's work, as Triton lets
        them, each value is written by all of them; else the warps race."""
        machine = self.machine
        warps = lanes // 32
        written = set(zip(warps.tolist(), offsets.tolist(), map(bytes, words), strict=True))
        winner = {at: warp for warp, at in zip(warps.tolist(), offsets.tolist(), strict=True)}
        lost = np.flatnonzero((won != words).any(1)).tolist()
        for i in lost:
            at = int(offsets[i])
            if (winner[at], at, bytes(words[i])) not in written:
                raise CheckFailed(
                    "shared race", f"warps {warps[i]} and {winner[at]} write different values to the same bytes"
                )
        machine.tally.conflict(machine.kernel.code[machine.at], len(lost))


class LocalSpace(_Space):
    def _rows(self, addresses, size, index, what):
        if int(addresses.min()) < 0 or int(addresses.max()) + size > self.machine.local.shape[1]:
            raise CheckFailed("local bounds", f"{what} of {size} bytes at {int(addresses.max())}")
        if int(np.bitwise_or.reduce(addresses)) & (size - 1):
            raise CheckFailed("local alignment", f"{what} of {size} bytes at {int(addresses.max())}")
        return self.machine.lane_numbers[index][:, None], addresses[:, None] + np.arange(size)

    def load(self, addresses, size, unit, index, ordered):
        data = self.machine.local[self._rows(addresses, size, index, "load")]
        return np.ascontiguousarray(data).view(UNSIGNED[8 * unit])

    def store(self, addresses, words, index, ordered):
        size = words.shape[1] * words.dtype.itemsize
        self.machine.local[self._rows(addresses, size, index, "store")] = np.ascontiguousarray(words).view(np.uint8)


class GenericSpace(_Space):
    """Addresses of any space, told apart by their windows."""

    def _each(self, addresses):
        for low, high, space in (
            (0, GENERIC_SHARED, self.machine.spaces["global"]),
            (GENERIC_SHARED, GENERIC_LOCAL, self.machine.spaces["shared"]),
            (GENERIC_LOCAL, GENERIC_PARAMETER, self.machine.spaces["local"]),
            (GENERIC_PARAMETER, 1 << 62, self.machine.spaces["param"]),
        ):
            inside = np.flatnonzero((addresses >= low) & (addresses < high))
            if len(inside):
                yield inside, addresses[inside] - low, space

    def load(self, addresses, size, unit, index, ordered):
        words = np.zeros((len(addresses), size // unit), UNSIGNED[8 * unit])
        lanes = self.machine.lane_numbers[index]
        for inside, local, space in self._each(addresses):
            words[inside] = space.load(local, size, unit, lanes[inside], ordered)
        return words

    def store(self, addresses, words, index, ordered):
        lanes = self.machine.lane_numbers[index]
        for inside, local, space in self._each(addresses):
            space.store(local, words[inside], lanes[inside], ordered)


class ParameterSpace(_Space):
    def load(self, addresses, size, unit, index, ordered):
        data = self.machine.parameters[addresses[:, None] + np.arange(size)]
        return np.ascontiguousarray(data).view(UNSIGNED[8 * unit])


def spaces(machine) -> dict[str, _Space]:
    return {
        "global": GlobalSpace(machine),
        "shared": SharedSpace(machine),
        "local": LocalSpace(machine),
        "param": ParameterSpace(machine),
        "generic": GenericSpace(machine),
    }


def _items(operand) -> tuple:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _is_ordered(ins) -> bool:
    """Whether an access may meet another program's without a race: it is atomic in the memory model's sense."""
    return ins.has("relaxed", "acquire", "release", "volatile", "mmio")


@instruction("ld", "ldu")
def _load(machine, ins) -> Operation:
    size, unit = access_size(ins)
    space = machine.spaces[space_of(ins)]
    kind = ins.kind if ins.kind not in ("bf16", "f16") else "b16"
    targets = [machine.registers.target(item, kind) for item in _items(ins.operands[0])]
    address = bind_address(machine, ins.operands[1])
    ordered, acquire = _is_ordered(ins), ins.has("acquire")
    signed = kind[0] == "s"

    def run(mask: Mask) -> None:
        index = lanes_of(mask, machine.lanes)
        where = address(index)
        words = space.load(where, size, unit, index, ordered)
        if acquire and machine.global_shadow:
            machine.global_shadow.synchronise(where, machine.program[index], True, False)
        if signed:
            words = words.view(dtype(kind))
        for j, target in enumerate(targets):
            target[index] = words[:, j].view(target.dtype) if target.itemsize == unit else words[:, j]

    return run


@instruction("st")
def _store(machine, ins) -> Operation:
    size, unit = access_size(ins)
    space = machine.spaces[space_of(ins)]
    sources = [machine.registers.read(item, f"u{8 * unit}") for item in _items(ins.operands[1])]
    address = bind_address(machine, ins.operands[0])
    ordered, release = _is_ordered(ins), ins.has("release")

    def run(mask: Mask) -> None:
        index = lanes_of(mask, machine.lanes)
        where = address(index)
        words = np.empty((len(where), len(sources)), UNSIGNED[8 * unit])
        for j, source in enumerate(sources):
            words[:, j] = source[index] if np.ndim(source) else source
        if release and machine.global_shadow:
            machine.global_shadow.synchronise(where, machine.program[index], False, True)
        space.store(where, words, index, ordered)

    return run


def _wrap_increment(old, limit):
    return np.where(old >= limit, 0, old + 1)


def _wrap_decrement(old, limit):
    return np.where((old == 0) | (old > limit), limit, old - 1)


_ATOMICS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": _wrap_increment,
    "dec": _wrap_decrement,
}


def _rounds(addresses: np.ndarray):
    """Groups of accesses with distinct addresses, in the order of the lanes."""
    order = np.argsort(addresses, kind="stable")
    ordered = addresses[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    rank = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.append(starts, len(ordered))))
    for round_ in range(int(rank.max()) + 1):
        yield order[rank == round_]


@instruction("atom", "red")
def _atomic(machine, ins) -> Operation:
    """Read-modify-write; lanes that meet at an address go one after the other, in their order."""
    kind, size = ins.kind, width(ins.kind) // 8
    name = next(m for m in ins.modifiers if m in _ATOMICS or m == "cas")
    space = space_of(ins)
    if space == "generic":
        space = "global"
    operands = ins.operands if ins.name == "atom" else (Register("_"), *ins.operands)
    targets = [machine.registers.target(item, kind) for item in _items(operands[0])]
    sources = [machine.registers.read(item, kind) for item in _items(operands[2])]
    if len(targets) != len(sources):
        targets *= len(sources)
    replacement = machine.registers.read(operands[3], kind) if name == "cas" else None
    address = bind_address(machine, operands[1])
    half = kind in ("f16", "bf16") or kind in PACKED
    acquire, release = ins.has("acquire", "acq_rel"), ins.has("release", "acq_rel")
    bits = UNSIGNED[8 * size]

    def combine(old: np.ndarray, value: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        if name == "cas":
            new = np.broadcast_to(replacement, machine.lanes)[lanes]
            return np.where(old == value, new, old)
        if half:
            return encode(_ATOMICS[name](decode(old.view(bits), kind), decode(value.view(bits), kind)), kind)
        return _ATOMICS[name](old, value).astype(old.dtype)

    def access(where: np.ndarray, index) -> tuple[np.ndarray, np.ndarray]:
        """The rows of memory as words, and which of them each lane uses."""
        if space == "shared":
            machine.shared.check(where, size, "atomic")
            offsets = where + machine.shared_base[index]
            if machine.shadow:
                machine.shadow.require_initialised(offsets // machine.shadow.granule)
            return machine.shared.rows(size, size), offsets // size
        machine.global_memory.check(where, size, "atomic")
        if machine.global_shadow:
            machine.global_shadow.atomic(where, size, machine.program[index])
            if acquire or release:
                machine.global_shadow.synchronise(where, machine.program[index], acquire, release)
        return machine.global_memory.rows(size), machine.global_memory.row(where, size)

    def run(mask: Mask) -> None:
        lanes = machine.lane_numbers[lanes_of(mask, machine.lanes)]
        start = address(lanes)
        for j, (target, source) in enumerate(zip(targets, sources, strict=True)):
            rows, places = access(start + j * size, lanes)
            values = np.broadcast_to(source, machine.lanes)[lanes]
            for chosen in _rounds(places):
                old = rows[places[chosen], 0].view(dtype(kind))
                new = combine(old, values[chosen], lanes[chosen])
                target[lanes[chosen]] = old.view(target.dtype)
                rows[places[chosen], 0] = new.view(bits)

    return run


@instruction("prefetch", "prefetchu", "createpolicy", "applypriority", "discard", "nanosleep", "pmevent")
def _hint(machine, ins) -> Operation:
    if ins.name == "createpolicy":
        target = machine.registers.target(ins.operands[0], "b64")
        return lambda mask: store(target, 0, mask)
    return lambda mask: None

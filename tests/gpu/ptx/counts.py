"""What a launch did: instructions, floating-point operations and bytes moved."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from .load_store import access_size, space_of
from .tensor_core import matrix_shape
from .types import PACKED, is_float

_FLOPS = {"add": 1, "sub": 1, "mul": 1, "fma": 2, "mad": 2, "min": 1, "max": 1, "div": 1, "neg": 0}
_SPECIAL = ("ex2", "lg2", "tanh", "sin", "cos", "rcp", "rsqrt", "sqrt")


@dataclass
class Counts:
    """Totals of a launch, or of several.

    `instructions` are counted per warp by opcode, `flops` of vector arithmetic per thread, `matrix_flops` by the type
    of the operands, and `loads` and `stores` are global accesses by width in bytes. `read` and `written` are distinct
    bytes: what must move even if every byte is fetched once; those need the machine's checks.

    `lane_conflicts` are stores to shared memory, by source line, in which lanes of a warp write different values to the
    same bytes: one of them wins, and PTX does not say which. Fused multiply-adds in a reduction do that: a * b + c and
    c + a * b round apart, so that the lanes' sums differ in the last bits.
    """

    instructions: Counter = field(default_factory=Counter)
    flops: float = 0
    special: float = 0
    matrix_flops: Counter = field(default_factory=Counter)
    loads: Counter = field(default_factory=Counter)
    stores: Counter = field(default_factory=Counter)
    atomics: float = 0
    shared_bytes: float = 0
    read: int = 0
    written: int = 0
    programs: int = 0
    lane_conflicts: Counter = field(default_factory=Counter)

    @property
    def loaded_bytes(self) -> float:
        return sum(width * count for width, count in self.loads.items())

    @property
    def stored_bytes(self) -> float:
        return sum(width * count for width, count in self.stores.items())

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})


class Tally:
    """What cannot be told from the number of lanes: bytes of copies that are cut short, and stores that clash."""

    def __init__(self):
        self.copies: dict[int, int] = defaultdict(int)
        self.conflicts: Counter = Counter()

    def reset(self) -> None:
        self.copies.clear()
        self.conflicts.clear()

    def conflict(self, ins, count: int) -> None:
        self.conflicts[ins.source or f"PTX line {ins.line}"] += count

    def copied(self, size: int, count: int) -> None:
        self.copies[size] += count


def summarise(machine) -> Counts:
    """The counts of a machine since its last reset."""
    counts = Counts()
    lanes = list(machine.guarded_lanes)
    for block, total in zip(machine.blocks, machine.block_lanes, strict=True):
        for pc in block.instructions:
            if machine.kernel.code[pc].guard is None or pc == block.last:
                lanes[pc] = total
    for ins, executed in zip(machine.kernel.code, lanes, strict=True):
        if executed:
            _add(counts, ins, int(executed))
    for size, number in machine.tally.copies.items():
        counts.loads[size] += int(number)
    counts.lane_conflicts.update(machine.tally.conflicts)
    return counts


def _add(counts: Counts, ins, lanes: int) -> None:
    counts.instructions[ins.opcode] += lanes / 32
    if ins.name in ("mma", "wgmma"):
        if ins.has("fence", "commit_group", "wait_group"):
            return
        m, n, k = matrix_shape(ins)
        kind = ins.modifiers[-2]
        counts.matrix_flops[kind] += 2 * m * n * k * lanes / (32 if ins.name == "mma" else 128)
    elif ins.name in ("ld", "st", "ldmatrix", "stmatrix"):
        space = "shared" if "matrix" in ins.name else space_of(ins)
        if space == "shared":
            counts.shared_bytes += lanes * (access_size(ins)[0] if "matrix" not in ins.name else _matrix_bytes(ins))
        elif space in ("global", "generic"):
            (counts.loads if ins.name == "ld" else counts.stores)[access_size(ins)[0]] += lanes
    elif ins.name in ("atom", "red"):
        counts.atomics += lanes
    elif is_float(ins.kind):
        pair = 2 if ins.kind in PACKED else 1
        if ins.name in _SPECIAL:
            counts.special += pair * lanes
        else:
            counts.flops += _FLOPS.get(ins.name, 0) * pair * lanes


def _matrix_bytes(ins) -> int:
    """Bytes per lane: a quarter of the row that it addresses, for each matrix."""
    return 4 * next(int(m[1:]) for m in ins.modifiers if m in ("x1", "x2", "x4"))

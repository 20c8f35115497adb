"""wgmma: asynchronous matrix multiplication of a warpgroup, operands in shared memory (PTX ISA, "Asynchronous warpgroup
level matrix instructions").

The product is computed when the instruction is issued. That is what the hardware gives if nothing touches operands and
accumulators before the wait, and the machine checks that nothing does.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .errors import CheckFailed, PTXError
from .instructions import Mask, Operation, instruction
from .parser import Immediate, Register, Vector
from .tensor_core import a_fragment, accumulator, matrix_shape, require_lanes, tf32

_SWIZZLE_BYTES = (16, 128, 64, 32)  # by the descriptor's bits 62 and 63
_SWIZZLE_MASK = (0, 7, 3, 1)


@dataclass
class _Product:
    """A wgmma under way: its warpgroup, the accumulators, A's registers, and the granules it reads."""

    group: int
    results: frozenset
    inputs: frozenset
    granules: np.ndarray
    committed: int | None = None


class WarpgroupProducts:
    """The wgmma that were issued and not waited for, and the fragments touched since the last wgmma.fence."""

    def __init__(self, machine):
        self.machine = machine
        self.products: list[_Product] = []
        self.committed = np.zeros(machine.lanes // 128 + 1, np.int64)
        # Every register that some wgmma of the kernel uses as a fragment, numbered; and by number and warpgroup,
        # whether it was touched since the last fence.
        self.fragments: dict[str, int] = {}
        self.unfenced = np.zeros((0, 0), bool)
        self.busy: frozenset = frozenset()

    def reset(self) -> None:
        self.products.clear()
        self.committed.fill(0)
        self.unfenced = np.ones((len(self.fragments), len(self.committed)), bool)
        self.busy = frozenset()

    def numbers(self, registers: Iterable[str]) -> np.ndarray:
        """The rows of `unfenced` that are theirs."""
        return np.array([self.fragments[name] for name in registers], np.int64)

    def groups(self, mask: Mask) -> np.ndarray | slice:
        """The warpgroups of which a lane is in the mask."""
        if mask is True:
            return slice(None)
        return np.unique(np.flatnonzero(mask) // 128)

    def begin(self, product: _Product) -> None:
        if self.machine.shadow:
            self.machine.shadow.reading[product.granules] += 1
        self.products.append(product)
        self.busy |= product.results | product.inputs

    def fence(self, groups: np.ndarray) -> None:
        """The warpgroups' registers are ordered before their products to come."""
        self.unfenced[:, groups] = False

    def commit(self, groups: np.ndarray) -> None:
        chosen = set(groups.tolist())
        for product in self.products:
            if product.committed is None and product.group in chosen:
                product.committed = int(self.committed[product.group])
        self.committed[groups] += 1

    def wait(self, groups: np.ndarray, pending: int) -> None:
        chosen, kept = set(groups.tolist()), []
        for product in self.products:
            limit = self.committed[product.group] - pending
            if product.group not in chosen or product.committed is None or product.committed >= limit:
                kept.append(product)
            elif self.machine.shadow:
                self.machine.shadow.end_wgmma(product.granules, product.group * 128)
        self.products = kept
        self.busy = frozenset().union(*(p.results | p.inputs for p in kept))

    def check_touch(self, touched: frozenset, written: frozenset, mask: Mask) -> None:
        """Raises where its own warpgroup reads or writes an accumulator, or writes an input, of a product under way."""
        for product in self.products:
            common = product.results & touched | product.inputs & written
            lanes = slice(product.group * 128, product.group * 128 + 128)
            if common and (mask is True or mask[lanes].any()):
                raise CheckFailed("asynchronous product", f"{min(common)} is touched before the wgmma was waited for")


def fragment_registers(ins) -> tuple[frozenset, frozenset]:
    """The accumulators of a wgmma.mma_async, and A's registers if it is not in shared memory."""
    if ins.name != "wgmma" or ins.modifiers[0] != "mma_async":
        return frozenset(), frozenset()
    a = ins.operands[1]
    names = (item.name for item in a.items) if isinstance(a, Vector) else ()
    return frozenset(item.name for item in ins.operands[0].items), frozenset(names)


def touched_registers(ins) -> set[str]:
    """The names of all registers of an instruction's operands."""
    found, stack = set(), list(ins.operands)
    while stack:
        operand = stack.pop()
        if isinstance(operand, Register):
            found.add(operand.name)
        elif isinstance(operand, Vector):
            stack.extend(operand.items)
        else:
            stack.extend(value for value in vars(operand).values() if isinstance(value, Register))
    return found


def written_registers(ins) -> set[str]:
    """The registers of the first operand, which all instructions but stores write."""
    if ins.name in ("st", "red", "bra", "stmatrix", "cp") or not ins.operands:
        return set()
    first = ins.operands[0]
    items = first.items if isinstance(first, Vector) else (first,)
    return {item.name for item in items if isinstance(item, Register)}


def guard_registers(machine, ins, operation: Operation, special: set[str]) -> Operation:
    """Wraps an instruction that touches registers which some wgmma of the kernel uses."""
    touched = frozenset(touched_registers(ins) & special)
    written = frozenset(written_registers(ins) & special)
    if ins.name == "wgmma" or not touched:
        return operation
    products = machine.products
    # A copy of one fragment's register to another's counts as late as what it copies: LLVM leaves copies between the
    # fence and the product, and ptxas, which names registers anew, puts them before the fence.
    is_copy = ins.name == "mov" and len(touched) == 2 and len(written) == 1
    numbers, copied = products.numbers(touched), products.numbers(touched - written)

    def run(mask: Mask) -> None:
        if products.busy and not products.busy.isdisjoint(touched):
            products.check_touch(touched, written, mask)
        unfenced = products.unfenced
        if mask is True and not is_copy:
            unfenced[numbers] = True
        else:
            groups = products.groups(mask)
            late = unfenced[copied, groups] if is_copy else True
            unfenced[numbers[:, None], np.arange(unfenced.shape[1])[groups]] |= late
        operation(mask)

    return run


@instruction("wgmma")
def _wgmma(machine, ins) -> Operation:
    action, products = ins.modifiers[0], machine.products
    if machine.threads % 128:
        raise PTXError("wgmma needs whole warpgroups")
    if action == "fence":
        return lambda mask: products.fence(require_lanes(mask, machine.lanes, 128, "wgmma.fence"))
    if action == "commit_group":
        return lambda mask: products.commit(require_lanes(mask, machine.lanes, 128, "wgmma.commit_group"))
    if action == "wait_group":
        pending = int(ins.operands[0].text)
        return lambda mask: products.wait(require_lanes(mask, machine.lanes, 128, "wgmma.wait_group"), pending)
    return _multiply(machine, ins)


def _multiply(machine, ins) -> Operation:
    m, n, k = matrix_shape(ins)
    result, kind, second = ins.modifiers[-3:]
    if result != "f32" or kind != second or kind not in ("f16", "bf16", "tf32"):
        raise PTXError("these types are not implemented")
    destination, a, b, scale_d, *immediates = ins.operands
    numbers = [int(operand.text, 0) for operand in immediates]
    file, d = machine.registers.rows(destination.items)
    fragments, accumulators = file.reshape(len(file), -1, 32), file.view(np.float32).reshape(len(file), -1, 32)
    in_registers = isinstance(a, Vector)
    transpose_a = not in_registers and kind != "tf32" and bool(numbers[2])
    transpose_b = kind != "tf32" and bool(numbers[2 if in_registers else 3])
    sign = np.float32(numbers[0] * numbers[1])
    a_rows = machine.registers.rows(a.items)[1] if in_registers else None
    a_descriptor = None if in_registers else machine.registers.read(a, "b64")
    b_descriptor = machine.registers.read(b, "b64")
    if isinstance(scale_d, Immediate):
        accumulate, negated = np.broadcast_to(np.bool_(int(scale_d.text) != 0), machine.lanes), False
    else:
        accumulate, negated = machine.registers.predicate(scale_d)
    results, inputs = fragment_registers(ins)
    products = machine.products
    names = sorted(results | inputs)
    numbers = products.numbers(names)

    def run(mask: Mask) -> None:
        groups = require_lanes(mask, machine.lanes, 128, "wgmma")
        lanes = groups * 128
        products.check_touch(inputs, frozenset(), mask)
        late = products.unfenced[numbers[:, None], groups].any(1)
        if late.any():
            name = names[int(late.argmax())]
            raise CheckFailed("wgmma fence", f"{name} is used with no wgmma.fence since it was last touched")
        warps = (groups[:, None] * 4 + np.arange(4)).ravel()
        if in_registers:
            left = a_fragment(fragments[a_rows[:, None], warps], kind).reshape(len(groups), 64, k)
            granules = [np.empty(0, np.int64)] * len(groups)
        else:
            left, granules = shared_operand(machine, lanes, a_descriptor[lanes], kind, 64, k, transpose_a)
        right, more = shared_operand(machine, lanes, b_descriptor[lanes], kind, n, k, transpose_b)
        product = np.matmul(left, right.swapaxes(1, 2)) * sign
        product = accumulator(product.reshape(len(warps), 16, n))
        keep = (~accumulate if negated else accumulate)[lanes]
        if keep.any():
            before = accumulators[d[:, None], warps]
            product = np.where(np.repeat(keep, 4)[None, :, None], before + product, product)
        accumulators[d[:, None], warps] = product
        for i, group in enumerate(groups.tolist()):
            reads = np.concatenate([granules[i], more[i]])
            products.begin(_Product(group, results, inputs, reads))

    return run


@functools.lru_cache(maxsize=4096)
def operand_offsets(descriptor: int, item: int, rows: int, k: int, transposed: bool) -> np.ndarray:
    """Where the elements (rows, k) of an operand lie in shared memory, in bytes.

    The descriptor holds, in units of 16 bytes, the start, the leading and the stride byte offset, and the swizzle.
    K-major: 8 rows of one swizzle width each form a core, cores follow at the stride offset. Otherwise ("transposed"):
    rows of k hold one swizzle width of m or n, the next such block at the leading offset, the next 8 of k at the stride
    offset.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = descriptor >> 62 & 3
    span = _SWIZZLE_BYTES[swizzle]
    row, depth = np.arange(rows)[:, None], np.arange(k)[None, :]
    if transposed:
        if swizzle == 0:
            # Without swizzle the two offsets change places.
            leading, stride = stride, leading
        across = span // item
        offsets = start + row // across * leading + depth // 8 * stride + depth % 8 * span + row % across * item
    else:
        column = depth * item if swizzle else depth * item // 16 * leading + depth * item % 16
        offsets = start + row // 8 * stride + row % 8 * span + column
    return offsets ^ ((offsets >> 7 & _SWIZZLE_MASK[swizzle]) << 4)


@functools.lru_cache(maxsize=4096)
def operand_granules(granule: int, *layout) -> np.ndarray:
    """The distinct granules of an operand."""
    return np.unique(operand_offsets(*layout) // granule)


def shared_operand(machine, lanes, descriptors, kind, rows, k, transposed) -> tuple[np.ndarray, list[np.ndarray]]:
    """An operand (groups, rows, k) as float32 by each group's descriptor, and the granules that each group reads."""
    item, shadow = 4 if kind == "tf32" else 2, machine.shadow
    layouts = [(descriptor, item, rows, k, transposed) for descriptor in descriptors.tolist()]
    offsets = np.stack([operand_offsets(*layout) for layout in layouts])
    machine.shared.check(offsets.ravel(), item, "wgmma")
    granules = [np.empty(0, np.int64)] * len(lanes)
    for i, lane in enumerate(lanes.tolist() if shadow else ()):
        base = machine.shared_base[lane] // shadow.granule
        granules[i] = operand_granules(shadow.granule, *layouts[i]) + base
        shadow.read_by_wgmma(granules[i], lane)
    bits = machine.shared.rows(item, item)[(offsets + machine.shared_base[lanes][:, None, None]) // item, 0]
    if kind == "tf32":
        return tf32(bits), granules
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32), granules
    return bits.view(np.float16).astype(np.float32), granules

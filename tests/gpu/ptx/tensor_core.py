"""ldmatrix, stmatrix and mma.sync: fragments spread over the threads of a warp (PTX ISA, "Matrix fragments")."""

import re

import numpy as np

from .errors import CheckFailed, PTXError
from .instructions import Mask, Operation, instruction
from .load_store import bind_address
from .parser import Vector
from .warp import require_whole_warps

_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)$")
# A thread's place in an 8 x 8 matrix of 16-bit elements: row lane / 4, and columns 2 (lane % 4) and the next.
_ROW, _COLUMN = np.arange(32) // 4, np.arange(32) % 4 * 2


def matrix_shape(ins) -> tuple[int, int, int]:
    """(m, n, k) of a matrix multiplication."""
    match = next(filter(None, map(_SHAPE.match, ins.modifiers)))
    return int(match[1]), int(match[2]), int(match[3])


@instruction("ldmatrix", "stmatrix")
def _move_matrices(machine, ins) -> Operation:
    """Loads or stores 1, 2 or 4 matrices of 8 rows of 16 bytes; lanes 8 i to 8 i + 7 give matrix i's row addresses."""
    if not ins.has("m8n8") or ins.kind != "b16":
        raise PTXError("only 8 x 8 matrices of 16-bit elements are implemented")
    loads = ins.name == "ldmatrix"
    fragment, where = ins.operands if loads else reversed(ins.operands)
    file, rows = machine.registers.rows(fragment.items if isinstance(fragment, Vector) else (fragment,))
    count, transposed = len(rows), ins.has("trans")
    address = bind_address(machine, where)
    addressed = machine.registers.lane < 8 * count
    pairs = file.reshape(len(file), -1, 32)  # (registers, warps, lanes)

    def run(mask: Mask) -> None:
        require_whole_warps(machine, mask, ins.name)
        lanes = np.flatnonzero(addressed if mask is True else addressed & mask)
        offsets = address(lanes)
        machine.shared.check(offsets, 16, ins.name)
        offsets = offsets + machine.shared_base[lanes]
        warps = slice(None) if mask is True else np.flatnonzero(mask[::32])
        words = machine.shared.rows(16, 2)
        if machine.shadow:
            granules, each = machine.shadow.granules(offsets, 16)
            owners = np.repeat(lanes, each)
            (machine.shadow.read if loads else machine.shadow.write)(granules, owners)
        if loads:
            matrices = words[offsets >> 4].reshape(-1, count, 8, 8)
            if transposed:
                matrices = matrices.swapaxes(2, 3)
            halves = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
            pairs[rows[:, None], _numbers(warps, pairs)] = halves.swapaxes(0, 1)
        else:
            halves = np.ascontiguousarray(pairs[rows[:, None], _numbers(warps, pairs)].swapaxes(0, 1))
            matrices = halves.view(np.uint16).reshape(-1, count, 8, 8)
            if transposed:
                matrices = matrices.swapaxes(2, 3)
            words[offsets >> 4] = matrices.reshape(-1, 8)

    return run


def _numbers(warps, pairs: np.ndarray) -> np.ndarray:
    return np.arange(pairs.shape[1]) if isinstance(warps, slice) else warps


def unpack_halves(bits: np.ndarray, kind: str) -> np.ndarray:
    """32-bit registers as their (low, high) halves in float32, stacked in front."""
    if kind == "bf16":
        return np.stack([bits << np.uint32(16), bits & np.uint32(0xFFFF0000)]).view(np.float32)
    halves = np.ascontiguousarray(bits).view(np.float16).reshape(*bits.shape, 2)
    return np.moveaxis(halves, -1, 0).astype(np.float32)


def tf32(bits: np.ndarray) -> np.ndarray:
    """What the tensor core sees of float32: the low 13 bits are ignored."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def a_fragment(bits: np.ndarray, kind: str) -> np.ndarray:
    """A's registers (2 or 4 or more, warps, 32) as matrices (warps, 16, k)."""
    registers, warps, _ = bits.shape
    if kind == "tf32":
        values = tf32(bits).reshape(registers // 2, 2, warps, 8, 4)  # column block, row half, warp, row, column
        return values.transpose(2, 1, 3, 0, 4).reshape(warps, 16, -1)
    values = unpack_halves(bits, kind).reshape(2, registers // 2, 2, warps, 8, 4)
    return values.transpose(3, 2, 4, 1, 5, 0).reshape(warps, 16, -1)


def b_fragment(bits: np.ndarray, kind: str) -> np.ndarray:
    """B's registers (1 or 2, warps, 32) as matrices (warps, k, 8)."""
    registers, warps, _ = bits.shape
    if kind == "tf32":
        return tf32(bits).reshape(registers, warps, 8, 4).transpose(1, 0, 3, 2).reshape(warps, -1, 8)
    values = unpack_halves(bits, kind).reshape(2, registers, warps, 8, 4)
    return values.transpose(2, 1, 4, 0, 3).reshape(warps, -1, 8)


def accumulator(matrix: np.ndarray) -> np.ndarray:
    """Matrices (warps, 16, n) as float32 fragments (n / 2, warps, 32), in the order of the registers."""
    warps, _, n = matrix.shape
    parts = matrix.reshape(warps, 2, 8, n // 8, 4, 2)  # row half, row, column block, lane, pair
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, warps, 32)


def pack_f16(values: np.ndarray) -> np.ndarray:
    """Accumulators (2 registers, ...) in half precision: pairs of neighbours share a register."""
    halves = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return halves[0::2] | (halves[1::2] << np.uint32(16))


@instruction("mma")
def _multiply(machine, ins) -> Operation:
    m, n, k = matrix_shape(ins)
    result, kind, second, of_c = ins.modifiers[-4:]
    if (m, n) != (16, 8) or kind != second or kind not in ("f16", "bf16", "tf32") or result != of_c:
        raise PTXError("this shape or type is not implemented")
    if kind == "tf32" and k not in (4, 8) or kind != "tf32" and k not in (8, 16):
        raise PTXError(f"k = {k} is not implemented for {kind}")
    (file, d), (_, a), (_, b), (_, c) = (machine.registers.rows(operand.items) for operand in ins.operands)
    fragments = file.reshape(len(file), -1, 32)
    accumulators = fragments.view(np.float32)
    half = result == "f16"

    def run(mask: Mask) -> None:
        require_whole_warps(machine, mask, "mma")
        left, right = a_fragment(fragments[a], kind), b_fragment(fragments[b], kind)
        product = accumulator(np.matmul(left, right))
        if half:
            product = pack_f16(product + unpack_halves(fragments[c], "f16").swapaxes(0, 1).reshape(4, -1, 32))
            target = fragments
        else:
            product += accumulators[c]
            target = accumulators
        if mask is True:
            target[d] = product
        else:
            warps = np.flatnonzero(mask[::32])
            target[d[:, None], warps] = product[:, warps]

    return run


def require_lanes(mask: Mask, lanes: int, group: int, what: str) -> np.ndarray:
    """The groups (warpgroups) of lanes that execute, all of whose lanes must."""
    if mask is True:
        return np.arange(lanes // group)
    count = mask.reshape(-1, group).sum(1)
    if ((count != 0) & (count != group)).any():
        raise CheckFailed("warp divergence", f"{what} by part of a warpgroup")
    return np.flatnonzero(count)

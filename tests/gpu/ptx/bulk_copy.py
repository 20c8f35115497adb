"""cp.async.bulk: copies of whole boxes of a tensor by TMA, or of bytes in a row, that arrive at an mbarrier (PTX ISA,
"cp.async.bulk.tensor").

A copy is carried out when it is issued, but only those who have waited for the phase of its barrier may know: the
machine checks that nobody touches the bytes before.
"""

import numpy as np

from .errors import CheckFailed, PTXError
from .instructions import Mask, Operation, lanes_of
from .load_store import bind_address
from .registers import GENERIC_PARAMETER, GENERIC_SHARED
from .tensor_map import ALIGNMENT, SIZE, SWIZZLE_BYTES, SWIZZLE_MASK, TensorMap, decode

_CHUNK = 16


def bind(machine, ins) -> Operation:
    if ins.has("prefetch"):
        return lambda mask: None
    spaces = [m for m in ins.modifiers if m.startswith("shared") or m == "global"]
    loads = spaces in (["shared::cluster", "global"], ["shared::cta", "global"])
    if not loads or not ins.has("mbarrier::complete_tx::bytes"):
        raise PTXError("bulk copies are implemented from global to shared memory, by way of an mbarrier")
    if any(m.startswith(("im2col", "tile::", "multicast", "cta_group")) for m in ins.modifiers):
        raise PTXError("bulk copies by im2col, gathers or to several CTAs are not implemented")
    return _tensor(machine, ins) if ins.has("tensor") else _bytes(machine, ins)


def _bytes(machine, ins) -> Operation:
    """[destination], [source], size, [mbarrier]."""
    to, source, at = (bind_address(machine, ins.operands[i]) for i in (0, 1, 3))
    size = machine.registers.read(ins.operands[2], "u32")

    def run(mask: Mask) -> None:
        for lane in machine.lane_numbers[lanes_of(mask, machine.lanes)].tolist():
            one = np.array([lane])
            count = int(np.broadcast_to(size, machine.lanes)[lane])
            if count % _CHUNK:
                raise CheckFailed("bulk copy", f"of {count} bytes, not a multiple of {_CHUNK}")
            steps = np.arange(0, count, _CHUNK)
            data = _load(machine, lane, source(one)[0] + steps, _CHUNK)
            _deliver(machine, lane, int(to(one)[0]) + steps, data, int(at(one)[0]))

    return run


def _tensor(machine, ins) -> Operation:
    """[destination], [tensor map, {coordinates}], [mbarrier]."""
    to, source, at = (bind_address(machine, operand) for operand in ins.operands[:3])
    coordinates = [machine.registers.read(item, "s32") for item in ins.operands[1].rest[0].items]
    if not ins.has(f"{len(coordinates)}d"):
        raise PTXError(f"{len(coordinates)} coordinates")

    def run(mask: Mask) -> None:
        for lane in machine.lane_numbers[lanes_of(mask, machine.lanes)].tolist():
            one = np.array([lane])
            tensor = _read_map(machine, lane, int(source(one)[0]))
            if len(tensor.sizes) != len(coordinates):
                raise CheckFailed("tensor map", f"of {len(tensor.sizes)} dimensions, {len(coordinates)} coordinates")
            start = [int(np.broadcast_to(c, machine.lanes)[lane]) for c in coordinates]
            destination = int(to(one)[0])
            if destination % 128:
                raise CheckFailed("shared alignment", f"a tensor's box at {destination}, not a multiple of 128")
            data = _read_box(machine, lane, tensor, start)
            _deliver(machine, lane, _places(tensor, destination), data, int(at(one)[0]))

    return run


def _read_map(machine, lane: int, address: int) -> TensorMap:
    """A tensor map among the parameters, or in global memory."""
    if address % ALIGNMENT:
        raise CheckFailed("tensor map", f"at {address:#x}, not a multiple of {ALIGNMENT}")
    if address >= GENERIC_PARAMETER:
        start = address - GENERIC_PARAMETER
        return decode(machine.parameters[start : start + SIZE].tobytes())
    if address >= GENERIC_SHARED:
        raise CheckFailed("tensor map", "in shared or local memory")
    return decode(_load(machine, lane, address + np.arange(0, SIZE, _CHUNK), _CHUNK).tobytes())


def _load(machine, lane: int, addresses: np.ndarray, size: int) -> np.ndarray:
    """The bytes (accesses, size) in global memory."""
    unit = min(size, 8)
    words = machine.spaces["global"].load(addresses, size, unit, np.full(len(addresses), lane), False)
    machine.tally.copied(_CHUNK, -(-len(addresses) * size // _CHUNK))
    return np.ascontiguousarray(words).view(np.uint8)


def _read_box(machine, lane: int, tensor: TensorMap, start: list[int]) -> np.ndarray:
    """The box's items (items, bytes), zeros outside of the tensor."""
    addresses, inside = np.zeros((), np.int64) + tensor.address, np.ones((), bool)
    dimensions = zip(start, tensor.box, tensor.sizes, (tensor.item, *tensor.strides), strict=True)
    for number, (first, extent, size, stride) in enumerate(dimensions):
        place = (first + np.arange(extent)).reshape(-1, *[1] * number)
        addresses = addresses + place * stride
        inside = inside & (place >= 0) & (place < size)
    addresses, inside = addresses.ravel(), np.broadcast_to(inside, addresses.shape).ravel()
    data = np.zeros((addresses.size, tensor.item), np.uint8)
    if inside.any():
        data[inside] = _load(machine, lane, addresses[inside], tensor.item)
    return data


def _places(tensor: TensorMap, destination: int) -> np.ndarray:
    """Where in shared memory the box's chunks of 16 bytes go."""
    if tensor.swizzle and tensor.box[0] * tensor.item != SWIZZLE_BYTES[tensor.swizzle]:
        raise PTXError("a box narrower than its swizzle is not implemented")
    places = destination + np.arange(0, tensor.box_bytes, _CHUNK)
    return places ^ ((places >> 7 & SWIZZLE_MASK[tensor.swizzle]) << 4)


def _deliver(machine, lane: int, offsets: np.ndarray, data: np.ndarray, at: int) -> None:
    """Writes the bytes as chunks at offsets of shared memory, and tells the barrier of them."""
    barrier = machine.memory_barriers.find(lane, at, by_copy=True)
    if len(offsets):
        machine.shared.check(offsets, _CHUNK, "bulk copy")
        rows = offsets + machine.shared_base[lane]
        if machine.shadow:
            granules, _ = machine.shadow.granules(rows, _CHUNK)
            machine.shadow.write_by_copy(granules, lane, barrier.agent, barrier.completed + 1)
        machine.shared.rows(_CHUNK, 1)[rows // _CHUNK] = data.reshape(-1, _CHUNK)
    machine.memory_barriers.expect(lane, barrier, -data.size)

"""cp.async: copies from global to shared memory that have happened only once they are waited for."""

from dataclasses import dataclass

import numpy as np

from . import bulk_copy
from .errors import PTXError
from .instructions import Mask, Operation, instruction, lanes_of
from .load_store import bind_address
from .parser import Immediate


@dataclass
class _Copy:
    """One instruction's copies: per lane the destination, the words, and the group it belongs to."""

    lanes: np.ndarray
    offsets: np.ndarray
    words: np.ndarray
    group: np.ndarray
    granules: np.ndarray


class AsyncCopies:
    """The copies under way. Each lane numbers its own groups."""

    def __init__(self, machine):
        self.machine = machine
        self.group = np.zeros(machine.lanes, np.int64)
        self.copies: list[_Copy] = []

    def reset(self) -> None:
        self.group.fill(0)
        self.copies.clear()

    def begin(self, lanes: np.ndarray, offsets: np.ndarray, words: np.ndarray) -> None:
        """The destination may be written at any time from here on: nothing may touch it until the wait."""
        shadow, size = self.machine.shadow, words.shape[1] * words.dtype.itemsize
        granules = np.empty((len(lanes), 0), np.int64)
        if shadow:
            granules, count = shadow.granules(offsets, size)
            shadow.check_write(granules, np.repeat(lanes, count))
            shadow.copying[granules] += 1
            granules = granules.reshape(len(lanes), count)
        self.copies.append(_Copy(lanes, offsets, words, self.group[lanes], granules))

    def wait(self, mask: Mask, pending: int) -> None:
        """Completes, for the lanes of the mask, all groups but the last `pending`."""
        limit = self.group - pending if pending >= 0 else np.full_like(self.group, np.iinfo(np.int64).max)
        if mask is not True:
            limit = np.where(mask, limit, -1)
        kept = []
        for copy in self.copies:
            done = copy.group < limit[copy.lanes]
            if done.all():
                self._complete(copy)
            elif done.any():
                self._complete(_select(copy, done))
                kept.append(_select(copy, ~done))
            else:
                kept.append(copy)
        self.copies = kept

    def _complete(self, copy: _Copy) -> None:
        shadow, size = self.machine.shadow, copy.words.shape[1] * copy.words.dtype.itemsize
        if shadow:
            granules = copy.granules.ravel()
            shadow.copying[granules] -= 1
            shadow.record_write(granules, np.repeat(copy.lanes, copy.granules.shape[1]))
        self.machine.shared.rows(size, copy.words.dtype.itemsize)[copy.offsets // size] = copy.words


def _select(copy: _Copy, chosen: np.ndarray) -> _Copy:
    return _Copy(*(array[chosen] for array in vars(copy).values()))


@instruction("cp")
def _async_copy(machine, ins) -> Operation:
    if ins.modifiers[0] != "async" or ins.has("mbarrier"):
        raise PTXError("this copy is not implemented")
    if ins.has("bulk"):
        return bulk_copy.bind(machine, ins)
    if ins.has("commit_group"):
        return _commit(machine)
    if ins.has("wait_group", "wait_all"):
        pending = int(ins.operands[0].text) if ins.has("wait_group") else -1
        return lambda mask: machine.copies.wait(mask, pending)
    return _copy(machine, ins)


def _commit(machine) -> Operation:
    def run(mask: Mask) -> None:
        machine.copies.group += mask

    return run


def _copy(machine, ins) -> Operation:
    """cp.async [shared], [global], size{, bytes}: what is beyond `bytes` is filled with zeros, and not read."""
    to, source = bind_address(machine, ins.operands[0]), bind_address(machine, ins.operands[1])
    size = int(ins.operands[2].text, 0)
    extras = [operand for operand in ins.operands[3:] if not ins.has("L2::cache_hint") or operand != ins.operands[-1]]
    present = machine.registers.read(extras[0], "u32") if extras else np.uint32(size)
    always_whole = not extras or isinstance(extras[0], Immediate) and int(extras[0].text, 0) == size
    unit = min(size, 4)

    def run(mask: Mask) -> None:
        index = lanes_of(mask, machine.lanes)
        lanes = machine.lane_numbers[index]
        offsets = to(index)
        machine.shared.check(offsets, size, "cp.async")
        if always_whole:
            words = machine.spaces["global"].load(source(index), size, unit, index, False)
            machine.tally.copied(size, len(lanes))
        else:
            words = _partial(lanes, source(index), np.broadcast_to(present, machine.lanes)[index])
        machine.copies.begin(lanes, offsets + machine.shared_base[index], words)

    def _partial(lanes: np.ndarray, addresses: np.ndarray, count: np.ndarray) -> np.ndarray:
        data = np.zeros((len(lanes), size), np.uint8)
        whole = np.flatnonzero(count >= size)
        if len(whole):
            words = machine.spaces["global"].load(addresses[whole], size, unit, lanes[whole], False)
            data[whole] = np.ascontiguousarray(words).view(np.uint8)
            machine.tally.copied(size, len(whole))
        for i in np.flatnonzero((count > 0) & (count < size)):
            some = int(count[i])
            bytes_ = machine.spaces["global"].load(
                addresses[i] + np.arange(some), 1, 1, np.repeat(lanes[i : i + 1], some), False
            )
            data[i, :some] = bytes_[:, 0]
            machine.tally.copied(some, 1)
        return data.view(f"u{unit}")

    return run

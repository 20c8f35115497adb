"""Runs a kernel: all threads of several CTAs in lockstep, those furthest behind in the program first.

A kernel is cut into basic blocks whose instructions are bound once, to a register file for a fixed number of lanes.
While all lanes agree, a block is a plain loop over numpy calls; when they part, the block with the lowest number runs
next, under a mask, so that structured code reconverges. Warps that wait for an mbarrier's phase are left out until it
is complete.
"""

import functools
import struct
from dataclasses import dataclass

import numpy as np

from . import (
    arithmetic,
    async_copy,
    bits,
    control,
    conversions,
    instructions,
    load_store,
    mbarrier,
    tensor_core,
    warp,
    wgmma,
)
from .checks import GlobalShadow, SharedShadow
from .counts import Counts, Tally, summarise
from .errors import CheckFailed, PTXError
from .memory import Allocation, GlobalMemory, SharedMemory
from .parser import Kernel
from .registers import RegisterFile

TABLES = (arithmetic, bits, control, conversions, load_store, async_copy, mbarrier, tensor_core, warp, wgmma)
_FORMATS = {"64": "Q", "32": "I", "16": "H", "8": "B"}
_BLOCK_LIMIT = 2_000_000  # blocks of one batch, beyond which a kernel is taken to hang
_FRUITLESS_LIMIT = 100  # times that warps are woken without a phase that completes


@dataclass
class Block:
    """Instructions from `first` to `last`; `end` gives the next block, `body` is what runs before it."""

    instructions: range
    last: int
    body: list
    end: object


class Machine:
    """A kernel bound to `ctas` programs of `block` threads with `shared` bytes of dynamic shared memory."""

    def __init__(self, kernel: Kernel, block: tuple, ctas: int, shared: int, checks: bool = True):
        self.kernel, self.ctas, self.checks = kernel, ctas, checks
        self.block = tuple(block) + (1,) * (3 - len(block))
        self.threads = self.block[0] * self.block[1] * self.block[2]
        if self.threads % 32:
            raise PTXError(f"{self.threads} threads are no whole number of warps")
        self.lanes = ctas * self.threads
        size = kernel.shared_size + shared
        self.registers = RegisterFile(kernel, self.block, self.lanes, size)
        self.lane_numbers = np.arange(self.lanes)
        self.shared = SharedMemory(ctas, size)
        self.shared_base = self.registers.cta * self.shared.stride
        self.local = np.zeros((self.lanes, kernel.local_size), np.uint8)
        self.parameters = np.zeros(max(kernel.parameter_size, 1), np.uint8)
        self.program = np.zeros(self.lanes, np.int32)
        self.global_memory, self.global_shadow = GlobalMemory([]), None
        self.shadow = None
        if checks:
            granule, warps = _granule(kernel, "shared"), self.threads // 32
            copiers = mbarrier.MOST if any(ins.name == "mbarrier" for ins in kernel.code) else 0
            self.shadow = SharedShadow(ctas, self.shared.stride, granule, warps, copiers, self.registers)
        self.module_data = _module_data(kernel)
        self.spaces = load_store.spaces(self)
        self.copies = async_copy.AsyncCopies(self)
        self.products = wgmma.WarpgroupProducts(self)
        self.barriers = control.Barriers(self)
        self.memory_barriers = mbarrier.MemoryBarriers(self)
        self.asleep = np.zeros(self.lanes // 32, bool)  # warps whose wait for an mbarrier failed
        self.fruitless = 0
        self.pc = np.zeros(self.lanes, np.int32)
        self.at = self.binding_pc = 0
        self.active = self.lanes
        self.guarded_lanes = [0] * len(kernel.code)
        self.tally = Tally()
        self.blocks = self._bind()
        self.block_lanes = [0] * len(self.blocks)

    # Binding

    def symbol_address(self, name: str) -> int:
        """The address of a parameter or variable, in its own state space."""
        parameter = next((p for p in self.kernel.parameters if p.name == name), None)
        if parameter is not None:
            return parameter.offset
        if name in self.module_data:
            return self.module_data[name].ctypes.data
        return self.registers.symbol(name)

    def _bind(self) -> list[Block]:
        code, labels = self.kernel.code, self.kernel.labels
        starts = {0, len(code), *labels.values()}
        starts |= {i + 1 for i, ins in enumerate(code) if control.ends_block(ins)}
        edges = sorted(starts)
        number = {start: i for i, start in enumerate(edges)}
        self.exit, self.blocked = number[len(code)], number[len(code)] + 1
        special = set().union(*(set().union(*wgmma.fragment_registers(ins)) for ins in code))
        self.products.fragments = {name: number for number, name in enumerate(sorted(special))}
        blocks = []
        for first, stop in zip(edges, edges[1:], strict=False):
            following = number[stop]
            tail = code[stop - 1] if control.ends_block(code[stop - 1]) else None
            body = []
            for self.binding_pc in range(first, stop - (tail is not None)):
                ins = code[self.binding_pc]
                operation = instructions.bind(self, ins)
                body.append(
                    (self.binding_pc, wgmma.guard_registers(self, ins, operation, special) if special else operation)
                )
            blocks.append(Block(range(first, stop), stop - 1, body, self._bind_end(tail, following, number)))
            if tail is None:
                blocks[-1].last = -1
        return blocks

    def _bind_end(self, ins, following: int, number: dict):
        if ins is None:
            return lambda mask: following
        if ins.name in control.BARRIERS:
            if ins.guard is not None:
                raise PTXError(f"line {ins.line}: a predicated barrier is not implemented")
            return control.bind_barrier(self, ins, following)
        if control.is_memory_wait(ins):
            if ins.guard is not None:
                raise PTXError(f"line {ins.line}: a predicated wait for an mbarrier is not implemented")
            return mbarrier.bind_wait(self, ins, following)
        if ins.name == "brx":
            raise PTXError(f"line {ins.line}: indirect branches are not implemented")
        target = number[self.kernel.labels[ins.operands[0].name]] if ins.name == "bra" else self.exit
        return control.bind_branch(self, ins, following, target)

    # Running

    def pending_arrivals(self) -> bool:
        return bool((self.barriers.arrived >= 0).any())

    def set_parameters(self, values: list) -> None:
        """Packs the arguments as the kernel's parameters expect; bytes are taken as they are."""
        for parameter, value in zip(self.kernel.parameters, values, strict=True):
            if isinstance(value, (bytes, bytearray)):
                data = bytes(value)
            elif parameter.kind in ("f32", "f64"):
                data = struct.pack("<f" if parameter.kind == "f32" else "<d", value)
            else:
                bits_ = parameter.size * 8
                data = struct.pack("<" + _FORMATS[str(bits_)], int(value) & ((1 << bits_) - 1))
            self.parameters[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(data, np.uint8)

    def reset_counts(self) -> None:
        self.guarded_lanes[:] = [0] * len(self.guarded_lanes)
        self.block_lanes[:] = [0] * len(self.block_lanes)
        self.tally.reset()

    def run(self, coordinates: np.ndarray, grid: tuple) -> None:
        """Runs the programs whose (x, y, z) are the rows of `coordinates`, at most as many as the machine holds."""
        present = len(coordinates)
        padded = np.concatenate([coordinates, np.repeat(coordinates[:1], self.ctas - present, 0)])
        self.registers.place_ctas(padded, grid)
        linear = (padded[:, 2] * grid[1] + padded[:, 1]) * grid[0] + padded[:, 0] + 1
        self.program[:] = np.repeat(linear, self.threads)
        self.shared.reset()
        if self.shadow:
            self.shadow.reset()
        for part in (self.copies, self.products, self.barriers, self.memory_barriers):
            part.reset()
        self.asleep.fill(False)
        self.fruitless = 0
        self.pc.fill(0)
        self.pc[present * self.threads :] = self.exit
        try:
            with np.errstate(all="ignore"):
                self._execute(present == self.ctas)
        except PTXError as error:
            raise self._located(error) from error

    def _execute(self, uniform: bool) -> None:
        pc, lanes, blocks, counted = self.pc, self.lanes, self.blocks, self.block_lanes
        number, mask = 0, True if uniform else None
        for _ in range(_BLOCK_LIMIT):
            if mask is None:
                behind = self._awake()
                number = int(behind.min())
                if number >= self.exit:
                    if (self.barriers.waiting >= 0).any():
                        raise CheckFailed("divergent barrier", self.barriers.explain())
                    return
                mask = behind == number
                self.active = int(np.count_nonzero(mask))
                if self.active == lanes:
                    mask = True
            elif number == self.exit:
                return
            else:
                self.active = lanes
            block = blocks[number]
            counted[number] += self.active
            for self.at, operation in block.body:  # noqa: B020 - the instruction that an error is reported at
                operation(mask)
            self.at = block.instructions[-1]
            following = block.end(mask)
            if following is None:
                mask = None
            elif mask is True:
                number = following
            else:
                pc[mask] = following
                mask = None
        raise CheckFailed("hang", f"still running after {_BLOCK_LIMIT} basic blocks")

    def _awake(self) -> np.ndarray:
        """The next block of each lane, for those asleep one beyond all; where nobody else can go on, all are woken."""
        if not self.asleep.any():
            return self.pc
        behind = np.where(np.repeat(self.asleep, 32), self.blocked, self.pc)
        if int(behind.min()) < self.exit:
            return behind
        self.fruitless += 1
        if self.fruitless > _FRUITLESS_LIMIT:
            raise CheckFailed("hang", self.memory_barriers.explain())
        self.asleep.fill(False)
        return self.pc

    def wake(self, cta: int) -> None:
        """A phase of one of the CTA's mbarriers is complete."""
        self.asleep.reshape(self.ctas, -1)[cta] = False
        self.fruitless = 0

    def _located(self, error: PTXError) -> PTXError:
        ins = self.kernel.code[self.at]
        place = f"{self.kernel.name}, PTX line {ins.line}, {ins.source or 'no source line'}, {ins.opcode}"
        if isinstance(error, CheckFailed):
            return CheckFailed(error.check, f"{error.message} [{place}]")
        return PTXError(f"{error} [{place}]")


def _granule(kernel: Kernel, space: str) -> int:
    """The smallest access to a state space, at most 4 bytes: how finely its checks look."""
    smallest = 4
    for ins in kernel.code:
        if ins.name in ("ld", "st", "ldu") and load_store.space_of(ins) in (space, "generic"):
            smallest = min(smallest, load_store.access_size(ins)[0])
        elif ins.name in ("atom", "red") and load_store.space_of(ins) in (space, "generic"):
            smallest = min(smallest, load_store.width(ins.kind) // 8)
    return smallest


def _module_data(kernel: Kernel) -> dict[str, np.ndarray]:
    """The module's variables in global and constant memory, aligned and with their initial values."""
    placed = {}
    for variable in kernel.variables.values():
        if variable.space in ("global", "const"):
            buffer = np.zeros(variable.size + 256, np.uint8)
            start = -buffer.ctypes.data % 256
            placed[variable.name] = buffer[start : start + variable.size]
            placed[variable.name][:] = np.frombuffer(variable.data, np.uint8)
    return placed


LANES = 2048  # lanes that a batch is filled up to: numpy's cost per call against what fits into the cache


@functools.lru_cache(maxsize=16)
def _machine(holder: "_Holder", block: tuple, ctas: int, shared: int, checks: bool) -> Machine:
    return Machine(holder.kernel, block, ctas, shared, checks)


class _Holder:
    """A kernel as a cache key: by identity, since the parser already shares equal ones."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def __hash__(self) -> int:
        return id(self.kernel)

    def __eq__(self, other) -> bool:
        return self.kernel is other.kernel


def launch(
    kernel: Kernel,
    grid: tuple,
    block: tuple,
    arguments: list,
    allocations: list[Allocation],
    shared: int = 0,
    checks: bool = True,
    programs=None,
) -> Counts:
    """Runs a grid. `programs` picks some of its coordinates instead of all; `checks=False` is faster and checks only
    bounds.

    Raises CheckFailed at the first instruction that breaks a rule.
    """
    grid = tuple(grid) + (1,) * (3 - len(grid))
    block = tuple(block) + (1,) * (3 - len(block))
    if programs is None:
        z, y, x = np.meshgrid(*(np.arange(extent) for extent in grid[::-1]), indexing="ij")
        programs = np.stack([x.ravel(), y.ravel(), z.ravel()], 1)
    programs = np.asarray(programs)
    if not len(programs):
        return Counts()
    threads = block[0] * block[1] * block[2]
    batches = -(-len(programs) // max(LANES // threads, 1))
    ctas = -(-len(programs) // batches)
    machine = _machine(_Holder(kernel), block, ctas, shared, checks)
    own = [Allocation(data.ctypes.data, data.size, name) for name, data in machine.module_data.items()]
    machine.global_memory = GlobalMemory([*allocations, *own])
    machine.global_shadow = GlobalShadow(machine.global_memory, _granule(kernel, "global")) if checks else None
    machine.set_parameters(arguments)
    machine.reset_counts()
    for start in range(0, len(programs), ctas):
        machine.run(programs[start : start + ctas], grid)
    counts = summarise(machine)
    counts.programs = len(programs)
    if machine.global_shadow:
        counts.read, counts.written = machine.global_shadow.touched()
    return counts

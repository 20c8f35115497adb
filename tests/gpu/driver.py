"""Launches Triton kernels on CPU tensors: compiled for a chosen GPU by Triton's own launch path, run by the PTX
emulator.

    with emulated("sm_90") as machine:
        kernel[grid](x, y, n, BLOCK=1024)
    machine.counts  # of all launches; machine.launches has them one by one

Nothing of the kernel or of how it is called changes: a stub driver stands in for CUDA's, and the last stage of the
pipeline, ptxas, is left out (compile_matrix.py is what checks it).
"""

import contextlib
import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from .chips import shared_limit
from .ptx import Allocation, Counts, Kernel, PTXError, launch, parse
from .tensors import allocation

# Triton keeps what it compiled by device number: one of ours for each architecture and pipeline.
_FIRST_DEVICE = 1000
_FIRST_CAPTURING = 2000
_AMD = {"gfx942": 999}
_STAGES_KEY = "ptx only"


@dataclass
class Launch:
    """One launch: the kernel, its grid, block and shared bytes, what it did, and how long the emulator took."""

    name: str
    kernel: Kernel
    grid: tuple
    threads: int
    shared: int
    counts: Counts
    seconds: float


class Emulation:
    """What `emulated` yields: the target and options, and a record of every launch."""

    def __init__(self, arch: int, checks: bool, transform: Callable[[str], str] | None):
        self.arch, self.checks, self.transform = arch, checks, transform
        self.launches: list[Launch] = []
        self._extra: list[Allocation] = []

    @property
    def counts(self) -> Counts:
        """The sum over all launches."""
        return sum((item.counts for item in self.launches), Counts())

    def allow(self, tensor: torch.Tensor, name: str) -> None:
        """Lets kernels reach a tensor that is not among their arguments, such as one behind a table of pointers."""
        self._extra.append(allocation(tensor, name))

    def run(
        self, kernel: Kernel, grid: tuple, threads: int, arguments: list, memory: list[Allocation], shared: int
    ) -> None:
        start = time.perf_counter()
        counts = launch(kernel, grid, (threads,), arguments, [*memory, *self._extra], shared, self.checks)
        seconds = time.perf_counter() - start
        self.launches.append(Launch(kernel.name, kernel, grid, threads, shared, counts, seconds))


@dataclass
class Compiled:
    """A kernel that was compiled all the way: its name, threads and shared bytes, and its binary and assembly text."""

    name: str
    threads: int
    shared: int
    binary: bytes
    assembly: dict[str, str]


class Capture:
    """What `captured` yields: the kernels that would have been launched."""

    def __init__(self, target: GPUTarget):
        self.target = target
        self.compiled: list[Compiled] = []

    def add(self, name: str, binary: bytes, metadata) -> None:
        if any(item.binary == binary for item in self.compiled):
            return
        paths = get_cache_manager(metadata.hash).get_group(f"{name[:150]}.json") or {}
        texts = {Path(path).suffix[1:]: Path(path) for path in paths.values()}
        assembly = {kind: path.read_text() for kind, path in texts.items() if kind in ("ptx", "amdgcn", "ttgir")}
        threads = metadata.num_warps * metadata.target.warp_size
        self.compiled.append(Compiled(name, threads, metadata.shared, binary, assembly))


_current: list[Emulation | Capture] = []


class _Utilities:
    """What Triton asks of a driver's module: device properties, and to load a binary, which here is PTX."""

    @staticmethod
    def get_device_properties(device: int) -> dict:
        limit = shared_limit(_arch_of_device(device))
        return {"max_shared_mem": limit, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple:
        return None, (name, binary), 0, 0, 1024

    @staticmethod
    def unload_module(module) -> None:
        """Nothing was loaded."""


class _Launcher:
    """Turns the values of a call into the parameters of the PTX kernel, and runs it."""

    def __init__(self, src, metadata):
        self.names = list(src.signature)
        self.types = list(src.signature.values())
        self.metadata = metadata

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *values):
        if x * y * z == 0:
            return
        emulation = _current[-1]
        name, binary = function
        if isinstance(emulation, Capture):
            emulation.add(name, binary, self.metadata)
            return
        if getattr(self.metadata, "num_ctas", 1) != 1:
            raise PTXError("clusters (num_ctas > 1) are not implemented")
        text = binary.decode()
        kernel = parse(emulation.transform(text) if emulation.transform else text)[name]
        arguments: list = []
        memory: list[Allocation] = []
        for argument, kind, value in zip(self.names, self.types, values, strict=True):
            _flatten(str(argument), kind, value, arguments, memory)
        # Triton appends pointers to scratch memory, of the size that the kernel asks for per program.
        scratch = np.empty(max(x * y * z * getattr(self.metadata, "global_scratch_size", 0), 1) + 128, np.uint8)
        scratch_start = scratch.ctypes.data + -scratch.ctypes.data % 128
        memory.append(Allocation(scratch_start, scratch.nbytes - 128, "scratch"))
        arguments += [scratch_start] * (len(kernel.parameters) - len(arguments))
        threads = kernel.threads[0] if kernel.threads else 32 * self.metadata.num_warps
        emulation.run(kernel, (x, y, z), threads, arguments, memory, self.metadata.shared)


_SCALARS = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}


def _flatten(name: str, kind, value, arguments: list, memory: list[Allocation]) -> None:
    """Appends an argument's parameters, those of a tuple one by one; constants are compiled in."""
    if isinstance(kind, tuple):
        for i, (inner, item) in enumerate(zip(kind, value, strict=True)):
            _flatten(f"{name}[{i}]", inner, item, arguments, memory)
    elif kind == "constexpr":
        return
    elif kind[0] == "*":
        tensor = getattr(value, "base", None) if not isinstance(value, torch.Tensor) else value
        if value is None:
            arguments.append(0)
        elif tensor is None:
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        elif tensor.device.type != "cpu":
            raise ValueError(f"{name}: the emulator takes CPU tensors, got one on {tensor.device}")
        else:
            arguments.append(tensor.data_ptr())
            memory.append(allocation(tensor, name))
    elif kind.startswith(("tensordesc", "nvTmaDesc")):
        raise PTXError(f"{name}: tensor descriptors are not implemented")
    elif kind in _SCALARS:
        arguments.append(struct.pack(_SCALARS[kind], value))
    elif kind == "bf16":
        arguments.append(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
    else:
        arguments.append(int(value))


class StubDriver:
    """Stands in for CUDA's driver, or ROCm's, while `emulated` or `captured` is entered."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def __init__(self, target: GPUTarget, device: int):
        self.target, self.device = target, device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple:
        return divmod(_arch_of_device(device), 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self) -> Callable:
        """For autotuning: runs nothing, and calls whatever comes first the fastest."""
        tried = 0

        def benchmark(call: Callable, quantiles=None, **_):
            nonlocal tried
            tried += 1
            return [float(tried)] * len(quantiles) if quantiles else float(tried)

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """There is none."""


def _arch_of_device(device: int) -> int:
    return device % 1000


def _ptx_only(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton's hook into its pipeline: the binary that is stored and loaded is the PTX itself."""
    if stages is not None:
        stages["cubin"] = lambda text, metadata: text.encode()
    return _STAGES_KEY, hashlib.sha256(_STAGES_KEY.encode()).hexdigest()


def parse_arch(target: str | int) -> int:
    """90 of "sm_90" or "sm_90a" or 90."""
    return int(str(target).removeprefix("sm_").rstrip("af"))


@contextlib.contextmanager
def emulated(
    target: str | int = "sm_90", *, checks: bool = True, transform: Callable[[str], str] | None = None
) -> Iterator[Emulation]:
    """Runs every Triton launch inside on the emulator, compiled for `target` ("sm_80", "sm_86", "sm_89" or "sm_90").

    checks=False is faster, and checks bounds and alignment only. `transform` rewrites the PTX before it runs, which is
    how mutations are tried. Raises ptx.CheckFailed where a kernel breaks a rule.
    """
    emulation = Emulation(parse_arch(target), checks, transform)
    target_ = GPUTarget("cuda", emulation.arch, 32)
    with _standing_in(emulation, StubDriver(target_, _FIRST_DEVICE + emulation.arch), _ptx_only):
        yield emulation


@contextlib.contextmanager
def captured(target: str | int) -> Iterator[Capture]:
    """Compiles every Triton launch inside to a binary, for "sm_80" to "sm_120" or "gfx942", and runs none."""
    hip = torch.version.hip
    if target in _AMD:
        capture, device, hip = Capture(GPUTarget("hip", target, 64)), _FIRST_CAPTURING + _AMD[target], hip or "7.0"
    else:
        arch = parse_arch(target)
        capture, device = Capture(GPUTarget("cuda", arch, 32)), _FIRST_CAPTURING + arch
    with _standing_in(capture, StubDriver(capture.target, device), None), mock.patch.object(torch.version, "hip", hip):
        yield capture


@contextlib.contextmanager
def _standing_in(session: Emulation | Capture, stub: StubDriver, hook: Callable | None) -> Iterator[None]:
    driver, previous_hook = triton.runtime.driver, knobs.runtime.add_stages_inspection_hook
    previous = driver._active
    driver.set_active(stub)
    knobs.runtime.add_stages_inspection_hook = hook
    _current.append(session)
    try:
        yield
    finally:
        _current.pop()
        knobs.runtime.add_stages_inspection_hook = previous_hook
        driver._active = previous

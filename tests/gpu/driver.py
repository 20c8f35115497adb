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

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from .chips import shared_limit
from .ptx import Allocation, CheckFailed, Counts, Kernel, PTXError, launch, parse

_FIRST_DEVICE = 1000  # Triton keeps what it compiled by device number: one of ours for each architecture
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


def allocation(tensor: torch.Tensor, name: str) -> Allocation:
    """The bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return Allocation(tensor.data_ptr(), 0, name)
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return Allocation(tensor.data_ptr(), span * tensor.element_size(), name)


_current: list[Emulation] = []


class _Utilities:
    """What Triton asks of a driver's module: device properties, and to load a binary, which here is PTX."""

    @staticmethod
    def get_device_properties(device: int) -> dict:
        limit = shared_limit(device - _FIRST_DEVICE)
        return {"max_shared_mem": limit, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple:
        return None, (name, binary.decode()), 0, 0, 1024

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
        if getattr(self.metadata, "num_ctas", 1) != 1:
            raise PTXError("clusters (num_ctas > 1) are not implemented")
        emulation = _current[-1]
        name, text = function
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


class _Driver:
    """Stands in for CUDA's driver while `emulated` is entered."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return _FIRST_DEVICE + self.arch

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple:
        return divmod(self.arch, 10)

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
    driver, hook = triton.runtime.driver, knobs.runtime.add_stages_inspection_hook
    previous = driver._active
    driver.set_active(_Driver(emulation.arch))
    knobs.runtime.add_stages_inspection_hook = _ptx_only
    _current.append(emulation)
    try:
        yield emulation
    finally:
        _current.pop()
        knobs.runtime.add_stages_inspection_hook = hook
        driver._active = previous


__all__ = ["CheckFailed", "Emulation", "Launch", "PTXError", "emulated", "parse_arch"]

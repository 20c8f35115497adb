"""The CUDA C++ kernels of fasttx's own binary on the emulator: real operators, bindings and launchers, on CPU tensors.

    with intercepted() as machine:
        ops.gelu(x, "none", "cuda")
    machine.counts

The PTX is what the binary carries, taken out by cuobjdump; only the driver is stood in for.
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import triton.backends.nvidia
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttx.dispatch import cuda_architectures, extension
from gpu.driver import Emulation, parse_arch
from gpu.ptx import Allocation, parse
from gpu.ptx.tensor_map import encode
from gpu.tensors import allocation

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
_ENTRY = re.compile(r"^\s*\.visible\s+\.entry\s+(\w+)", re.MULTILINE)
missing = None if cuda_architectures else "the binary contains no CUDA kernels"


@functools.cache
def modules() -> list[str]:
    """All PTX that the binary carries, a text for each source file of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = [CUOBJDUMP, "-xptx", "all", extension.__file__]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return [path.read_text() for path in Path(folder).glob("*.ptx")]


@functools.cache
def kernels() -> dict[str, str]:
    """The PTX of each kernel, a module of its own, by its name."""
    found = {}
    for text in modules():
        files = "\n".join(re.findall(r"^\s*\.file\s.*$", text, re.MULTILINE))
        text = re.split(r"^\s*\.(?:file|section)\s", text, maxsplit=1, flags=re.MULTILINE)[0]
        starts = [match.start() for match in _ENTRY.finditer(text)]
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            found[_ENTRY.match(text, start)[1]] = text[: starts[0]] + text[start:end] + files
    return found


def gpu_of(target: str) -> str:
    """ "sm_90" of "binary sm_90"; of "binary" the oldest that there are kernels for."""
    return target.removeprefix("binary").strip() or "sm_80"


class _Announced(TorchDispatchMode):
    """Tells which memory a call of an operator may touch: that of its tensors."""

    def __init__(self, memory: list[Allocation]):
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fasttx_cuda":
            return func(*args, **(kwargs or {}))
        tensors = ((f"argument {i}", arg) for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.numel())
        self.memory[:] = [allocation(tensor, name) for name, tensor in tensors]
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.memory.clear()


@contextlib.contextmanager
def intercepted(
    *, gpu: str = "sm_80", checks: bool = True, transform: Callable[[str], str] | None = None
) -> Iterator[Emulation]:
    """Within this context the operators of fasttx_cuda take CPU tensors, and what they launch runs on the emulator.

    gpu: whose capability it has, "sm_80" or "sm_90"; checks, transform: as `emulated`'s.
    """
    machine, memory = Emulation(parse_arch(gpu), checks, transform), []
    failures = []

    def on_launch(image: str, name: str, grid: tuple, threads: int, shared: int, parameter: bytes) -> None:
        text = kernels()[name]
        kernel = parse(transform(text) if transform else text)[name]
        try:
            machine.run(kernel, grid, threads, [parameter], list(memory), shared)
        except Exception as error:
            failures.append(error)
            raise

    def on_allocation(address: int, size: int) -> None:
        memory.append(Allocation(address, size, f"result {len(memory)}"))

    def on_map(address: int, sizes: tuple, strides: tuple, box: tuple) -> bytes:
        return encode(address, 2, sizes, strides, box, swizzle=3)

    extension.intercept_cuda(on_launch, on_allocation, on_map, machine.arch)
    try:
        with _Announced(memory):
            yield machine
    except RuntimeError as error:
        # What a callback raised has been through C++ and PyTorch's dispatcher, which know no types of Python's.
        raise (failures or [error])[0] from None
    finally:
        extension.intercept_cuda(None, None)

"""What the results of a measurement depend on: processor, threads, memory allocator."""

import os
import platform
from pathlib import Path

import torch

from fasttx.dispatch import extension

_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc", "tbbmalloc")


def cpu_model() -> str:
    """The processor's name, as it tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> str:
    """How many threads PyTorch and fasttx's kernels run on, and of how many processors."""
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'} on {cores()} processors"


def allocator() -> str:
    """The memory allocator in use: one that was preloaded, or the system's."""
    system = " ".join(filter(None, platform.libc_ver())) or platform.system()
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return f"{system}'s malloc (whether another is preloaded cannot be told here)"
    for name in _ALLOCATORS:
        if f"lib{name}" in maps:
            return f"{name} (preloaded)"
    return f"{system}'s malloc (no other is preloaded)"


def summary() -> tuple[str, str]:
    """Two lines: the machine and how it is used, and the software."""
    isa = f"kernels for {extension.isa()}" if extension else "no C++ kernels"
    return (
        f"{cpu_model()}, {isa}, {threads()}",
        f"torch {torch.__version__}, Python {platform.python_version()}, {allocator()}",
    )

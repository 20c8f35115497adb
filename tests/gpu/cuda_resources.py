"""The CUDA C++ kernels' registers, spills and occupancy on every architecture.

    python -m gpu.cuda_resources --write    (in tests/) writes cuda_resources.json

The binary tells of the architectures that the build compiled for; for all of them ptxas compiles the PTX that
it carries.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fasttx.dispatch import extension
from gpu import binary
from gpu.bounds import blocks_per_multiprocessor
from gpu.nvcc import find_nvcc

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TABLE = Path(__file__).with_name("cuda_resources.json")


def find_ptxas() -> str | None:
    """That of CUDA's installation, beside nvcc."""
    nvcc = find_nvcc()
    return None if nvcc is None else str(Path(nvcc).with_name("ptxas"))


def built() -> dict[int, dict[str, dict[str, int]]]:
    """What compile_for gives, of the architectures that the binary is compiled for."""
    command = [binary.CUOBJDUMP, "-res-usage", extension.__file__]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[int, dict[str, dict[str, int]]] = {}
    for line in (told.stdout + told.stderr).splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.setdefault(arch, {})[name] = {"registers": registers, "stack": stack + local, "shared": shared}
    return found


def compile_for(arch: int) -> dict[str, dict[str, int]]:
    """By kernel that it has: registers, bytes of stack, where spilled ones lie, and of static shared memory."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(binary.modules()):
            only = re.search(r"^\.target sm_(\d+a)", text, re.MULTILINE)
            if only and only[1] != f"{arch}a":
                continue
            target = only[1] if only else arch
            path = Path(folder) / f"{number}.ptx"
            path.write_text(text)
            command = [find_ptxas(), f"-arch=sm_{target}", "-O3", "-v", str(path), "-o", f"{path}.cubin"]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            for part in told.split("Compiling entry function ")[1:]:
                name = part.split("'")[1]
                numbers = {
                    "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                    "stack": int(re.search(r"(\d+) bytes stack frame", part)[1]),
                    "shared": int((re.search(r"(\d+) bytes smem", part) or [0, 0])[1]),
                }
                found[name] = numbers
    return found


def blocks(arch: int, numbers: dict[str, int], threads: int, dynamic_shared: int) -> int:
    """How many blocks of a kernel fit on a multiprocessor."""
    return blocks_per_multiprocessor(arch, threads, numbers["registers"], numbers["shared"] + dynamic_shared)


def read_table() -> dict[str, dict[str, int]]:
    """kernel -> architecture -> registers."""
    return json.loads(TABLE.read_text())


def write_table() -> None:
    """A line for each kernel."""
    table: dict[str, dict[str, int]] = {}
    for arch in ARCHITECTURES:
        for name, numbers in compile_for(arch).items():
            table.setdefault(name, {})[f"sm_{arch}"] = numbers["registers"]
    lines = (f"{json.dumps(name)}: {json.dumps(registers)}" for name, registers in sorted(table.items()))
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m gpu.cuda_resources --write")
    write_table()

"""Every kernel compiled for every architecture: registers, spills, shared memory and matrix instructions.

    python -m gpu.compile_matrix [name ...]          (in tests/) compiles and compares with compile_matrix.json
    python -m gpu.compile_matrix --write [name ...]  writes it

What is compiled is what a call launches for that architecture, constants, specialisation and configuration included: a
case is a function that makes the call, with tensors of any device (kernel_cases.py lists them).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import triton.backends.nvidia

from gpu.chips import LIMITS
from gpu.driver import Compiled, captured

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
TABLE = Path(__file__).with_name("compile_matrix.json")
_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_NVIDIA_MATRIX = r"\b(?:HMMA|HGMMA|QGMMA|QMMA|UTC\w*MMA|IMMA|DMMA)\b"
_AMD_MATRIX = r"\bv_mfma_"
_AMD_SHARED = 64 * 1024


@dataclass(frozen=True)
class Case:
    """A call whose launches are compiled. Kernels with one of the words of `matrix` in their name (any name has the
    empty word) must have matrix instructions."""

    name: str
    call: Callable[[], object]
    matrix: tuple[str, ...] = ()
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes. spills: bytes of stack per thread, which is what spilled registers lie in."""

    threads: int
    registers: int
    spills: int
    shared: int
    matrix: int


def resources(compiled: Compiled) -> Resources:
    """Read from the binary by cuobjdump and nvdisasm, or from AMD's assembly."""
    if "amdgcn" in compiled.assembly:
        return _amd_resources(compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.binary)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        assembly = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{compiled.name}: cuobjdump says nothing of its resources: {usage[:200]}")
    registers, stack, static, local = map(int, found.groups())
    matrix = len(re.findall(_NVIDIA_MATRIX, assembly))
    return Resources(compiled.threads, registers, stack + local, max(compiled.shared, static), matrix)


def _amd_resources(compiled: Compiled) -> Resources:
    text = compiled.assembly["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    return Resources(
        compiled.threads,
        number("vgpr_count"),  # accumulators included
        number("private_segment_fixed_size"),
        compiled.shared,
        len(re.findall(_AMD_MATRIX, text)),
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def compile_case(case: Case, architecture: str) -> dict[str, Resources]:
    """The resources of each kernel that the case launches; a name that comes twice gets a number."""
    with captured(architecture) as capture:
        case.call()
    found: dict[str, Resources] = {}
    for compiled in capture.compiled:
        name, count = compiled.name, 2
        while name in found:
            name, count = f"{compiled.name}#{count}", count + 1
        found[name] = resources(compiled)
    return found


def complaints(case: Case, architecture: str, name: str, new: Resources, old: dict | None) -> list[str]:
    """What is wrong with a kernel: beyond the chip's limits, or worse than the table says."""
    where = f"{case.name}, {architecture}, {name}"
    arch = architecture.removeprefix("sm_")
    limit = LIMITS[int(arch)].block_shared if arch.isdigit() else _AMD_SHARED
    wrong = []
    if new.shared > limit:
        wrong.append(f"{where}: {new.shared} bytes of shared memory, the chip has {limit}")
    if new.spills:
        wrong.append(f"{where}: spills {new.spills} bytes")
    if any(word in name for word in case.matrix) and not new.matrix:
        wrong.append(f"{where}: no matrix instructions")
    if old is None:
        return [*wrong, f"{where}: not in the table"]
    for field in ("registers", "shared"):
        if getattr(new, field) > old[field]:
            wrong.append(f"{where}: {field} went from {old[field]} to {getattr(new, field)}")
    if new.matrix < old["matrix"] and any(word in name for word in case.matrix):
        wrong.append(f"{where}: matrix instructions went from {old['matrix']} to {new.matrix}")
    return wrong


def read_table() -> dict:
    """case -> architecture -> kernel -> resources."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_table(table: dict) -> None:
    """A line for each kernel."""
    text = json.dumps(table, indent=1, sort_keys=True)
    TABLE.write_text(re.sub(r"\{[^{}]+\}", lambda match: " ".join(match[0].split()), text) + "\n")


def check(case: Case, architecture: str) -> list[str]:
    """Compiles and compares."""
    old = read_table().get(case.name, {}).get(architecture, {})
    found = compile_case(case, architecture)
    wrong = [c for name, new in found.items() for c in complaints(case, architecture, name, new, old.get(name))]
    return wrong if found else [f"{case.name}, {architecture}: nothing was launched"]


def main(arguments: list[str]) -> int:
    from gpu.kernel_cases import CASES

    parser = argparse.ArgumentParser(prog="python -m gpu.compile_matrix")
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("names", nargs="*", help="cases (default: all)")
    options = parser.parse_args(arguments)
    table, wrong = read_table(), []
    for case in CASES:
        if options.names and case.name not in options.names:
            continue
        for architecture in case.architectures:
            if options.write:
                found = compile_case(case, architecture)
                table.setdefault(case.name, {})[architecture] = {name: asdict(r) for name, r in found.items()}
                wrong += [c for n, r in found.items() for c in complaints(case, architecture, n, r, asdict(r))]
                write_table(table)
            else:
                wrong += check(case, architecture)
        print(case.name, "done", flush=True)
    print("\n".join(wrong))
    return bool(wrong) and not options.write


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

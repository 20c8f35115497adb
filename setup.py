"""Builds fasttx._C with ninja: one set of compiler flags for each instruction set, one binary for every torch >= 2.10.

Without a C++ compiler the package installs all the same and runs on its reference path; `python -m fasttx doctor` says
so. FASTTX_CPP=0 leaves the extension out on purpose; CXX names another compiler.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: the oldest stable ABI that the binary needs

COMMON = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]
# Kernels write every fused multiply-add out, so that the main loop and the tail of a row round alike.
KERNEL = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]
KERNEL += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own intrinsics headers
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512_BF16 = [*AVX512, "-mavx512bf16"]
    AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX, "amx_float32": AMX}


def find_compiler() -> str | None:
    """The C++ compiler to build with, or None."""
    if os.environ.get("FASTTX_CPP") == "0":
        return None
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name.split()[0]))), None)


def find_ninja() -> str:
    """The ninja of the running environment: its package's where there is one, else the one on the path."""
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise SystemExit("fasttx is built with ninja, which was not found: pip install ninja")
    return found


def torch_folder() -> Path:
    """Where torch's headers and libraries are, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "fasttx builds against torch's headers, and torch is not installed here: "
            "pip install torch, then pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def sources() -> dict[str, list[str]]:
    """Every source file with its own flags."""
    torch = torch_folder()
    python = sysconfig.get_paths()["include"]
    headers = [f"-isystem{torch / 'include'}", f"-isystem{python}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    files = {str(path): headers for path in sorted((ROOT / "csrc/bindings").glob("*.cpp"))}
    files[str(ROOT / "csrc/cpu/dispatch.cpp")] = []
    for isa, flags in ISAS.items():
        files[str(ROOT / f"csrc/cpu/isa_{isa}.cpp")] = [*KERNEL, *flags]
    return files


def ninja_file(compiler: str, target: Path) -> str:
    """The build description: compile every source with its flags, link them."""

    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lib = torch_folder() / "lib"
    link = [f"-L{lib}", "-ltorch_cpu", "-ltorch", "-lc10", "-Wl,--as-needed"]
    if sys.platform == "darwin":
        link = [f"-L{lib}", "-ltorch_cpu", "-ltorch", "-lc10", "-undefined", "dynamic_lookup"]
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compiler} {' '.join(COMMON)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared -O3 $in {' '.join(link)} -o $out",
    ]
    objects = []
    # The kernels first: they take longest.
    for path, flags in sorted(sources().items(), key=lambda item: "isa_" not in item[0]):
        objects.append(escape(f"{Path(path).parent.name}_{Path(path).stem}.o"))
        lines += [f"build {objects[-1]}: compile {escape(path)}", f"  flags = {' '.join(flags)}"]
    lines += [f"build {escape(target.resolve())}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


class BuildWithNinja(build_ext):
    """Compiles one extension with ninja; what has not changed is not compiled again."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(find_compiler(), target))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([find_ninja(), "-C", str(folder), *jobs], check=True)


if find_compiler() is None:
    print("fasttx: no C++ compiler, so the kernels are left out: only the reference path will run", file=sys.stderr)
    extensions = []
else:
    extensions = [Extension("fasttx._C", [])]

setup(
    packages=[*find_packages(include=["fasttx", "fasttx.*"]), "fasttx.kernels"],
    package_dir={"fasttx.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWithNinja},
)

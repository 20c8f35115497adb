"""Builds fasttx._C with ninja: one set of compiler flags for each instruction set, one binary for every torch >= 2.10.

Without a C++ compiler the package installs all the same and runs on its reference path; `python -m fasttx doctor` says
so. FASTTX_CPP=0 leaves the extension out on purpose; CXX names another compiler.

Where nvcc is installed the binary holds the CUDA kernels too, which need no CUDA to load. FASTTX_CUDA=0 leaves them
out, FASTTX_CUDA=1 makes a missing nvcc an error; FASTTX_CUDA_ARCHS="80 90" names the architectures, "all" those of a
release.
"""

import importlib.util
import os
import platform
import re
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
COMMON += [f"'-fmacro-prefix-map={ROOT.resolve()}/='"]  # errors name files of the project, not of the machine
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

# Kernels are compiled once, to PTX of the oldest architecture that they can run on; ptxas makes each binary of it.
CUDA_BASE = "80"
# As on the CPU, fused multiply-adds are those that are written out.
NVCC = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo"]
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
CUDA_DEVELOPMENT = ("80", "90")


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


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the path, or of where CUDA installs itself; None where it is not wanted or not there."""
    wanted = os.environ.get("FASTTX_CUDA") or None
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"FASTTX_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0" or not sys.platform.startswith("linux"):
        return None
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = next((home / "bin/nvcc" for home in homes if (home / "bin/nvcc").exists()), None) or shutil.which("nvcc")
    if found is None and wanted == "1":
        raise SystemExit("FASTTX_CUDA=1 asks for the CUDA kernels, and nvcc was not found: set CUDA_HOME")
    return None if found is None else Path(found)


def cuda_archs() -> tuple[str, ...]:
    """The architectures to compile for, as in ("80", "90")."""
    names = os.environ.get("FASTTX_CUDA_ARCHS", "").replace("sm_", "").replace(",", " ").split()
    if names == ["all"]:
        return CUDA_ARCHS
    unknown = [name for name in names if name not in CUDA_ARCHS]
    if unknown:
        raise SystemExit(f"FASTTX_CUDA_ARCHS knows {' '.join(CUDA_ARCHS)} and all, not {' '.join(unknown)}")
    return tuple(names) or CUDA_DEVELOPMENT


def targets_of(source: Path) -> tuple[str, tuple[str, ...]]:
    """What a source's PTX is for, and the architectures that binaries are made of it for: none, and it is left out.

    One whose name ends in an architecture, such as foo_sm90.cu, is what that one alone can do.
    """
    match = re.search(r"_sm(\d+)$", source.stem)
    if match is None:
        return CUDA_BASE, cuda_archs()
    return f"{match[1]}a", (f"{match[1]}a",) if match[1] in cuda_archs() else ()


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
    files |= {str(path): [] for path in sorted((ROOT / "csrc/cuda").glob("*.cpp"))}
    for isa, flags in ISAS.items():
        files[str(ROOT / f"csrc/cpu/isa_{isa}.cpp")] = [*KERNEL, *flags]
    return files


def escape(text: object) -> str:
    """As ninja wants paths."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def cuda_rules(folder: Path) -> tuple[list[str], list[str]]:
    """What compiles the CUDA kernels and packs them into the binary: lines of the build description, and objects.

    A source becomes PTX, the PTX a binary for each architecture, all of these one fat binary; its bytes are part of the
    library, where CUDA's own tools find them too. A kernel that spills fails the build.
    """
    nvcc = find_nvcc()
    archs = cuda_archs() if nvcc else ()
    targets = {path.stem: targets_of(path) for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if nvcc}
    names = [name for name, (_, binaries) in targets.items() if binaries]
    compiled = " ".join([*(f"sm_{arch}" for arch in archs), f"compute_{CUDA_BASE}"]) if nvcc else ""
    images = "".join(f"""{{"{name}", fasttx_image_{name}}}, """ for name in names)
    declarations = "".join(f"extern \"C\" const unsigned char fasttx_image_{name}[];\n" for name in names)
    write_if_new(
        folder / "images.cpp",
        f"""#include "{ROOT.resolve() / 'csrc/cuda/driver.h'}"\n{declarations}namespace fasttx::cuda {{\n"""
        f"""const Image kImages[] = {{{images}{{nullptr, nullptr}}}};\n"""
        f"""const char* const kArchitectures = "{compiled}";\n}}\n""",
    )
    lines = ["build images.o: compile images.cpp", "  flags ="]
    objects = ["images.o"]
    if not nvcc:
        return lines, objects
    # Line numbers stay in the PTX, for those who read it; in the binaries they would take most of the room.
    lines += [
        "rule ptx",
        f"  command = {escape(nvcc)} {' '.join(NVCC)} -arch=compute_$base -ptx -MD -MF $out.d $in -o $out"
        f""" && sed -i 's#{ROOT.resolve()}/##; s#"/.*/include/#"#' $out""",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule plain",
        r"  command = sed -E '/^\s*\.(loc|file)\b/d; /^\s*\.section/,$$d' $in > $out",
        "rule cubin",
        f"  command = {escape(nvcc.parent / 'ptxas')} -O3 --warn-on-spills -Werror -arch=$arch $in -o $out",
        "rule pack",
        f"  command = {escape(nvcc.parent / 'fatbinary')} --64 --compress-all --create=$out $images",
        "rule embed",
        f"  command = {find_compiler()} -c $in -o $out",
    ]
    for name in names:
        base, binaries = targets[name]
        lines += [f"build {name}.ptx: ptx {escape(ROOT.resolve() / f'csrc/cuda/{name}.cu')}", f"  base = {base}"]
        lines += [f"build {name}.plain.ptx: plain {name}.ptx"]
        packed = [f"--image3=kind=ptx,sm={base},file={name}.ptx"]
        for arch in binaries:
            lines += [f"build {name}.sm_{arch}.cubin: cubin {name}.plain.ptx", f"  arch = sm_{arch}"]
            packed += [f"--image3=kind=elf,sm={arch},file={name}.sm_{arch}.cubin"]
        cubins = " ".join(f"{name}.sm_{arch}.cubin" for arch in binaries)
        lines += [f"build {name}.fatbin: pack {name}.ptx {cubins}", f"  images = {' '.join(packed)}"]
        symbol = f"fasttx_image_{name}"
        write_if_new(
            folder / f"{name}.image.S",
            f""".section .nv_fatbin,"a"\n.balign 8\n.globl {symbol}\n.hidden {symbol}\n{symbol}:\n"""
            f""".incbin "{name}.fatbin"\n.section .note.GNU-stack,"",@progbits\n""",
        )
        lines += [f"build {name}.image.o: embed {name}.image.S | {name}.fatbin"]
        objects.append(f"{name}.image.o")
    return lines, objects


def write_if_new(path: Path, text: str) -> None:
    """Leaves a file alone that says so already: ninja goes by its time."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ninja_file(compiler: str, target: Path, folder: Path) -> str:
    """The build description: compile every source with its flags, link them."""
    lib = torch_folder() / "lib"
    # libtorch stands for all of it: where that has CUDA, the current stream comes from there.
    link = [f"-L{lib}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-lc10", "-Wl,--as-needed", "-ldl"]
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
    cuda, objects = cuda_rules(folder)
    lines += cuda
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
        (folder / "build.ninja").write_text(ninja_file(find_compiler(), target, folder))
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

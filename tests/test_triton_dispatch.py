"""How calls come to the Triton kernels: what refuses them, in words, and what runs them once they are chosen.

CUDA tensors are fake ones here, and the CUDA device is one that PyTorch is told of.
"""

import pytest
import torch
from fasttx.kernels import availability
from torch._subclasses.fake_tensor import FakeTensorMode

import fasttx
from fasttx import _gpu, dispatch, functional, reference

pytest.importorskip("triton")


@pytest.fixture
def on_gpu():
    """Makes fake CUDA tensors of these shapes."""
    with FakeTensorMode() as mode:
        yield lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="cuda")
    del mode


@pytest.fixture
def device(monkeypatch):
    """`device(capability)`: PyTorch finds a CUDA device of it."""

    def find(capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(_gpu, "_lacking", {})
        monkeypatch.setattr(_gpu, "_capabilities", {})
        monkeypatch.setattr(dispatch, "cuda_architectures", "")  # as in a build without nvcc
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Testla")

    return find


def test_auto_takes_triton_on_cuda_tensors(on_gpu, device):
    device()
    x = on_gpu(4, 8)
    for op in availability.OPS:
        assert dispatch.choose(op, (x,)) == "triton"
        assert dispatch.takes_kernel(op, (x, None, x))


def test_what_auto_took_is_told(on_gpu, device, monkeypatch):
    device()
    heard = []
    monkeypatch.setattr(dispatch, "listeners", [heard.append])
    dispatch.choose("gelu", (on_gpu(3),))
    assert [(decision.op, decision.backend) for decision in heard] == [("gelu", "triton")]
    assert heard[0].reason.startswith("not cuda: this build of fasttx contains no CUDA kernels")
    assert heard[0].kernel == "gelu_fwd"


@pytest.mark.parametrize(
    ("shapes", "dtypes", "op", "reason"),
    [
        ([(4, 8)], [torch.float64], "gelu", "float64 is not float32, bfloat16 or float16"),
        (
            [(4, 8), (8,)],
            [torch.float32, torch.float16],
            "layer_norm",
            "dtypes differ: torch.float32 and torch.float16",
        ),
        ([(2**31,)], [torch.bfloat16], "gelu", "a dimension of 2147483648 is larger than"),
        ([(4, 8)], [torch.float32], "no_such_op", "there is no Triton kernel for no_such_op"),
    ],
)
def test_refusals_that_the_tensors_are_the_reason_of(on_gpu, device, shapes, dtypes, op, reason):
    device()
    tensors = tuple(on_gpu(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    assert dispatch.choose(op, tensors) == "reference"
    with pytest.raises(fasttx.UnsupportedError, match=reason):
        dispatch.choose(op, tensors, "triton")


def test_tensors_on_two_devices_are_refused(on_gpu, device):
    device()
    with pytest.raises(fasttx.UnsupportedError, match="a tensor is on cpu, not on a CUDA device"):
        dispatch.choose("layer_norm", (on_gpu(4, 8), torch.ones(8)), "triton")


def test_tensors_on_the_cpu_are_refused(device):
    device()
    with pytest.raises(fasttx.UnsupportedError, match="'triton': a tensor is on cpu, not on a CUDA device"):
        functional.gelu(torch.ones(3), backend="triton")


@pytest.mark.parametrize("capability", [(7, 5), (7, 0)])
def test_capabilities_that_are_too_old_are_refused(on_gpu, device, capability):
    device(capability)
    reason = f"Testla has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    with pytest.raises(fasttx.UnsupportedError, match=reason):
        dispatch.choose("gelu", (on_gpu(3),), "triton")


def test_machines_without_triton_are_refused(on_gpu, device, monkeypatch):
    device()
    monkeypatch.setattr(availability, "_is_installed", lambda: False)
    with pytest.raises(fasttx.UnsupportedError, match="triton is not installed"):
        dispatch.choose("gelu", (on_gpu(3),), "triton")


def test_machines_without_a_gpu_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(fasttx.UnsupportedError, match="PyTorch finds no CUDA device here"):
        functional.gelu(torch.ones(3), backend="triton")


def wide_heads(query: torch.Tensor) -> torch.Tensor:
    return functional.attention(query, query, query)


NORM = "LayerNorm"
# What is run, the dtype and the capability; the backend that takes it, and why Triton does not.
TOLD = {
    "taken": (NORM, torch.float32, (9, 0), "triton", ""),
    "dtype": (NORM, torch.float64, (9, 0), "reference", "float64 is not float32, bfloat16 or float16"),
    "capability": (NORM, torch.float32, (7, 5), "reference", "compute capability 7.5, the kernels need 8.0"),
    "width": (wide_heads, torch.bfloat16, (9, 0), "reference", "heads are 257 wide"),
}


class Call(torch.nn.Module):
    """A function as a module, for explain."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize("case", TOLD)
def test_explain_tells_what_auto_took_and_why(on_gpu, device, case, monkeypatch):
    # Fake tensors of a device that this PyTorch is not built for cannot be indexed, as the reference does.
    monkeypatch.setattr(reference, "attention", lambda query, *_, **__: (query, query.sum(-1)))
    what, dtype, capability, backend, reason = TOLD[case]
    device(capability)
    model = fasttx.nn.LayerNorm(257, device="cuda", dtype=dtype) if what is NORM else Call(what)
    explanation = fasttx.explain(model, on_gpu(1, 2, 3, 257, dtype=dtype))
    (row,) = explanation.rows
    assert row.backend == backend and reason in row.reason
    assert reason in str(explanation)


def test_an_op_keeps_its_own_refusal(on_gpu, device):
    device()
    with pytest.raises(fasttx.UnsupportedError, match="nothing to do"):
        dispatch.choose("gelu", (on_gpu(3),), "triton", kernel_refusal="nothing to do")


def test_every_launcher_is_the_kernel_of_its_operator():
    from fasttx.kernels import register

    for launcher in register.LAUNCHERS:
        for overload in (launcher.__name__, f"{launcher.__name__}.raw"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fasttx::{overload}", "CUDA")


def test_every_launcher_has_its_operators_arguments():
    import inspect

    from fasttx.kernels import register

    for launcher in register.LAUNCHERS:
        schema = getattr(torch.ops.fasttx, launcher.__name__).default._schema
        assert list(inspect.signature(launcher).parameters) == [argument.name for argument in schema.arguments]

"""How calls come to the CUDA C++ kernels: what refuses them, in words, what `auto` takes, and what their gradients run.

CUDA tensors are fake ones here, and the CUDA device is one that PyTorch is told of.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fasttx
from fasttx import _cuda, _gpu, dispatch
from fasttx.ops import attention, gelu, layer_norm, softmax

BF16 = torch.bfloat16


@pytest.fixture
def on_gpu():
    """Makes fake CUDA tensors of these shapes."""
    with FakeTensorMode() as mode:
        yield lambda *shape, dtype=BF16, **given: torch.empty(*shape, dtype=dtype, device="cuda", **given)
    del mode


@pytest.fixture
def device(monkeypatch):
    """`device(capability)`: PyTorch finds a CUDA device of it, and the binary has kernels."""

    def find(capability: tuple[int, int] = (8, 0), architectures: str = "sm_80 compute_80") -> None:
        monkeypatch.setattr(_gpu, "_lacking", {})
        monkeypatch.setattr(_gpu, "_capabilities", {})
        monkeypatch.setattr(dispatch, "cuda_architectures", architectures)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Testla")

    return find


PREFERRED = [(op, preference) for preference in _cuda.PREFERENCES for op in preference.ops]


@pytest.mark.parametrize(("op", "preference"), PREFERRED)
def test_auto_follows_the_table_of_preferences(on_gpu, device, op, preference):
    pytest.importorskip("triton")
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        device(capability)
        first = preference.capabilities is None or capability in preference.capabilities
        x = on_gpu(2, 3, 4, 8)
        assert dispatch.choose(op, (x, x, x)) == ("cuda" if first else "triton"), capability


def test_every_preference_is_for_ops_that_there_are_and_says_why():
    assert {op for op, _ in PREFERRED} <= set(_cuda.OPS)
    assert all(preference.evidence for preference in _cuda.PREFERENCES)


def test_auto_takes_what_triton_cannot(on_gpu, device, monkeypatch):
    from fasttx.kernels import availability

    device((9, 0))
    monkeypatch.setattr(availability, "_is_installed", lambda: False)
    x = on_gpu(2, 3, 4, 8)
    assert dispatch.choose("attention", (x, x, x)) == "cuda"


# What is called, with what shapes and dtype, and why it is refused.
REFUSED = {
    "float64": ("gelu", [(4, 8)], torch.float64, "float64 is not float32, bfloat16 or float16"),
    "no kernel": ("feed_forward", [(4, 8)], BF16, "there is no CUDA C\\+\\+ kernel for feed_forward"),
    "float32": ("attention", [(1, 2, 3, 8)] * 3, torch.float32, "are for bfloat16 and float16"),
    "wide heads": ("attention", [(1, 2, 3, 136)] * 3, BF16, "136 wide: not a multiple of 8 up to 128"),
    "odd heads": ("attention_varlen", [(3, 2, 20)] * 3, BF16, "20 wide: not a multiple of 8"),
    "large": ("gelu", [(2**31,)], BF16, "a dimension of 2147483648 is larger than"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_that_the_tensors_are_the_reason_of(on_gpu, device, case):
    op, shapes, dtype, reason = REFUSED[case]
    device()
    with pytest.raises(fasttx.UnsupportedError, match=reason):
        dispatch.choose(op, tuple(on_gpu(*shape, dtype=dtype) for shape in shapes), "cuda")


def test_refusals_that_the_machine_is_the_reason_of(on_gpu, device, monkeypatch):
    x = on_gpu(4, 8)
    device(architectures="")
    with pytest.raises(fasttx.UnsupportedError, match="this build of fasttx contains no CUDA kernels: nvcc"):
        dispatch.choose("gelu", (x,), "cuda")
    device((7, 5))
    with pytest.raises(fasttx.UnsupportedError, match="capability 7.5, the kernels need 8.0"):
        dispatch.choose("gelu", (x,), "cuda")
    device()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(fasttx.UnsupportedError, match="are for NVIDIA's GPUs"):
        dispatch.choose("gelu", (x,), "cuda")


class _Named(TorchDispatchMode):
    """The operators of fasttx's libraries that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("fasttx"):
            self.names.append(f"{func.namespace}::{func._schema.name.partition('::')[2]}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_launches(needs_extension):
    """The kernels take CPU tensors, and nothing is launched."""
    dispatch.extension.intercept_cuda(lambda *launch: None, lambda *allocation: None)
    yield
    dispatch.extension.intercept_cuda(None, None)


# Of each op: a call on a tensor, and the operators that it and its gradient run.
RUN = {
    "gelu": (lambda x: gelu.gelu(x, "none", "cuda"), ["gelu_fwd", "gelu_bwd"]),
    "layer_norm": (
        lambda x: layer_norm.layer_norm(x, 8, None, None, 1e-5, "cuda"), ["layer_norm_fwd", "layer_norm_bwd"]
    ),
    "softmax": (lambda x: softmax.softmax(x, None, False, -1, "cuda"), ["softmax_fwd", "softmax_bwd"]),
    "attention": (
        lambda x: attention.attention(x, x, x, *[None] * 5, True, 0, -1, -1, 0.0, None, 1.0, backend="cuda")[0],
        ["attention_fwd", "attention_bwd"],
    ),
}


@pytest.mark.parametrize("case", RUN)
def test_gradients_stay_with_the_kernels_that_were_named(without_launches, case):
    call, names = RUN[case]
    x = torch.zeros(2, 3, 4, 8, dtype=BF16, requires_grad=True)
    with _Named() as called:
        call(x).sum().backward()
    assert called.names == [f"fasttx_cuda::{name}" for name in names]


@pytest.mark.parametrize("case", RUN)
def test_traced_graphs_name_the_kernels(without_launches, case):
    call, names = RUN[case]

    def differentiate(x):
        (gradient,) = torch.autograd.grad(call(x).sum(), x)
        return gradient

    graph = make_fx(differentiate)(torch.zeros(2, 3, 4, 8, dtype=BF16, requires_grad=True))
    found = [node.target._schema.name for node in graph.graph.nodes if "fasttx" in str(node.target)]
    assert found == [f"fasttx_cuda::{name}" for name in names]


def test_tensors_on_the_cpu_are_refused_where_nothing_stands_in_for_a_gpu(needs_extension):
    with pytest.raises(RuntimeError, match="tensors on a CUDA device, got one on the CPU"):
        gelu.gelu(torch.zeros(3), "none", "cuda")

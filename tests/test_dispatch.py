"""Choosing a backend: what is named is used or refused with the reason, and how to name it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fasttx
from fasttx import dispatch, functional

X = torch.randn(2, 5)

# An installation without a compiler: the extension is simply not there.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "fasttx._C":
            raise ImportError("cannot import name '_C' from 'fasttx'")

sys.meta_path.insert(0, Block())
"""


def python(code, *options, **environment):
    """A fresh interpreter that runs `code` where fasttx and torch are imported as here."""
    inherited = {name: value for name, value in os.environ.items() if "FASTTX" not in name}
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env=inherited | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def decisions():
    heard = []
    dispatch.listeners.append(heard.append)
    yield heard
    dispatch.listeners.remove(heard.append)


def chosen(decisions):
    return [decision.backend for decision in decisions]


def test_auto_takes_the_kernels(decisions, needs_extension):
    functional.gelu(X)
    functional.gelu(X, backend="auto")
    with fasttx.backend("auto"):
        functional.gelu(X)
    assert chosen(decisions) == ["cpu"] * 3
    assert str(decisions[0]) == "gelu: cpu"
    assert decisions[0].kernel == "gelu_fwd" and not decisions[0].is_fallback


def test_every_kernel_is_an_operator():
    for kernel in dispatch.KERNELS.values():
        assert hasattr(torch.ops.fasttx, kernel)


def test_context_names_a_backend_and_ends(decisions, needs_extension):
    with fasttx.backend("reference"):
        functional.gelu(X)
        with fasttx.backend("cpu"):
            functional.gelu(X)
        functional.gelu(X)
    functional.gelu(X)
    assert chosen(decisions) == ["reference", "cpu", "reference", "cpu"]


def test_context_ends_when_an_error_leaves_it(decisions, needs_extension):
    with pytest.raises(KeyError), fasttx.backend("reference"):
        raise KeyError
    functional.gelu(X)
    assert chosen(decisions) == ["cpu"]


def test_argument_goes_before_the_context(decisions, needs_extension):
    with fasttx.backend("cpu"):
        functional.gelu(X, backend="reference")
    with fasttx.backend("reference"):
        functional.gelu(X, backend="cpu")
        functional.gelu(X, backend="auto")
    assert chosen(decisions) == ["reference", "cpu", "cpu"]


def test_context_belongs_to_its_thread(decisions):
    def elsewhere():
        functional.gelu(X)

    with fasttx.backend("reference"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert chosen(decisions) == ["cpu" if dispatch.extension else "reference"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_named_backend_never_falls_back(name, decisions):
    with pytest.raises(fasttx.UnsupportedError, match=f"gelu cannot run on the backend '{name}'"):
        functional.gelu(X, backend=name)
    with pytest.raises(fasttx.UnsupportedError, match=name), fasttx.backend(name):
        functional.gelu(X)
    assert not decisions


def test_refusal_gives_the_calls_own_reason(decisions, needs_extension):
    nothing = torch.randn(3, 0)
    with pytest.raises(fasttx.UnsupportedError, match=r"layer_norm.*normalized_shape \(0,\) holds nothing"):
        functional.layer_norm(nothing, (0,), backend="cpu")
    functional.layer_norm(nothing, (0,))
    assert chosen(decisions) == ["reference"]
    assert decisions[0].refusals == (("cpu", "normalized_shape (0,) holds nothing"),)
    assert "not cpu: normalized_shape (0,) holds nothing" in str(decisions[0])
    assert decisions[0].is_fallback and decisions[0].kernel == ""


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ((X, X.double()), "dtypes differ"),
        ((torch.zeros(2, dtype=torch.complex64),), "complex64 is not float32"),
        ((torch.empty(2, device="meta"),), "on meta, not on the CPU"),
        ((X.to_sparse(),), "layout"),
        ((X, None, torch.empty(2, device="meta")), "on meta, not on the CPU"),
    ],
)
def test_cpu_refuses_what_its_kernels_cannot_read(tensors, reason, needs_extension):
    with pytest.raises(fasttx.UnsupportedError, match=reason):
        dispatch.choose("op", tensors, "cpu")
    assert dispatch.choose("op", tensors, "reference") == "reference"


def test_cpu_leaves_autocast_to_the_reference(needs_extension):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dispatch.choose("op", (X,)) == "reference"
        with pytest.raises(fasttx.UnsupportedError, match="autocast"):
            dispatch.choose("op", (X,), "cpu")


def test_unknown_backend_is_an_error_that_lists_them():
    message = "must be one of cuda, triton, cpu, reference or auto, got 'gpu'"
    with pytest.raises(ValueError, match=message), fasttx.backend("gpu"):
        pass
    with pytest.raises(ValueError, match=message):
        functional.gelu(X, backend="gpu")


REPORT = """
import torch, fasttx
from fasttx import dispatch
heard = []
dispatch.listeners.append(heard.append)
fasttx.functional.gelu(torch.ones(3))
with fasttx.backend("auto"):
    fasttx.functional.gelu(torch.ones(3))
print([decision.backend for decision in heard], dispatch.extension and dispatch.extension.isa())
"""


def test_environment_names_the_backend():
    done = python(REPORT, FASTTX_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    expected = ["reference", "cpu" if dispatch.extension else "reference"]
    assert str(expected) in done.stdout


def test_environment_with_an_unknown_backend_is_an_error():
    done = python(REPORT, FASTTX_BACKEND="fast")
    assert done.returncode != 0
    assert "ValueError: backend must be one of" in done.stderr and "'fast'" in done.stderr


def test_environment_names_the_instruction_set(needs_extension):
    done = python(REPORT, FASTTX_ISA="scalar")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("scalar")


def test_environment_with_an_unknown_instruction_set_is_an_error(needs_extension):
    done = python(REPORT, FASTTX_ISA="avx1024")
    assert done.returncode != 0
    assert "unknown instruction set 'avx1024'" in done.stderr
    assert "this machine can use: scalar" in done.stderr


def test_instruction_set_that_the_machine_lacks_is_an_error(needs_extension):
    lacking = [name for name, present in dispatch.extension.isas() if not present]
    if not lacking:
        pytest.skip("this machine has every instruction set of the build")
    in_use = dispatch.extension.isa()
    with pytest.raises(ValueError, match=f"lacks the instruction set '{lacking[0]}'"):
        dispatch.extension.set_isa(lacking[0])
    assert dispatch.extension.isa() == in_use
    done = python(REPORT, FASTTX_ISA=lacking[0])
    assert done.returncode != 0
    assert f"lacks the instruction set '{lacking[0]}'" in done.stderr


def test_best_instruction_set_is_the_default(needs_extension):
    done = python(REPORT)
    assert done.returncode == 0, done.stderr
    unasked = ("amx_float32",)  # where neighbours use the core, its float32 is slower than by vectors
    best = [name for name, present in dispatch.extension.isas() if present and name not in unasked][-1]
    if best == "avx512_bf16" and "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        best = "avx512"  # elsewhere vdpbf16ps is slower than widening
    assert done.stdout.strip().endswith(best)
    assert dispatch.extension.default_isa() == best


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_without_the_extension_the_reference_runs_after_one_warning(backend):
    code = f"""
{BLOCK}
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fasttx
    from fasttx import functional
    y = functional.gelu(torch.ones(3), backend={backend!r})
    model = fasttx.optimize(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    model(torch.ones(1, 3, 8))
ours = [str(w.message) for w in caught if "fasttx" in str(w.message)]
print(len(ours), *ours)
assert torch.equal(y, fasttx.reference.gelu(torch.ones(3)))
"""
    done = python(code)
    if backend == "cpu":
        assert done.returncode != 0
        assert "UnsupportedError: gelu cannot run on the backend 'cpu'" in done.stderr
        assert "the C++ extension is not part of this installation" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 fasttx runs on its reference path, without its kernels:")
    assert "no C++ compiler was found when it was installed" in done.stdout


def test_extension_that_does_not_load_says_why():
    code = BLOCK.replace("cannot import name '_C' from 'fasttx'", "undefined symbol: torch_call")
    done = python(code + "import fasttx")
    assert done.returncode == 0, done.stderr
    assert "could not be loaded: undefined symbol: torch_call" in done.stderr
    assert done.stderr.count("RuntimeWarning") == 1


def test_isa_fixture_puts_its_instruction_set_in_use(isa):
    assert dispatch.extension.isa() == isa


@pytest.mark.parametrize("count", [1, 3])
def test_threads_fixture_sets_and_puts_back(threads, count):
    before = torch.get_num_threads()
    with threads(count):
        assert torch.get_num_threads() == count
    assert torch.get_num_threads() == before

"""`make gpu` as on a GPU: its cases on CUDA tensors that are fake, and the whole of it with the emulator for a GPU."""

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")

from fasttx.kernels import configs, launch  # noqa: E402

from benchmarks.gpu import __main__ as program  # noqa: E402
from benchmarks.gpu import limits  # noqa: E402
from benchmarks.gpu.cases import Case, all_cases  # noqa: E402
from fasttx import _gpu, dispatch  # noqa: E402
from gpu.driver import Emulation  # noqa: E402
from gpu.launchers import full, on_triton  # noqa: E402


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """What torch.compile makes of a case takes longer than all that is tested here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


def test_every_case_lies_on_the_gpu_and_is_taken_by_triton(monkeypatch):
    monkeypatch.setattr(_gpu, "_lacking", {None: None, 0: None})
    monkeypatch.setattr(_gpu, "_capabilities", {None: (9, 0), 0: (9, 0)})
    monkeypatch.setattr(dispatch, "cuda_architectures", "")  # as in a build without nvcc
    heard = []
    monkeypatch.setattr(dispatch, "listeners", [heard.append])
    with FakeTensorMode(), torch.no_grad():  # which refuses tensors on two devices, as PyTorch does
        for case in all_cases("cuda", quick=True):
            assert {x.device.type for x in case.inputs.values()} == {"cuda"}, case.name
            heard.clear()
            assert case.fasttx(**case.inputs).shape == case.eager(**case.inputs).shape, case.name
            assert [decision.backend for decision in heard] == ["triton"], case.name


class CudaIsTheCPU(TorchFunctionMode):
    """What is to be made on a CUDA device is made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return function(*args, **kwargs)


@contextlib.contextmanager
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """PyTorch finds a GPU: the emulator, which runs the Triton kernels on CPU tensors."""
    chip = SimpleNamespace(name="emulated", major=9, minor=0, multi_processor_count=4)
    for name, answer in {
        "is_available": True, "synchronize": None, "empty_cache": None, "get_device_name": chip.name,
        "get_device_properties": chip, "is_current_stream_capturing": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(configs, "tuned", {})
    for name in ("FASTTX_TUNE", "FASTTX_TUNING"):
        monkeypatch.setenv(name, "")  # what the program sets is undone with it
    launch.forget()
    try:
        with CudaIsTheCPU(), on_triton("sm_90", checks=False) as machine:
            yield machine
    finally:
        launch.forget()


KERNELS = {
    "layer_norm": {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"},
    "decoding": {"_attention_split_kernel", "_attention_join_kernel"},
}


@pytest.mark.parametrize("ops", [tuple(KERNELS), pytest.param((), marks=full, id="all")])
def test_the_whole_program_tunes_measures_and_reports(ops, tmp_path, monkeypatch):
    def some(device: str, quick: bool) -> Iterator[Case]:
        return (case for case in all_cases(device, quick) if not ops or case.op in ops)

    def smaller(*arguments, **options) -> limits.Limits:
        return measure(*arguments, **{**options, "size": 2**16, "side": 32})

    measure = limits.measure
    monkeypatch.setattr(limits, "measure", smaller)
    monkeypatch.setattr(program, "all_cases", some)
    monkeypatch.setattr(program, "_ROUNDS", 1)
    with a_gpu(monkeypatch) as machine:
        assert program.main(["--quick", "--minutes", "60", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["environment"]["gpu"] == "emulated" and not content["failed"]
    assert {row["case"] for row in content["rows"]} == {case.name for case in some("cpu", True)}
    assert all(row["variants"]["fasttx"]["error_of_eager"] < 8 for row in content["rows"])
    launched = {item.name for item in machine.launches}
    assert launched >= set().union(*(KERNELS[op] for op in ops))
    (tuned,) = json.loads((tmp_path / "tuning.json").read_text())["devices"].values()
    assert {entry["kernel"] for entry in tuned} <= set(launch.KERNELS) and tuned
    assert "| case | fasttx, us |" in (tmp_path / "results.md").read_text()

"""The logic of `make gpu`, on CPU tensors."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import limits, report, tests
from benchmarks.gpu.cases import Case, agrees, all_cases, padded_attention, standard

LIMITS = limits.Limits(1e10, {torch.bfloat16: 1e12, torch.float32: 1e11})


def a_case(**changes):
    x = torch.randn(8, 16)
    values = {
        "op": "double", "shape": "8x16", "dtype": torch.float32, "backward": False, "inputs": {"input": x},
        "flops": 128.0, "bytes": 1024.0, "fasttx": lambda input: input + input, "eager": lambda input: 2 * input,
        "rivals": {"absent": "not installed", "broken": lambda input: input @ input},
    }  # fmt: skip
    return Case(**values | changes)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """torch.compile would take a minute for all of the cases."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    for name in ("FASTTX_TUNE", "FASTTX_TUNING"):
        monkeypatch.setenv(name, "")


def test_every_case_agrees_with_eager_and_states_its_work():
    names = []
    for case in all_cases("cpu", quick=True):
        names.append(case.name)
        assert agrees(case, case.fasttx, standard(case)) < 8, case.name
        assert case.flops > 0 and case.bytes > 0
        case.call(case.fasttx)()
    assert len(set(names)) == len(names)
    assert {name.split()[0] for name in names} >= {"layer_norm", "feed_forward", "attention", "softmax", "bias_gelu"}
    assert {name.split()[-1] for name in names} == {"fwd", "fwd+bwd"}
    for kind in ("float32", "causal padded bfloat16"):
        assert {name.split()[-1] for name in names if name.startswith("attention") and kind in name} == {
            "fwd", "fwd+bwd"
        }  # fmt: skip
    assert [name.split()[-1] for name in names if name.startswith("decoding")] == ["fwd"]


def test_what_only_rivals_read_need_not_be_moved():
    (case,) = padded_attention("cpu", torch.bfloat16, False, 2, 2, 64, 32)
    floats = 4 * case.inputs["query"].nbytes  # the result's among them
    assert case.bytes == floats + case.inputs["key_lengths"].nbytes
    assert case.flops == 4 * 2 * 32 * case.inputs["mask"].sum()


def test_a_rival_that_is_missing_or_fails_is_left_out_with_the_reason():
    row = program.measure(a_case(), "cpu", LIMITS, 0.01)
    assert set(row["variants"]) == {"fasttx", "eager"} and row["best_rival"] == "eager"
    assert row["left_out"]["absent"] == "not installed"
    assert row["left_out"]["broken"].startswith("RuntimeError")


def test_a_failure_of_ours_is_a_failure():
    def fail(input):
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        program.measure(a_case(fasttx=fail), "cpu", LIMITS, 0.01)


def test_a_row_states_rates_and_shares():
    row = program.measure(a_case(), "cpu", LIMITS, 0.01)
    ours = row["variants"]["fasttx"]
    seconds = ours["seconds"][0]
    assert ours["tflops"] == pytest.approx(128 / seconds / 1e12)
    assert ours["gigabytes_per_second"] == pytest.approx(1024 / seconds / 1e9)
    assert ours["share_of_copy"] == pytest.approx(1024 / 1e10 / seconds)
    assert ours["share_of_limit"] == pytest.approx(1024 / 1e10 / seconds)
    assert ours["share_of_product"] == pytest.approx(128 / 1e11 / seconds)
    assert ours["error_of_eager"] == 0.0
    low, high = row["speed_against_best"][1:]
    assert low <= row["speed_against_best"][0] <= high


def test_gradients_are_those_of_every_floating_input():
    case = a_case(backward=True)
    (gradient,) = case.call(case.fasttx)()
    assert gradient.shape == (8, 16) and case.inputs["input"].grad is None


def test_what_is_not_reached_in_time_is_named(tmp_path):
    rows, failed = program.run(tmp_path, "cpu", [a_case(), a_case(op="late")], LIMITS, time.monotonic() - 1, 0.01)
    assert rows == [] and failed == {}
    assert "late 8x16" in (tmp_path / "results.md").read_text()


def test_a_deadline_leaves_gradients_as_they_were():
    """It may strike where they are switched off already, and nothing is there yet that switches them on again."""
    with pytest.raises(program.OutOfTime), program.at_most(0.01):
        torch.set_grad_enabled(False)
        time.sleep(60)
    assert torch.is_grad_enabled()


def test_a_case_that_is_still_running_at_the_deadline_is_stopped(tmp_path):
    slow = a_case(op="slow", rivals={"rival": lambda input: time.sleep(60)})
    start = time.monotonic()
    rows, failed = program.run(tmp_path, "cpu", [slow, a_case()], LIMITS, start + 0.3, 0.01)
    assert time.monotonic() - start < 20 and rows == [] and failed == {}
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["environment"]["not reached in time"] == "slow 8x16 float32 fwd, double 8x16 float32 fwd"


def test_a_case_that_fails_is_told_and_the_others_are_measured(tmp_path):
    def too_large(input):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nand more lines")

    cases = [a_case(), a_case(op="large", fasttx=too_large), a_case(op="last")]
    rows, failed = program.run(tmp_path, "cpu", cases, LIMITS, time.monotonic() + 60, 0.01, {"tests": "none"})
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB"
    assert [row["case"].split()[0] for row in rows] == ["double", "last"]
    assert failed == {"large 8x16 float32 fwd": reason}
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["failed"] == failed and len(content["rows"]) == 2 and content["environment"]["tests"] == "none"
    assert f"- large 8x16 float32 fwd: {reason}" in (tmp_path / "results.md").read_text()


_PRINTS = """
import sys, time
for line in sys.argv[2:]: print("[gw0] [ 10%]", line, "tests/gpu/test_x.py::test_x")
print("FAILED tests/gpu/test_x.py::test_x - as the summary says again")
sys.stdout.flush()
time.sleep(float(sys.argv[1]))
"""


def test_tests_on_the_device_are_counted_and_stopped_in_time(tmp_path):
    def pytest_that(seconds, *words):
        return [sys.executable, "-c", _PRINTS, str(seconds), *words]

    done = tests.run(tmp_path, 60, [pytest_that(0, "PASSED", "PASSED"), pytest_that(0, "PASSED", "SKIPPED")])
    assert str(done) == "3 passed, 0 failed" and done.is_good
    bad = tests.run(tmp_path, 60, [pytest_that(0, "PASSED", "FAILED", "ERROR")])
    assert str(bad) == "1 passed, 2 failed" and not bad.is_good
    start = time.monotonic()
    stopped = tests.run(tmp_path, 5, [pytest_that(300, "PASSED"), pytest_that(0, "PASSED")])
    assert time.monotonic() - start < 100
    assert str(stopped) == "1 passed, 0 failed, the others were stopped after 5 s" and stopped.is_good
    nothing = tests.run(tmp_path, 60, [[sys.executable, "-c", "raise SystemExit(4)"]])
    assert str(nothing) == "0 passed, 1 failed" and not nothing.is_good
    assert (tmp_path / "tests.txt").exists()


def test_tests_on_the_device_are_those_of_the_kernels():
    folder = Path(program.__file__).parents[2] / "tests/gpu"
    assert folder.is_dir() and tests.command("emulated_full")[-3:] == [str(folder), "-m", "emulated_full"]


def test_the_limits_are_rates():
    measured = limits.measure("cpu", lambda: None, size=2**16, side=32, seconds=0.01)
    assert measured.copy > 1e6 and set(measured.matmul) == {torch.bfloat16, torch.float32}
    assert measured.least_seconds(measured.matmul[torch.float32], 0, torch.float32) == pytest.approx(1.0)


def test_the_whole_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "all_cases", lambda device, quick: [a_case(), a_case(backward=True)])
    assert program.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["case"] for row in content["rows"]] == ["double 8x16 float32 fwd", "double 8x16 float32 fwd+bwd"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| double 8x16 float32 fwd |" in text and "absent: not installed" in text
    assert "results in" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    assert program.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_report_of_nothing(tmp_path):
    report.write(tmp_path, {"device": "cpu"}, LIMITS, [])
    assert "copy: 10 GB/s" in (tmp_path / "results.md").read_text()

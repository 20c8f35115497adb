"""Tuning of the Triton kernels: the choice, the file, and that a tuned configuration is used."""

import json
import time

import pytest
import torch

pytest.importorskip("triton")

from fasttx.kernels import configs, launch, register, tune  # noqa: E402, F401
from fasttx.kernels.configs import Config  # noqa: E402

CONFIGS = [Config({"BLOCK_M": m}, num_warps=4) for m in (16, 32, 64)]


@pytest.fixture(autouse=True)
def _own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTX_TUNING", str(tmp_path / "there" / "tuning.json"))
    monkeypatch.setattr(configs, "tuned", {})


def test_the_fastest_in_the_median_is_taken():
    delays = dict(zip(CONFIGS, (0.002, 0.0, 0.001), strict=True))
    best, medians = tune.fastest(CONFIGS, lambda config: time.sleep(delays[config]), lambda: None)
    assert best is CONFIGS[1]
    assert set(medians) == set(CONFIGS) and medians[CONFIGS[0]] >= 0.002


def test_what_does_not_run_is_left_out():
    def run(config):
        if config is not CONFIGS[2]:
            raise RuntimeError("out of resources: shared memory")

    assert tune.fastest(CONFIGS, run, lambda: None)[0] is CONFIGS[2]
    with pytest.raises(RuntimeError, match="shared memory"):
        tune.fastest(CONFIGS[:2], run, lambda: None)


def test_results_are_kept_by_gpu_and_read_back():
    problem = {"block": 1024}
    tune.save("layer_norm_fwd", "sm_90", problem, CONFIGS[0], "one")
    tune.save("layer_norm_fwd", "sm_90", problem, CONFIGS[1], "one")
    tune.save("layer_norm_fwd", "sm_90", problem, CONFIGS[2], "another")
    configs.tuned.clear()
    tune.load("one")
    assert configs.choose("layer_norm_fwd", "sm_90", problem).as_json() == CONFIGS[1].as_json()
    content = json.loads(tune.path().read_text())
    assert [len(content["devices"][name]) for name in ("one", "another")] == [1, 1]
    configs.tuned.clear()
    tune.load("a third")
    assert configs.choose("layer_norm_fwd", "sm_90", problem) in configs.TABLES["layer_norm_fwd"]["sm_90"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 0, "devices": {}}', '{"version": 1}'])
def test_a_file_that_cannot_be_read_counts_as_none(content):
    tune.path().parent.mkdir()
    tune.path().write_text(content)
    tune.load("one")
    assert configs.tuned == {}
    tune.save("gelu_fwd", "sm_80", {"block": 64}, CONFIGS[0], "one")
    assert json.loads(tune.path().read_text())["devices"]["one"]


def test_a_home_that_cannot_be_written_to_is_no_error(monkeypatch):
    monkeypatch.setenv("FASTTX_TUNING", "/dev/null/tuning.json")
    tune.save("gelu_fwd", "sm_80", {"block": 64}, CONFIGS[0], "one")
    assert configs.choose("gelu_fwd", "sm_80", {"block": 64}) is CONFIGS[0]


@pytest.mark.parametrize(
    ("arch", "table"),
    [("sm_80", "sm_80"), ("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx950", "gfx942")],
)
def test_an_architecture_without_tables_takes_the_nearest_older_ones(arch, table):
    assert configs.nearest(arch) == table


def test_an_architecture_that_is_too_old_is_an_error():
    with pytest.raises(ValueError, match="sm_75 is older than sm_80"):
        configs.nearest("sm_75")


def test_every_kernel_has_a_table_for_every_architecture():
    for name in launch.KERNELS:
        assert set(configs.TABLES[name]) == set(configs.ARCHITECTURES)


def test_a_problem_that_nothing_is_meant_for_is_an_error():
    with pytest.raises(ValueError, match="no configuration of layer_norm_fwd on sm_90 is meant for"):
        configs.choose("layer_norm_fwd", "sm_90", {"block": 2**20})


def test_kernels_are_tuned_as_they_are_met(monkeypatch):
    from fasttx.kernels.gelu import gelu_fwd
    from gpu.driver import emulated

    monkeypatch.setenv("FASTTX_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch.forget()
    x = torch.randn(3, 2048)
    with emulated("sm_90") as machine:
        y = gelu_fwd(x, None, 2)
        tried = len(machine.launches)
        gelu_fwd(x, None, 2)
        assert len(machine.launches) == tried + 1
    launch.forget()
    assert tried > len(configs.candidates("gelu_fwd", "sm_90", {"block": 2048}))
    assert list(configs.tuned) == [("gelu_fwd", "sm_90", (("block", 2048),))]
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))

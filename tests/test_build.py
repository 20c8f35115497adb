"""What setup.py makes of the variables that steer the CUDA kernels; nothing is compiled here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# setup.py without its last statement, and what a call of one of its functions gives.
CALL = """
import pathlib, sys
text = pathlib.Path("setup.py").read_text()
names = {"__file__": "setup.py", "__name__": "__main__"}
exec(text[: text.index("if find_compiler() is None")], names)
print(names[sys.argv[1]](*map(pathlib.Path, sys.argv[2:])))
"""


def call(function: str, *paths: Path, **variables: str) -> subprocess.CompletedProcess:
    hidden = {name: value for name, value in os.environ.items() if not name.startswith(("FASTTX_", "CUDA_"))}
    return subprocess.run(
        [sys.executable, "-c", CALL, function, *map(str, paths)],
        cwd=ROOT,
        env={**hidden, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("variables", "archs"),
    [
        ({}, ("80", "90")),
        ({"FASTTX_CUDA_ARCHS": "all"}, ("80", "86", "89", "90", "100", "120")),
        ({"FASTTX_CUDA_ARCHS": "sm_89, 120"}, ("89", "120")),
    ],
)
def test_architectures(variables, archs):
    assert call("cuda_archs", **variables).stdout.strip() == str(archs)


def test_a_source_of_one_architecture_is_compiled_for_it_alone():
    assert call("targets_of", Path("foo")).stdout.strip() == "('80', ('80', '90'))"
    assert call("targets_of", Path("foo_sm90")).stdout.strip() == "('90a', ('90a',))"
    assert call("targets_of", Path("foo_sm90"), FASTTX_CUDA_ARCHS="80 100").stdout.strip() == "('90a', ())"


def test_an_unknown_architecture_is_refused():
    done = call("cuda_archs", FASTTX_CUDA_ARCHS="80 75")
    assert done.returncode and "FASTTX_CUDA_ARCHS knows 80 86 89 90 100 120 and all, not 75" in done.stderr


def test_nvcc_is_found_where_cuda_is(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    assert call("find_nvcc", CUDA_HOME=str(tmp_path)).stdout.strip() == str(tmp_path / "bin/nvcc")
    assert call("find_nvcc", CUDA_HOME=str(tmp_path), FASTTX_CUDA="0").stdout.strip() == "None"


def test_what_is_wanted_must_be_there(tmp_path):
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is installed where it is looked for last")
    done = call("find_nvcc", PATH=str(tmp_path), FASTTX_CUDA="1")
    assert done.returncode and "nvcc was not found: set CUDA_HOME" in done.stderr


def test_another_wish_is_refused():
    done = call("find_nvcc", FASTTX_CUDA="yes")
    assert done.returncode and "FASTTX_CUDA must be 0 or 1, got 'yes'" in done.stderr


def test_a_build_without_cuda_has_no_images(tmp_path):
    done = call("cuda_rules", tmp_path, FASTTX_CUDA="0")
    assert done.returncode == 0 and "nvcc" not in done.stdout
    text = (tmp_path / "images.cpp").read_text()
    assert "kImages[] = {{nullptr, nullptr}}" in text and 'kArchitectures = ""' in text

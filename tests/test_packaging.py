"""What an installation holds, and how it behaves without a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# An editable installation beside it would lend its own modules.
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fasttx, installed by pip into a folder of its own on a machine without a C++ compiler."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fasttx", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--target", folder, source],
        check=True,
        env={**os.environ, "CXX": "no-such-compiler", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    return folder


def python(folder: Path, code: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", ALONE + code],
        capture_output=True,
        text=True,
        cwd=cwd or folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


def test_installs_and_runs_without_a_compiler(installed):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fasttx
assert fasttx.__file__.startswith({folder!r}), fasttx.__file__
assert [w.category for w in caught] == [RuntimeWarning], caught
assert "no C++ compiler" in str(caught[0].message)
x = torch.randn(2, 8)
assert torch.allclose(fasttx.functional.gelu(x), torch.nn.functional.gelu(x), atol=1e-6)
try:
    fasttx.functional.gelu(x, backend="cpu")
except fasttx.UnsupportedError as error:
    print(error)
"""
    done = python(installed, code.format(folder=str(installed)))
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout


def test_doctor_tells_that_the_compiler_was_missing(installed):
    done = python(installed, "import fasttx.__main__ as m, sys; sys.exit(m.main(['doctor']))")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout


def test_kernels_belongs_to_fasttx_only(installed):
    code = """
import fasttx.kernels.availability
import torch; assert fasttx.kernels.availability.refusal("gelu", (torch.ones(1),))
import kernels
"""
    done = python(installed, code)
    assert "No module named 'kernels'" in done.stderr


def test_a_checkout_stands_aside_for_the_package_kernels(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("owner = 'another project'\n")
    done = python(tmp_path, "import kernels; print(kernels.owner)", cwd=ROOT)
    assert done.stdout.strip() == "another project", done.stderr


def test_training_needs_no_other_extra():
    """Its commands read models, tokenizers and adapters."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*extras["models"], *extras["lora"]} <= set(extras["train"])
    assert all(">=" in package for package in extras["models"])


def test_the_wheel_holds_every_package(installed):
    shipped = {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fasttx").rglob("*.py")}
    source |= {f"fasttx/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert source <= shipped, sorted(source - shipped)

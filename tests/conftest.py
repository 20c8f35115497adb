"""Fixtures for every test; seeds, the instruction set and the threads are reset each time."""

import contextlib
import gc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fasttx.dispatch import extension, extension_missing


def _instruction_sets() -> list:
    """The build's instruction sets; those that cannot run here are skipped by name."""
    if extension is None:
        return [pytest.param("none", marks=pytest.mark.skip(reason=str(extension_missing)))]
    return [
        pytest.param(name, marks=() if present else pytest.mark.skip(reason=f"no {name} here"))
        for name, present in extension.isas()
    ]


def _modes() -> dict[str, object]:
    """What a thread of PyTorch and Python is in, and what a test must leave as it was."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "garbage collection": gc.isenabled(),
    }


@pytest.fixture(autouse=True)
def _reset(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds PyTorch by the test's own name, and puts back what tests change."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    threads = torch.get_num_threads()
    isa = extension.isa() if extension else None
    before = _modes()
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        extension.set_isa(isa)
    after = _modes()
    if after != before:  # every later test would be another one
        torch.set_grad_enabled(before["gradients"])
        pytest.fail(f"the test leaves behind {after}, and found {before}")


@pytest.fixture
def needs_extension() -> None:
    """Skips, with the reason, where the C++ kernels are not there."""
    if extension is None:
        pytest.skip(extension_missing)


@pytest.fixture(params=_instruction_sets())
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set of this machine in turn, in use while the test runs."""
    extension.set_isa(request.param)
    return request.param


@pytest.fixture
def threads() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """`with threads(n):` runs PyTorch, and fasttx's kernels, on n threads."""

    @contextlib.contextmanager
    def use(count: int) -> Iterator[None]:
        previous = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(previous)

    return use


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data as `make data` fills it, tiny; to be read alone."""
    from tiny_data import make

    return make(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_bert(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that training sentiment begins with; to be read alone."""
    from tiny_data import pretrain

    return pretrain(tiny_folder, tmp_path_factory.mktemp("bert"))


@pytest.fixture
def tiny_system(tiny_folder: Path, tiny_bert: Path) -> Callable:
    """Makes a system of training by its name and options, on the tiny data."""
    from tiny_data import system

    def made(name, *options):
        if name == "digits":
            pytest.importorskip("sklearn")
        start = ["--start", tiny_bert] if name == "sentiment" else []
        return system(name, tiny_folder, *start, *options)

    return made

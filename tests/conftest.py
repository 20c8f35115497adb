"""Fixtures for every test; seeds, the instruction set and the threads are reset each time."""

import contextlib
import zlib
from collections.abc import Callable, Iterator

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


@pytest.fixture(autouse=True)
def _reset(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds PyTorch by the test's own name, and puts back what tests change."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    threads = torch.get_num_threads()
    isa = extension.isa() if extension else None
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        extension.set_isa(isa)


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

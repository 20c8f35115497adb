"""Configurations as data: for each kernel and architecture, the tiles, warps and stages that are worth trying.

A table's entries are ordered. Where nothing was tuned the first that the problem fits is taken; tuning tries all that
it fits. A configuration changes the order of a sum at most, and none is chosen by how many rows there are: a token's
result must not depend on its batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# What a program may have of shared memory, in bytes (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; CDNA 3 ISA: LDS).
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}


@dataclass(frozen=True, eq=False)
class Config:
    """How a kernel is compiled: its block sizes by parameter name, warps a program, stages of its software pipeline.

    up_to: the largest value of each of the problem's that it is meant for, by name.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    up_to: Mapping[str, int] = field(default_factory=dict)

    def fits(self, problem: Mapping[str, int]) -> bool:
        """Whether it is meant for this problem."""
        return all(problem[name] <= largest for name, largest in self.up_to.items())

    def as_json(self) -> dict:
        """What tuning saves."""
        return {"blocks": dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


Table = dict[str, tuple[Config, ...]]


def everywhere(*entries: Config, **others: tuple[Config, ...]) -> Table:
    """The same entries on every architecture, apart from those that have their own."""
    return {arch: others.get(arch, entries) for arch in ARCHITECTURES}


TABLES: dict[str, Table] = {}
# Tuned configurations, by (kernel, architecture, problem): they go before the tables.
tuned: dict[tuple[str, str, tuple[tuple[str, int], ...]], Config] = {}


def candidates(kernel: str, arch: str, problem: Mapping[str, int]) -> tuple[Config, ...]:
    """The table's entries that the problem fits, in their order. Raises ValueError where there is none."""
    fitting = tuple(config for config in TABLES[kernel][nearest(arch)] if config.fits(problem))
    if not fitting:
        raise ValueError(f"no configuration of {kernel} on {arch} is meant for {dict(problem)}")
    return fitting


def choose(kernel: str, arch: str, problem: Mapping[str, int]) -> Config:
    """The configuration that was tuned for this problem, else the table's first that it fits."""
    known = tuned.get((kernel, arch, tuple(problem.items())))
    return candidates(kernel, arch, problem)[0] if known is None else known


def nearest(arch: str) -> str:
    """The architecture whose tables serve this one: itself, or the newest that is no newer, of the same maker."""
    if arch in ARCHITECTURES:
        return arch
    if not arch.startswith("sm_"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    older = [name for name in ARCHITECTURES if name.startswith("sm_") and int(name.removeprefix("sm_")) < number]
    if not older:
        raise ValueError(f"{arch} is older than {ARCHITECTURES[0]}, the oldest architecture that there are kernels for")
    return older[-1]

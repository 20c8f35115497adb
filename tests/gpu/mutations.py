"""Breaks compiled kernels on purpose, to see that the emulator's checks and a test's own comparison notice.

    left, outcomes = mutations.survivors("sm_90", [Trial(call, agrees)])

The target "binary" stands for the CUDA C++ kernels, called through their operators.

A mutation is caught if the emulator raises, or the result is wrong. One that survives both must be listed by the test
as equivalent, with the reason: nothing that the kernel computes depends on what was changed.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from gpu import binary
from gpu.driver import Emulation, emulated
from gpu.ptx import CheckFailed, PTXError


@dataclass(frozen=True)
class Mutation:
    """One change: its kind, the line of the PTX it touches, and the text before and after."""

    kind: str
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.kind} at PTX line {self.line}: {' '.join(self.before.split())[:100]}"

    def __call__(self, text: str) -> str:
        lines = text.split("\n")
        if lines[self.line - 1] != self.before:
            raise ValueError(f"line {self.line} is not what the mutation was made from")
        lines[self.line - 1] = self.after
        return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """`check` names the check that raised, "result" is a wrong result, None means that the mutation survived."""

    mutation: Mutation
    check: str | None
    detail: str = ""


@dataclass(frozen=True)
class Trial:
    """A call that launches one kernel, and whether what it returns is right."""

    call: Callable[[], object]
    agrees: Callable[[object], bool]


def _drop(pattern: str) -> Callable[[str], list[str]]:
    compiled = re.compile(pattern)
    return lambda line: [compiled.sub("", line)] if compiled.search(line) else []


def _replace(pattern: str, replacement: str) -> Callable[[str], list[str]]:
    compiled = re.compile(pattern)

    def change(line: str) -> list[str]:
        changed = compiled.sub(replacement, line, count=1)
        return [changed] if changed != line else []

    return change


def _nudge(line: str) -> list[str]:
    """An immediate of an integer comparison off by one: a mask that lets one element too many, or too few, through."""
    match = re.search(r"(setp\.(?:lt|gt|le|ge)\.[su](?:32|64)\s+%p\d+, %r[sd]?\d+, )(-?\d+);", line)
    if match:
        return [line.replace(match[0], f"{match[1]}{int(match[2]) + 1};")]
    return []


def _late(line: str) -> list[str]:
    """A wait for copies that lets two more groups be under way, and three at least."""
    match = re.search(r"\b(cp\.async\.wait_group\s+)(\d+);", line)
    return [line.replace(match[0], f"{match[1]}{max(3, int(match[2]) + 2)};")] if match else []


_STRICTNESS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


def _loosen(line: str) -> list[str]:
    """A comparison with a register off by one: < for <= and the like."""
    match = re.search(r"setp\.(lt|le|gt|ge)(\.[su](?:32|64)\s+%p\d+, %r[sd]?\d+, %r)", line)
    return [line.replace(match[0], f"setp.{_STRICTNESS[match[1]]}{match[2]}")] if match else []


def _stride(line: str) -> list[str]:
    """A step between addresses that is twice what it should be."""
    match = re.search(r"(mul\.wide\.[su]32\s+%rd\d+, %r\d+, )(\d+);", line)
    if match:
        return [line.replace(match[0], f"{match[1]}{2 * int(match[2])};")]
    match = re.search(r"(shl\.b(?:32|64)\s+%r[d]?\d+, %r[d]?\d+, )(\d+);", line)
    return [line.replace(match[0], f"{match[1]}{int(match[2]) + 1};")] if match else []


def _swap(line: str) -> list[str]:
    """Two registers of a fragment changed over."""
    match = re.search(r"(mma\.sync[^{]*\{[^}]*\},\s*\{\s*)(%r\d+),(\s*)(%r\d+)", line)
    if not match or match[2] == match[4]:
        return []
    return [line.replace(match[0], f"{match[1]}{match[4]},{match[3]}{match[2]}")]


def _distant(line: str) -> list[str]:
    """A shuffle with another lane than the one meant: one that another step of a reduction already reads."""
    match = re.search(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )(\d+),", line)
    return [line.replace(match[0], f"{match[1]}{int(match[2]) // 2 or 2},")] if match else []


KINDS: dict[str, Callable[[str], list[str]]] = {
    "dropped barrier": _drop(r"\bbar\.sync\s+\d+(?:, \d+)?;"),
    "dropped warp barrier": _drop(r"\bbar\.warp\.sync\s+-?\w+;"),
    "dropped wait": _drop(r"\bcp\.async\.wait_(?:group\s+\d+|all\s*);"),
    "late wait": _late,
    "dropped commit": _drop(r"\bcp\.async\.commit_group;"),
    "whole copy": _replace(r"(cp\.async\.c[ag][^;]*, (?:0x)?\d+), %r\d+;", r"\1;"),
    "dropped wgmma wait": _drop(r"\bwgmma\.wait_group\.sync\.aligned\s+\d+;"),
    "dropped wgmma fence": _drop(r"\bwgmma\.fence\.sync\.aligned;"),
    "dropped proxy fence": _drop(r"\bfence\.proxy\.async\S*;"),
    "dropped initialisation fence": _drop(r"\bfence\.mbarrier_init\S*;"),
    "dropped arrival": _drop(r"\bmbarrier\.arrive\.shared[^;]*;"),
    "dropped phase": _replace(r"\bmbarrier\.try_wait\S* (\S+), \[[^;]*;", r"setp.eq.b32 \1, 0, 0;"),
    "dropped bytes": _replace(r"(\bmbarrier\.arrive\.expect_tx[^;]*), \S+;", r"\1, 128;"),
    "late phase": _replace(
        r"(\bmbarrier\.try_wait\.parity[^;]*), (\S+);", r"{.reg .b32 other; xor.b32 other, \2, 1; \1, other;}"
    ),
    "unguarded store": _replace(r"@!?%p\d+\s+(st\.global)", r"\1"),
    "unguarded load": _replace(r"@!?%p\d+\s+(ld\.global)", r"\1"),
    "inverted guard": _replace(r"@(%p\d+)\s+(st\.global)", r"@!\1 \2"),
    "off by one": _nudge,
    "off by one (register)": _loosen,
    "wrong stride": _stride,
    "swapped fragment": _swap,
    "wrong lane": _distant,
    "transposed matrix": _replace(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared"),
}
# What a kernel does wrong whatever its input; the others need inputs that reach the edge in question.
SYNCHRONISATION = [kind for kind in KINDS if kind.startswith(("dropped", "late"))]
DATA = ["swapped fragment", "transposed matrix", "wrong lane", "inverted guard", "wrong stride"]
EDGES = ["whole copy", "unguarded store", "unguarded load", "off by one", "off by one (register)"]


def of(text: str, kinds: Iterable[str] | None = None, most: int | None = None) -> Iterator[Mutation]:
    """Every mutation of a module, or of some kinds; `most` spreads that many of each kind over the kernel."""
    lines = text.split("\n")
    for kind in kinds or KINDS:
        found = [
            Mutation(kind, number, line, changed)
            for number, line in enumerate(lines, 1)
            for changed in KINDS[kind](line)
        ]
        step = 1 if most is None else max(-(-len(found) // most), 1)
        yield from found[::step]


def _machine(target: str, transform: Callable[[str], str]) -> contextlib.AbstractContextManager[Emulation]:
    """Triton's kernels compiled for a target, or those of fasttx's binary."""
    if target.startswith("binary"):
        return binary.intercepted(gpu=binary.gpu_of(target), transform=transform)
    return emulated(target, transform=transform)


def compiled(target: str, trial: Trial, kernel: str = "") -> str:
    """The PTX of the one kernel that a trial launches, or of the one whose name has `kernel` in it.

    Raises ValueError unless there is one, and what it gives unbroken is right.
    """
    texts = []

    def keep(text: str) -> str:
        texts.append(text)
        return text

    with _machine(target, keep):
        result = trial.call()
    if not trial.agrees(result):
        raise ValueError("the result is wrong with nothing changed: every mutation would count as caught")
    texts = {text for text in texts if re.search(rf"\.entry \w*{kernel}", text)}
    if len(texts) != 1:
        raise ValueError(f"the call launches {len(texts)} kernels {kernel}, expected one")
    return texts.pop()


def judge(mutation: Mutation, target: str, trial: Trial, original: str) -> Outcome:
    """Runs a call with its kernel changed, whose PTX is `original`; others that it launches stay as they are."""
    try:
        with _machine(target, lambda text: mutation(text) if text == original else text):
            result = trial.call()
    except CheckFailed as error:
        return Outcome(mutation, error.check, error.message)
    except PTXError as error:
        return Outcome(mutation, "malformed", str(error))
    return Outcome(mutation, None if trial.agrees(result) else "result")


def survivors(
    target: str,
    trials: list[Trial],
    kinds: Iterable[str] | None = None,
    most: int | None = None,
    kernel: str = "",
) -> tuple[list[Mutation], list[Outcome]]:
    """Judges the mutations of a kernel: those that no trial noticed, and all outcomes.

    All trials must launch the same PTX: sizes that Triton specialises alike. kernel: which one of several that a call
    launches, by a part of its name.
    """
    text = compiled(target, trials[0], kernel)
    for trial in trials[1:]:
        if compiled(target, trial, kernel) != text:
            raise ValueError("the trials do not launch the same PTX")
    left, outcomes = list(of(text, kinds, most)), []
    for trial in trials:
        judged = [judge(mutation, target, trial, text) for mutation in left]
        outcomes += [outcome for outcome in judged if outcome.check is not None]
        left = [outcome.mutation for outcome in judged if outcome.check is None]
    return left, outcomes + [Outcome(mutation, None) for mutation in left]

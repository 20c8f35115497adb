"""explain(): what each module of a model was swapped to and ran on, and why not otherwise."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import torch
from torch.nn import Module

from fasttx import _callers, dispatch
from fasttx.nn._plain import why_patched
from fasttx.patch import swap

# The statuses that stand for time lost: an op on no kernel, a child outside its fusion, a module not yet swapped.
_SLOW = ("slow", "called", "not optimized")


@dataclass(frozen=True)
class Row:
    """One module, or one op that a module ran. Fields that say nothing are empty.

    A module's status: "swapped"; "fused" into another module; "called", outside the fusion that it would be part of;
    "not optimized", where optimize(model) would swap it; "left alone", a subclass of what it would swap; "as torch",
    where fasttx has nothing for it. An op's: "ran", on a kernel or where the user wanted it, or "slow", elsewhere.
    backend: "parts" where one operation has become several, each with a row of its own. kernel: the
    operator of the `fasttx` library. isa: its instruction set. reason: why not otherwise, in words.
    """

    module: str
    class_name: str
    status: str
    op: str = ""
    backend: str = ""
    kernel: str = ""
    isa: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """The rows; as text, an aligned table of them."""

    rows: tuple[Row, ...]

    @property
    def slow(self) -> tuple[Row, ...]:
        """The rows on a slow path: slow, called, or not optimized."""
        return tuple(row for row in self.rows if row.status in _SLOW)

    def as_dicts(self) -> list[dict[str, str]]:
        """The rows as plain data."""
        return list(map(asdict, self.rows))

    def __str__(self) -> str:
        header = tuple(field.name.replace("_name", "") for field in fields(Row))
        table = [header, *map(astuple, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        used = [index for index, width in enumerate(widths) if any(row[index] for row in table[1:])]
        return "\n".join(
            "  ".join(row[index].ljust(widths[index]) for index in used).rstrip() for row in table
        )


def explain(model: Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """What fasttx does in this model.

    Without inputs: a row for each module, with what it was swapped to, the fusion that it is part
    of, or the reason why it is neither. With inputs: the model runs once on them, without gradients
    and in the mode that it is in, and there is a row for each op in the order they ran, with the
    module that called it, the backend, kernel and instruction set, and the reasons why earlier
    backends, or a module's fused forward, did not take it. Equal rows appear once. A model is on no slow path where
    `explain(model).slow` and `explain(model, *inputs).slow` are both empty.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not inputs and not kwargs:
        return Explanation(tuple(_describe(model)))
    paths = {id(module): path or "(model)" for path, module in model.named_modules()}
    rows: dict[Row, None] = {}

    def listen(decision: dispatch.Decision) -> None:
        module = next((caller for caller in _callers.modules() if id(caller) in paths), None)
        rows[_row(decision, "" if module is None else paths[id(module)], module)] = None

    dispatch.listeners.append(listen)
    try:
        with torch.no_grad(), dispatch.strict(False):
            model(*inputs, **kwargs)
    finally:
        dispatch.listeners.remove(listen)
    return Explanation(tuple(rows))


def _row(decision: dispatch.Decision, path: str, module: Module | None) -> Row:
    on_cpu = decision.backend == "cpu" and dispatch.extension is not None
    return Row(
        path,
        type(module).__name__ if module is not None else "",
        "slow" if decision.is_fallback else "ran",
        decision.op,
        decision.backend,
        decision.kernel,
        dispatch.extension.isa() if on_cpu else "",
        decision.reason,
    )


def _describe(model: Module) -> Iterator[Row]:
    originals, swaps = swap.original_classes(), swap.swaps_for("remove")
    in_fusions = _in_fusions(model, originals)
    for path, module in model.named_modules():
        kind = type(module)
        name = kind.__name__
        if kind in originals:
            name = f"{originals[kind].__name__} -> fasttx's {name}"
        status, reason = in_fusions.get(id(module)) or _status(module, originals, swaps)
        yield Row(path or "(model)", name, status, reason=reason)


def _in_fusions(model: Module, originals: dict[type, type]) -> dict[int, tuple[str, str]]:
    """By id of each module that a swapped one reads or would read: its status and the reason."""
    found = {}
    for path, module in model.named_modules():
        parts: Callable | None = getattr(module, "parts", None)
        if type(module) not in originals or parts is None:
            continue
        replaced = _replaced(module)
        for name, reason in parts():
            child = module
            for step in name.split("."):
                child = getattr(child, step)
            if replaced or reason:
                found[id(child)] = "called", f"called as it is, outside the fusion: {replaced or reason}"
            else:
                found[id(child)] = "fused", f"fused into {path or '(model)'}"
    return found


def _status(module: Module, originals: dict[type, type], swaps: dict[type, type]) -> tuple[str, str]:
    kind = type(module)
    if kind in originals:
        replaced = _replaced(module)
        return ("called", f"swapped in vain: {replaced}") if replaced else ("swapped", "swapped")
    if kind in swaps:
        return "not optimized", "not swapped: optimize(model) would"
    for known in swaps:
        if issubclass(kind, known):
            return "left alone", f"left alone: a subclass of {known.__name__} may do something else"
    attention = swap.why_attention_stays(module)
    if attention is not None:
        return "left alone", f"its attention is left alone: {attention}"
    return "as torch", "left alone: no fused form of its own"


def _replaced(module: Module) -> str | None:
    """Why a swapped module's own forward does not run, or not as fasttx's."""
    return "its forward was replaced" if "forward" in module.__dict__ else why_patched(module)

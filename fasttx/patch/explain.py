"""explain(): what each module of a model was swapped to and ran on, and why not otherwise."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch.nn import Module

from fasttx import _callers, dispatch
from fasttx.patch import swap


@dataclass(frozen=True)
class Row:
    """One module, or one op that a module ran. Fields that say nothing are empty."""

    module: str
    class_name: str
    op: str = ""
    backend: str = ""
    isa: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """The rows; as text, an aligned table of them."""

    rows: tuple[Row, ...]

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
    module that called it, the backend and the instruction set, and the reasons why earlier
    backends, or a module's fused forward, did not take it. Equal rows appear once.
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
        with torch.no_grad():
            model(*inputs, **kwargs)
    finally:
        dispatch.listeners.remove(listen)
    return Explanation(tuple(rows))


def _row(decision: dispatch.Decision, path: str, module: Module | None) -> Row:
    on_cpu = decision.backend == "cpu" and dispatch.extension is not None
    return Row(
        path,
        type(module).__name__ if module is not None else "",
        decision.op,
        decision.backend,
        dispatch.extension.isa() if on_cpu else "",
        decision.reason,
    )


def _describe(model: Module) -> list[Row]:
    originals, swaps = swap.original_classes(), swap.swaps_for("remove")
    fused: dict[int, str] = {}
    for path, module in model.named_modules():
        parts: Callable | None = getattr(module, "parts", None)
        if type(module) in originals and parts is not None:
            for name, reason in parts():
                child = module
                for step in name.split("."):
                    child = getattr(child, step)
                whole = f"fused into {path or '(model)'}"
                outside = f"called as it is, outside the fusion: {reason}"
                fused[id(child)] = whole if reason is None else outside
    rows = []
    for path, module in model.named_modules():
        kind = type(module)
        name = kind.__name__
        if kind in originals:
            name = f"{originals[kind].__name__} -> fasttx's {name}"
        reason = fused.get(id(module)) or _reason(kind, originals, swaps)
        rows.append(Row(path or "(model)", name, reason=reason))
    return rows


def _reason(kind: type, originals: dict[type, type], swaps: dict[type, type]) -> str:
    if kind in originals:
        return "swapped"
    if kind in swaps:
        return "not swapped: optimize(model) would"
    for known in swaps:
        if issubclass(kind, known):
            return f"left alone: a subclass of {known.__name__} may do something else"
    return "left alone: no fused form of its own"

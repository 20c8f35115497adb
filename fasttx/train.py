"""Training: one loop for every model, from a drawn batch to a checkpoint that continues bit for bit.

All that is random in a step follows from the seed and the number of the step, so a checkpoint holds no generator, and a
run that was killed goes on exactly as if it had not been: on the same device, with as many threads, the same
instruction set and the same version of torch, as sums are added in another order by others.
"""

import csv
import dataclasses
import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttx import _checkpoint
from fasttx._checkpoint import CheckpointError
from fasttx._recipe import Recipe
from fasttx.dispatch import backend, requested_backend
from fasttx.models import Model
from fasttx.models._model import write_atomically

__all__ = ["COLUMNS", "CheckpointError", "Recipe", "Run", "Task", "measures", "moved", "train"]

COLUMNS = ("step", "loss", "rate", "gradient_norm", "size", "seconds")  # of metrics.csv, before the task's measures
_PARTS = ("model", "optimizer", "schedule")  # of a run, whose states make a checkpoint


class Task(Protocol):
    """What a model is to learn, and by what it is judged."""

    def batch(self, index: int) -> dict[str, Tensor]:
        """The arguments of model.loss; the same for the same index, whatever was asked for before."""

    def size(self, batch: dict[str, Tensor]) -> int:
        """How many tokens (or images) a batch has, for the speed that is shown."""

    def evaluate(self, model: Model) -> dict[str, float]:
        """Measures on data that is held out, by name; the model is in evaluation mode, without gradients."""

    def save(self, model: Model, folder: Path) -> None:
        """Puts the model where those who use it find it, whole or not at all."""


class Run:
    """A model on its way through a recipe, in a folder of its own: metrics.csv, checkpoint.pt, what the task saves.

    Goes on from the folder's checkpoint where there is one, and raises CheckpointError where that is another run's.
    It runs where the model is. backend: the one that its kernels come from; None leaves that to fasttx.backend and
    FASTTX_BACKEND. settings: what else makes the run what it is, by name, in numbers and strings: a checkpoint of other
    settings is another run's.
    """

    def __init__(
        self, model: Model, task: Task, recipe: Recipe, folder: Path, *, backend: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.task, self.recipe, self.backend = model, task, recipe, backend
        self.settings = dict(settings or {})
        _checkpoint.require_plain("settings", self.settings)
        self.folder, self.steps, self.rows, self.seconds = Path(folder), 0, [], 0.0
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"none of this {type(model).__name__}'s parameters is trained")
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.98), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, recipe.rate_at)
        if (self.folder / "checkpoint.pt").exists():
            state = _checkpoint.read(self.folder / "checkpoint.pt", self._identity())
            for name in _PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.steps, self.rows, self.seconds = state["steps"], state["rows"], state["seconds"]

    @property
    def done(self) -> bool:
        return self.steps >= self.recipe.steps

    @property
    def due(self) -> bool:
        """Whether it is at the end of an interval, or its own, and was not evaluated there."""
        at_end = self.done or self.steps % self.recipe.interval == 0
        return self.steps > 0 and at_end and not measures(self.rows[-1])

    def step(self) -> dict[str, float]:
        """One step of the optimizer; returns its row of the metrics. Raises FloatingPointError for a loss of NaN."""
        started, recipe = time.perf_counter(), self.recipe
        self.model.train()
        torch.manual_seed(recipe.seed * 1_000_003 + self.steps)
        loss, size = 0.0, 0
        self.model.zero_grad(set_to_none=True)  # of what was before: none of it is this step's
        with self._context():
            for part in range(recipe.accumulate):
                batch = moved(self.model, self.task.batch(self.steps * recipe.accumulate + part))
                device = next(iter(batch.values())).device.type
                with torch.autocast(device, torch.bfloat16, enabled=recipe.bfloat16):
                    share = self.model.loss(**batch) / recipe.accumulate
                share.backward()
                loss, size = loss + share.item(), size + self.task.size(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip).item()
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"step {self.steps}: the loss is {loss} and its gradient's norm {norm}")
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        row = dict(zip(COLUMNS, (self.steps, loss, rate, norm, size, seconds), strict=True))
        self.rows.append(row)
        return row

    def keep(self) -> None:
        """Evaluates, and writes metrics, model and checkpoint, each of them whole or not at all.

        Where the evaluation fails they are written without it, and the run's next start evaluates again.
        """
        try:
            self.rows[-1] |= self.evaluate()
        finally:
            self._write()

    def evaluate(self) -> dict[str, float]:
        """The task's measures now. Raises ValueError for one with the name of a column of every run's."""
        self.model.eval()
        with torch.inference_mode(), self._context():
            found = {name: float(value) for name, value in self.task.evaluate(self.model).items()}
        taken = found.keys() & set(COLUMNS)
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))}: no measure may be called as a column of the metrics")
        return found

    def _context(self) -> AbstractContextManager[None]:
        return backend(self.backend or requested_backend())

    def _write(self) -> None:
        out = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        table = csv.DictWriter(out, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        self.task.save(self.model, self.folder)
        write_atomically(self.folder / "metrics.csv", out.getvalue().encode())
        state = {"identity": self._identity(), "steps": self.steps, "rows": self.rows, "seconds": self.seconds}
        state |= {name: getattr(self, name).state_dict() for name in _PARTS}
        _checkpoint.write(self.folder / "checkpoint.pt", state)

    def _identity(self) -> dict[str, Any]:
        model = self.model
        return {
            "architecture": type(model).__name__, "config": model.config.to_dict(), "tokenizers": model.tokenizers,
            "recipe": dataclasses.asdict(self.recipe), "backend": self.backend or requested_backend(),
            "settings": self.settings,
            "weights": {
                name: f"{str(p.dtype).removeprefix('torch.')}{'' if p.requires_grad else ', frozen'}"
                for name, p in model.named_parameters()
            },
        }  # fmt: skip


def measures(row: dict[str, float]) -> dict[str, float]:
    """Of a row of the metrics, what the task measured; empty between evaluations."""
    return {name: value for name, value in row.items() if name not in COLUMNS}


def moved(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, by name, where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def train(*runs: Run) -> Iterator[tuple[Run, dict[str, float]]]:
    """Takes the runs to their ends, step by step in turn, so that what slows the machine slows all of them.

    Yields each step's run and row: with the task's measures where the run was evaluated and kept, at every interval and
    at its end.
    """
    for run in runs:
        if run.due:
            run.keep()
    while going := [run for run in runs if not run.done]:
        behind = min(run.steps for run in going)
        for run in going:
            if run.steps > behind:
                continue
            row = run.step()
            if run.due:
                run.keep()
            yield run, row

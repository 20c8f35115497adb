"""Training: one loop for every model, from a drawn batch to a checkpoint that continues bit for bit.

All that is random in a step follows from the seed and the number of the step, so a checkpoint holds no generator, and a
run that was killed goes on exactly as if it had not been.
"""

import csv
import dataclasses
import io
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttx.dispatch import backend
from fasttx.models import Model
from fasttx.models._model import write_atomically

COLUMNS = ("step", "loss", "rate", "gradient_norm", "size", "seconds")  # of metrics.csv, before the task's measures
_PARTS = ("model", "optimizer", "schedule")  # of a run, whose states make a checkpoint


class CheckpointError(ValueError):
    """A folder whose checkpoint is of another run, or is not whole."""


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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW with a linear warm-up and a cosine down to a tenth of the learning rate.

    Weight decay acts on matrices alone. A step's gradient is the mean over `accumulate` batches, scaled down to the
    norm `clip` where it is longer. bfloat16: under torch.autocast, with weights in float32. Every `interval` steps the
    model is evaluated and kept.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    bfloat16: bool = True
    interval: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("accumulate", 1), ("interval", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def rate_at(self, step: int) -> float:
        """The share of the learning rate that step `step` takes."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup))


class Run:
    """A model on its way through a recipe, in a folder of its own: metrics.csv, checkpoint.pt, what the task saves.

    Goes on from the folder's checkpoint where there is one, and raises CheckpointError where that is another run's.
    backend: the one that its kernels come from. settings: what else makes the run what it is, by name, in numbers and
    strings: a checkpoint of other settings is another run's.
    """

    def __init__(
        self, model: Model, task: Task, recipe: Recipe, folder: Path, *, backend: str = "auto",
        settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.task, self.recipe, self.backend = model, task, recipe, backend
        self.settings = dict(settings or {})
        self.folder, self.steps, self.rows, self.seconds = Path(folder), 0, [], 0.0
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.98), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, recipe.rate_at)
        if (self.folder / "checkpoint.pt").exists():
            self._resume()

    @property
    def done(self) -> bool:
        return self.steps >= self.recipe.steps

    def step(self) -> dict[str, float]:
        """One step of the optimizer; returns its row of the metrics. Raises FloatingPointError for a loss of NaN."""
        started, recipe, device = time.perf_counter(), self.recipe, next(self.model.parameters()).device
        self.model.train()
        torch.manual_seed(recipe.seed * 1_000_003 + self.steps)
        loss, size = 0.0, 0
        with backend(self.backend):
            for part in range(recipe.accumulate):
                batch = self.task.batch(self.steps * recipe.accumulate + part)
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                    share = self.model.loss(**{k: v.to(device) for k, v in batch.items()}) / recipe.accumulate
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
        """Evaluates, and writes metrics, model and checkpoint, each of them whole or not at all."""
        self.rows[-1] |= self.evaluate()
        out = io.StringIO()
        table = csv.DictWriter(out, list(dict.fromkeys(name for row in self.rows for name in row)))
        table.writeheader()
        table.writerows(self.rows)
        self.task.save(self.model, self.folder)
        write_atomically(self.folder / "metrics.csv", out.getvalue().encode())
        state = {"identity": self._identity(), "steps": self.steps, "rows": self.rows, "seconds": self.seconds}
        state |= {name: getattr(self, name).state_dict() for name in _PARTS}
        data = io.BytesIO()
        torch.save(state, data)
        write_atomically(self.folder / "checkpoint.pt", data.getvalue())

    def evaluate(self) -> dict[str, float]:
        """The task's measures now."""
        self.model.eval()
        with torch.inference_mode(), backend(self.backend):
            return self.task.evaluate(self.model)

    def _identity(self) -> dict[str, Any]:
        model = self.model
        return {
            "architecture": type(model).__name__, "config": model.config.to_dict(), "tokenizers": model.tokenizers,
            "recipe": dataclasses.asdict(self.recipe), "backend": self.backend, "settings": self.settings,
        }  # fmt: skip

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["identity"]
        except Exception as error:  # torch.load has many kinds for a file that is not whole
            raise CheckpointError(f"{path} is no whole checkpoint: {error}; remove it to begin anew") from error
        for name, mine in self._identity().items():
            if found.get(name) != mine:
                what = f"whose {name} is {found.get(name)}, not {mine}"
                raise CheckpointError(f"{path} is of another run, {what}: choose another folder, or remove this one")
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.steps, self.rows, self.seconds = state["steps"], state["rows"], state["seconds"]


def measures(row: dict[str, float]) -> dict[str, float]:
    """Of a row of the metrics, what the task measured; empty between evaluations."""
    return {name: value for name, value in row.items() if name not in COLUMNS}


def train(*runs: Run) -> Iterator[tuple[Run, dict[str, float]]]:
    """Takes the runs to their ends, step by step in turn, so that what slows the machine slows all of them.

    Yields each step's run and row: with the task's measures where the run was evaluated and kept, at every interval and
    at its end.
    """
    while not all(run.done for run in runs):
        behind = min(run.steps for run in runs)
        for run in runs:
            if run.steps > behind or run.done:
                continue
            row = run.step()
            if run.steps % run.recipe.interval == 0 or run.done:
                run.keep()
            yield run, row

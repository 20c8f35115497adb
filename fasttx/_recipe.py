"""How long and how fast a model learns."""

import dataclasses
import math


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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and type(value) is not int:
                raise TypeError(f"{field.name} must be an int, got {type(value).__name__}")
            if not isinstance(value, (int, float)):
                raise TypeError(f"{field.name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value):
                raise ValueError(f"{field.name} must be finite, got {value}")
        for name, least in (("steps", 1), ("warmup", 0), ("weight_decay", 0), ("accumulate", 1), ("interval", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed must be from 0 to 2**40 - 1, got {self.seed}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def rate_at(self, step: int) -> float:
        """The share of the learning rate that step `step` takes."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup))

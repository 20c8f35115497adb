"""What `python -m fasttx train` trains: data, a model, and the measures that it is judged by."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from fasttx.models import Model
from fasttx.train import Recipe

_Batch = TypeVar("_Batch")


class System:
    """A fasttx.train.Task that reads its data and makes its model.

    tokenizers: by the name that the model binds them to. Sizes that a command may change are in `recipe`, and in what
    `add_arguments` adds; args has them, `data` (the folder) and `seed`.
    """

    summary: ClassVar[str]
    recipe: ClassVar[Recipe]
    variants: ClassVar[tuple[str, ...]] = ()

    def __init__(self, args: argparse.Namespace) -> None:
        self.seed: int = args.seed
        self.tokenizers: dict[str, Any] = {}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """The system's own."""

    def model(self) -> Model:
        """A new model, drawn from torch's generator."""
        raise NotImplementedError

    def batch(self, index: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def size(self, batch: dict[str, Tensor]) -> int:
        raise NotImplementedError

    def evaluate(self, model: Model) -> dict[str, float]:
        raise NotImplementedError

    def variant(self, name: str) -> "System":
        """The same system with less in it, to be trained beside it; name: one of `variants`."""
        raise NotImplementedError

    def save(self, model: Model, folder: Path) -> None:
        """Puts the model where the commands that use it find it."""
        model.save(folder / "model.safetensors")

    def report(self, model: Model) -> Iterator[str]:
        """What there is to say of the trained model beside its measures: baselines, examples."""
        return iter(())

    def generator(self, *numbers: int) -> torch.Generator:
        """One for these numbers and the run's seed, and no other."""
        seed = self.seed
        for number in numbers:
            seed = seed * 1_000_003 + number
        return torch.Generator().manual_seed(seed % 2**63)


class Epochs(Generic[_Batch]):
    """The batches of one epoch after another, by their number; make: from an epoch's number to its batches."""

    def __init__(self, make: Callable[[int], Sequence[_Batch]]) -> None:
        self._make, self._made = make, []

    def __getitem__(self, index: int) -> _Batch:
        epoch = 0
        while True:
            if epoch == len(self._made):
                self._made.append(self._make(epoch))
                if not len(self._made[-1]):
                    raise ValueError("there is nothing to learn from: an epoch has no batches")
            if index < len(self._made[epoch]):
                return self._made[epoch][index]
            index -= len(self._made[epoch])
            epoch += 1

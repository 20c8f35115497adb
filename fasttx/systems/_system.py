"""What `python -m fasttx train` trains: data, a model, and the measures that it is judged by."""

import argparse
import zlib
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

    tokenizers: by the name that the model binds them to. data: what there is to learn from, as `described` says it.
    unit: what `size` counts. packages: what `evaluate` needs beside torch. Sizes that a command may change are in
    `recipe`, and in what `add_arguments` adds; args has them, `data` (the folder) and `seed`.
    """

    summary: ClassVar[str]
    recipe: ClassVar[Recipe]
    variants: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "tokens"
    packages: ClassVar[tuple[str, ...]] = ()
    data: str

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


def described(kind: str, train: Sequence[Any], held_out: Sequence[Any]) -> str:
    """How many there are of each, and a checksum of them: equal for equal data, and hardly for any other."""
    checksum = zlib.crc32(repr((train, held_out)).encode())
    return f"{len(train):,} {kind} to learn from, {len(held_out):,} held out (checksum {checksum:08x})"


class Epochs(Generic[_Batch]):
    """The batches of one epoch after another, by their number; make: from an epoch's number to its batches.

    One epoch is kept, and made again where an earlier one is asked for.
    """

    def __init__(self, make: Callable[[int], Sequence[_Batch]]) -> None:
        self._make, self._lengths = make, []
        self._number, self._batches = -1, ()

    def __getitem__(self, index: int) -> _Batch:
        epoch = 0
        while index >= self._length(epoch):
            index -= self._length(epoch)
            epoch += 1
        return self._take(epoch)[index]

    def _length(self, epoch: int) -> int:
        if epoch == len(self._lengths):
            self._lengths.append(len(self._take(epoch)))
        return self._lengths[epoch]

    def _take(self, epoch: int) -> Sequence[_Batch]:
        if epoch != self._number:
            self._number, self._batches = epoch, self._make(epoch)
            if not len(self._batches):
                raise ValueError("there is nothing to learn from: an epoch has no batches")
        return self._batches

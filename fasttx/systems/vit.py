"""Vision transformers on handwritten digits and on clothes."""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttx import datasets
from fasttx.models import Model, ViT, ViTConfig
from fasttx.train import Recipe, moved

from ._system import Epochs, System, described


class ImageSystem(System):
    """Images and their classes; in training they move by up to --shift pixels, and with `mirror` half are mirrored."""

    unit = "images"
    patch: int
    dropout = 0.0
    mirror = False
    width, layers, heads = 128, 4, 4

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.args = args
        self.images, self.labels, self.held_out, self.held_out_labels = self.read(args)
        self.data = described("images", self.labels.tolist(), self.held_out_labels.tolist())
        self.batches = Epochs(
            lambda epoch: torch.randperm(len(self.images), generator=self.generator(1, epoch)).split(args.batch)
        )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--batch", type=int, default=128, help="images at a time")
        parser.add_argument("--patch", type=int, default=cls.patch, help="side of a patch, in pixels")
        parser.add_argument("--width", type=int, default=cls.width, help="of the model")
        parser.add_argument("--layers", type=int, default=cls.layers, help="of the model")
        parser.add_argument("--heads", type=int, default=cls.heads, help="of attention")
        parser.add_argument("--dropout", type=float, default=cls.dropout, help="in training")
        parser.add_argument("--shift", type=int, default=0, help="pixels that an image moves at most, in training")
        parser.add_argument("--pool", choices=("class", "mean"), default="mean", help="what the classes are told from")

    def read(self, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images and labels to train with, and those that are held out."""
        raise NotImplementedError

    def model(self) -> Model:
        a = self.args
        return ViT(
            ViTConfig(
                image_size=self.images.shape[-1], patch_size=a.patch, classes=int(self.labels.max()) + 1, width=a.width,
                layers=a.layers, heads=a.heads, dropout=a.dropout, pool=a.pool, init_std=max(a.width, 1) ** -0.5,
            )
        )  # fmt: skip

    def batch(self, index: int) -> dict[str, Tensor]:
        """Every image once before any comes again."""
        chosen = self.batches[index]
        return {"images": self.varied(self.images[chosen], index), "labels": self.labels[chosen]}

    def varied(self, images: Tensor, index: int) -> Tensor:
        """The images, each moved and mirrored by chance."""
        generator, shift, (batch, _, height, width) = self.generator(2, index), self.args.shift, images.shape
        if shift < 0:
            raise ValueError(f"--shift must be 0 or more, got {shift}")
        down, right = torch.randint(0, 2 * shift + 1, (2, batch, 1), generator=generator)
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        if self.mirror:
            mirrored = torch.rand(batch, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (shift,) * 4)
        return padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)

    def size(self, batch: dict[str, Tensor]) -> int:
        return len(batch["images"])

    def evaluate(self, model: Model) -> dict[str, float]:
        right = 0
        for images, labels in zip(self.held_out.split(500), self.held_out_labels.split(500), strict=True):
            batch = moved(model, {"images": images, "labels": labels})
            right += (model(batch["images"]).argmax(-1) == batch["labels"]).sum().item()
        return {"accuracy": right / len(self.held_out)}


class DigitsSystem(ImageSystem):
    """The 1797 digits that come with scikit-learn, 8 x 8 pixels."""

    summary = "ViT on scikit-learn's handwritten digits: accuracy on a fifth held out"
    recipe = Recipe(steps=600, learning_rate=2e-3, interval=200, bfloat16=False)
    patch = 2
    width = 64
    dropout = 0.1

    def read(self, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, labels = datasets.digits()
        kept, held_out = map(torch.tensor, datasets.split(range(len(images)), 0.2, seed=0))
        return images[kept], labels[kept], images[held_out], labels[held_out]


class FashionSystem(ImageSystem):
    """Fashion-MNIST's own split: 60,000 images of clothes to train with, 10,000 to test."""

    summary = "ViT on Fashion-MNIST: accuracy on its test images"
    recipe = Recipe(steps=3500, learning_rate=1e-3, warmup=200, interval=700)
    patch = 7
    mirror = True

    def read(self, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (*datasets.fashion_mnist(args.data, "train"), *datasets.fashion_mnist(args.data, "test"))

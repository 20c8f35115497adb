"""A picture of clothes and a question about it, answered from both."""

import argparse
import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from fasttx import datasets
from fasttx.models import BertConfig, Model, Multimodal, MultimodalConfig, ViTConfig
from fasttx.text import Tokenizer
from fasttx.train import Recipe, moved

from ._system import System, described

_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_PLACES = {"T-shirt": "chest", "pullover": "chest", "coat": "chest", "shirt": "chest", "trouser": "legs",
           "dress": "whole body", "sandal": "feet", "sneaker": "feet", "ankle boot": "feet", "bag": "hand"}  # fmt: skip
_ANSWERS = (*_NAMES, *dict.fromkeys(_PLACES.values()), "yes", "no")
_ANSWER = {answer: i for i, answer in enumerate(_ANSWERS)}
_WHAT, _WHERE, _BRIGHT = "what is it ?", "where does it go ?", "is it bright ?"
_IS_IT = tuple(f"is it a {name} ?" for name in _NAMES)
_QUESTIONS = (_WHAT, _WHERE, _BRIGHT, *_IS_IT)
_KINDS = 4
_EXAMPLES = 6


class MultimodalSystem(System):
    """Questions of four kinds, equally often, about Fashion-MNIST: what, where, is it bright, is it a certain thing.

    What is asked decides which answers are possible, and only the picture which of them is right. The model also
    learns to write a caption: "a bright coat for the chest".
    """

    summary = "image and question to an answer on Fashion-MNIST: accuracy, against either alone"
    recipe = Recipe(steps=1500, learning_rate=1e-3, warmup=100, interval=500)
    variants = ("image", "text")
    unit = "images"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.args, self.modality = args, "both"
        (self.images, self.labels), held_out = (datasets.fashion_mnist(args.data, part) for part in ("train", "test"))
        self.data = described("images", self.labels.tolist(), held_out[1].tolist())
        # As many are bright as not.
        self.threshold = _brightness(self.images).median()
        captions = [_caption(name, bright) for name in _NAMES for bright in (True, False)]
        tokenizer = Tokenizer.train("word", [*_QUESTIONS, *captions], lowercase=True)
        self.tokenizers = {"text": tokenizer}
        self.questions = tokenizer.batch(list(_QUESTIONS), cls=True)
        self.captions = tokenizer.batch(captions, bos=True, eos=True)
        generator = torch.Generator().manual_seed(0)
        self.held_out = held_out[0], *self._ask(*held_out, generator)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--batch", type=int, default=128, help="pictures at a time")
        parser.add_argument("--width", type=int, default=96, help="of each encoder and the decoder")
        parser.add_argument("--layers", type=int, default=3, help="of the encoder of pictures; the others have two")
        parser.add_argument("--dropout", type=float, default=0.1, help="in training")

    def variant(self, name: str) -> "MultimodalSystem":
        """The same with nothing to see, or nothing to read."""
        made = copy.copy(self)
        made.modality = name
        return made

    def model(self) -> Model:
        a, t = self.args, self.tokenizers["text"]
        sizes = {"width": a.width, "heads": 4, "dropout": a.dropout, "init_std": max(a.width, 1) ** -0.5}
        return Multimodal(
            MultimodalConfig(
                image=ViTConfig(image_size=28, patch_size=7, layers=a.layers, **sizes),
                text=BertConfig(vocab_size=len(t), layers=2, max_positions=16, pad_id=t.pad_id, **sizes),
                layers=2, queries=4, classes=len(_ANSWERS), caption_layers=2, bos_id=t.bos_id, eos_id=t.eos_id,
                pad_id=t.pad_id, **sizes,
            )
        )  # fmt: skip

    def _ask(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """For each image the number of a question, of its answer, and of its caption."""
        bright = _brightness(images) > self.threshold
        kinds = torch.randint(0, _KINDS, (len(images),), generator=generator)
        # Half of those who ask for a certain thing are right.
        other = (labels + torch.randint(1, len(_NAMES), (len(images),), generator=generator)) % len(_NAMES)
        asked = torch.where(torch.rand(len(images), generator=generator) < 0.5, labels, other)
        places = torch.tensor([_ANSWER[_PLACES[name]] for name in _NAMES])
        yes_no = torch.tensor([_ANSWER["no"], _ANSWER["yes"]])
        questions = torch.where(kinds == 3, 3 + asked, kinds)
        answers = torch.stack((labels, places[labels], yes_no[bright.long()], yes_no[(asked == labels).long()]))
        return questions, answers.gather(0, kinds[None])[0], 2 * labels + (~bright).long()

    def _arguments(self, images: Tensor, questions: Tensor) -> dict[str, Tensor]:
        """What the modality lets the model have."""
        seen = {"images": images}
        read = {"token_ids": self.questions.token_ids[questions], "padding": self.questions.padding[questions]}
        return {"both": seen | read, "image": seen, "text": read}[self.modality]

    def batch(self, index: int) -> dict[str, Tensor]:
        generator = self.generator(index)
        chosen = torch.randint(0, len(self.images), (self.args.batch,), generator=generator)
        images, labels = self.images[chosen], self.labels[chosen]
        questions, answers, captions = self._ask(images, labels, generator)
        written = {"captions": self.captions.token_ids[captions], "caption_padding": self.captions.padding[captions]}
        return self._arguments(images, questions) | written | {"labels": answers}

    def size(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def evaluate(self, model: Model) -> dict[str, float]:
        right = 0
        for images, questions, answers, _ in zip(*(part.split(500) for part in self.held_out), strict=True):
            told = model(**moved(model, self._arguments(images, questions))).argmax(-1)
            right += (told.cpu() == answers).sum().item()
        return {"accuracy": right / len(self.held_out[0])}

    def report(self, model: Model) -> Iterator[str]:
        images, questions, answers, captions = (part[:_EXAMPLES] for part in self.held_out)
        arguments, tokenizer = moved(model, self._arguments(images, questions)), self.tokenizers["text"]
        with torch.inference_mode():
            told = model(**arguments).argmax(-1).tolist()
            written = model.caption(**arguments, max_new_tokens=self.captions.token_ids.shape[1]).tolist()
        for i, row in enumerate(written):
            right = tokenizer.decode(self.captions.token_ids[captions[i]].tolist())
            yield (
                f"  {_QUESTIONS[questions[i]]} {_ANSWERS[told[i]]} ({_ANSWERS[answers[i]]}); "
                f'"{tokenizer.decode(row)}" ("{right}")'
            )


def _brightness(images: Tensor) -> Tensor:
    """The mean of what is not black."""
    return images.flatten(1).sum(1) / (images.flatten(1) > 0).sum(1).clamp(min=1)


def _caption(name: str, bright: bool) -> str:
    return f"a {'bright' if bright else 'dark'} {name} for the {_PLACES[name]}"

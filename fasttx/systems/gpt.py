"""A decoder-only language model on Shakespeare, and a recurrent one of the same size beside it."""

import argparse
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fasttx import data, datasets, functional
from fasttx.models import GPT, Config, GPTConfig, Model
from fasttx.text import Tokenizer
from fasttx.train import Recipe, moved

from ._ngram import bits_per_character
from ._system import System, described

_ORDERS = (3, 4, 5, 6, 7)


class GPTSystem(System):
    """Byte pairs of plays, predicted one after the other; measured in bits per character of plays held out."""

    summary = "GPT on Shakespeare: bits per character, against an n-gram"
    recipe = Recipe(steps=1000, learning_rate=2e-3, interval=250)

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        train, held_out = datasets.split(datasets.shakespeare(args.data), 0.1, seed=0)
        self.data = described("plays", train, held_out)
        self.texts = "\n\n".join(train), "\n\n".join(held_out)
        tokenizer = Tokenizer.train("bpe", train, vocab_size=args.vocabulary)
        self.tokenizers = {"text": tokenizer}
        self.train, self.held_out = (torch.tensor(tokenizer.encode(text)) for text in self.texts)
        self.args = args
        if len(self.held_out) <= args.context:
            raise ValueError(f"--context {args.context}: the held-out plays have {len(self.held_out)} tokens")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--vocabulary", type=int, default=1024, help="tokens")
        parser.add_argument("--context", type=int, default=128, help="tokens that are seen at a time")
        parser.add_argument("--batch", type=int, default=32, help="texts at a time")
        parser.add_argument("--width", type=int, default=256, help="of the model")
        parser.add_argument("--layers", type=int, default=4, help="of the model")
        parser.add_argument("--heads", type=int, default=4, help="of attention")
        parser.add_argument("--dropout", type=float, default=0.1, help="in training")

    def model(self) -> Model:
        a = self.args
        vocabulary = len(self.tokenizers["text"])
        return GPT(GPTConfig(vocabulary, a.width, a.layers, a.heads, max_positions=a.context, dropout=a.dropout))

    def batch(self, index: int) -> dict[str, Tensor]:
        inputs, targets = data.windows(self.train, self.args.context, self.args.batch, self.generator(index))
        return {"token_ids": inputs, "targets": targets}

    def size(self, batch: dict[str, Tensor]) -> int:
        return batch["token_ids"].numel()

    def evaluate(self, model: Model) -> dict[str, float]:
        """Every held-out token but the first, after those before it in its window."""
        length = self.args.context
        windows = self.held_out[: (len(self.held_out) - 1) // length * length + 1].unfold(0, length + 1, length)
        nats = 0.0
        for part in windows.split(self.args.batch):
            batch = moved(model, {"token_ids": part[:, :-1], "targets": part[:, 1:]})
            nats += model.loss(**batch).item() * batch["targets"].numel()
        predicted = self.tokenizers["text"].decode(self.held_out[1 : windows[:, 1:].numel() + 1].tolist())
        return {"bits_per_character": nats / math.log(2) / len(predicted)}

    def report(self, model: Model) -> Iterator[str]:
        counted = {order: bits_per_character(*self.texts, order) for order in _ORDERS}
        best = min(counted, key=counted.get)
        yield f"The best n-gram of characters (order {best}): {counted[best]:.3f} bits per character"


@dataclasses.dataclass(frozen=True)
class LSTMConfig(Config):
    """Sizes of an LSTM: token embeddings of `width`, `layers` of as many cells, and a head that is tied to them."""

    vocab_size: int
    width: int
    layers: int
    dropout: float = 0.0


class LSTM(Model):
    """Hochreiter and Schmidhuber 1997, by torch.nn.LSTM: the model that GPT is measured against."""

    Config = LSTMConfig

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.width)
        torch.nn.init.normal_(self.embedding.weight, std=0.02)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.lstm = torch.nn.LSTM(
            config.width, config.width, config.layers, batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )  # fmt: skip

    def loss(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy, in nats; token_ids and targets (B, T)."""
        hidden, _ = self.lstm(self.dropout(self.embedding(token_ids)))
        return functional.linear_cross_entropy(self.dropout(hidden), self.embedding.weight, targets)


class LSTMSystem(GPTSystem):
    """The same task for a recurrent network, whose steps cannot run side by side."""

    summary = "an LSTM on the same text: what GPT is measured against"
    # In float32, as torch's LSTM is slower in bfloat16; these steps take the time of GPT's.
    recipe = dataclasses.replace(GPTSystem.recipe, steps=400, interval=100, bfloat16=False)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.set_defaults(width=432, layers=2)

    def model(self) -> Model:
        a = self.args
        return LSTM(LSTMConfig(len(self.tokenizers["text"]), a.width, a.layers, a.dropout))

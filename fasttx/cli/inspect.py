"""`python -m fasttx inspect`: one word in different sentences by a BERT, layer by layer, and where attention looks."""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttx import datasets
from fasttx.cli import CommandError, _trained, console, need
from fasttx.models import Bert, BertForPretraining
from fasttx.text import Tokenizer

_SENTENCES = (
    "she sat on the bank of the river and watched the water",
    "the bank of the stream was covered with grass",
    "he put all his money into the bank",
    "the bank refused to lend them any money",
    "a plane has to bank before it turns",
    "you can bank on her to keep a promise",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the word, the sentences, and where to put the plots."""
    folder = "folder of `train bert`, or of a BERT as Hugging Face saves it; MiniLM unless given"
    parser.add_argument("--model", type=Path, help=folder)
    parser.add_argument("--word", default="bank", help="whose hidden states are compared")
    parser.add_argument("--sentences", nargs="+", default=_SENTENCES, help="each has the word in it")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the plots")


def run(args: argparse.Namespace) -> int:
    """Prints the similarities and draws them, and the attention of the first sentence."""
    screen = console()
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    if len(args.sentences) < 2:
        raise CommandError("--sentences: there is nothing to compare in fewer than two")
    try:
        folder = args.model or datasets.minilm()
        model, tokenizer = _load(folder)
        batch = tokenizer.batch(list(args.sentences), cls=True)
        if batch.token_ids.max() >= model.config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: it is "
                "another model's"
            )
        places = [_find(tokenizer, args.word, sentence) for sentence in args.sentences]
        with torch.inference_mode():
            states = model.hidden_states(batch.token_ids, padding=batch.padding)
            first = int((~batch.padding[0]).sum())
            maps = model.attention_maps(batch.token_ids[:1, :first])
        args.output.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        raise CommandError(error) from error

    means = []
    for layer, hidden in enumerate(states):
        cosines = similarities(torch.stack([hidden[i, place].mean(0) for i, place in enumerate(places)]))
        means.append(cosines)
        name = f"layer {layer}" if layer else "embedding"
        screen.print(f"{name:>9}: cosine of {args.word!r} in different sentences {cosines.mean():.3f}")
    tokens = [tokenizer.token(i) for i in batch.token_ids[0, :first].tolist()]
    for path in (_plot_words(pyplot, args, means), _plot_attention(pyplot, args, maps, tokens)):
        screen.print(f"Plot: {path}", soft_wrap=True)
    return 0


def similarities(vectors: Tensor) -> Tensor:
    """The cosine of each two of the vectors (N, width): (N * (N - 1) / 2,)."""
    directions = F.normalize(vectors, dim=-1)
    rows, columns = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return (directions @ directions.T)[rows, columns]


def _load(folder: Path) -> tuple[Bert, Tokenizer]:
    if (folder / "config.json").exists():
        return Bert.from_pretrained(folder).eval(), Tokenizer.load(folder / "tokenizer.json")
    model, (tokenizer,) = _trained.load(BertForPretraining, folder, "text", system="bert")
    return model.bert, tokenizer


def _find(tokenizer: Tokenizer, word: str, sentence: str) -> slice:
    """Where the word's tokens stand behind the sentence's [CLS], for the first time: as a word, in any case."""
    if not word.strip():
        raise ValueError("--word is empty")
    tokens = tokenizer.encode(sentence)
    for match in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", sentence, re.IGNORECASE):
        # A space before a word is part of its first token, where it is one's at all.
        before = tokenizer.encode(sentence[: match.start()].rstrip())
        through = tokenizer.encode(sentence[: match.end()])
        if before == tokens[: len(before)] and through == tokens[: len(through)] and len(before) < len(through):
            return slice(1 + len(before), 1 + len(through))
    raise ValueError(f"--word {word!r} is not in every sentence")


def _plot_words(pyplot, args: argparse.Namespace, cosines: list[Tensor]) -> Path:
    """The similarity of each two sentences' word by layer, and their mean."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(torch.stack(cosines).tolist(), color="#9cc3e0", linewidth=1)
    axes.plot([c.mean().item() for c in cosines], "o-", color="#1f6fb4", label="mean of all pairs")
    axes.set(xlabel="layer (0: the embedding)", ylabel="cosine", title=f"{args.word!r} in different sentences")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _saved(pyplot, figure, args.output / "inspect_word.png")


def _plot_attention(pyplot, args: argparse.Namespace, maps: list[Tensor], tokens: list[str]) -> Path:
    """A row of panels for each layer, one panel for each head: queries down, keys across."""
    heads = maps[0].shape[1]
    figure, panels = pyplot.subplots(len(maps), heads, figsize=(1.3 * heads, 1.4 * len(maps)), squeeze=False)
    for layer, (row, attention) in enumerate(zip(panels, maps, strict=True)):
        for head, axes in enumerate(row):
            axes.imshow(attention[0, head].tolist(), cmap="Blues", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"layer {layer + 1}", fontsize=8)
    panels[0][0].set_yticks(range(len(tokens)), tokens, fontsize=4)
    for head, axes in enumerate(panels[0]):
        axes.set_title(f"head {head + 1}", fontsize=8)
    return _saved(pyplot, figure, args.output / "inspect_attention.png")


def _saved(pyplot, figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path

"""`python -m fasttx translate`: French for English, by a model that `train translation` made."""

import argparse
import sys

from fasttx.cli import CommandError, _trained
from fasttx.models import EncoderDecoder
from fasttx.systems.translation import translate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the texts: as arguments, or by lines on standard input."""
    _trained.add_arguments(parser, "translation")
    parser.add_argument("texts", nargs="*", help="English texts; by default the lines of standard input")
    parser.add_argument("--beams", type=int, default=4, help="1 takes the likeliest token each time")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each text."""
    model, (source, target) = _trained.load(
        EncoderDecoder, args.model, "source", "target", system="translation", device=args.device
    )
    try:
        texts = [text.strip() for text in args.texts] or [line.strip() for line in sys.stdin if line.strip()]
        if not texts:
            raise ValueError("there is no text to translate: give it as an argument, or by lines on standard input")
        print("\n".join(translate(model, source, target, texts, beams=args.beams)))
    except ValueError as error:
        raise CommandError(error) from error
    return 0

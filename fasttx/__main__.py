"""The command line: python -m fasttx {demo, train, generate, ...}, or `fasttx` where it is installed."""

import argparse
import sys
from collections.abc import Sequence

from fasttx import __version__
from fasttx.cli import CommandError, compare, demo, doctor, generate, inspect, train, translate

_COMMANDS = {
    "demo": (demo, "a real BERT on real sentences: PyTorch against fasttx, timed and checked"),
    "compare": (compare, "every kernel's error against float64, beside eager PyTorch's own"),
    "doctor": (doctor, "what this installation and this machine have, and why what lacks lacks"),
    "train": (train, "a whole system on real data: its loss, its measures, a checkpoint that continues exactly"),
    "generate": (generate, "goes on with a text, by a GPT that `train gpt` made"),
    "translate": (translate, "French for English, by a model that `train translation` made"),
    "inspect": (inspect, "one word in different sentences, layer by layer, and where attention looks, as plots"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if all is well, 1 if it found something wrong, 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="python -m fasttx", description=__doc__.split(":")[0])
    parser.add_argument("--version", action="version", version=f"fasttx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
    args = parser.parse_args(arguments)
    try:
        return _COMMANDS[args.command][0].run(args)
    except CommandError as error:
        print(f"fasttx {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

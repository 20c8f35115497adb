"""`python -m fasttx generate`: goes on with a text, by a GPT that `train gpt` made."""

import argparse

import torch

from fasttx import data
from fasttx.cli import CommandError, _trained
from fasttx.models import GPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the texts to go on with, and how to choose."""
    _trained.add_folder(parser, "gpt")
    parser.add_argument("prompts", nargs="*", default=["ROMEO."], help="texts to go on with")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, help="choose among so many")
    parser.add_argument("--top-p", type=float, default=0.95, help="choose among the likeliest with this much chance")
    parser.add_argument("--seed", type=int, default=0, help="of the choices")


def run(args: argparse.Namespace) -> int:
    """Prints each prompt with what follows."""
    model, (tokenizer,) = _trained.load(GPT, args.model, "text")
    try:
        prompts = [tokenizer.encode(text) for text in args.prompts]
        if not all(prompts):
            raise ValueError("one of the prompts is empty: there is nothing to go on with")
        ids, padding = data.pad(prompts, tokenizer.pad_id, side="left")
        written = model.generate(
            ids, padding=padding, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
            top_p=args.top_p, pad_id=tokenizer.pad_id, generator=torch.Generator().manual_seed(args.seed),
        )  # fmt: skip
    except ValueError as error:
        raise CommandError(error) from error
    for row in written.tolist():
        print(tokenizer.decode(row), end="\n\n")
    return 0

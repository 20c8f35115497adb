"""`python -m fasttx generate`: goes on with a text, by a GPT that `train gpt` made."""

import argparse

import torch

from fasttx import data
from fasttx.cli import CommandError, _trained
from fasttx.models import GPT
from fasttx.text import Tokenizer
from fasttx.train import moved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the texts to go on with, how to choose, and where to end."""
    _trained.add_arguments(parser, "gpt")
    parser.add_argument("prompts", nargs="*", default=["ROMEO."], help="texts to go on with")
    parser.add_argument("--max-new-tokens", type=int, help="at most; 100 unless given, where the model has the room")
    parser.add_argument("--stop", action="append", default=[], help="text of a token that ends; may be repeated")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, help="choose among so many")
    parser.add_argument("--top-p", type=float, default=0.95, help="choose among the likeliest with this much chance")
    parser.add_argument("--seed", type=int, default=0, help="of the choices")


def run(args: argparse.Namespace) -> int:
    """Prints each prompt with what follows."""
    model, (tokenizer,) = _trained.load(GPT, args.model, "text", system="gpt", device=args.device)
    try:
        prompts = [tokenizer.encode(text) for text in args.prompts]
        if not all(prompts):
            raise ValueError("one of the prompts is empty: there is nothing to go on with")
        ids, padding = data.pad(prompts, tokenizer.pad_id, side="left")
        room = max(1, model.config.max_positions - ids.shape[1] + 1)  # the last new token needs no position
        written = model.generate(
            **moved(model, {"prompts": ids, "padding": padding}), pad_id=tokenizer.pad_id,
            max_new_tokens=min(100, room) if args.max_new_tokens is None else args.max_new_tokens,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            stop=[_token(tokenizer, text) for text in args.stop], generator=_generator(args),
        )  # fmt: skip
    except ValueError as error:
        raise CommandError(error) from error
    for row in written.tolist():
        print(tokenizer.decode(row), end="\n\n")
    return 0


def _token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ValueError(f"--stop {text!r} is {len(ids)} tokens, and has to be one")
    return ids[0]


def _generator(args: argparse.Namespace) -> torch.Generator:
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {args.seed}")
    return torch.Generator(args.device).manual_seed(args.seed)

"""`python -m benchmarks.rounding`: what roundings alone make of a training run.

Trains GPT as `python -m fasttx train gpt` does, from weights changed by one part in a million: how far its end lies
from that run's is how far two right implementations may differ.
"""

import argparse
from pathlib import Path

import torch

from fasttx.cli import train as command
from fasttx.systems import SYSTEMS
from fasttx.train import Run, measures, train


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of the changes, a run each")
    parser.add_argument("--steps", type=int, help="taken of the run; all unless given")
    parser.add_argument("--threads", type=int, help="threads; PyTorch's default otherwise")
    parser.add_argument("--output", type=Path, default=Path("results/rounding"), help="folder; runs in it go on")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    usual = argparse.ArgumentParser()
    command.add_arguments(usual)
    system = SYSTEMS["gpt"](usual.parse_args(["gpt"]))
    for seed in given.seeds:
        torch.manual_seed(system.recipe.seed)
        model = system.model()
        model.bind(**system.tokenizers)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
        folder = given.output / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(model, system, system.recipe, folder, settings={"changes": seed})
        for _, row in train(run):
            if measures(row):
                print(f"changes {seed}, step {run.steps}: loss {row['loss']:.4f}, {measures(row)}", flush=True)
            if run.steps == given.steps:
                print(f"changes {seed}, step {run.steps}: loss {row['loss']!r}", flush=True)
                break


if __name__ == "__main__":
    main()

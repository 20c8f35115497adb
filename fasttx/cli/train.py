"""`python -m fasttx train <system>`: a model trained on real data, and beside it the same on the reference path."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

import fasttx
from fasttx.cli import CommandError, console, need
from fasttx.dispatch import BACKENDS, UnsupportedError
from fasttx.finetune import trainable
from fasttx.measure import Measurement
from fasttx.systems import SYSTEMS, System
from fasttx.systems._torch import TorchRun
from fasttx.train import CheckpointError, Recipe, Run, measures, train

# Without fasttx's kernels: its reference path, and torch.nn's own modules.
_PLAIN = {"reference": Run, "torch": TorchRun}
# Arguments that do not change what is trained, or that the recipe and the run have already.
_NO_SETTINGS = {"command", "system", "data", "output", "threads", "backend", "beside", "float32"}
_CHANGES = {"steps": int, "learning_rate": float, "accumulate": int, "interval": int, "seed": int}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each system, with what all have in common and its own."""
    systems = parser.add_subparsers(dest="system", required=True, metavar="system")
    for name, system in SYSTEMS.items():
        one = systems.add_parser(
            name, help=system.summary, description=system.summary + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        one.add_argument("--data", type=Path, default=Path("data"), help="folder that `make data` fills")
        one.add_argument("--output", type=Path, default=Path("results") / name, help="folder; a run in it goes on")
        for option, kind in _CHANGES.items():
            flag = "--" + option.replace("_", "-")
            one.add_argument(flag, type=kind, default=getattr(system.recipe, option), help="of the recipe")
        one.add_argument("--float32", action="store_true", help="train without torch.autocast to bfloat16")
        one.add_argument("--threads", type=int, help="PyTorch's own choice unless given")
        one.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="whose kernels run")
        others = (*_PLAIN, *system.variants)
        one.add_argument("--beside", choices=others, nargs="+", default=[], help="what to train with it, step by step")
        system.add_arguments(one)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints what was reached."""
    screen = console()
    say = functools.partial(screen.print, markup=False, soft_wrap=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    if getattr(args, "batch", 1) < 1:
        raise CommandError(f"--batch must be at least 1, got {args.batch}")
    try:
        recipe = SYSTEMS[args.system].recipe
        changes = {name: getattr(args, name) for name in _CHANGES}
        recipe = dataclasses.replace(recipe, bfloat16=recipe.bfloat16 and not args.float32, **changes)
        system = SYSTEMS[args.system](args)
        system.batch(0)  # refuses sizes that do not fit the data
        settings = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in vars(args).items() if name not in {*_NO_SETTINGS, *_CHANGES}
        }  # fmt: skip
        runs = {args.system: _run(system, recipe, args.output, args.backend, settings)}
        for name in args.beside:
            folder, its_own = args.output / name, settings | {"beside": name}
            if name in _PLAIN:
                runs[name] = _run(system, recipe, folder, "reference", its_own, _PLAIN[name])
            else:
                runs[name] = _run(system.variant(name), recipe, folder, args.backend, its_own)
    except (CheckpointError, FileNotFoundError, ImportError, ValueError) as error:
        raise CommandError(error) from error
    for name, one in runs.items():
        goes_on = f", from step {one.steps}" if one.steps else ""
        say(f"{name}: {type(one.model).__name__} in {one.folder}{goes_on}; {trainable(one.model)}")

    try:
        _train(screen, runs)
    except (FloatingPointError, UnsupportedError) as error:
        raise CommandError(error) from error
    plot = _plot(runs, args.output / "loss.png")
    for name, one in runs.items():
        speed = sum(row["size"] for row in one.rows) / one.seconds
        took = f"{one.steps} steps in {one.seconds:.0f} s, {speed:,.0f} a second"
        say(f"{name}: {_words(one.evaluate())}; {took}")
    for name in _PLAIN.keys() & runs.keys():
        say(_comparison(runs[args.system], runs[name], name))
    for line in system.report(runs[args.system].model.eval()):
        say(line)
    say(f"Plot: {plot}")
    return 0


def _run(
    system: System, recipe: Recipe, folder: Path, backend: str, settings: dict[str, Any], kind: type[Run] = Run
) -> Run:
    """A run of a model that is the same for every backend."""
    torch.manual_seed(recipe.seed)
    model = system.model()
    model.bind(**system.tokenizers)
    # Refuses another run's folder before it is written to.
    made = kind(model, system, recipe, folder, backend=backend, settings=settings)
    for name, tokenizer in system.tokenizers.items():
        tokenizer.save(folder / f"{name}.json")
    return made


def _train(screen, runs: dict[str, Run]) -> None:
    """With a bar on a terminal, and a line at every evaluation."""
    progress = need("rich.progress")
    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:,.0f} a second"),
        progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=screen) as bar:
        names = {id(run): name for name, run in runs.items()}
        tasks = {
            name: bar.add_task(name, total=run.recipe.steps, completed=run.steps, loss=float("nan"), speed=0.0)
            for name, run in runs.items()
        }
        for one, row in train(*runs.values()):
            name = names[id(one)]
            bar.update(tasks[name], completed=one.steps, loss=row["loss"], speed=row["size"] / row["seconds"])
            if measures(row):
                reached = f"loss {row['loss']:.4f}, {_words(measures(row))}"
                bar.print(f"{name}: step {one.steps}, {reached}, {one.seconds:.0f} s")


def _words(measured: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items())


def _comparison(fast: Run, other: Run, name: str) -> str:
    """How much faster, and how far apart the losses are."""
    seconds = {which: [row["seconds"] for row in run.rows] for which, run in (("fasttx", fast), (name, other))}
    times = Measurement({which: torch.tensor(values, dtype=torch.float64) for which, values in seconds.items()})
    losses = torch.tensor([[row["loss"] for row in run.rows] for run in (fast, other)])
    last = losses[:, -max(1, losses.shape[1] // 10) :].mean(1)
    return (
        f"fasttx took its steps at {times.ratio(name, 'fasttx'):.2f} times the speed of {name} (medians); mean loss of "
        f"the last tenth: {last[0]:.4f} and {last[1]:.4f}"
    )


def _plot(runs: dict[str, Run], path: Path) -> Path:
    """The losses by step, and the measures."""
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, one in runs.items():
        width = max(1, len(one.rows) // 100)
        losses = torch.tensor([row["loss"] for row in one.rows]).unfold(0, width, 1).mean(1)
        left.plot(range(width, width + len(losses)), losses.tolist(), label=name)
        kept = [row for row in one.rows if measures(row)]
        for key in measures(kept[-1]):
            right.plot([row["step"] for row in kept], [row[key] for row in kept], "o-", label=f"{name}: {key}")
    left.set(xlabel="step", ylabel=f"training loss, mean of {width} steps")
    right.set(xlabel="step", title="held out")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.01, f"fasttx {fasttx.__version__}, torch {torch.__version__}", fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path

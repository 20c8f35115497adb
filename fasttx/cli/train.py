"""`python -m fasttx train <system>`: a model trained on real data.

And beside it, step by step in turn, what it is measured against: `--beside reference`, the same without fasttx's
kernels; `--beside torch`, the same on torch.nn's own modules; or one of the system's variants, with less in it.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

import fasttx
from fasttx.cli import CommandError, add_device, console, need, require_device
from fasttx.dispatch import BACKENDS, UnsupportedError, backend, requested_backend
from fasttx.finetune import trainable
from fasttx.measure import Measurement
from fasttx.systems import SYSTEMS, System
from fasttx.systems._torch import TorchRun
from fasttx.train import Recipe, Run, measures, train

# Without fasttx's kernels: its reference path, and torch.nn's own modules.
_PLAIN = {"reference": Run, "torch": TorchRun}
# Arguments that do not change what is trained, or that the recipe and the run have already.
_RECIPE = [field.name for field in dataclasses.fields(Recipe)]
_NO_SETTINGS = {"command", "system", "data", "output", "threads", "backend", "beside", "beams", *_RECIPE}
_PACKAGES = ("safetensors", "rich.progress", "matplotlib.pyplot")


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
        for option in _RECIPE:
            default, flag = getattr(system.recipe, option), "--" + option.replace("_", "-")
            switch = isinstance(default, bool)
            kind = {"action": argparse.BooleanOptionalAction} if switch else {"type": type(default)}
            one.add_argument(flag, **kind, default=default, help="of the recipe")
        one.set_defaults(warmup=None)  # the recipe's share of the steps: see _recipe
        one.add_argument(
            "--float32", dest="bfloat16", action="store_false", default=argparse.SUPPRESS, help="as --no-bfloat16"
        )
        one.add_argument("--threads", type=int, help="PyTorch's own choice unless given")
        add_device(one)
        names = ("auto", *BACKENDS)
        one.add_argument("--backend", choices=names, default=requested_backend(), help="whose kernels run")
        others = (*_PLAIN, *system.variants)
        one.add_argument("--beside", choices=others, nargs="+", default=[], help="what to train with it, step by step")
        system.add_arguments(one)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints what was reached."""
    screen = console("train")
    say = functools.partial(screen.print, markup=False, soft_wrap=True)
    for package in (*_PACKAGES, *SYSTEMS[args.system].packages):
        need(package, extra="train")
    device = require_device(args.device)
    for name in ("batch", "threads"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise CommandError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        recipe = _recipe(args)
        system = SYSTEMS[args.system](args)
        system.batch(0)  # refuses sizes that do not fit the data
        settings = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in vars(args).items() if name not in _NO_SETTINGS
        } | {"data": system.data}  # fmt: skip
        made = functools.partial(_run, recipe=recipe, device=device)
        runs = {args.system: made(system, args.output, args.backend, settings)}
        for name in args.beside:
            folder, its_own = args.output / name, settings | {"beside": name}
            if name in _PLAIN:
                runs[name] = made(system, folder, "reference", its_own, kind=_PLAIN[name])
                _require_in_turn(runs[args.system], runs[name], name)
            else:
                runs[name] = made(system.variant(name), folder, args.backend, its_own)
        # Only now, as another run's folder has to stay as it was.
        for folder in (one.folder for one in runs.values()):
            folder.mkdir(parents=True, exist_ok=True)
            for name, tokenizer in system.tokenizers.items():
                tokenizer.save(folder / f"{name}.json")
    except (ImportError, OSError, ValueError) as error:
        raise CommandError(error) from error
    say(f"{args.system}: {system.data}")
    for name, one in runs.items():
        goes_on = f", from step {one.steps}" if one.steps else ""
        say(f"{name}: {type(one.model).__name__} in {one.folder}{goes_on}; {trainable(one.model)}")

    try:
        _train(screen, runs, system.unit)
        plot = _plot(runs, args.output / "loss.png")
        for name, one in runs.items():
            speed = sum(row["size"] for row in one.rows) / one.seconds
            took = f"{one.steps} steps in {one.seconds:.0f} s, {speed:,.0f} {system.unit} a second"
            say(f"{name}: {_words(measures(one.rows[-1]))}; {took}")
        for name in _PLAIN.keys() & runs.keys():
            say(_comparison(runs[args.system], runs[name], name))
        with backend(args.backend):
            for line in system.report(runs[args.system].model.eval()):
                say(line)
    except (FloatingPointError, ImportError, OSError, UnsupportedError, ValueError) as error:
        kept = f" (what was trained before is in {args.output})" if (args.output / "checkpoint.pt").exists() else ""
        raise CommandError(f"{error}{kept}") from error
    say(f"Plot: {plot}")
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    """The system's with what was asked for; the warm-up of fewer steps is as large a share of them."""
    usual, warmup = SYSTEMS[args.system].recipe, args.warmup
    if warmup is None:
        warmup = min(usual.warmup, usual.warmup * args.steps // usual.steps)
    elif warmup > args.steps:
        raise ValueError(f"--warmup {warmup} of --steps {args.steps}: the learning rate would never be reached")
    return Recipe(**{name: getattr(args, name) for name in _RECIPE} | {"warmup": warmup})


def _run(
    system: System, folder: Path, backend: str, settings: dict[str, Any], *, recipe: Recipe, device: torch.device,
    kind: type[Run] = Run,
) -> Run:  # fmt: skip
    """A run of a model that is the same for every backend."""
    torch.manual_seed(recipe.seed)
    model = system.model().to(device)
    model.bind(**system.tokenizers)
    return kind(model, system, recipe, folder, backend=backend, settings=settings)


def _require_in_turn(fast: Run, other: Run, name: str) -> None:
    """Raises ValueError unless they are as far as each other, or as a run that was killed leaves them."""
    apart = abs(fast.steps - other.steps)
    if apart > fast.recipe.interval or (apart and fast.done and not other.steps):
        raise ValueError(
            f"{fast.folder} is at step {fast.steps} and {name} beside it at step {other.steps}: steps that were not "
            "taken in turn cannot be compared, choose another --output"
        )


def _train(screen, runs: dict[str, Run], unit: str) -> None:
    """With a bar on a terminal, and a line at every evaluation."""
    progress = need("rich.progress", extra="train")
    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:,.0f} " + unit + " a second"),
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
    need("matplotlib", extra="train").use("Agg")
    pyplot = need("matplotlib.pyplot", extra="train")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, one in runs.items():
        width = max(1, len(one.rows) // 100)
        losses = torch.tensor([row["loss"] for row in one.rows]).unfold(0, width, 1).mean(1)
        left.plot(range(width, width + len(losses)), losses.tolist(), label=f"{name}: mean of {width} steps")
        kept = [row for row in one.rows if measures(row)]
        for key in measures(kept[-1]):
            right.plot([row["step"] for row in kept], [row[key] for row in kept], "o-", label=f"{name}: {key}")
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", title="held out")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.01, f"fasttx {fasttx.__version__}, torch {torch.__version__}", fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path

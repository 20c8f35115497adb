"""`python -m fasttx demo`: a real BERT on real sentences, PyTorch against fasttx."""

import argparse
import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttx
from fasttx import datasets, measure
from fasttx.cli import CommandError, console, machine, need
from fasttx.cli.sentences import PAIRS, SENTENCES
from fasttx.measure import Interval, Measurement, Verdict

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The baseline, what is measured against it, and that without its handling of padding.
EAGER, FAST, PADDED = "PyTorch", "fasttx", "fasttx, padded"


@dataclass(frozen=True)
class Result:
    """One batch size: how many of its tokens are valid, the times, and the embeddings' errors."""

    batch: int
    valid: int
    padded: int
    times: Measurement
    verdict: Verdict

    def tokens_per_second(self, name: str) -> Interval:
        """Valid tokens a second."""
        return self.times.median(name).inverse(self.valid)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The batches, how long and how to measure, and where to put the plot."""
    parser.add_argument("--batches", type=_positive, nargs="+", default=[1, 8, 32], help="sentences at a time")
    parser.add_argument("--seconds", type=float, default=12.0, help="measured, per batch size")
    parser.add_argument("--threads", type=_positive, help="PyTorch's own choice unless given")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the plot")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 1 where fasttx's error exceeds its budget."""
    screen = console()
    pyplot = _pyplot()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = _DTYPES[args.dtype]
    tokenizer, models, truth = _load(dtype)

    for line in machine.summary():
        screen.print(line, markup=False)
    screen.print(
        f"all-MiniLM-L6-v2 in {args.dtype}: {sum(p.numel() for p in truth.parameters()) / 1e6:.1f} "
        "million weights; each sentence's embedding is the mean over its tokens, of length 1"
    )
    screen.print(_similarities(tokenizer, models))

    results = []
    for batch in dict.fromkeys(args.batches):
        with screen.status(f"batch {batch}"):
            results.append(_measure(batch, tokenizer, models, truth, args.seconds))
    screen.print(_table(results))
    for line in _conclusions(results):
        screen.print(line)
    path = _plot(pyplot, results, args.dtype, args.output)
    screen.print(f"Plot: {path}", soft_wrap=True)
    return 0 if all(result.verdict.passed for result in results) else 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _pyplot():
    need("matplotlib").use("Agg")
    return need("matplotlib.pyplot")


def _load(dtype: torch.dtype):
    """The tokenizer, the model in its three variants, and the float64 model of the same weights."""
    # Everything is in the installed packages: nothing is looked up elsewhere.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = need("transformers")
    try:
        folder = datasets.minilm()
    except FileNotFoundError as error:
        raise CommandError(error) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, dtype=dtype).eval()
    models = {
        EAGER: model,
        FAST: fasttx.optimize(copy.deepcopy(model)),
        PADDED: fasttx.optimize(copy.deepcopy(model), padding="keep"),
    }
    return tokenizer, models, copy.deepcopy(model).double()


def _tokens(tokenizer, sentences: list[str] | tuple[str, ...]) -> dict[str, Tensor]:
    return dict(tokenizer(list(sentences), padding=True, return_tensors="pt"))


@torch.inference_mode()
def embed(model: torch.nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """The embeddings (sentences, width): means over valid tokens, scaled to length 1.

    They are averaged in float32 at least, and rounded once, to the model's dtype.
    """
    hidden = model(**tokens).last_hidden_state
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    # The mean's divisor is left to the scaling.
    total = (wide * tokens["attention_mask"].unsqueeze(-1)).sum(1)
    return F.normalize(total, dim=-1).to(hidden.dtype)


def _measure(batch: int, tokenizer, models, truth, seconds: float) -> Result:
    sentences = [SENTENCES[i % len(SENTENCES)] for i in range(batch)]
    tokens = _tokens(tokenizer, sentences)
    verdict = measure.judge(embed(models[FAST], tokens), embed(models[EAGER], tokens), embed(truth, tokens))
    times = measure.interleave(
        {name: lambda model=model: embed(model, tokens) for name, model in models.items()},
        seconds=seconds,
    )
    mask = tokens["attention_mask"]
    return Result(batch, int(mask.sum()), mask.numel(), times, verdict)


def _similarities(tokenizer, models):
    tokens = _tokens(tokenizer, [sentence for pair in PAIRS for sentence in pair])
    table = need("rich.table").Table(title="How similar are they?", title_justify="left")
    table.add_column("sentences")
    table.add_column(EAGER, justify="right")
    table.add_column(FAST, justify="right")
    cosines = []
    for name in (EAGER, FAST):
        first, second = embed(models[name], tokens).float().view(len(PAIRS), 2, -1).unbind(1)
        cosines.append((first * second).sum(-1).tolist())
    for (one, other), eager, fast in zip(PAIRS, *cosines, strict=True):
        table.add_row(f"{one} / {other}", f"{eager:.3f}", f"{fast:.3f}")
    return table


def _table(results: list[Result]):
    table = need("rich.table").Table(
        title="Interleaved medians and their 95 % intervals",
        title_justify="left",
        caption="speed: times PyTorch's. error: the embeddings' largest, against float64",
        caption_justify="left",
    )
    table.add_column("batch", justify="right")
    table.add_column("variant", no_wrap=True)
    for name in ("ms", "tokens/s", "speed", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        errors = {EAGER: result.verdict.eager_error, FAST: result.verdict.error}
        for name in result.times.samples:
            speed = result.tokens_per_second(name)
            table.add_row(
                str(result.batch) if name == EAGER else "",
                name,
                f"{result.times.median(name).scaled(1e3):.2f}",
                f"{speed.value:,.0f}",
                "" if name == EAGER else f"{result.times.ratio(EAGER, name):.2f}",
                f"{errors[name]:.2e}" if name in errors else "",
            )
        table.add_section()
    return table


def _conclusions(results: list[Result]) -> list[str]:
    lines = []
    for result in results:
        whole = result.times.ratio(EAGER, FAST)
        kernels = result.times.ratio(EAGER, PADDED)
        padding = result.times.ratio(PADDED, FAST)
        lines.append(
            f"Batch {result.batch}, {result.valid} of {result.padded} tokens valid "
            f"({result.valid / result.padded:.0%}): {whole:.2f} times PyTorch's speed = "
            f"{kernels.value:.2f} by the kernels x {padding.value:.2f} by not computing padding "
            f"({result.times.rounds} rounds)."
        )
    failed = [result for result in results if not result.verdict.passed]
    for result in failed:
        lines.append(f"[bold red]FAIL[/] at batch {result.batch}: {result.verdict}")
    if not failed:
        lines.append("fasttx's error is within twice PyTorch's and one ulp: [green]pass[/]")
    return lines


def _plot(pyplot, results: list[Result], dtype: str, folder: Path) -> Path:
    """Bars of tokens per second, and of errors, for each batch size."""
    figure, (speed, error) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    colours = {EAGER: "#8c8c8c", FAST: "#1f6fb4", PADDED: "#9cc3e0"}
    places = torch.arange(len(results)).double()
    for index, name in enumerate(colours):
        rates = [result.tokens_per_second(name) for result in results]
        values = [rate.value for rate in rates]
        below = [rate.value - rate.low for rate in rates]
        above = [rate.high - rate.value for rate in rates]
        x = (places + (index - 1) * 0.27).tolist()
        speed.bar(x, values, 0.26, yerr=(below, above), color=colours[name], label=name, capsize=2)
        if name == FAST:
            for place, rate, result in zip(x, rates, results, strict=True):
                text = f"{result.times.ratio(EAGER, FAST).value:.2f}x"
                above = (place, rate.high)
                speed.annotate(text, above, (0, 4), textcoords="offset points", ha="center")
    speed.set(ylabel="valid tokens per second", title=f"MiniLM, {dtype}")
    speed.legend(frameon=False)

    for offset, name, values in (
        (-0.2, EAGER, [result.verdict.eager_error for result in results]),
        (0.2, FAST, [result.verdict.error for result in results]),
    ):
        error.bar((places + offset).tolist(), values, 0.38, color=colours[name], label=name)
    budgets = [result.verdict.budget for result in results]
    error.plot(places.tolist(), budgets, "k_", markersize=40, label="allowed")
    error.set(ylabel="largest error against float64", title="Embeddings")
    error.margins(y=0.25)
    error.legend(frameon=False, markerscale=0.3)
    for axes in (speed, error):
        axes.set_xticks(places.tolist(), [f"batch {result.batch}" for result in results])
        axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.01, "\n".join(machine.summary()), fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.06, 1, 1))

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"demo_{dtype}.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path

"""The results of a run, as JSON for programs and as Markdown for people."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fasttx.measure import Interval, Measurement

from .cases import Case
from .limits import Limits

Row = dict[str, object]


def row(
    case: Case, measured: Measurement, errors: Mapping[str, float], left_out: Mapping[str, str], limits: Limits
) -> Row:
    """One case: for each variant its median and interval in seconds, rates, share of the device's limit and error."""
    variants = {}
    for name in measured.samples:
        median = measured.median(name)
        variants[name] = {
            "seconds": _interval(median),
            "tflops": case.flops / median.value / 1e12,
            "gigabytes_per_second": case.bytes / median.value / 1e9,
            "share_of_copy": case.bytes / median.value / limits.copy,
            "share_of_product": case.flops / median.value / limits.matmul[case.dtype],
            "share_of_limit": limits.least_seconds(case.flops, case.bytes, case.dtype) / median.value,
            "error_of_eager": errors.get(name),
        }
    rivals = (name for name in variants if not name.startswith("fasttx"))
    best = min(rivals, key=lambda name: measured.median(name).value)
    return {
        "case": case.name,
        "flops": case.flops,
        "bytes": case.bytes,
        "rounds": measured.rounds,
        "variants": variants,
        "best_rival": best,
        "speed_against_eager": _interval(measured.ratio("eager", "fasttx")),
        "speed_against_best": _interval(measured.ratio(best, "fasttx")),
        "left_out": dict(left_out),
    }


def _interval(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]


def write(
    folder: Path,
    environment: Mapping[str, object],
    limits: Limits,
    rows: Sequence[Row],
    failed: Mapping[str, str] | None = None,
) -> None:
    """results.json and results.md in the folder: losses are printed like wins, and what failed with the reason."""
    failed = failed or {}
    rates = {str(dtype): rate for dtype, rate in limits.matmul.items()}
    content = {
        "environment": dict(environment),
        "copy_bytes_per_second": limits.copy,
        "matmul_flops_per_second": rates,
        "rows": list(rows),
        "failed": dict(failed),
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1))
    (folder / "results.md").write_text(_markdown(environment, limits, rows, failed))


def _markdown(
    environment: Mapping[str, object], limits: Limits, rows: Sequence[Row], failed: Mapping[str, str]
) -> str:
    lines = ["# GPU results", ""]
    lines += [f"- {name}: {value}" for name, value in environment.items()]
    lines += [f"- copy: {limits.copy / 1e9:.0f} GB/s"]
    lines += [f"- product of {dtype}: {rate / 1e12:.1f} TFLOP/s" for dtype, rate in limits.matmul.items()]
    lines += [
        "",
        "Medians with their 95 % interval. Shares are of the copy's bandwidth and of the product's rate in that dtype.",
        "",
        "| case | fasttx, us | TFLOP/s | of the product | GB/s | of the copy | against eager | against the best "
        "| which is | error | on each backend, us |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        ours = entry["variants"]["fasttx"]
        backends = (
            f"{name.removeprefix('fasttx on ')} {values['seconds'][0] * 1e6:.1f}"
            for name, values in entry["variants"].items()
            if name.startswith("fasttx on")
        )
        cells = [
            entry["case"], _text(ours["seconds"], 1e6, ".1f"), f"{ours['tflops']:.1f}",
            f"{ours['share_of_product']:.0%}", f"{ours['gigabytes_per_second']:.0f}", f"{ours['share_of_copy']:.0%}",
            _text(entry["speed_against_eager"], 1, ".2f"), _text(entry["speed_against_best"], 1, ".2f"),
            entry["best_rival"], f"{ours['error_of_eager']:.2f}", ", ".join(backends) or "-",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if rows:
        gains = [entry["speed_against_best"][0] for entry in rows]
        lines += [
            "",
            f"Median against the best rival of each case: {statistics.median(gains):.2f}x, least {min(gains):.2f}x.",
        ]
    reasons = sorted({f"{name}: {why}" for entry in rows for name, why in entry["left_out"].items()})
    lines += ["", "Left out:", *[f"- {reason}" for reason in reasons]] if reasons else []
    lines += ["", "Failed:", *[f"- {name}: {why}" for name, why in failed.items()]] if failed else []
    return "\n".join(lines) + "\n"


def _text(interval: list[float], factor: float, spec: str) -> str:
    value, low, high = (x * factor for x in interval)
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def environment(device: str) -> dict[str, object]:
    """What the figures hold for."""
    import platform

    found = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found

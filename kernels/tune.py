"""Tuning: which of a table's configurations is the fastest on this GPU, found once for each problem and kept in a file.

With FASTTX_TUNE=1 a kernel that meets a problem for the first time tries all that the table has for it, which takes
their compilation and some milliseconds each. What was found before is read and used without it. The file is
FASTTX_TUNING, or ~/.cache/fasttx/tuning.json; it holds the results of every GPU that it saw.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from . import configs
from .configs import Config

_SECONDS = 0.02  # that each configuration is timed for
_LEAST_CALLS = 5
_VERSION = 2


def wanted() -> bool:
    """Whether kernels are to be tuned as they are met."""
    return os.environ.get("FASTTX_TUNE") == "1"


def path() -> Path:
    """Where results are kept."""
    named = os.environ.get("FASTTX_TUNING")
    return Path(named) if named else Path.home() / ".cache" / "fasttx" / "tuning.json"


def device_name() -> str:
    """The GPU that results hold for."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def fastest(
    candidates: Sequence[Config], run: Callable[[Config], None], synchronize: Callable[[], object]
) -> tuple[Config, dict[Config, float]]:
    """The candidate whose calls take the least time in the median, and the medians in seconds.

    run(config) launches the kernel once; a candidate whose first launch raises is left out. They take turns, so that
    what else the GPU does falls on all alike. Raises the last error where none runs.
    """
    running, failure = [], None
    for config in candidates:
        try:
            run(config)
            synchronize()
        except Exception as error:  # more shared memory or registers than there are, on a chip not in the tables
            failure = error
        else:
            running.append(config)
    if not running:
        raise failure or ValueError("there is nothing to tune: no candidates")
    samples: dict[Config, list[float]] = {config: [] for config in running}
    end = time.perf_counter() + _SECONDS * len(running)
    while time.perf_counter() < end or len(samples[running[0]]) < _LEAST_CALLS:
        for config in running:
            start = time.perf_counter()
            run(config)
            synchronize()
            samples[config].append(time.perf_counter() - start)
    medians = {config: statistics.median(times) for config, times in samples.items()}
    return min(running, key=medians.get), medians


def load(device: str | None = None) -> None:
    """Makes configs.choose take what was found for this GPU, if anything was.

    A file that cannot be read, or that another version wrote, counts as none.
    """
    for entry in _read().get(device or device_name(), []):
        config = Config(entry["blocks"], entry["num_warps"], entry["num_stages"], entry["problem"])
        configs.tuned[entry["kernel"], entry["arch"], tuple(entry["problem"].items())] = config


def save(kernel: str, arch: str, problem: Mapping[str, int], config: Config, device: str | None = None) -> None:
    """Keeps a result, for now and for later processes; the file is replaced whole: readers see all or nothing."""
    configs.tuned[kernel, arch, tuple(problem.items())] = config
    known, device = _read(), device or device_name()
    entry = {"kernel": kernel, "arch": arch, "problem": dict(problem), **config.as_json()}
    others = [
        e for e in known.get(device, []) if (e["kernel"], e["arch"], e["problem"]) != (kernel, arch, dict(problem))
    ]
    known[device] = [*others, entry]
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump({"version": _VERSION, "devices": known}, new, indent=1)
        os.replace(new.name, file)
    except OSError:
        pass  # a home that cannot be written to: the result holds for this process


def _read() -> dict[str, list[dict]]:
    try:
        content = json.loads(path().read_text())
        return content["devices"] if content["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

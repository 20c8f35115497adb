"""`python -m benchmarks`: every op against PyTorch's own, interleaved, with its error.

A row whose error is over budget shows no speed. `of machine` is the larger share of the two limits measured in the same
run: copy bandwidth and PyTorch's square matrix product in that dtype.
"""

import argparse
import importlib
import sys

import torch
from rich.console import Console
from rich.table import Table

from fasttx.cli.machine import summary
from fasttx.measure import interleave

from .case import DTYPES
from .machine import copy_bandwidth, matmul_rate

OPS = ("attention", "feed_forward", "gelu", "layer_norm", "softmax")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", default=OPS, help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of each row")
    parser.add_argument("--threads", type=int, help="threads; PyTorch's default otherwise")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    # Where no terminal tells its width, wide enough for a row to be a line.
    console = Console(width=None if sys.stdout.isatty() else 150)
    for line in summary():
        console.print(line, highlight=False)
    bandwidth = copy_bandwidth()
    rates = {dtype: matmul_rate(dtype) for dtype in DTYPES}
    console.print(
        f"copy {bandwidth / 1e9:.0f} GB/s; matrix product "
        + ", ".join(f"{str(d)[6:]} {rate / 1e9:.0f} GFLOP/s" for d, rate in rates.items())
    )
    table = Table("op", "shape", "dtype", "error", "eager's", "PyTorch", "fasttx", "ratio", "of machine")
    failed = False
    for op in arguments.ops:
        for case in importlib.import_module(f"benchmarks.{op}").cases():
            verdict = case.verdict()
            row = [
                case.name + (" fwd+bwd" if case.backward else ""), case.shape, str(case.dtype)[6:],
                f"{verdict.error:.1e}", f"{verdict.eager_error:.1e}",
            ]  # fmt: skip
            if not verdict.passed:
                failed = True
                table.add_row(*row, "", "", f"over budget {verdict.budget:.1e}", "", style="red")
                continue
            measured = interleave(
                {"PyTorch": case.call(case.torch), "fasttx": case.call(case.fasttx)},
                seconds=arguments.seconds, warm_up=0.2,
            )  # fmt: skip
            times = {name: measured.median(name).value for name in ("PyTorch", "fasttx")}
            limit = max(case.bytes / bandwidth, case.flops / rates[case.dtype])
            table.add_row(
                *row, *(f"{t * 1e3:.3f} ms" for t in times.values()),
                f"{measured.ratio('PyTorch', 'fasttx'):.2f}", f"{limit / times['fasttx']:.0%}",
            )  # fmt: skip
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

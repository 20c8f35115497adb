"""OpenVINO on the BERT of bert.py, in a process of its own: it cannot run under a preloaded allocator.

`python -m benchmarks.openvino_bert 8 128 float32 2` says that it is ready, and then runs the model on 2 threads, once
for every line that it reads.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from . import allocators
from .case import NotMeasured, dtype_name


class OpenVINO:
    """Calling it runs the model once and waits."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype):
        if importlib.util.find_spec("openvino") is None:
            raise NotMeasured("openvino is not installed")
        arguments = (*map(str, shape), dtype_name(dtype), str(torch.get_num_threads()))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            cwd=Path(__file__).parent.parent, env=allocators.environment("default"),
        )  # fmt: skip
        self._wait()

    def __call__(self) -> None:
        self._process.stdin.write("\n")
        self._wait()

    def _wait(self) -> None:
        if not self._process.stdout.readline():
            raise RuntimeError(f"OpenVINO's process ended with {self._process.wait()}")

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self._process.communicate()  # the end of its input is its end


def _main(batch: int, length: int, dtype: torch.dtype, threads: int) -> None:
    # What it would report to its makers, over the network and from further processes, disturbs what is measured.
    sys.modules["openvino_telemetry"] = None
    import openvino

    from .bert import model_and_tokens

    model, tokens = model_and_tokens((batch, length), torch.float32)
    converted = openvino.convert_model(model, example_input=tokens)
    converted.reshape({port.any_name: list(tokens[port.any_name].shape) for port in converted.inputs})
    options = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(converted, "CPU", options).create_infer_request()
    request.set_tensors({name: openvino.Tensor(x.numpy()) for name, x in tokens.items()})
    print("ready", flush=True)
    for _ in sys.stdin:
        request.infer()
        print("done", flush=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]), int(sys.argv[4]))

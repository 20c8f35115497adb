"""`python -m benchmarks.fine_tuning`: a step of BERT's pretraining with all gradients, biases' alone, and LoRA's alone.

Forward and backward, without an optimizer, interleaved in one process.
"""

import argparse
import copy
from collections.abc import Callable

import torch

from fasttx import finetune
from fasttx.measure import interleave
from fasttx.models import BertConfig, BertForPretraining


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fine_tuning", description=__doc__)
    for name, size in {"layers": 4, "width": 256, "batch": 16, "length": 128, "vocabulary": 8192, "rank": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time")
    parser.add_argument("--threads", type=int, help="threads; PyTorch's default otherwise")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = BertConfig(
        given.vocabulary, given.width, given.layers, heads=given.width // 64, max_positions=given.length, dropout=0.0
    )
    base = BertForPretraining(config)
    token_ids = torch.randint(1, given.vocabulary, (given.batch, given.length), generator=generator)
    targets = torch.where(torch.rand(token_ids.shape, generator=generator) < 0.15, token_ids, -100)
    of_pairs = torch.randint(2, (given.batch,), generator=generator)

    def step(model: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.loss(token_ids, mlm_targets=targets, nsp_targets=of_pairs).backward()
            model.zero_grad()

        return run

    biases, adapters = copy.deepcopy(base), finetune.lora(copy.deepcopy(base), rank=given.rank)
    finetune.bitfit(biases)
    models = {"all": base, "biases": biases, "LoRA": adapters}
    result = interleave({name: step(model) for name, model in models.items()}, seconds=given.seconds, warm_up=2.0)
    print(f"{given}\n{torch.get_num_threads()} threads, {result.rounds} rounds; times and ratios with 95 % intervals")
    for name, model in models.items():
        faster = result.ratio("all", name)
        print(f"{name:7} {result.median(name).scaled(1e3):.2f} ms, {faster:.3f} x as fast; {finetune.trainable(model)}")


if __name__ == "__main__":
    main()

"""A Hugging Face BERT of two base-sized layers on a padded batch, against PyTorch and against OpenVINO."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fasttx
from fasttx.measure import Verdict, judge

from .case import DTYPES, Case, NotMeasured, Work, item_size
from .encoder_layer import layer_flops, lengths

_LAYERS = 2
_LAYER_WEIGHTS = 12 * 768 * 768

# (rival, (batch, length)): the bars in float32 and in bfloat16.
_BARS = {
    ("eager", (8, 128)): (1.8, 1.8),
    ("eager", (4, 512)): (2.0, 1.8),
    ("OpenVINO", (8, 128)): (1.45, 1.35),
    ("OpenVINO", (4, 512)): (1.7, 1.5),
}


def cases() -> Iterator[Case]:
    """62 % of the tokens valid, against each rival."""
    for index, dtype in enumerate(DTYPES):
        for (rival, shape), bars in _BARS.items():
            yield Case(
                "bert",
                f"62 % valid, against {rival}",
                f"({shape[0]},{shape[1]})",
                dtype,
                partial(_work, rival, shape, dtype),
                flops=_LAYERS * layer_flops(lengths(*shape).tolist()),
                bytes=_LAYERS * _LAYER_WEIGHTS * item_size(dtype),
                bar=bars[index],
            )


def _model(dtype: torch.dtype) -> torch.nn.Module:
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise NotMeasured("transformers is not installed") from error
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=_LAYERS, attn_implementation="sdpa")
    return BertModel(config, add_pooling_layer=False).eval().to(dtype)


def _work(rival: str, shape: tuple[int, int], dtype: torch.dtype) -> Work:
    model = _model(dtype)
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(shape[1]) < lengths(*shape)[:, None]
    tokens = {
        "input_ids": torch.randint(model.config.vocab_size, shape, generator=generator),
        "attention_mask": valid.long(),
    }
    ours, theirs = (_calling(m, tokens) for m in (fasttx.optimize(copy.deepcopy(model)), model))

    def verdict() -> Verdict:
        truth = _calling(copy.deepcopy(model).double(), tokens)
        return judge(ours()[valid], theirs()[valid], truth()[valid])

    rivals = {"eager": theirs} if rival == "eager" else {rival: _openvino(model, tokens, dtype)}
    return Work(rivals, ours, verdict)


def _calling(model: torch.nn.Module, tokens: dict[str, Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: model(**tokens).last_hidden_state)


def _openvino(model: torch.nn.Module, tokens: dict[str, Tensor], dtype: torch.dtype) -> Callable[[], object]:
    """The same weights on the same padded input; OpenVINO takes them in float32 and is told what to compute in."""
    try:
        import openvino
    except ImportError as error:
        raise NotMeasured("openvino is not installed") from error
    converted = openvino.convert_model(copy.deepcopy(model).float(), example_input=tokens)
    converted.reshape({port.any_name: list(tokens[port.any_name].shape) for port in converted.inputs})
    options = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(converted, "CPU", options).create_infer_request()
    request.set_tensors({name: openvino.Tensor(x.numpy()) for name, x in tokens.items()})
    return request.infer

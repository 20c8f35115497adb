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
from .openvino_bert import OpenVINO

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


def model_and_tokens(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The same weights, but for rounding, and the same tokens on every call."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise NotMeasured("transformers is not installed") from error
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=_LAYERS, attn_implementation="sdpa")
    model = BertModel(config, add_pooling_layer=False).eval().to(dtype)
    valid = torch.arange(shape[1]) < lengths(*shape)[:, None]
    return model, {"input_ids": torch.randint(config.vocab_size, shape), "attention_mask": valid.long()}


def _work(rival: str, shape: tuple[int, int], dtype: torch.dtype) -> Work:
    model, tokens = model_and_tokens(shape, dtype)
    valid = tokens["attention_mask"].bool()
    ours, theirs = (_calling(m, tokens) for m in (fasttx.optimize(copy.deepcopy(model)), model))

    def verdict() -> Verdict:
        truth = _calling(copy.deepcopy(model).double(), tokens)
        return judge(ours()[valid], theirs()[valid], truth()[valid])

    return Work({rival: theirs if rival == "eager" else OpenVINO(shape, dtype)}, ours, verdict)


def _calling(model: torch.nn.Module, tokens: dict[str, Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: model(**tokens).last_hidden_state)

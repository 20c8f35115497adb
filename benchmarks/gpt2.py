"""A Hugging Face GPT-2 on real weights, decoding with its cache: by generate(), and by calls of the model alone."""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

import fasttx
from fasttx.measure import Verdict, judge

from .case import Case, NotMeasured, Work

_PROMPT, _TOKENS = 16, 256
_LAYERS, _WIDTH, _VOCABULARY = 8, 256, 9669
# Every token reads all of them.
_WEIGHTS = _LAYERS * 12 * _WIDTH**2 + _VOCABULARY * _WIDTH
# Against transformers' "eager", with its cache.
_BARS = {"eager": 1.3, "sdpa": None}


def cases() -> Iterator[Case]:
    """In float32, which the weights are in, against each rival."""
    for name, decode in (("generate", _generate), ("calls", _decode)):
        for rival, bar in _BARS.items():
            yield Case(
                "gpt2", f"{name}, {_TOKENS} tokens, against {rival}", f"(1,{_PROMPT})", torch.float32,
                partial(_work, decode, rival), flops=2.0 * _TOKENS * _WEIGHTS, bytes=4.0 * _TOKENS * _WEIGHTS,
                bar=bar if decode is _generate else None,
            )  # fmt: skip


def _work(decode: Callable[[Module, Tensor], Tensor], rival: str) -> Work:
    theirs = _model(rival)
    ours = fasttx.optimize(copy.deepcopy(theirs))
    prompt = torch.randint(5, _VOCABULARY, (1, _PROMPT), generator=torch.Generator().manual_seed(0))

    def verdict() -> Verdict:
        tokens = _generate(theirs, prompt)
        return judge(*(_logits(m, tokens) for m in (ours, theirs, copy.deepcopy(theirs).double())))

    return Work({rival: partial(decode, theirs, prompt)}, partial(decode, ours, prompt), verdict)


def _model(implementation: str) -> Module:
    try:
        from transformers import GPT2LMHeadModel
    except ImportError as error:
        raise NotMeasured("transformers is not installed") from error
    package = importlib.util.find_spec("mgm")
    if package is None:
        raise NotMeasured("microformer-mgm, which has the weights, is not installed")
    path = Path(package.submodule_search_locations[0]) / "resources" / "general_model"
    return GPT2LMHeadModel.from_pretrained(path, attn_implementation=implementation).eval()


def _generate(model: Module, prompt: Tensor) -> Tensor:
    """Prompt and tokens, by generate(), which goes on when a sentence ends."""
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=_TOKENS, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def _decode(model: Module, prompt: Tensor) -> Tensor:
    """The same, without what generate() does besides."""
    tokens, output = [prompt], model(prompt, use_cache=True)
    while len(tokens) <= _TOKENS:
        tokens.append(output.logits[:, -1:].argmax(-1))
        output = model(tokens[-1], past_key_values=output.past_key_values, use_cache=True)
    return torch.cat(tokens, 1)


@torch.no_grad()
def _logits(model: Module, tokens: Tensor) -> Tensor:
    """The logits of each token, computed one after another with the cache."""
    output = model(tokens[:, :_PROMPT], use_cache=True)
    logits = [output.logits]
    for token in tokens[:, _PROMPT:].split(1, 1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, 1)

"""What `compare` compares: one line for each case, a shape for each input, and the options."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fasttx import functional, reference
from fasttx.cli import eager
from fasttx.measure import Standard
from fasttx.rng import draw_seed

_SEED = 20_170_612


@dataclass(frozen=True)
class Case:
    """One input of one op.

    An input is a shape, drawn from a normal distribution, or a function of a generator that draws
    it. Those named in `frozen` are not differentiated.
    """

    op: str
    name: str
    inputs: Mapping[str, tuple[int, ...] | Callable[[torch.Generator], Tensor]]
    options: Mapping[str, object] = field(default_factory=dict)
    frozen: tuple[str, ...] = ("attn_mask", "mask", "alibi_slopes")

    def standard(self, dtype: torch.dtype) -> Standard:
        """The float64 truth and eager PyTorch's results on this input, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.op} {self.name}".encode()))
        inputs = {name: _draw(name, how, generator) for name, how in self.inputs.items()}
        options = dict(self.options)
        if "dropout_p" in options:
            torch.manual_seed(_SEED)
            options["seed"] = draw_seed()
        true, eagerly = getattr(reference, self.op), getattr(eager, self.op)
        return Standard(
            reference=lambda **inputs: true(**inputs, **options),
            eager=lambda **inputs: eagerly(**inputs, **options),
            inputs=inputs,
            dtype=dtype,
            frozen=self.frozen,
        )

    def call(self, backend: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """fasttx's op with this case's options, drawing the seed that `standard` used."""
        op = getattr(functional, self.op)

        def run(**inputs):
            torch.manual_seed(_SEED)
            return op(**inputs, **self.options, backend=backend)

        return run


def _draw(name: str, how: object, generator: torch.Generator) -> Tensor:
    if callable(how):
        return how(generator)
    values = torch.randn(how, generator=generator, dtype=torch.float64)
    # Matrices of weights as layers have them, so that what leaves a layer is of order one.
    return values / how[1] ** 0.5 if name.startswith("weight") and len(how) == 2 else values


def _qkv(batch, heads, queries, keys, width, value_width=None, kv_heads=None):
    kv_heads = kv_heads or heads
    return {
        "query": (batch, heads, queries, width),
        "key": (batch, kv_heads, keys, width),
        "value": (batch, kv_heads, keys, value_width or width),
    }


def _packed(heads, width, lengths_q, lengths_k=None, kv_heads=None):
    lengths_k, kv_heads = lengths_k or lengths_q, kv_heads or heads
    return {
        "query": (sum(lengths_q), heads, width),
        "key": (sum(lengths_k), kv_heads, width),
        "value": (sum(lengths_k), kv_heads, width),
        "cu_seqlens_q": _given([0, *torch.tensor(lengths_q).cumsum(0).tolist()]),
        "cu_seqlens_k": _given([0, *torch.tensor(lengths_k).cumsum(0).tolist()]),
    }


def _given(values):
    return lambda generator: torch.tensor(values)


def _bools(*shape):
    """About two thirds True, the first column always, so that no row is empty."""

    def draw(generator):
        mask = torch.rand(shape, generator=generator) < 0.66
        mask[..., 0] = True
        return mask

    return draw


def _some_rows_empty(*shape):
    def draw(generator):
        mask = torch.rand(shape, generator=generator) < 0.66
        mask[..., ::3, :] = False
        return mask

    return draw


def _scaled(factor, offset, *shape):
    return lambda generator: factor * torch.randn(shape, generator=generator).double() + offset


def _slopes(heads):
    return _given([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)])


_RAGGED = (5, 0, 64, 33, 1, 17)
_AFFINE = {"weight": (384,), "bias": (384,)}

ATTENTION = (
    Case("attention", "plain", _qkv(2, 4, 64, 64, 32)),
    Case("attention", "causal", _qkv(2, 4, 150, 150, 64), {"is_causal": True}),
    Case("attention", "bool mask", _qkv(2, 4, 33, 65, 32) | {"attn_mask": _bools(2, 1, 33, 65)}),
    Case("attention", "float mask", _qkv(2, 4, 33, 65, 32) | {"attn_mask": (4, 33, 65)}),
    Case("attention", "key lengths", _qkv(3, 4, 40, 90, 32) | {"key_lengths": _given([90, 1, 37])}),
    Case("attention", "window", _qkv(2, 4, 100, 100, 32), {"window": (16, 8)}),
    Case(
        "attention",
        "alibi, causal",
        _qkv(2, 4, 70, 70, 32) | {"alibi_slopes": _slopes(4)},
        {"is_causal": True},
        frozen=(),
    ),
    Case("attention", "grouped heads", _qkv(2, 6, 40, 40, 32, kv_heads=2), {"enable_gqa": True}),
    Case("attention", "widths 33 and 17", _qkv(2, 3, 19, 23, 33, 17)),
    Case("attention", "one key", _qkv(2, 3, 19, 1, 16)),
    Case("attention", "long keys", _qkv(1, 2, 20, 1500, 64)),
    Case("attention", "decode", _qkv(4, 4, 1, 333, 64)),
    Case(
        "attention",
        "decode, cached",
        _qkv(2, 4, 3, 200, 64),
        {"is_causal": True, "query_offset": 197},
    ),
    Case("attention", "large scores", _qkv(2, 4, 64, 64, 32), {"scale": 4.0}),
    Case("attention", "dropout", _qkv(2, 4, 70, 70, 32), {"dropout_p": 0.3}),
    Case(
        "attention",
        "empty rows",
        _qkv(2, 4, 30, 30, 32) | {"attn_mask": _some_rows_empty(30, 30)},
    ),
    Case("attention", "with lse", _qkv(2, 4, 70, 90, 32), {"return_lse": True}),
    Case(
        "attention",
        "all at once",
        _qkv(2, 6, 50, 80, 24, 40, kv_heads=3)
        | {
            "attn_mask": (50, 80),
            "key_lengths": _given([80, 61]),
            "alibi_slopes": _slopes(6),
        },
        {
            "is_causal": True,
            "query_offset": 20,
            "window": (30, -1),
            "dropout_p": 0.1,
            "enable_gqa": True,
        },
    ),
    Case("attention_varlen", "ragged", _packed(4, 32, _RAGGED)),
    Case("attention_varlen", "causal", _packed(4, 32, _RAGGED), {"is_causal": True}),
    Case(
        "attention_varlen",
        "own lengths of keys",
        _packed(4, 32, (5, 20, 33), (9, 70, 1)),
    ),
    Case(
        "attention_varlen",
        "window, alibi, grouped",
        _packed(4, 32, _RAGGED, kv_heads=2) | {"alibi_slopes": _slopes(4)},
        {"window": (12, 12), "enable_gqa": True},
    ),
    Case("attention_varlen", "dropout", _packed(4, 32, (64, 33, 17)), {"dropout_p": 0.2}),
)

LAYER_NORM = (
    Case("layer_norm", "384", {"input": (64, 384), **_AFFINE}, {"normalized_shape": (384,)}),
    Case(
        "layer_norm",
        "wide",
        {"input": (6, 5000), "weight": (5000,), "bias": (5000,)},
        {"normalized_shape": (5000,)},
    ),
    Case(
        "layer_norm",
        "narrow",
        {"input": (9, 7, 3), "weight": (3,), "bias": (3,)},
        {"normalized_shape": (3,)},
    ),
    Case(
        "layer_norm",
        "odd, two dims",
        {"input": (5, 13, 17), "weight": (13, 17), "bias": (13, 17)},
        {"normalized_shape": (13, 17)},
    ),
    Case("layer_norm", "no weights", {"input": (31, 129)}, {"normalized_shape": (129,)}),
    Case(
        "layer_norm",
        "far from zero",
        {"input": _scaled(1.0, 100.0, 16, 384), **_AFFINE},
        {"normalized_shape": (384,)},
    ),
    Case(
        "add_layer_norm",
        "384",
        {"input": (64, 384), "residual": (64, 384), **_AFFINE},
        {"normalized_shape": (384,)},
    ),
    Case(
        "add_layer_norm",
        "odd, with the sum",
        {"input": (7, 131), "residual": (7, 131), "weight": (131,), "bias": (131,)},
        {"normalized_shape": (131,), "return_sum": True},
    ),
    Case(
        "add_layer_norm",
        "dropout",
        {"input": (64, 384), "residual": (64, 384), **_AFFINE},
        {"normalized_shape": (384,), "dropout_p": 0.1, "training": True},
    ),
)

SOFTMAX = (
    Case("softmax", "plain", {"input": (9, 77)}),
    Case("softmax", "wide", {"input": (4, 3000)}),
    Case("softmax", "bool mask", {"input": (2, 4, 9, 33), "mask": _bools(2, 1, 1, 33)}),
    Case("softmax", "float mask", {"input": (2, 4, 9, 33), "mask": (9, 33)}),
    Case("softmax", "causal", {"input": (2, 4, 40, 40)}, {"is_causal": True}),
    Case("softmax", "first dim", {"input": (33, 20)}, {"dim": 0}),
    Case(
        "softmax",
        "empty rows",
        {"input": (9, 33), "mask": _some_rows_empty(9, 33)},
    ),
)

GELU = tuple(
    Case(op, f"{name}, {approximate}", inputs, {"approximate": approximate})
    for approximate in ("none", "tanh")
    for op, name, inputs in (
        ("gelu", "odd", {"input": (7, 131)}),
        ("gelu", "tails", {"input": _scaled(4.0, 0.0, 64, 128)}),
        ("bias_gelu", "odd", {"input": (7, 131), "bias": (131,)}),
        ("bias_gelu", "wide", {"input": (64, 1536), "bias": (1536,)}),
    )
)


def _layers(rows, width, hidden, out, bias=True):
    inputs = {
        "input": (*rows, width),
        "weight1": (hidden, width),
        "bias1": (hidden,),
        "weight2": (out, hidden),
        "bias2": (out,),
    }
    return inputs if bias else {name: x for name, x in inputs.items() if "bias" not in name}


FEED_FORWARD = (
    Case("linear", "384", {"input": (4, 16, 384), "weight": (384, 384), "bias": (384,)}),
    Case("linear", "odd", {"input": (13, 37), "weight": (29, 37), "bias": (29,)}),
    Case("linear", "one row, no bias", {"input": (1, 384), "weight": (1536, 384)}),
    *(
        Case("feed_forward", f"{name}, {activation}", inputs, {"activation": activation})
        for activation in ("gelu", "gelu_tanh", "relu")
        for name, inputs in (
            ("odd", _layers((3, 5), 37, 71, 29)),
            ("128 x 512", _layers((48,), 128, 512, 128)),
        )
    ),
    Case(
        "feed_forward",
        "no biases",
        _layers((9,), 64, 128, 64, bias=False),
        {"bias1": None, "bias2": None},
    ),
    Case(
        "feed_forward",
        "dropout",
        _layers((48,), 128, 512, 128),
        {"dropout_p": 0.1, "training": True},
    ),
)



def _indices(count, *shape, ignored=0.0):
    def draw(generator):
        indices = torch.randint(0, count, shape, generator=generator)
        if ignored:
            indices[torch.rand(shape, generator=generator) < ignored] = -100
        return indices

    return draw


CROSS_ENTROPY = tuple(
    Case(
        "linear_cross_entropy",
        name,
        {"input": (rows, 64), "weight": (classes, 64), "target": _indices(classes, rows, ignored=ignored)} | bias,
        {"reduction": "none"} | options,
    )
    for name, rows, classes, ignored, bias, options in (
        ("384 classes, bias", 60, 384, 0.0, {"bias": (384,)}, {}),
        ("2500 classes, some ignored", 40, 2500, 0.3, {}, {}),
        ("label smoothing", 60, 150, 0.3, {}, {"label_smoothing": 0.1}),
    )
)
_ENTRIES = {
    "token_ids": _indices(50, 4, 33), "token_weight": (50, 64), "position_weight": (40, 64),
    "segment_ids": _indices(2, 4, 33), "segment_weight": (2, 64),
}  # fmt: skip
EMBEDDING = (
    Case("embedding", "all, norm", _ENTRIES | {"norm_weight": (64,), "norm_bias": (64,)}),
    Case("embedding", "all, no norm", _ENTRIES, {"offset": 5, "token_scale": 8.0}),
    Case(
        "embedding", "dropout", _ENTRIES | {"norm_weight": (64,), "norm_bias": (64,)},
        {"dropout_p": 0.1, "training": True, "padding_idx": 3},
    ),
)  # fmt: skip

CASES = (*ATTENTION, *SOFTMAX, *LAYER_NORM, *GELU, *FEED_FORWARD, *CROSS_ENTROPY, *EMBEDDING)
OPS = tuple(dict.fromkeys(case.op for case in CASES))

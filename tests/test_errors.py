"""Bad input: every public function refuses it in words."""

import math
import re
from functools import partial

import pytest
import torch
from properties import draw

import fasttx
from fasttx import UnsupportedError, functional

B, H, T, S, D, DV, W = 2, 4, 3, 5, 8, 6, 7


def f32(*shape):
    return draw(*shape, dtype=torch.float32)


# Valid arguments of every function: its tensors by name, with everything optional that is checked.
VALID = {
    "attention": lambda: {
        "query": f32(B, H, T, D),
        "key": f32(B, H, S, D),
        "value": f32(B, H, S, DV),
        "attn_mask": torch.ones(T, S, dtype=torch.bool),
        "key_lengths": torch.tensor([5, 2]),
        "alibi_slopes": f32(H),
    },
    "attention_varlen": lambda: {
        "query": f32(T, H, D),
        "key": f32(S, H, D),
        "value": f32(S, H, DV),
        "cu_seqlens_q": torch.tensor([0, 1, T]),
        "cu_seqlens_k": torch.tensor([0, 3, S]),
        "alibi_slopes": f32(H),
    },
    "attention_weights": lambda: {
        "query": f32(B, H, T, D),
        "key": f32(B, H, S, D),
        "lse": f32(B, H, T),
        "attn_mask": torch.ones(T, S, dtype=torch.bool),
        "key_lengths": torch.tensor([5, 2]),
        "alibi_slopes": f32(H),
    },
    "merge_attention": lambda: {
        "out1": f32(B, H, T, DV),
        "lse1": f32(B, H, T),
        "out2": f32(B, H, T, DV),
        "lse2": f32(B, H, T),
    },
    "softmax": lambda: {"input": f32(T, S), "mask": torch.ones(T, S, dtype=torch.bool)},
    "layer_norm": lambda: {
        "input": f32(T, W),
        "normalized_shape": (W,),
        "weight": f32(W),
        "bias": f32(W),
    },
    "add_layer_norm": lambda: {
        "input": f32(T, W),
        "residual": f32(T, W),
        "normalized_shape": (W,),
        "weight": f32(W),
        "bias": f32(W),
        "training": True,
    },
    "gelu": lambda: {"input": f32(T, W)},
    "bias_gelu": lambda: {"input": f32(T, W), "bias": f32(W)},
    "linear": lambda: {"input": f32(T, W), "weight": f32(S, W), "bias": f32(S)},
    "feed_forward": lambda: {
        "input": f32(T, W),
        "weight1": f32(S, W),
        "bias1": f32(S),
        "weight2": f32(D, S),
        "bias2": f32(D),
        "training": True,
    },
    "linear_cross_entropy": lambda: {
        "input": f32(T, W),
        "weight": f32(S, W),
        "target": torch.tensor([0, -100, S - 1]),
        "bias": f32(S),
    },
    "embedding": lambda: {
        "token_weight": f32(S, W),
        "token_ids": torch.tensor([[0, S - 1, 2]]),
        "position_weight": f32(D, W),
        "segment_ids": torch.tensor([0, 1, 1]),
        "segment_weight": f32(2, W),
        "norm_weight": f32(W),
        "norm_bias": f32(W),
        "position_ids": torch.tensor([[3, 0, D - 1]]),
        "training": True,
    },
}
OPTIONAL = {
    "attention": {"attn_mask", "key_lengths", "alibi_slopes"},
    "attention_varlen": {"alibi_slopes"},
    "attention_weights": {"lse", "attn_mask", "key_lengths", "alibi_slopes"},
    "softmax": {"mask"},
    "layer_norm": {"weight", "bias"},
    "add_layer_norm": {"weight", "bias"},
    "linear": {"bias"},
    "feed_forward": {"bias1", "bias2"},
    "linear_cross_entropy": {"bias"},
    "embedding": {
        "position_weight", "position_ids", "segment_weight", "segment_ids", "norm_weight", "norm_bias"
    },
}
INDICES = ("target", "token_ids", "position_ids", "segment_ids")
# The tensor that decides device and dtype.
FIRST = ("input", "query", "out1", "token_weight")
TENSORS = [
    (function, name)
    for function, make in VALID.items()
    for name, value in make().items()
    if isinstance(value, torch.Tensor)
]
FLOATING = [
    (f, n) for f, n in TENSORS if n not in ("mask", "attn_mask", *INDICES) and "len" not in n
]  # of these, every one must be floating
every_function = pytest.mark.parametrize("function", VALID)


def call(function, **changes):
    """The function on valid arguments, less these changes."""
    return getattr(functional, function)(**VALID[function]() | changes)


def assert_raises(kind, name, function, **changes):
    """The error is of that kind, and names the argument."""
    with pytest.raises(kind, match=rf"\b{re.escape(name)}\b"):
        call(function, **changes)


@every_function
def test_valid_arguments_are_valid(function):
    """What the other tests here change one thing of; without the options, too."""
    for changes in ({}, dict.fromkeys(OPTIONAL.get(function, ()))):
        call(function, **changes, backend="reference")
        if "attention" not in function:
            call(function, **changes)


def test_every_function_is_here():
    assert set(VALID) == set(functional.__all__)


@pytest.mark.parametrize("value", [1.5, [1.0, 2.0], "x"], ids=repr)
@pytest.mark.parametrize("function, name", TENSORS)
def test_what_is_no_tensor(function, name, value):
    assert_raises(TypeError, name, function, **{name: value})


@pytest.mark.parametrize(
    "function, name", [(f, n) for f, n in TENSORS if n not in OPTIONAL.get(f, ())]
)
def test_a_tensor_that_is_missing(function, name):
    assert_raises(TypeError, name, function, **{name: None})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("function, name", FLOATING)
def test_a_dtype_that_is_not_floating(function, name, dtype):
    assert_raises(TypeError, name, function, **{name: VALID[function]()[name].to(dtype)})


def test_attention_of_sparse_tensors():
    query, key, value = (torch.randn(1, 2, 3, 4) for _ in range(3))
    with pytest.raises(TypeError, match=r"key must be a dense tensor, got the layout torch.sparse_coo"):
        functional.attention(query, key.to_sparse(), value)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bool, torch.uint8, torch.complex64], ids=str
)
@pytest.mark.parametrize("function, name", [(f, n) for f, n in TENSORS if n in INDICES])
def test_a_dtype_that_is_no_index(function, name, dtype):
    assert_raises(TypeError, name, function, **{name: VALID[function]()[name].to(dtype)})


@pytest.mark.parametrize(
    "function, name",
    [(f, n) for f, n in FLOATING if n not in FIRST and "attention" not in f],
)
@pytest.mark.usefixtures("needs_extension")
def test_mixed_dtypes(function, name):
    """The CPU kernels refuse and say so; auto takes the reference, in the dtype of the input."""
    half = VALID[function]()[name].bfloat16()
    with pytest.raises(UnsupportedError, match="dtypes differ.*float32.*bfloat16"):
        call(function, **{name: half}, backend="cpu")
    found = call(function, **{name: half})
    torch.manual_seed(0)
    assert found.dtype == torch.float32 and found.isfinite().all()


@pytest.mark.parametrize(
    "function, name",
    [(f, n) for f in ("attention", "attention_varlen") for n in ("key", "value")]
    + [("attention_weights", n) for n in ("key", "lse")]
    + [("merge_attention", n) for n in ("lse1", "out2", "lse2")],
)
def test_attention_wants_one_dtype(function, name):
    assert_raises(TypeError, name, function, **{name: VALID[function]()[name].bfloat16()})


@pytest.mark.parametrize("function, name", TENSORS)
def test_tensors_on_different_devices(function, name):
    """The first tensor on another device is told by the second's name."""
    moved = VALID[function]()[name].to("meta")
    if len([f for f, _ in TENSORS if f == function]) == 1:
        assert call(function, **{name: moved}).device.type == "meta"
    elif name in FIRST:
        with pytest.raises(ValueError, match="is on cpu but .* is on meta"):
            call(function, **{name: moved})
    else:
        assert_raises(ValueError, name, function, **{name: moved})


@every_function
@pytest.mark.usefixtures("needs_extension")
def test_another_device_under_the_cpu_backend(function):
    arguments = {
        n: x.to("meta") if isinstance(x, torch.Tensor) and "seqlens" not in n else x
        for n, x in VALID[function]().items()
        if n != "key_lengths"
    }
    if function == "attention_varlen":
        arguments |= {n: arguments[n].to("meta") for n in ("cu_seqlens_q", "cu_seqlens_k")}
    with pytest.raises(UnsupportedError, match="meta"):
        getattr(functional, function)(**arguments, backend="cpu")


@every_function
def test_backends_that_are_not_there(function):
    with pytest.raises(ValueError, match="backend.*'gpu'"):
        call(function, backend="gpu")
    for name in ("triton", "cuda"):
        with pytest.raises(UnsupportedError, match=f"{function}.*'{name}': .+"):
            call(function, backend=name)
        with fasttx.backend(name), pytest.raises(UnsupportedError, match=name):
            call(function)
        with fasttx.backend(name):
            call(function, backend="reference")


def test_an_unknown_backend_context():
    with pytest.raises(ValueError, match="backend.*'gpu'"), fasttx.backend("gpu"):
        pass


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan, math.inf])
@pytest.mark.parametrize(
    "function", ["attention", "attention_varlen", "add_layer_norm", "feed_forward", "embedding"]
)
def test_dropout_outside_its_range(function, value):
    assert_raises(ValueError, "dropout_p", function, dropout_p=value)
    assert_raises(TypeError, "dropout_p", function, dropout_p="0.1")
    if "attention" not in function:
        assert_raises(ValueError, "dropout_p", function, dropout_p=value, training=False)


MISMATCHES = [
    ("layer_norm", "normalized_shape", {"normalized_shape": (W + 1,)}),
    ("layer_norm", "normalized_shape", {"normalized_shape": W - 1}),
    ("layer_norm", "normalized_shape", {"normalized_shape": ()}),
    ("layer_norm", "normalized_shape", {"normalized_shape": (2, T, W)}),
    ("layer_norm", "normalized_shape", {"input": f32()}),
    ("layer_norm", "weight", {"weight": f32(W + 1)}),
    ("layer_norm", "weight", {"weight": f32(1, W)}),
    ("layer_norm", "bias", {"bias": f32(1)}),
    ("add_layer_norm", "residual", {"residual": f32(T + 1, W)}),
    ("add_layer_norm", "residual", {"residual": f32(1, W)}),
    ("add_layer_norm", "normalized_shape", {"normalized_shape": (T,)}),
    ("add_layer_norm", "weight", {"weight": f32(W - 1)}),
    ("add_layer_norm", "bias", {"bias": f32(W, 1)}),
    ("gelu", "approximate", {"approximate": "exact"}),
    ("bias_gelu", "approximate", {"approximate": "gelu"}),
    ("bias_gelu", "bias", {"bias": f32(W + 1)}),
    ("bias_gelu", "bias", {"bias": f32(1)}),
    ("bias_gelu", "input", {"input": f32()}),
    ("linear", "weight", {"weight": f32(S, W + 1)}),
    ("linear", "weight", {"weight": f32(W)}),
    ("linear", "weight", {"weight": f32(1, S, W)}),
    ("linear", "bias", {"bias": f32(S + 1)}),
    ("linear", "bias", {"bias": f32(1)}),
    ("linear", "input", {"input": f32()}),
    ("feed_forward", "weight1", {"weight1": f32(S, W + 1)}),
    ("feed_forward", "weight2", {"weight2": f32(D, S + 1)}),
    ("feed_forward", "weight2", {"weight2": f32(S)}),
    ("feed_forward", "bias1", {"bias1": f32(D)}),
    ("feed_forward", "bias2", {"bias2": f32(S)}),
    ("feed_forward", "input", {"input": f32()}),
    ("feed_forward", "activation", {"activation": "swish"}),
    ("feed_forward", "activation", {"activation": "none"}),
    ("softmax", "input", {"input": f32()}),
    ("softmax", "dim", {"dim": 2}),
    ("softmax", "dim", {"dim": -3}),
    ("softmax", "is_causal", {"dim": 0, "is_causal": True}),
    ("softmax", "is_causal", {"input": f32(S), "mask": None, "is_causal": True}),
    ("softmax", "mask", {"mask": torch.ones(S, T, dtype=torch.bool)}),
    ("softmax", "mask", {"mask": f32(1, T, S)}),
    ("attention", "query", {"query": f32(H, T, D)}),
    ("attention", "key", {"key": f32(1, B, H, S, D)}),
    ("attention", "batch", {"query": f32(B + 1, H, T, D)}),
    ("attention", "length", {"key": f32(B, H, S + 1, D)}),
    ("attention", "width", {"key": f32(B, H, S, D + 1)}),
    ("attention", "width", {"query": f32(B, H, T, 0), "key": f32(B, H, S, 0)}),
    ("attention", "heads", {"query": f32(B, H + 1, T, D)}),
    ("attention", "heads", {"value": f32(B, 2, S, DV)}),
    ("attention", "heads", {"key": f32(B, 3, S, D), "value": f32(B, 3, S, DV), "enable_gqa": True}),
    ("attention", "heads", {"key": f32(B, 0, S, D), "value": f32(B, 0, S, DV), "enable_gqa": True}),
    ("attention", "attn_mask", {"attn_mask": torch.ones(T, S + 1, dtype=torch.bool)}),
    ("attention", "attn_mask", {"attn_mask": torch.ones(B, T, S, dtype=torch.bool)}),
    ("attention", "attn_mask", {"attn_mask": f32(1, 1, 1, T, S)}),
    ("attention", "key_lengths", {"key_lengths": torch.tensor([1, S + 1])}),
    ("attention", "key_lengths", {"key_lengths": torch.tensor([-1, S])}),
    ("attention", "key_lengths", {"key_lengths": torch.tensor([1])}),
    ("attention", "key_lengths", {"key_lengths": torch.tensor([[1, 2]])}),
    ("attention", "alibi_slopes", {"alibi_slopes": f32(H + 1)}),
    ("attention", "window", {"window": (1, 2, 3)}),
    ("attention", "scale", {"scale": math.nan}),
    ("attention", "scale", {"scale": math.inf}),
    ("attention_weights", "query", {"query": f32(H, T, D)}),
    ("attention_weights", "batch", {"key": f32(B + 1, H, S, D)}),
    ("attention_weights", "heads", {"key": f32(B, 2, S, D)}),
    ("attention_weights", "lse", {"lse": f32(B, H, T + 1)}),
    ("attention_weights", "lse", {"lse": f32(B, H, 1)}),
    ("attention_weights", "attn_mask", {"attn_mask": torch.ones(T, S + 1, dtype=torch.bool)}),
    ("attention_weights", "key_lengths", {"key_lengths": torch.tensor([1, S + 1])}),
    ("attention_weights", "dropout_p", {"dropout_p": 1.0}),
    ("attention_weights", "seed", {"dropout_p": 0.5}),
    ("merge_attention", "out1", {"out1": f32(T, DV)}),
    ("merge_attention", "out2", {"out2": f32(B, H, T, DV + 1)}),
    ("merge_attention", "lse1", {"lse1": f32(B, T, H)}),
    ("merge_attention", "lse2", {"lse2": f32(B, H, T, 1)}),
    ("attention_varlen", "query", {"query": f32(1, T, H, D)}),
    ("attention_varlen", "length", {"value": f32(S + 1, H, DV)}),
    ("attention_varlen", "heads", {"query": f32(T, H + 1, D)}),
    ("attention_varlen", "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 1, T + 1])}),
    ("attention_varlen", "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 1, T - 1])}),
    ("attention_varlen", "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([1, 1, T])}),
    ("attention_varlen", "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, T])}),
    ("attention_varlen", "cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, S + 1, S])}),
    ("attention_varlen", "cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, -1, S])}),
    ("attention_varlen", "cu_seqlens_k", {"cu_seqlens_k": torch.tensor([], dtype=torch.int64)}),
    ("attention_varlen", "cu_seqlens_k", {"cu_seqlens_k": torch.tensor([[0, 1, S]])}),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("function, name, changes", MISMATCHES)
def test_values_that_do_not_fit(function, name, changes, backend):
    assert_raises(ValueError, name, function, **changes, backend=backend)


WRONG_DTYPES = [
    ("softmax", "mask", torch.ones(T, S, dtype=torch.int64)),
    ("softmax", "mask", torch.ones(T, S, dtype=torch.float16)),
    ("attention", "attn_mask", torch.ones(T, S, dtype=torch.uint8)),
    ("attention", "attn_mask", torch.ones(T, S, dtype=torch.float64)),
    ("attention", "key_lengths", torch.tensor([1.0, 2.0])),
    ("attention", "key_lengths", torch.tensor([True, False])),
    *(
        (function, name, value)
        for function in ("attention", "attention_varlen", "attention_weights")
        for name, value in (
            ("is_causal", 1), ("is_causal", None), ("window", 3), ("window", (1, 2.0)), ("window", (True, 2)),
            ("scale", "1"), ("scale", True), ("scale", torch.tensor(1.0)),
        )
    ),
    *(
        (function, "query_offset", value)
        for function in ("attention", "attention_weights")
        for value in (1.0, True, None, torch.tensor(1))
    ),
    ("attention_varlen", "cu_seqlens_q", torch.tensor([0.0, 1.0, 3.0])),
    ("attention_varlen", "cu_seqlens_k", torch.tensor([0, 3, 5], dtype=torch.int16)),
    ("layer_norm", "normalized_shape", 7.0),
    ("add_layer_norm", "normalized_shape", None),
]


@pytest.mark.parametrize("function, name, value", WRONG_DTYPES)
def test_a_wrong_dtype_or_type(function, name, value):
    assert_raises(TypeError, name, function, **{name: value})


@pytest.mark.parametrize("name, value", [("is_causal", 1), ("query_offset", 1.0), ("scale", "1"), ("scale", math.nan)])
def test_options_are_checked_on_the_quick_way_too(name, value):
    """The call without masks, which goes straight to its kernel."""
    x = f32(B, H, T, D)
    with pytest.raises((TypeError, ValueError), match=name):
        functional.attention(x, x, x, **{name: value})


@pytest.mark.usefixtures("needs_extension")
def test_autocast_casts_for_a_named_backend_too():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call("linear", backend="cpu").dtype == torch.bfloat16
        assert call("linear").dtype == torch.bfloat16


def _modules():
    """A module, the tensors that it takes, and one of its arguments, which must be a tensor or a mask."""
    x, width = torch.randn(2, 3, 8), 8
    layer = partial(torch.nn.TransformerEncoderLayer, width, 2, 16, batch_first=True)
    decoder_layer = partial(torch.nn.TransformerDecoderLayer, width, 2, 16, batch_first=True)
    stacks = {
        "norm": (torch.nn.LayerNorm(width), {"input": x}, ()),
        "gelu": (torch.nn.GELU(), {"input": x}, ()),
        "attention": (
            torch.nn.MultiheadAttention(width, 2, batch_first=True), dict.fromkeys(("query", "key", "value"), x),
            ("attn_mask", "key_padding_mask"),
        ),
        "encoder layer": (layer(), {"src": x}, ("src_mask", "src_key_padding_mask")),
        "encoder": (torch.nn.TransformerEncoder(layer(), 1), {"src": x}, ("mask", "src_key_padding_mask")),
    }
    masks = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
    stacks["decoder layer"] = decoder_layer(), {"tgt": x, "memory": x}, masks
    stacks["decoder"] = torch.nn.TransformerDecoder(decoder_layer(), 1), {"tgt": x, "memory": x}, masks
    for name, (module, tensors, masks) in stacks.items():
        for argument in (*tensors, *masks):
            yield pytest.param(module, tensors, argument, id=f"{name}-{argument}")


@pytest.mark.parametrize("module, tensors, argument", list(_modules()))
def test_modules_name_what_is_no_tensor(module, tensors, argument):
    module = fasttx.optimize(module)
    with pytest.raises(TypeError, match=f"^{argument} must be a tensor( or None)?, got list"):
        module(**tensors | {argument: [1.0]})


@pytest.mark.parametrize("mask, name", [("src_mask", "src"), ("tgt_mask", "attn"), ("memory_mask", "attn")])
def test_a_mask_of_integers_is_named_by_torchs_layer_or_attention(mask, name):
    model, x = fasttx.nn.Transformer(8, 2, 1, 1, 16, batch_first=True), torch.randn(2, 3, 8)
    with pytest.raises(AssertionError, match=f"only bool and floating types of {name}_mask are supported"):
        model(x, x, **{mask: torch.zeros(3, 3, dtype=torch.long)})

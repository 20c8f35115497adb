"""Calls of attention for the compile matrix: every configuration, alone with what loads a tile least and most."""

from collections.abc import Callable

import torch
from fasttx.kernels.attention import attention_fwd
from fasttx.kernels.attention_bias_bwd import attention_bias_bwd
from fasttx.kernels.attention_bwd import attention_bwd

from gpu.compile_matrix import Case

_TOKENS = 512


def _options(queries: int, **given) -> tuple:
    """The op's arguments after query, key and value: causal, unless a mask of each query comes in."""
    mask, starts = given.get("attn_mask"), given.get("cu_seqlens")
    return (
        mask, given.get("key_lengths"), starts, starts, given.get("alibi_slopes"),
        mask is None or mask.shape[2] == 1, _TOKENS - queries, given.get("window_left", -1), -1,
        given.get("dropout_p", 0.0), given.get("seed"), 0.1,
    )  # fmt: skip


def _mask(queries: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(2, 4, queries, _TOKENS, dtype=dtype)


_WINDOW = {"window_left": 5}
_LENGTHS = {"key_lengths": torch.ones(2, dtype=torch.int64)}
_PADDING = {"attn_mask": torch.ones(2, 1, 1, _TOKENS, dtype=torch.bool), **_LENGTHS}
_PACKED = {"cu_seqlens": torch.arange(0, 2 * _TOKENS + 1, _TOKENS)}
_ALIBI = {"alibi_slopes": torch.empty(4)}
# By name, what a call of so many queries is laden with.
_LADEN = {
    "": lambda queries: {},
    ", dropout": lambda queries: {"dropout_p": 0.1, "seed": torch.tensor(1)},
    ", mask": lambda queries: {"attn_mask": _mask(queries, torch.bool)},
    ", added mask": lambda queries: {"attn_mask": _mask(queries, torch.float32)[:, :1]},
    ", bias": lambda queries: {"attn_mask": _mask(queries, torch.float32), **_ALIBI, **_WINDOW},
    ", padding": lambda queries: _PADDING,
    ", padding, window": lambda queries: {**_PADDING, **_WINDOW},
    ", lengths, window": lambda queries: {**_LENGTHS, **_WINDOW},
    ", packed": lambda queries: _PACKED,
    ", packed, window": lambda queries: {**_PACKED, **_WINDOW},
    ", packed, ALiBi": lambda queries: {**_PACKED, **_ALIBI, **_WINDOW},
}


def _inputs(width: int, queries: int, dtype: torch.dtype, is_packed: bool = False) -> list[torch.Tensor]:
    made = [torch.empty(2, heads, n, width, dtype=dtype) for heads, n in ((4, queries), (2, _TOKENS), (2, _TOKENS))]
    return [x.transpose(1, 2).flatten(0, 1) for x in made] if is_packed else made


def _train(width: int, dtype: torch.dtype, laden: str) -> None:
    query, key, value = _inputs(width, _TOKENS, dtype, "packed" in laden)
    options = _options(_TOKENS, **_LADEN[laden](_TOKENS))
    output, _, stats, _ = attention_fwd(query, key, value, *options)
    arguments = (output, None, query, key, value, output, stats, *options)
    attention_bwd(*arguments)
    if laden == ", bias":
        attention_bias_bwd(*arguments)


def _decode(width: int, dtype: torch.dtype, laden: str) -> None:
    attention_fwd(*_inputs(width, 1, dtype), *_options(1, **_LADEN[laden](1)))


# How values are multiplied: their dtype, and PyTorch's setting for float32.
_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
# Words in the names of the kernels that multiply matrices: all but the one that joins splits.
_MATRIX = ("fwd", "bwd", "split")


def _run(call: Callable, width: int, precision: str, laden: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        call(width, _PRECISIONS[precision], laden)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _case(kind: str, call: Callable, width: int, precision: str, laden: str) -> Case:
    return Case(
        f"attention{kind} {precision} {width}{laden}",
        lambda: _run(call, width, precision, laden),
        () if precision == "float32" else _MATRIX,
    )


# Narrow heads have the tiles of 64 in most tables. Widths that are no power of two mask a row's last columns.
CASES = [
    *(_case("", _train, w, "bfloat16", laden) for w in (64, 128, 256) for laden in _LADEN),
    *(_case("", _train, w, "bfloat16", ", bias") for w in (16, 32, 96, 160)),
    *(_case("", _train, w, "bfloat16", ", mask") for w in (16, 32)),
    *(_case("", _train, w, "float16", laden) for w in (64, 128) for laden in ("", ", bias")),
    *(_case("", _train, w, "float32", ", bias") for w in (16, 32, 64, 128, 256)),
    *(_case("", _train, w, "tf32", ", bias") for w in (16, 32, 64, 128)),
    *(_case("", _train, 64, precision, "") for precision in ("float32", "tf32")),
    *(_case(" of one query", _decode, w, "bfloat16", "") for w in (64, 80, 128, 256)),
    *(_case(" of one query", _decode, w, "bfloat16", x) for w in (64, 128) for x in (", mask", ", bias", ", padding")),
    *(_case(" of one query", _decode, w, "float16", "") for w in (64, 128, 256)),
    *(_case(" of one query", _decode, w, "float32", "") for w in (16, 32, 64, 128, 256)),
    *(_case(" of one query", _decode, w, "tf32", "") for w in (16, 32, 64, 128)),
]

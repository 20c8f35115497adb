"""Calls of attention for the compile matrix: every configuration, alone with what loads a tile least and most."""

import torch
from fasttx.kernels.attention import attention_fwd
from fasttx.kernels.attention_bias_bwd import attention_bias_bwd
from fasttx.kernels.attention_bwd import attention_bwd

from gpu.compile_matrix import Case

_TOKENS = 512


def _options(queries: int, **given) -> tuple:
    """The op's arguments after query, key and value: causal, unless a mask of each query comes in."""
    return (
        given.get("attn_mask"), None, None, None, given.get("alibi_slopes"), "attn_mask" not in given,
        _TOKENS - queries, given.get("window_left", -1), -1, given.get("dropout_p", 0.0), given.get("seed"), 0.1,
    )  # fmt: skip


def _mask(queries: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(2, 4, queries, _TOKENS, dtype=dtype)


# By name, what a call of so many queries is laden with.
_LADEN = {
    "": lambda queries: {},
    ", dropout": lambda queries: {"dropout_p": 0.1, "seed": torch.tensor(1)},
    ", mask": lambda queries: {"attn_mask": _mask(queries, torch.bool)},
    ", bias": lambda queries: {
        "attn_mask": _mask(queries, torch.float32), "alibi_slopes": torch.empty(4), "window_left": 5
    },
}  # fmt: skip


def _inputs(width: int, queries: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty(2, heads, n, width, dtype=dtype) for heads, n in ((4, queries), (2, _TOKENS), (2, _TOKENS))]


def _train(width: int, dtype: torch.dtype, laden: str) -> None:
    query, key, value = _inputs(width, _TOKENS, dtype)
    options = _options(_TOKENS, **_LADEN[laden](_TOKENS))
    output, _, stats, _ = attention_fwd(query, key, value, *options)
    arguments = (output, None, query, key, value, output, stats, *options)
    attention_bwd(*arguments)
    if laden == ", bias":
        attention_bias_bwd(*arguments)


def _decode(width: int, dtype: torch.dtype, laden: str) -> None:
    attention_fwd(*_inputs(width, 1, dtype), *_options(1, **_LADEN[laden](1)))


def _laden(call, dtype: torch.dtype) -> tuple[str, ...]:
    """What calls come with: all kinds where tiles differ by it, else what takes most."""
    if call is _decode:
        return ("",)
    return tuple(_LADEN) if dtype == torch.bfloat16 else (", bias",)


def _architectures(dtype: torch.dtype, laden: str) -> tuple[str, ...]:
    """One of each group that shares its tiles; what is laden in bfloat16, on one."""
    if dtype == torch.float32:
        return "sm_80", "sm_90", "sm_120"
    return ("sm_90",) if laden else ("sm_80", "sm_90", "sm_100", "sm_120")


# Words in the names of the kernels that multiply matrices: all but the one that joins splits.
_MATRIX = ("fwd", "bwd", "split")
CASES = [
    Case(
        f"attention{kind} {str(dtype)[6:]} {width}{laden}",
        lambda call=call, width=width, dtype=dtype, laden=laden: call(width, dtype, laden),
        _MATRIX if dtype == torch.bfloat16 else (),
        _architectures(dtype, laden),
    )
    for dtype in (torch.bfloat16, torch.float32)
    for width in (64, 128, 256)
    for kind, call in (("", _train), (" of one query", _decode))
    for laden in (_laden(call, dtype))
]

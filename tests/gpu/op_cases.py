"""Calls of every kernel but attention's for the compile matrix: each configuration, laden with most that it can be."""

import torch
from fasttx.kernels import configs, cross_entropy, embedding, gelu, layer_norm, matmul, softmax
from fasttx.kernels.configs import Config
from fasttx.kernels.dropout import Dropout
from fasttx.kernels.launch import KERNELS

from gpu.compile_matrix import Case

_ROWS = 64
_SEED = torch.tensor(1)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _layer_norm_fwd(width: int) -> None:
    x, weight = _empty(_ROWS, width), _empty(width)
    layer_norm.add_layer_norm_fwd(x, x, width, weight, weight, 1e-5, 0.1, _SEED, True)


def _layer_norm_bwd(width: int) -> None:
    x, weight = _empty(_ROWS, width), _empty(width)
    layer_norm.add_layer_norm_bwd(x, x, x, weight, width, 1e-5, 0.1, _SEED, True, True, True, True)


def _gelu_fwd(width: int) -> None:
    gelu.gelu_fwd(_empty(_ROWS, width), _empty(width), 2)


def _gelu_bwd(width: int) -> None:
    x = _empty(_ROWS, width)
    gelu.gelu_bwd(x, x, _empty(width), 2, True)


def _softmax_fwd(width: int) -> None:
    softmax.softmax_fwd(_empty(1, 1, _ROWS, width), _empty(1, 1, _ROWS, width, dtype=torch.float32), True)


def _softmax_bwd(width: int) -> None:
    softmax.softmax_bwd(_empty(_ROWS, width), _empty(_ROWS, width))


def _embedding(width: int, backward: bool) -> None:
    ids = torch.zeros(2, _ROWS // 2, dtype=torch.int64)
    table, weight = _empty(_ROWS, width), _empty(width)
    call = (ids, table, ids, table, ids, table, weight, weight, 2.0, 0, 1e-5, 0.1, _SEED, 0)
    if backward:
        embedding.embedding_bwd(_empty(*ids.shape, width), *call, *[True] * 5)
    else:
        embedding.embedding_fwd(*call)


def _cross_entropy(dtype: torch.dtype, backward: bool) -> None:
    target = torch.zeros(_ROWS, dtype=torch.int64)
    call = (_empty(_ROWS, 256, dtype=dtype), _empty(512, 256, dtype=dtype), target, _empty(512, dtype=dtype))
    if not backward:
        cross_entropy.linear_cross_entropy_fwd(*call, -100, 0.1, 0)
        return
    # The products that follow are matmul's own cases.
    cross_entropy.linear_cross_entropy_bwd(
        torch.empty(_ROWS), *call, torch.empty(_ROWS, 2), -100, 0.1, 0, False, False, False
    )


def _row_cases(name: str, call) -> list[Case]:
    """A case for each entry of a table that goes by the width of a row, on the architectures that have it."""

    def run(config: Config) -> None:
        with KERNELS[name].using(config):
            call(config.up_to["block"])

    found: dict[str, tuple[Config, list[str]]] = {}
    for architecture, table in configs.TABLES[name].items():
        for config in table:
            case = f"{name} {config.up_to['block']}, {config.blocks['BLOCK_M']} rows, {config.num_warps} warps"
            if config.blocks.get("SUMS_FIRST"):
                case += ", sums first"
            found.setdefault(case, (config, []))[1].append(architecture)
    return [Case(case, lambda c=c: run(c), (), tuple(archs)) for case, (c, archs) in found.items()]


def _product(dtype: torch.dtype, epilogue: int) -> None:
    """The products that take most registers of those that a configuration is meant for."""
    rows, width, hidden = 256, 256, 512
    x, h, y = _empty(rows, width, dtype=dtype), _empty(rows, hidden, dtype=dtype), _empty(rows, hidden, dtype=dtype)
    weight, bias = _empty(hidden, width, dtype=dtype), _empty(hidden, dtype=dtype)
    dropout = Dropout.of(0.1, _SEED)
    if epilogue < 2:
        matmul.multiply(x, weight.t(), h, bias=bias, residual=y)
    matmul.multiply(h.t(), x, weight)
    if epilogue >= 1:
        matmul.multiply(x, weight.t(), h, bias=bias, activation=3, preact=y, dropout=dropout)
        matmul.multiply(x, weight.t(), h, bias=bias, residual=y, dropout=dropout)
    if epilogue >= 2:
        matmul.multiply_backward(x, weight.t(), h, activation=2, preact=y, dropout=dropout, hidden=y, wants_sums=True)


def _tile_cases(kernel: str, call, matrix: str) -> list[Case]:
    """A case for each entry of a table of products, on the architectures that have it; `matrix` names the kernels."""
    found: dict[str, tuple[Config, list[str]]] = {}
    for architecture, table in configs.TABLES[kernel].items():
        for config in table:
            blocks, up_to = "x".join(str(config.blocks[f"BLOCK_{axis}"]) for axis in "MNK"), config.up_to
            name = f"{kernel} {blocks}, {config.num_warps} warps, {config.num_stages} stages, {up_to['bits']} bits"
            if "epilogue" in up_to:
                name += f", epilogue {up_to['epilogue']}"
            found.setdefault(name, (config, []))[1].append(architecture)
    return [
        # float32 is multiplied by the vector units, unless PyTorch allows TF32.
        Case(name, lambda c=c: call(c), (matrix,) if c.up_to["bits"] == 16 else (), tuple(architectures))
        for name, (c, architectures) in found.items()
    ]


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.up_to["bits"] == 16 else torch.float32


def _run_matmul(config: Config) -> None:
    with KERNELS["matmul"].using(config):
        _product(_dtype(config), config.up_to["epilogue"])


def _cross_entropy_cases(kernel: str) -> list[Case]:
    def run(config: Config) -> None:
        with KERNELS[kernel].using(config):
            _cross_entropy(_dtype(config), backward=kernel.endswith("bwd"))

    return _tile_cases(kernel, run, kernel)


# What a model begins and ends with.
ENDS = [
    *_row_cases("embedding_fwd", lambda width: _embedding(width, False)),
    *_row_cases("embedding_bwd", lambda width: _embedding(width, True)),
    *_cross_entropy_cases("cross_entropy_fwd"),
    *_cross_entropy_cases("cross_entropy_bwd"),
]
CASES = [
    *_row_cases("layer_norm_fwd", _layer_norm_fwd),
    *_row_cases("layer_norm_bwd", _layer_norm_bwd),
    Case("layer_norm_fwd wide", lambda: _layer_norm_fwd(20000)),
    Case("layer_norm_bwd wide", lambda: _layer_norm_bwd(20000)),
    *_row_cases("gelu_fwd", _gelu_fwd),
    *_row_cases("gelu_bwd", _gelu_bwd),
    *_row_cases("softmax_fwd", _softmax_fwd),
    *_row_cases("softmax_bwd", _softmax_bwd),
    Case("softmax_fwd wide", lambda: _softmax_fwd(20000)),
    Case("softmax_bwd wide", lambda: _softmax_bwd(20000)),
    *_tile_cases("matmul", _run_matmul, "matmul"),
    *ENDS,
]

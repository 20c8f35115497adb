"""The calls whose kernels the compile matrix covers: add a Case for each configuration that ships."""

import torch

from gpu import attention_cases, op_cases, sample_kernels
from gpu.compile_matrix import Case


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _matmul(dtype: torch.dtype) -> None:
    a, b, out = _empty(512, 512, dtype=dtype), _empty(512, 512, dtype=dtype), _empty(512, 512, dtype=dtype)
    sample_kernels.matmul[(8, 8)](a, b, out, 512, 512, 512, 64, 64, 32, False, False, num_warps=4, num_stages=2)


def _attention() -> None:
    q, k, v, out = (_empty(2, 256, 64) for _ in range(4))
    sample_kernels.attention[(4, 2)](q, k, v, out, 0.18, 256, True, 64, 64, 32, num_warps=4, num_stages=2)


def _layer_norm() -> None:
    x, out, weight, bias = _empty(8, 1024), _empty(8, 1024), _empty(1024), _empty(1024)
    sample_kernels.layer_norm[(8,)](x, out, weight, bias, 1024, 1024, 1e-5, BLOCK=1024)


CASES = [
    Case("sample matmul bf16", lambda: _matmul(torch.bfloat16), matrix=("",)),
    Case("sample matmul tf32", lambda: _matmul(torch.float32), matrix=("",)),
    Case("sample attention", _attention, matrix=("",)),
    Case("sample layer norm", _layer_norm),
    *attention_cases.CASES,
    *op_cases.CASES,
]

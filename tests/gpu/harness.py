"""Runs a few PTX instructions over arrays, one element per thread."""

import numpy as np

from gpu.ptx import Allocation, Counts, launch, parse

_HEADER = ".version 8.5\n.target sm_90a\n.address_size 64\n"


def module(body: str, parameters: int, threads: int, declarations: str = "") -> str:
    """A kernel `k` whose parameters p0, p1, ... are pointers, in %rd0, %rd1, ...; %t is the thread."""
    arguments = ",\n".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(parameters))
    return f"""{_HEADER}
.extern .shared .align 16 .b8 smem[];
.visible .entry k({arguments})
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %h<32>;
.reg .b32 %r<256>;
.reg .b64 %rd<64>;
.reg .b32 %t;
{declarations}
{loads}
mov.u32 %t, %tid.x;
{body}
ret;
}}
"""


def run_module(
    text: str, arrays: list[np.ndarray], threads: int, grid: tuple = (1,), shared: int = 0, checks: bool = True
) -> Counts:
    """Launches kernel `k` with the arrays as its arguments."""
    memory = [Allocation(a.ctypes.data, a.nbytes, f"p{i}") for i, a in enumerate(arrays)]
    return launch(parse(text)["k"], grid, (threads,), [a.ctypes.data for a in arrays], memory, shared, checks)


_PREFIX = {1: "h", 2: "h", 4: "r", 8: "rd"}


def _register(dtype: np.dtype, number: int) -> str:
    return f"%{_PREFIX[dtype.itemsize]}{number}"


def elementwise(instruction: str, inputs: list[np.ndarray], result: np.dtype | type) -> np.ndarray:
    """Runs an instruction on every element: {d} stands for the destination, {a}, {b}, {c} for the inputs."""
    result = np.dtype(result)
    count = len(inputs[0])
    threads = -(-count // 32) * 32
    padded = [np.concatenate([x, np.repeat(x[-1:], threads - count)]) for x in inputs]
    out = np.zeros(threads, result)
    lines, names = [], {"d": _register(result, 20)}
    for i, array in enumerate(padded):
        names["abc"[i]] = _register(array.dtype, 10 + i)
        lines.append(f"mul.wide.u32 %rd40, %t, {array.dtype.itemsize};")
        lines.append(f"add.s64 %rd40, %rd40, %rd{i};")
        lines.append(f"ld.global.b{8 * array.dtype.itemsize} {names['abc'[i]]}, [%rd40];")
    lines.append(instruction.format(**names))
    lines.append(f"mul.wide.u32 %rd40, %t, {result.itemsize};")
    lines.append(f"add.s64 %rd40, %rd40, %rd{len(inputs)};")
    lines.append(f"st.global.b{8 * result.itemsize} [%rd40], {names['d']};")
    arrays = [*padded, out]
    run_module(module("\n".join(lines), len(arrays), threads), arrays, threads)
    return out[:count]

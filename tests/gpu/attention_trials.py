"""Attention as mutations of its kernels are tried on: sizes and offsets of any kind that launch the same PTX."""

import math
from unittest import mock

import torch
from fasttx.kernels import attention_bwd as backward
from fasttx.kernels.attention import attention_fwd

from gpu.mutations import Trial
from gpu.test_shipped_mutations import trial


def causal(
    queries: int, keys: int, offset: int, *, several: bool = False, cold: float = 0.0, part: str = "forward",
    on_cuda: bool = False,
) -> Trial:  # fmt: skip
    """Two heads over one of keys, bfloat16, 64 wide; query i sees the keys up to i + offset, or none at all.

    several: two sequences and two heads of keys. cold: scores are about -8 cold^2, so that a key too many, whose score
    is 0, is all that a row sees; in the backward the output's gradient is 0, which gives exact results, and from 4 on
    NaN with such a key, whose probability overflows. part: "forward", of a few queries that of split keys; or one
    kernel of the backward alone, "dq" (which gives the rows' delta too) or "dkdv". on_cuda: the CUDA C++ kernels, whose
    backward runs whole for either part, and gives no delta.
    """
    batch, kv_heads = (2, 2) if several else (1, 1)
    query, slope = torch.randn(2, batch, 2 * kv_heads, queries, 64).unbind()
    key, value = torch.randn(2, batch, kv_heads, keys, 64).unbind()
    if cold:
        query, key, slope = query / 2 + cold, key / 2 - cold, torch.zeros_like(slope)
    # Each in memory of its own: past the end of one must not lie another.
    query, key, value, slope = (x.to(torch.bfloat16, copy=True) for x in (query, key, value, slope))
    options = (None,) * 5 + (True, offset, -1, -1, 0.0, None, 64**-0.5)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(offset)
    rows = seen.any(-1)
    products = leaves[0] @ leaves[1].repeat_interleave(2, 1).mT
    scores = (products / 8).masked_fill(~seen, -math.inf)
    p = scores.masked_fill(~rows[:, None], 0).softmax(-1) * rows[:, None]
    output, lse = p @ leaves[2].repeat_interleave(2, 1), scores.detach().logsumexp(-1)
    if part == "forward":

        def call() -> tuple:
            op = torch.ops.fasttx_cuda.attention_fwd.raw if on_cuda else attention_fwd
            found, found_lse = op(query, key, value, *options)[:2]
            return found, torch.where(rows | (found_lse != -math.inf), found_lse, 0.0)

        return trial(call, (output.detach(), torch.where(rows, lse, 0.0)), 2**-7)
    gradients = torch.autograd.grad(output, leaves, slope.double(), retain_graph=True)
    top = torch.where(rows, products.detach().masked_fill(~seen, -math.inf).amax(-1), 0.0)
    factor = torch.where(rows, (top / 8 - lse).exp(), 0.0)
    output, stats = output.detach().bfloat16(), torch.stack([top, factor], -1).float()
    delta = (slope.double() * output).sum(-1)
    if on_cuda:

        def call_whole() -> tuple:
            found = torch.ops.fasttx_cuda.attention_bwd.raw(slope, None, query, key, value, output, stats, *options)
            return found[:1] if part == "dq" else found[1:]

        return trial(call_whole, gradients[:1] if part == "dq" else gradients[1:], 2**-6)

    def call_part() -> tuple:
        with mock.patch.object(backward, "_dkdv" if part == "dq" else "_dq") as other:
            # What the rows' kernel leaves for that of the keys.
            other.side_effect = None if part == "dq" else lambda grid, arguments, *_: arguments[7].copy_(delta)
            found = backward.attention_bwd(slope, None, query, key, value, output, stats, *options)
        return (found[0], other.call_args.args[1][5]) if part == "dq" else found[1:]

    return trial(call_part, (gradients[0], delta) if part == "dq" else gradients[1:], 2**-6)

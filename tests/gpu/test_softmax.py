"""Masked softmax, Triton's kernels and the CUDA C++ ones, on the emulator against float64 by the error budget."""

import pytest
import torch
from budget import assert_op_within_budget, assert_within_budget
from properties import draw

from fasttx import reference
from fasttx.measure import ulp
from fasttx.ops import softmax as ops
from gpu.launchers import backend_of, by_dtype, by_kernels, full, on_kernels, shipped, using


def eager(input, mask=None, is_causal=False):
    """torch.softmax of the masked input; rows that keep nothing are zeros."""
    scores = input
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones(input.shape[-2:]).triu(1).bool(), -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0).to(input.dtype)


def check(target, dtype, shape, mask=None, is_causal=False):
    inputs = {"input": 3 * draw(*shape)}
    if mask is not None:
        inputs["mask"] = mask
    with on_kernels(target):
        assert_op_within_budget(
            lambda input, mask=None: ops.softmax(input, mask, is_causal, -1, backend_of(target)),
            eager=lambda input, mask=None: eager(input, mask, is_causal),
            reference=lambda input, mask=None: reference.softmax(input, mask=mask, is_causal=is_causal),
            inputs=inputs,
            dtype=dtype,
        )


@by_kernels
@by_dtype
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 33), pytest.param((4, 700), marks=full), pytest.param((3, 1), marks=full)])
def test_softmax(target, dtype, is_causal, shape):
    check(target, dtype, shape, is_causal=is_causal)


MASKS = {
    "bool, all": lambda: torch.rand(2, 3, 5, 40) > 0.3,
    "bool, keys": lambda: torch.rand(2, 1, 1, 40) > 0.3,
    "bool, queries": lambda: torch.rand(5, 1) > 0.3,
    "bool, nothing": lambda: torch.zeros(2, 1, 5, 40, dtype=torch.bool),
    "bool, strided": lambda: (torch.rand(40, 5) > 0.3).t(),
    "additive": lambda: draw(3, 5, 40),
    "additive, one query": lambda: draw(3, 1, 40),
}


@by_kernels
@pytest.mark.parametrize("kind", MASKS)
def test_masks(target, kind):
    check(target, torch.bfloat16, (2, 3, 5, 40), MASKS[kind](), is_causal="queries" in kind)


@full
@by_kernels
@by_dtype
@pytest.mark.parametrize("kind", MASKS)
def test_masks_in_every_dtype(target, dtype, kind):
    check(target, dtype, (2, 3, 5, 40), MASKS[kind]())


@full
@by_kernels
@by_dtype
def test_a_mask_of_whole_rows_has_no_gradient(target, dtype):
    # Whatever is added to all of a row changes nothing: the gradient is a sum that cancels. The ulp of slack is that of
    # what is summed, as a sum of such terms can be no better known than the terms.
    x, mask = (3 * draw(2, 3, 5, 40)).to(dtype), draw(3, 1, 1).to(dtype)
    slope = draw(*x.shape).to(dtype)

    def gradient(function):
        given = mask.clone().requires_grad_()
        return torch.autograd.grad(function(x, given), given, slope)[0]

    with on_kernels(target):
        found = gradient(lambda x, mask: ops.softmax(x, mask, False, -1, backend_of(target)))
    wide = torch.softmax(x.double() + mask.double(), -1)
    terms = wide * (slope.double() - (wide * slope.double()).sum(-1, keepdim=True))
    summed = terms.abs().sum_to_size(3, 1, 1)
    budget = 2 * gradient(eager).abs().max().item() + ulp(summed.max().item(), dtype)
    assert found.abs().max().item() <= budget


@by_kernels
def test_a_wider_mask_than_the_input(target):
    x, mask = torch.randn(5, 40).bfloat16(), torch.randn(5, 40)
    with on_kernels(target):
        y = ops.softmax(x, mask, False, -1, backend_of(target))
    assert_within_budget(
        actual=y, eager=torch.softmax(x + mask, -1).bfloat16(), truth=torch.softmax(x.double() + mask.double(), -1)
    )


@by_kernels
def test_wide_rows(target):
    check(target, torch.float32, (2, 2, 20000), torch.rand(2, 1, 20000) > 0.5)


@by_kernels
def test_fully_masked_wide_rows(target):
    check(target, torch.bfloat16, (2, 1, 20000), torch.arange(2)[:, None, None] > 0)


BLOCKS = (64, 256, 512, 1024, 4096, 8192)


@full
@pytest.mark.parametrize(
    ("block", "target", "config"),
    [pytest.param(b, *p.values, id=f"{b}-{p.id}") for b in BLOCKS for p in shipped("softmax_fwd", block=b)],
)
def test_shipped_configurations(block, target, config):
    with using(softmax_fwd=config, softmax_bwd=config):
        check(target, torch.bfloat16, (7, block - 9), torch.rand(7, block - 9) > 0.3)


@by_kernels
def test_five_dimensions_and_another_dim(target):
    x = torch.randn(2, 2, 3, 5, 8)
    mask = torch.rand(2, 1, 3, 5, 8) > 0.3
    with on_kernels(target):
        y = ops.softmax(x, mask, False, -1, backend_of(target))
        across = ops.softmax(x, None, False, 1, backend_of(target))
    torch.testing.assert_close(y, reference.softmax(x, mask=mask))
    torch.testing.assert_close(across, torch.softmax(x, 1))

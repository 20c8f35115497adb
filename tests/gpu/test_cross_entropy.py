"""A linear layer and the cross-entropy of its output, in Triton on the emulator, against float64 by the budget."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from budget import assert_op_within_budget
from fasttx.kernels import cross_entropy as kernels
from properties import draw

from fasttx import reference
from fasttx.ops import cross_entropy as ops
from gpu.launchers import by_dtype, by_target, full, on_triton, shipped, using

IGNORED = -100


def targets(rows, classes, ignored=3):
    """The class of every row; each third one, or so, is ignored."""
    target = torch.randint(0, classes, rows)
    if ignored:
        target.view(-1)[::ignored] = IGNORED
    return target


def problem(rows, width, classes, with_bias=True):
    inputs = {"input": draw(*rows, width), "weight": draw(classes, width) / width**0.5}
    return inputs | {"bias": draw(classes)} if with_bias else inputs


def check(target_arch, dtype, inputs, target, smoothing=0.0, reduction="none"):
    def op(input, weight, bias=None):
        loss = ops.linear_cross_entropy(input, weight, target, bias, IGNORED, smoothing, reduction)
        return loss.to(input.dtype)

    def eager(input, weight, bias=None):
        logits = F.linear(input, weight, bias).flatten(0, -2)
        loss = F.cross_entropy(
            logits, target.flatten(), ignore_index=IGNORED, label_smoothing=smoothing, reduction=reduction
        )
        return loss.view(target.shape) if reduction == "none" else loss

    def truth(input, weight, bias=None):
        return reference.linear_cross_entropy(
            input, weight, target, bias, ignore_index=IGNORED, label_smoothing=smoothing, reduction=reduction
        )

    with on_triton(target_arch):
        assert_op_within_budget(op, eager=eager, reference=truth, inputs=inputs, dtype=dtype)


@contextlib.contextmanager
def small_tiles(stretch=128, classes=256, rows=128):
    """Several stretches and tiles of a problem that the emulator has time for."""
    names = {"_STRETCH": stretch, "_TILE_CLASSES": classes, "_TILE_ROWS": rows}
    with mock.patch.multiple(kernels, **names):
        yield


@by_target
@by_dtype
@pytest.mark.parametrize("smoothing", [0.1, pytest.param(0.0, marks=full)])
def test_within_budget(target, dtype, smoothing):
    with small_tiles():
        check(target, dtype, problem((2, 70), 72, 300), targets((2, 70), 300), smoothing)


@full
@by_target
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(target, reduction):
    check(target, torch.float32, problem((80,), 64, 130), targets((80,), 130), reduction=reduction)


@full
@by_target
@pytest.mark.parametrize("classes", [1, 5, 2049])
def test_odd_numbers_of_classes(target, classes):
    # Against one class there is nothing to lose: eager's error is zero, and no budget.
    if classes == 1:
        x, weight, target_class = torch.randn(6, 40), torch.randn(1, 40), targets((6,), 1)
        with on_triton(target):
            loss = ops.linear_cross_entropy(x, weight, target_class, None, IGNORED, 0.0, "none")
        assert not loss.any()
    else:
        check(target, torch.bfloat16, problem((40,), 40, classes, with_bias=False), targets((40,), classes))


@by_target
def test_transposed_weight(target):
    inputs = problem((33,), 40, 50)
    inputs["weight"] = inputs["weight"].bfloat16().t().contiguous().t()
    check(target, torch.bfloat16, inputs, targets((33,), 50))


@by_target
def test_rows_of_one_tile_are_all_ignored(target):
    chosen = targets((140,), 90, ignored=0)
    chosen[:135] = IGNORED
    x, weight = torch.randn(140, 32).bfloat16(), torch.randn(90, 32).bfloat16()
    x.requires_grad_()
    with on_triton(target):
        loss = ops.linear_cross_entropy(x, weight, chosen, None, IGNORED, 0.0, "none")
        (dx,) = torch.autograd.grad(loss.sum(), x)
    assert not loss[:135].any() and loss[135:].all()
    assert not dx[:135].any() and dx[135:].any(-1).all()


@by_target
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_counts(target, rows):
    x, weight, bias = torch.randn(rows, 24), torch.randn(20, 24), torch.randn(20)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    nothing = torch.full((rows,), IGNORED)
    with on_triton(target):
        assert ops.linear_cross_entropy(x, weight, nothing, bias, IGNORED, 0.0, "mean").isnan()
        loss = ops.linear_cross_entropy(x, weight, nothing, bias, IGNORED, 0.0, "sum")
        gradients = torch.autograd.grad(loss, (x, weight, bias))
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


@by_target
@pytest.mark.parametrize("wrong", [-1, 20, 2**40])
def test_a_target_that_is_no_class_is_nan_and_reads_nothing_outside(target, wrong):
    x, weight = torch.randn(5, 24).requires_grad_(), torch.randn(20, 24)
    chosen = torch.tensor([1, wrong, 19, IGNORED, 0])
    with on_triton(target):
        loss = ops.linear_cross_entropy(x, weight, chosen, None, IGNORED, 0.0, "none")
        (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == [False, True, False, False, False]
    assert dx.isnan().all(-1).tolist() == [False, True, False, False, False]


@by_target
def test_infinite_logits(target):
    """-infinity is a class that does not occur; +infinity, and a row of -infinity alone, are NaN as in PyTorch."""
    x, weight = torch.ones(3, 16), torch.zeros(6, 16)
    bias = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf, 2.0, 0.5])
    chosen = torch.tensor([0, 1, 4])
    with on_triton(target):
        loss = ops.linear_cross_entropy(x, weight, chosen, bias, IGNORED, 0.0, "none")
        lost = ops.linear_cross_entropy(x, weight, chosen, bias.abs(), IGNORED, 0.0, "none")
        none = ops.linear_cross_entropy(x, weight, chosen, torch.full((6,), -torch.inf), IGNORED, 0.0, "none")
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight, bias), chosen, reduction="none"))
    assert lost.isnan().any() and not none.isfinite().any()


@by_target
def test_rows_do_not_depend_on_their_batch(target):
    x, weight, chosen = torch.randn(140, 48).bfloat16(), torch.randn(40, 48).bfloat16(), targets((140,), 40)

    def run(x, chosen):
        x = x.clone().requires_grad_()
        loss = ops.linear_cross_entropy(x, weight, chosen, None, IGNORED, 0.1, "none")
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    with on_triton(target), small_tiles():
        together = run(x, chosen)
        parts = [run(*both) for both in zip(x.split([1, 100, 39]), chosen.split([1, 100, 39]), strict=True)]
    for whole, pieces in zip(together, zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))


@full
@pytest.mark.parametrize(
    ("kernel", "target", "config"),
    [
        pytest.param(kernel, *p.values, id=f"{kernel}-{p.id}")
        for kernel in ("cross_entropy_fwd", "cross_entropy_bwd")
        for bits in (16, 32)
        for p in shipped(kernel, bits=bits)
    ],
)
def test_shipped_configurations(kernel, target, config):
    """Two tiles of rows and of classes, all ragged."""
    dtype = torch.bfloat16 if config.up_to["bits"] == 16 else torch.float32
    rows, classes = config.blocks["BLOCK_M"] + 9, 2 * config.blocks["BLOCK_N"] + 8
    with using(**{kernel: config}), small_tiles():
        check(target, dtype, problem((rows,), 72, classes), targets((rows,), classes), 0.1)

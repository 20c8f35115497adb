"""Dropout's mask in Triton, bit for bit that of fasttx.philox; seeds on the device; the online softmax's step."""

import math

import pytest
import torch
from budget import assert_within_budget

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from fasttx.kernels.dropout import Dropout  # noqa: E402
from fasttx.kernels.math import LOG2E, dropout_keep, online_softmax_step  # noqa: E402

from fasttx import philox  # noqa: E402
from fasttx.rng import draw_seed  # noqa: E402
from gpu.launchers import by_target, on_triton  # noqa: E402

SEEDS = (0, 1, -1, 2**31, 2**63 - 1, -(2**63), 12345678901234567)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _keep_kernel(
    out_ptr, seed_ptr, seed: tl.int64, threshold: tl.int64, batch, head, first_row, first_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    keep = dropout_keep(seed, seed_ptr, threshold, batch, head, first_row + rows, first_column, COLUMNS)
    tl.store(out_ptr + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep.to(tl.int8))


def kept(dropout, batch, head, first_row, first_column, rows=8, columns=64):
    out = torch.empty(rows, columns, dtype=torch.int8)
    seed, threshold, _ = dropout.numbers
    _keep_kernel[(1,)](
        out, dropout.seed_ptr, seed, threshold, batch, head, first_row, first_column, ROWS=rows, COLUMNS=columns,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out.bool().cpu()


def expected(seed, p, batch, head, first_row, first_column, rows=8, columns=64):
    batch, head = torch.tensor([batch], device="cpu"), torch.tensor([head], device="cpu")
    whole = philox.keep_mask(seed, batch, head, first_row + rows, first_column + columns, p)
    return whole[0, 0, first_row:, first_column:]


@by_target
@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_the_references(target, seed):
    with on_triton(target):
        mask = kept(Dropout.of(0.3, torch.tensor(seed)), 3, 2, 5, 12)
    assert torch.equal(mask, expected(seed, 0.3, 3, 2, 5, 12))


@by_target
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 1 - 1e-9])
def test_every_probability(target, p):
    with on_triton(target):
        mask = kept(Dropout.of(p, torch.tensor(7)), 0, 0, 0, 0, rows=16, columns=128)
    assert torch.equal(mask, expected(7, p, 0, 0, 0, 0, rows=16, columns=128))


@by_target
def test_a_seed_in_memory(target):
    seed = torch.tensor(2**40 + 9)
    in_memory = Dropout.of(0.3, seed)._replace(seed_ptr=seed, numbers=(0, *Dropout.of(0.3, seed).numbers[1:]))
    with on_triton(target):
        assert torch.equal(kept(in_memory, 1, 0, 0, 4), expected(2**40 + 9, 0.3, 1, 0, 0, 4))


def test_a_seed_on_the_device_is_not_waited_for():
    seed = torch.empty((), dtype=torch.int64, device="meta")  # has no value that could be asked for
    assert Dropout.of(0.5, seed) == (True, seed, (0, 2**31, 2.0))


def test_a_captured_graph_draws_its_seeds_on_the_device(monkeypatch):
    assert draw_seed().is_cpu
    drawn = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "randint", lambda *_, device, **__: drawn.append(device))
    draw_seed()
    assert drawn == ["cuda"]


@pytest.mark.parametrize(
    ("p", "seed", "reason"),
    [
        (1.0, torch.tensor(1), r"dropout_p must be in \[0, 1\), got 1.0"),
        (-0.1, torch.tensor(1), "got -0.1"),
        (float("nan"), torch.tensor(1), "got nan"),
        (0.5, None, "needs a seed: one int64, got None"),
        (0.5, torch.tensor(1.0), "needs a seed"),
        (0.5, torch.tensor([1, 2]), "needs a seed"),
    ],
)
def test_bad_dropout_is_refused(p, seed, reason):
    with pytest.raises(ValueError, match=reason):
        Dropout.of(p, seed)


@triton.jit
def _softmax_kernel(scores_ptr, out_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """softmax's largest value, sum, and the sum over again by shrinking, as attention accumulates its output."""
    rows = tl.arange(0, ROWS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    again = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        scores = tl.load(scores_ptr + rows[:, None] * WIDTH + column[None, :]) * LOG2E
        probabilities, shrink, largest, total = online_softmax_step(scores, largest, total)
        again = again * shrink + tl.sum(probabilities, 1)
    tl.store(out_ptr + rows, largest)
    tl.store(out_ptr + ROWS + rows, total)
    tl.store(out_ptr + 2 * ROWS + rows, again)


@by_target
def test_online_softmax(target):
    scores = 5 * torch.randn(16, 128)
    scores[0] = -torch.inf
    scores[1, :64] = -torch.inf
    scores[2, 64:] = -torch.inf
    out = torch.empty(3, 16)
    with on_triton(target):
        _softmax_kernel[(1,)](scores, out, ROWS=16, WIDTH=128, BLOCK=32, enable_fp_fusion=False)
    largest, total, again = out.cpu()
    scores = scores.cpu()
    assert largest[0] == -torch.inf and total[0] == again[0] == 0
    lse = (largest.double() + total.double().log2()) * math.log(2)
    assert_within_budget(
        actual=lse.float(), eager=torch.logsumexp(scores, 1), truth=torch.logsumexp(scores.double(), 1), name="lse"
    )
    # The three blocks after the first round once each in `total`, by a fused multiply-add, and twice in the other.
    assert ((again.double() - total).abs() <= 3 * 3 * 2**-24 * total).all()

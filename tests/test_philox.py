"""Philox4x32-10 against the published vectors and against plain Python integers."""

import math
import unittest.mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fasttx
from fasttx import philox

MASK32 = 0xFFFFFFFF
INDICES = st.one_of(st.integers(0, 9), st.integers(0, MASK32))


def python_philox(counter, key):
    """The paper's round function on Python integers, which do not wrap."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def python_keep(seed, batch, head, row, column, p):
    key = (seed & MASK32, (seed >> 32) & MASK32)
    word = python_philox((column >> 2, row, head, batch), key)[column & 3]
    return word >= min(round(p * 2**32), MASK32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
@pytest.mark.parametrize("tensor_key", [False, True])
def test_published_vectors(counter, key, expected, tensor_key):
    words = tuple(torch.tensor(word) for word in counter)
    key = tuple(torch.tensor(word) for word in key) if tensor_key else key
    assert tuple(word.item() for word in philox.philox4x32(words, key)) == expected
    assert python_philox(counter, tuple(int(word) for word in key)) == expected


def test_counters_are_taken_modulo_32_bits():
    words = tuple(torch.tensor(word) for word in (5, 6, 7, 8))
    shifted = tuple(word + (3 << 32) for word in words)
    assert philox.philox4x32(words, (1, 2)) == philox.philox4x32(shifted, (1, 2))


@settings(max_examples=60, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    batch=st.lists(INDICES, max_size=3),
    head=st.lists(INDICES, max_size=3),
    rows=st.integers(0, 5),
    columns=st.integers(0, 11),
    p=st.floats(0, 1, exclude_max=True),
)
@pytest.mark.parametrize("block", [1, 20, philox._BLOCK])
def test_keep_mask_is_one_word_per_element(block, seed, batch, head, rows, columns, p):
    indices = [torch.tensor(numbers, dtype=torch.int64) for numbers in (batch, head)]
    with unittest.mock.patch.object(philox, "_BLOCK", block):
        mask = philox.keep_mask(seed, *indices, rows, columns, p)
    expected = [
        [
            [[python_keep(seed, b, h, i, j, p) for j in range(columns)] for i in range(rows)]
            for h in head
        ]
        for b in batch
    ]
    shape = (len(batch), len(head), rows, columns)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.tensor(expected, dtype=torch.bool).reshape(shape))


def test_seeds_as_int_and_tensor_agree_in_all_64_bits():
    for seed in (0, 7, MASK32, 1 << 32, 2**63 - 1, -1, -(2**62)):
        expected = philox.matrix_keep_mask(seed, 3, 9, 0.5)
        assert torch.equal(philox.matrix_keep_mask(torch.tensor(seed), 3, 9, 0.5), expected)
        assert torch.equal(philox.matrix_keep_mask(seed % 2**64, 3, 9, 0.5), expected)
    low, high = (philox.matrix_keep_mask(seed, 8, 64, 0.5) for seed in (7, 7 + (1 << 32)))
    assert not torch.equal(low, high)


def test_matrix_is_batch_and_head_zero():
    zero = torch.zeros(1, dtype=torch.int64)
    matrix = philox.matrix_keep_mask(3, 6, 10, 0.3)
    assert torch.equal(matrix, philox.keep_mask(3, zero, zero, 6, 10, 0.3)[0, 0])


def test_a_larger_mask_holds_the_smaller_one():
    batch, head = torch.arange(3), torch.arange(4)
    large = philox.keep_mask(11, batch, head, 9, 23, 0.4)
    small = philox.keep_mask(11, batch[1:2], head[2:], 5, 14, 0.4)
    assert torch.equal(large[1:2, 2:, :5, :14], small)
    several_blocks = philox.matrix_keep_mask(11, 1000, 300, 0.4)
    assert torch.equal(several_blocks[900:, :7], philox.matrix_keep_mask(11, 1000, 7, 0.4)[900:])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_kept_fraction(p):
    mask = philox.keep_mask(2024, torch.arange(4), torch.arange(4), 64, 253, p)
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(mask.double().mean().item() - (1 - p)) < 5 * deviation
    # Neighbours along every dim are independent: they agree with probability p^2 + (1 - p)^2.
    agree = p * p + (1 - p) * (1 - p)
    for dim in range(4):
        count = mask.shape[dim] - 1
        same = mask.narrow(dim, 0, count) == mask.narrow(dim, 1, count)
        # Overlapping pairs are correlated; doubling the variance covers them.
        deviation = math.sqrt(2 * agree * (1 - agree) / same.numel())
        assert abs(same.double().mean().item() - agree) < 5 * deviation


def test_a_word_equal_to_the_threshold_is_kept():
    first = 0x6627E8D5  # the word of element (0, 0) under seed 0
    kept = [philox.matrix_keep_mask(0, 1, 1, word / 2**32).item() for word in (first, first + 1)]
    assert kept == [True, False]


class Bounded(int):
    """Compiled code may take a signed overflow for impossible and drop the masks after it."""

    def __mul__(self, other):
        product = int(self) * other
        assert -(2**63) <= product < 2**63
        return torch.tensor(product)


@pytest.mark.parametrize("multiplier", philox._MULTIPLIERS)
@pytest.mark.parametrize("word", [0, 1, 0x80000000, MASK32])
def test_products_fit_in_int64(multiplier, word):
    halves = philox._multiply_wide(multiplier, Bounded(word))
    assert tuple(half.item() for half in halves) == divmod(multiplier * word, 2**32)


def test_threshold_limits():
    assert philox.drop_threshold(0.0) == 0
    assert philox.drop_threshold(0.5) == 1 << 31
    assert philox.drop_threshold(math.nextafter(1.0, 0.0)) == MASK32
    assert philox.drop_threshold(0.5 * 2**-32) == 0  # half rounds to even
    assert philox.matrix_keep_mask(5, 20, 20, 0.0).all()


def test_exported_with_a_dynamic_batch():
    class Training(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fasttx.nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)

        def forward(self, x):
            return self.layer(x)

    with fasttx.backend("reference"):
        batch = torch.export.Dim("batch", min=2, max=1000)
        exported = torch.export.export(Training(), (torch.randn(7, 9, 8),), dynamic_shapes={"x": {0: batch}})
    assert exported.module()(torch.randn(11, 9, 8)).shape == (11, 9, 8)

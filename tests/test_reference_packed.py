"""The reference on packed sequences, which it takes in batches of equal lengths."""

import pytest
import torch

from fasttx import _reference_math, reference


@pytest.mark.parametrize("scores", [1, 40, 2**22])
def test_packed_sequences_in_batches_of_any_size(monkeypatch, scores):
    """Equal lengths in one batch or several, some with no query or no key: each as alone, with its gradients."""
    monkeypatch.setattr(_reference_math, "_SCORES", scores)
    lengths = [(3, 4), (0, 2), (3, 4), (5, 0), (3, 4), (2, 2), (3, 4), (0, 0)]
    queries, keys = (torch.tensor([0, *column]).cumsum(0) for column in zip(*lengths, strict=True))
    q = torch.randn(queries[-1], 2, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(keys[-1], 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"is_causal": True, "dropout_p": 0.3, "return_lse": True, "seed": 5}
    packed = reference.attention_varlen(q, k, v, queries, keys, **options)
    assert all(tensor.is_contiguous() for tensor in packed)
    outputs, lses = [], []
    for index, (length_q, _) in enumerate(lengths):  # as the padded batch with these lengths has them
        if length_q == 0:
            continue
        taken = q[queries[index] : queries[index + 1]], *(x[keys[index] : keys[index + 1]] for x in (k, v))
        row = (torch.cat((x.new_zeros(index, *x.shape), x[None])).transpose(1, 2) for x in taken)
        output, lse = reference.attention(*row, **options)
        outputs.append(output[index].transpose(0, 1))
        lses.append(lse[index])
    expected = torch.cat(outputs), torch.cat(lses, 1)
    for actual, wanted in zip(packed, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(packed[0])
    gradients = [torch.autograd.grad((out[0] * weights).sum(), (q, k, v)) for out in (packed, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)

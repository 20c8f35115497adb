"""torch.autocast on a GPU: torch's casting lists there, which are not the CPU's, on tensors without data.

A fake tensor says that it is on a GPU, and torch's dispatcher autocasts it as one: what torch's own functions give is
torch's list. (torch's own modules, and nodes of autograd, do not run so where there is no GPU.)
"""

import contextlib

import pytest
import torch
from test_autocast import CASES, LOWER
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fasttx import functional, reference

WIDE = torch.float32


@pytest.fixture(autouse=True)
def attention_without_indices(monkeypatch):
    """An index with None, which the reference's attention has, asks for a GPU; what it is given and gives counts."""

    def attention(query, key, value, **options):
        return F.scaled_dot_product_attention(query, key, value), query.new_empty(query.shape[:-1], dtype=WIDE)

    monkeypatch.setattr(reference, "attention", attention)


@contextlib.contextmanager
def autocast(dtype):
    """As torch.autocast("cuda", dtype), which is off where there is no GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def dtypes(outputs):
    return [x.dtype for x in pytree.tree_leaves(outputs)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", LOWER)
def test_dtypes_of_functions_are_those_of_torch(name, dtype):
    ours, theirs, shapes = CASES[name]
    for first, others in ((WIDE, WIDE), (dtype, WIDE), (dtype, dtype), (WIDE, dtype), (torch.float64,) * 2):
        with FakeTensorMode():
            inputs = [torch.empty(s, device="cuda", dtype=others if i else first) for i, s in enumerate(shapes)]
            with autocast(dtype):
                expected, actual = dtypes(theirs(*inputs)), dtypes(ours(functional, *inputs))
        assert actual == expected, (first, others)

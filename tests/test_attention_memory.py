"""Attention's memory grows with the tokens, not with their square."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("needs_extension")

# Prints by how many bytes a forward and backward raise the peak over their tensors, all of which exist before.
PROGRAM = """
import resource, sys, torch
from fasttx.functional import attention

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(length, dtype):
    x = [torch.randn(1, 4, length, 64).to(dtype).requires_grad_() for _ in range(3)]
    slope = torch.randn_like(x[0])
    before = peak()
    output = attention(*x, is_causal=True)
    results = [output, *torch.autograd.grad(output, x, slope)]
    return peak() - before - sum(r.nbytes for r in results)

torch.set_num_threads(2)
dtype = getattr(torch, sys.argv[1])
run(300, dtype)
print(run(16384, dtype))
"""


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_sixteen_thousand_tokens_take_less_than_64_mib_more(dtype):
    command = [sys.executable, "-c", PROGRAM, dtype]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 64 << 20, found.stdout

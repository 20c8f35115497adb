"""Attention's memory grows with the tokens, not with their square."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("needs_extension")

# Prints by how many bytes a forward and backward raise the peak over their tensors, all of which exist before.
PROGRAM = """
import sys, torch
from fasttx.functional import attention

def peak():
    # Of this program alone: ru_maxrss would begin with the size of the process that started it.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def run(length, dtype, kind):
    x = [torch.randn(1, 4, length, 64).to(dtype).requires_grad_() for _ in range(3)]
    slope = torch.randn_like(x[0])
    options = {"is_causal": True}
    if kind == "mask":
        options = {"attn_mask": (torch.rand(length) > 0.1).expand(1, 4, length, length)}
    elif kind == "bias":
        x.append(torch.randn(4, 1, length).to(dtype).requires_grad_())
    before = peak()
    output = attention(*x[:3], **{"attn_mask": x[3]} if kind == "bias" else options)
    results = [output, *torch.autograd.grad(output, x, slope)]
    return peak() - before - sum(r.nbytes for r in results)

torch.set_num_threads(2)
name, length, kind = sys.argv[1:]
dtype = getattr(torch, name)
run(300, dtype, kind)
print(run(int(length), dtype, kind))
"""


def _bytes(*arguments: str) -> int:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_sixteen_thousand_tokens_take_less_than_64_mib_more(dtype):
    assert _bytes(dtype, "16384", "causal") < 64 << 20


@pytest.mark.parametrize("kind", ("mask", "bias"))
def test_a_mask_that_broadcasts_is_never_made_dense(kind):
    """Of 4 heads and 6000 tokens it would be 137 MiB as bool, 549 MiB as float32; and so would the bias's gradient."""
    assert _bytes("float32", "6000", kind) < 64 << 20

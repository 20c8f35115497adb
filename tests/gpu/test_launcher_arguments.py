"""Bad input to the launchers: refused before anything is launched, as by the C++ kernels' bindings."""

import pytest
import torch
from fasttx.kernels import register
from fasttx.kernels._attention_call import Call
from test_raw_ops import RAW

from gpu.launchers import on_triton

LAUNCHERS = {launcher.__name__: launcher for launcher in register.LAUNCHERS}
OPS = [name for name in RAW if name in LAUNCHERS and not name.startswith(("attention", "self_attention"))]
EVERY = [(name, change) for name in OPS for change in RAW[name][1]]


@pytest.mark.parametrize("name", OPS)
def test_arguments_as_they_should_be(name):
    with on_triton("sm_80") as machine:
        LAUNCHERS[name](**RAW[name][0])
    assert machine.launches


@pytest.mark.parametrize(("name", "change"), EVERY, ids=[f"{name}-{'-'.join(change)}" for name, change in EVERY])
def test_arguments_that_do_not_fit(name, change):
    with on_triton("sm_80") as machine, pytest.raises((TypeError, ValueError)):
        LAUNCHERS[name](**RAW[name][0] | change)
    assert not machine.launches


@pytest.mark.parametrize("name", OPS)
def test_float64_is_refused(name):
    wide = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in RAW[name][0].items()
    }
    with on_triton("sm_80") as machine, pytest.raises(TypeError, match="must be float32, bfloat16 or float16"):
        LAUNCHERS[name](**wide)
    assert not machine.launches


@pytest.mark.parametrize(("width", "value_width", "how"), [(128, 80, "tf32"), (129, 80, "ieee"), (80, 129, "ieee")])
def test_heads_too_wide_for_tf32_are_multiplied_as_float32(width, value_width, how):
    query, value = torch.zeros(1, 1, 4, width), torch.zeros(1, 1, 4, value_width)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        call = Call(query, query, value, *(None,) * 5, False, 0, -1, -1, 0.0, None, 1.0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for kernel in ("attention_fwd", "attention_split", "attention_bwd_dq", "attention_bwd_dkdv", "attention_bias_bwd"):
        assert call.constants_of(kernel)[-1] == how

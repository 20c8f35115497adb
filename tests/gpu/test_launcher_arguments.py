"""Bad input to the launchers: refused before anything is launched, as by the C++ kernels' bindings."""

import pytest
import torch
from fasttx.kernels import register
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

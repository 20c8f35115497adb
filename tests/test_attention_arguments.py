"""What attention refuses, and what it says."""

from collections.abc import Callable

import pytest
import torch

import fasttx.functional as F
from fasttx.ops import attention as ops

pytestmark = pytest.mark.usefixtures("needs_extension")


def _refusals() -> dict[str, tuple[str, Callable[[list], None]]]:
    """What is wrong with the call, by name: the message, and the change to good arguments."""

    def put(index: int, value: object) -> Callable[[list], None]:
        return lambda arguments: arguments.__setitem__(index, value)

    x, mask = torch.randn(2, 4, 6, 8), torch.ones(2, 4, 6, 6, dtype=torch.bool)
    numbers = torch.tensor
    return {
        "dtype": ("query must be float32", put(0, x.int())),
        "key's dtype": ("key differs in dtype", put(1, x.double())),
        "dimensions": ("4 dimensions", put(2, x[0])),
        "width": ("differ in width", put(1, x[..., :7])),
        "length": ("heads or length", put(2, x[:, :, :5])),
        "kv heads": ("heads or length", put(2, x[:, :2])),
        "heads": ("multiple", lambda a: a.__setitem__(slice(1, 3), [x[:, :3], x[:, :3]])),
        "batch": ("differ in batch", lambda a: a.__setitem__(slice(1, 3), [x[:1], x[:1]])),
        "mask's shape": ("does not broadcast", put(3, mask[..., :5])),
        "mask's dims": ("4 dimensions", put(3, mask[0])),
        "mask's dtype": ("attn_mask must be bool", put(3, mask.int())),
        "mask too wide": ("attn_mask must be bool", put(3, mask.double())),
        "lengths too long": ("must lie in", put(4, numbers([3, 7]))),
        "negative lengths": ("must lie in", put(4, numbers([3, -1]))),
        "lengths' dtype": ("int64", put(4, numbers([3, 3], dtype=torch.int32))),
        "lengths' number": ("must hold 2", put(4, numbers([3]))),
        "half of the offsets": ("come together", put(5, numbers([0, 6]))),
        "slopes": ("alibi_slopes", put(7, torch.rand(3))),
        "slopes' dtype": ("alibi_slopes", put(7, torch.rand(4).double())),
        "dropout": ("dropout_p", put(12, 1.0)),
        "no seed": ("seed", put(12, 0.5)),
    }


REFUSALS = _refusals()


@pytest.mark.parametrize("what", REFUSALS)
def test_the_op_itself_refuses_what_would_read_astray(what):
    message, change = REFUSALS[what]
    good = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    good += [None, None, None, None, None, False, 0, -1, -1, 0.0, None, 0.5]
    ops.attention_fwd(*good)
    change(good)
    with pytest.raises(RuntimeError, match=message):
        ops.attention_fwd(*good)


@pytest.mark.parametrize("offsets", ([0, 4], [1, 3, 6], [0, 5, 3, 6], [0, 7, 6], [0, -1, 6], []), ids=str)
def test_the_op_itself_refuses_offsets_out_of_bounds(offsets):
    x = torch.randn(6, 2, 8)
    bad = torch.tensor(offsets, dtype=torch.int64)
    good = torch.tensor([0] * max(len(offsets) - 1, 0) + [6])
    for q, k in ((bad, good), (good, bad)):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            ops.attention_fwd(x, x, x, None, None, q, k, None, False, 0, -1, -1, 0.0, None, 1.0)


def test_the_gradient_must_fit_the_forward():
    inputs = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    options = (None, None, None, None, None, False, 0, -1, -1, 0.0, None, 1.0)
    output, lse, stats, _ = ops.attention_fwd(*inputs, *options)
    for slope, slope_lse, out, at, message in (
        (output[..., :4], None, output, stats, "grad has the wrong shape"),
        (output, None, output[:1], stats, "output has the wrong shape"),
        (output, None, output, stats[:1], "stats does not fit"),
        (output, None, output, stats.double(), "stats does not fit"),
        (output, lse[..., :1], output, stats, "grad_lse does not fit"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.attention_bwd(slope, slope_lse, *inputs, out, at, *options)


def test_bad_arguments():
    x = torch.randn(2, 4, 6, 8)
    bad: list[tuple[type, str, tuple, dict]] = [
        (TypeError, "query", (x.int(), x, x), {}),
        (TypeError, "key", (x, x.double(), x), {}),
        (ValueError, "query", (x[0], x, x), {}),
        (ValueError, "width", (x, x[..., :7], x), {}),
        (ValueError, "heads", (x, x[:, :2], x[:, :2]), {}),
        (ValueError, "multiple", (x, x[:, :3], x[:, :3]), {"enable_gqa": True}),
        (ValueError, "batch", (x, x[:1], x[:1]), {}),
        (ValueError, "broadcast", (x, x, x), {"attn_mask": torch.ones(5, 6) > 0}),
        (TypeError, "attn_mask", (x, x, x), {"attn_mask": torch.ones(6, 6).int()}),
        (ValueError, "key_lengths", (x, x, x), {"key_lengths": torch.tensor([7, 1])}),
        (TypeError, "key_lengths", (x, x, x), {"key_lengths": torch.rand(2)}),
        (ValueError, "dropout_p", (x, x, x), {"dropout_p": 1.0}),
        (ValueError, "dropout_p", (x, x, x), {"dropout_p": -0.1}),
        (ValueError, "alibi_slopes", (x, x, x), {"alibi_slopes": torch.rand(3)}),
    ]
    for error, message, tensors, options in bad:
        with pytest.raises(error, match=message):
            F.attention(*tensors, **options)

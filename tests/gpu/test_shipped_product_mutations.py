"""Attention and linear layers that ship, broken on purpose: the checks, or the comparison with PyTorch, must notice."""

import math
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fasttx.kernels import matmul  # noqa: E402
from fasttx.kernels.attention import attention_fwd  # noqa: E402
from fasttx.kernels.attention_bwd import attention_bwd  # noqa: E402

from gpu import mutations  # noqa: E402
from gpu.launchers import full  # noqa: E402
from gpu.mutations import SYNCHRONISATION, Trial  # noqa: E402
from gpu.test_shipped_mutations import by_target, trial  # noqa: E402


def attention(
    queries: int, keys: int, *, causal: bool = True, backward: bool = False, wide: bool = False, ahead: int = 0
) -> Trial:
    """Two heads over one of keys, bfloat16; causal: the last query but `ahead` sees all keys, and so do those after it.

    Plain: two sequences. wide: two sequences and two heads of keys, each with its two.
    """
    batch, kv_heads, width = 2 if wide or not causal else 1, 2 if wide else 1, 64
    offset = keys - queries + ahead if causal else 0
    q, slope = torch.randn(2, batch, 2 * kv_heads, queries, width).bfloat16().unbind()
    k, v = torch.randn(2, batch, kv_heads, keys, width).bfloat16().unbind()
    q, slope, k, v = (x.clone() for x in (q, slope, k, v))  # past the end of one must not lie another
    options = (None,) * 5 + (causal, offset, -1, -1, 0.0, None, width**-0.5)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(offset + 1) & causal
    key, value = (x.repeat_interleave(2, 1) for x in leaves[1:])
    scores = (leaves[0] @ key.mT).masked_fill(hidden, -math.inf)
    output, lse = (scores * width**-0.5).softmax(-1) @ value, (scores * width**-0.5).logsumexp(-1)
    if not backward:
        return trial(lambda: attention_fwd(q, k, v, *options)[:2], (output.detach(), lse.detach()), 2**-7)
    gradients = torch.autograd.grad(output, leaves, slope.double(), retain_graph=True)
    top = scores.detach().amax(-1)
    stats = torch.stack([top, (top * width**-0.5 - lse.detach()).exp()], -1).float()
    output = output.detach().bfloat16()
    return trial(lambda: attention_bwd(slope, None, q, k, v, output, stats, *options), gradients, 2**-6)


def product(rows: int, columns: int, depth: int) -> Trial:
    """relu(a b + bias), and what it is taken of."""
    a, b, bias = torch.randn(rows, depth).bfloat16(), torch.randn(columns, depth).bfloat16(), torch.randn(columns)
    bias = bias.bfloat16()
    preact = a.double() @ b.double().t() + bias.double()

    def call() -> tuple:
        found, before = torch.empty(2, rows, columns, dtype=torch.bfloat16).unbind()
        found, before = found.clone(), before.clone()
        matmul.multiply(a, b.t(), found, bias=bias, activation=1, preact=before)
        return found, before

    return trial(call, (F.relu(preact), preact), 2**-7)


# By kernel: the trials, and its name. Sizes make each of their loops run never, once, and several times.
LOOPS = [(70, 150), (70, 420), (60, 60)]
KERNELS = {
    "attention": (lambda: [attention(*size) for size in LOOPS], "_attention_fwd_kernel"),
    "attention's dq": (lambda: [attention(*size, backward=True) for size in LOOPS], "_bwd_dq_kernel"),
    "attention's dk, dv": (
        lambda: [attention(*size, backward=True) for size in ((232, 232), (200, 200))], "_bwd_dkdv_kernel"
    ),
    "matmul": (lambda: [product(137, 272, 208), product(40, 160, 80)], "_matmul_kernel"),
}  # fmt: skip
_JOINS_THE_NEXT = "the group joins the next one, and no wait tells the two apart"
_AT_THE_HEAD = "what a copy overwrites was last read before the barrier at the loop's head, or another that follows"
_COVERED = "the fence at the loop's head follows every copy; what is multiplied later lies in registers"
_UNTOUCHED = "no register of the second product was touched since the first one's fence"
_A_MULTIPLE = "the depth is compared, which is a multiple of 16 here"
_IN_EVERY_TILE = "a tile's first 16 columns are within, as there are a multiple of 16"
_NO_EFFECT = "one more tile, or step of the loop, or copy ahead: beyond the matrix, where masks leave nothing to do"
# Survivors that change nothing, by kind: how many, and why.
EQUIVALENT: dict[tuple[str, str], dict[str, tuple[int, str]]] = {
    ("attention", "sm_80"): {
        "dropped barrier": (2, "after a loop, whose last step ends with one; the result lies where only queries were"),
        "dropped wait": (1, "after the last loop: nothing reads what those copies write"),
        "late wait": (1, "the same wait"),
        "dropped commit": (2, _JOINS_THE_NEXT),
    },
    ("attention", "sm_90"): {
        "dropped barrier": (4, _AT_THE_HEAD),
        "dropped commit": (2, _JOINS_THE_NEXT),
        "dropped proxy fence": (2, _COVERED),
    },
    ("attention's dq", "sm_80"): {
        "dropped barrier": (2, "after a loop, whose last step ends with one; the result lies where only queries were"),
        "dropped wait": (1, "after the last loop: nothing reads what those copies write"),
        "late wait": (1, "the same wait"),
        "dropped commit": (4, _JOINS_THE_NEXT),
    },
    ("attention's dq", "sm_90"): {
        "dropped barrier": (6, _AT_THE_HEAD),
        "dropped commit": (4, _JOINS_THE_NEXT),
        "dropped wgmma fence": (2, _UNTOUCHED),
        "dropped proxy fence": (4, _COVERED),
    },
    ("attention's dk, dv", "sm_90"): {
        "dropped barrier": (7, _AT_THE_HEAD + "; the last loop has one step"),
        "dropped commit": (24, _JOINS_THE_NEXT),
        "dropped wgmma wait": (
            3,
            "the second product's wait is for both, and nothing touches the first one's sums before",
        ),
        "dropped wgmma fence": (5, _UNTOUCHED + ", or the loop before ended with one"),
        "dropped proxy fence": (9, _COVERED),
    },
    ("matmul", "sm_80"): {
        "off by one": (4, _A_MULTIPLE),
        "off by one (register)": (4, _NO_EFFECT),
        "dropped barrier": (1, "at the loop's head: the one at its end already follows the wait for these tiles"),
        "dropped wait": (3, "two in a row, and one at the loop's head after which nothing was committed"),
        "late wait": (3, "the same waits"),
        "dropped commit": (1, _JOINS_THE_NEXT),
    },
    ("matmul", "sm_90"): {
        "off by one": (3, _A_MULTIPLE),
        "off by one (register)": (5, _NO_EFFECT + "; " + _IN_EVERY_TILE),
        "dropped commit": (1, _JOINS_THE_NEXT),
    },
}


def judge(kernel: str, target: str, kinds: list[str], trials: list[Trial] | None = None) -> Counter:
    """The checks that noticed, and how many mutations each; all but equivalent ones must be noticed."""
    make, name = KERNELS[kernel]
    left, outcomes = mutations.survivors(target, trials or make(), kinds, kernel=name)
    allowed = EQUIVALENT.get((kernel, target), {})
    found = Counter(mutation.kind for mutation in left)
    beyond = [str(m) for m in left if found[m.kind] > allowed.get(m.kind, (0, ""))[0]]
    assert not beyond, "\n".join(beyond)
    return Counter(outcome.check for outcome in outcomes if outcome.check is not None)


@full
@by_target
@pytest.mark.parametrize("kernel", KERNELS)
def test_missing_synchronisation_is_caught(kernel: str, target: str) -> None:
    caught = judge(kernel, target, SYNCHRONISATION)
    assert (caught["shared race"] or caught["warp race"]) and "malformed" not in caught and "result" not in caught


@by_target
def test_every_store_of_a_product_is_guarded(target: str) -> None:
    caught = judge("matmul", target, ["unguarded store"], [product(137, 144, 208), product(40, 160, 80)])
    assert set(caught) == {"global bounds"}


def edges_of_a_product() -> list[Trial]:
    """Each row and column of a thread is the first outside in one; tiles in groups, and all buffers in turn."""
    several = (137, 272, 208), (40, 160, 80), (1160, 16, 16)
    depths = [*range(16, 128, 16), 464, *range(144, 256, 16), 240]
    each = ((8 * i + 9, 16 * (5 * i % 16 + 1), depth) for i, depth in enumerate(depths))
    with_few = product(300, 256, 48)  # tiles a program, that is

    def call() -> object:
        with mock.patch.object(matmul, "_processors", lambda device: 3):
            return with_few.call()

    return [*(product(*size) for size in (*several, *each)), Trial(call, with_few.agrees)]


@full
@by_target
def test_a_product_s_masks_and_strides_are_right_to_the_element(target: str) -> None:
    caught = judge("matmul", target, ["off by one", "off by one (register)", "wrong stride"], edges_of_a_product())
    assert caught["global bounds"] and caught["result"] and "malformed" not in caught


@full
@by_target
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "matmul"])
def test_every_store_of_attention_is_guarded(kernel: str, target: str) -> None:
    backward = kernel != "attention"
    trials = [attention(*size, causal=False, backward=backward) for size in ((132, 70), (67, 97), (131, 161))]
    assert set(judge(kernel, target, ["unguarded store"], trials)) <= {"global bounds", "global race"}

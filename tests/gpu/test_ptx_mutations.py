"""Kernels broken on purpose: the emulator's checks, or the comparison with PyTorch, must notice."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402

from gpu import mutations, sample_kernels  # noqa: E402
from gpu.mutations import DATA, EDGES, SYNCHRONISATION, Trial  # noqa: E402

TARGETS = ["sm_80", "sm_90"]


def _near(expected: torch.Tensor, epsilon: float) -> Callable[[torch.Tensor], bool]:
    bound = epsilon * (expected.abs() + expected.abs().max())
    return lambda actual: bool(((actual.double() - expected).abs() <= bound).all())


def attention(length: int) -> Trial:
    # Tensors of their own: past the end of one must not lie another.
    q, k, v = (torch.randn(2, length, 64).bfloat16() for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)

    def call() -> torch.Tensor:
        out = torch.full_like(q, math.nan)
        sample_kernels.attention[(triton.cdiv(length, 64), 2)](
            q, k, v, out, 64**-0.5 * math.log2(math.e), length, True, 64, 64, 64, num_warps=4, num_stages=2
        )
        return out

    return Trial(call, _near(expected, 2**-7))


def matmul(m: int, n: int, k: int) -> Trial:
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()

    def call() -> torch.Tensor:
        out = torch.full((m, n), math.nan)
        grid = triton.cdiv(m, 64), triton.cdiv(n, 64)
        sample_kernels.matmul[grid](a, b, out, m, n, k, 64, 64, 32, False, False, num_warps=4, num_stages=3)
        return out

    return Trial(call, _near(a.double() @ b.double(), 2**-12))


def layer_norm(width: int) -> Trial:
    x, weight, bias = torch.randn(5, width), torch.randn(width), torch.randn(width)
    expected = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)

    def call() -> torch.Tensor:
        out = torch.full_like(x, math.nan)
        sample_kernels.layer_norm[(5,)](x, out, weight, bias, width, width, 1e-5, BLOCK=512, enable_fp_fusion=False)
        return out

    return Trial(call, _near(expected, 2**-20))


def add_rows(size: int) -> Trial:
    x, y = torch.randn(size), torch.randn(size)

    def call() -> torch.Tensor:
        out = torch.full((size,), math.nan)
        sample_kernels.add_rows[(triton.cdiv(size, 512),)](x, y, out, size, BLOCK=512)
        return out

    return Trial(call, lambda out: torch.equal(out, x + y))


KERNELS = {
    "attention": lambda: [attention(130), attention(65)],
    "matmul": lambda: [matmul(65, 80, 144), matmul(97, 144, 80)],
    "layer norm": lambda: [layer_norm(301), layer_norm(9)],
}
_JOINS_THE_NEXT = "the group joins the next one, and no wait tells the two apart"
# Survivors that change nothing, by kind: how many, and why.
EQUIVALENT: dict[tuple[str, str], dict[str, tuple[int, str]]] = {
    ("attention", "sm_80"): {
        "dropped barrier": (1, "after the loop: the result is laid out where only the queries were, long since read"),
        "dropped wait": (1, "after the loop: every copy was waited for inside"),
        "late wait": (1, "the same wait"),
        "dropped commit": (2, _JOINS_THE_NEXT),
    },
    ("attention", "sm_90"): {
        "dropped commit": (2, _JOINS_THE_NEXT),
        "dropped proxy fence": (1, "the first product's fence comes after both copies and covers this one"),
    },
    ("matmul", "sm_80"): {
        "dropped barrier": (1, "at the loop's head: the one at its end already follows the wait for these tiles"),
        "dropped wait": (3, "two in a row, and one at the loop's head after which nothing was committed"),
        "late wait": (3, "the same waits"),
        "dropped commit": (1, _JOINS_THE_NEXT),
    },
    ("matmul", "sm_90"): {"dropped commit": (1, _JOINS_THE_NEXT)},
}


def _judge(kernel: str, target: str, kinds: list[str], most: int | None) -> Counter:
    left, outcomes = mutations.survivors(target, KERNELS[kernel](), kinds, most)
    allowed = EQUIVALENT.get((kernel, target), {})
    found = Counter(mutation.kind for mutation in left)
    beyond = [str(m) for m in left if found[m.kind] > allowed.get(m.kind, (0, ""))[0]]
    assert not beyond, "\n".join(beyond)
    return Counter(outcome.check for outcome in outcomes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_missing_synchronisation_is_caught(kernel: str, target: str) -> None:
    caught = _judge(kernel, target, SYNCHRONISATION, None)
    assert caught["shared race"] or caught["warp race"]
    assert "malformed" not in caught and "result" not in caught
    if kernel != "layer norm":
        assert caught["uninitialised shared memory"] or caught["asynchronous copy"]
    if kernel != "layer norm" and target == "sm_90":
        assert caught["wgmma fence"] and caught["proxy fence"] and caught["asynchronous product"]


@pytest.mark.emulated_full
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_wrong_data_is_caught(kernel: str, target: str) -> None:
    caught = _judge(kernel, target, DATA, 12)
    assert caught["result"] and "malformed" not in caught


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_data_is_caught_in_a_sample(target: str) -> None:
    assert _judge("matmul", target, DATA, 2)["result"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_edge_of_a_vector_is_guarded(target: str) -> None:
    trials = [add_rows(size) for size in (1001, 1002, 1003, 1004)]
    left, outcomes = mutations.survivors(target, trials, EDGES)
    assert not left, "\n".join(map(str, left))
    assert {"global bounds"} <= {outcome.check for outcome in outcomes}


@pytest.mark.emulated_full
@pytest.mark.parametrize("target", TARGETS)
def test_every_row_and_column_of_attention_is_guarded(target: str) -> None:
    trials = [attention(length) for length in (65, 130, 67, 73, 81, 97, 35, 3)]
    left, _ = mutations.survivors(target, trials, ["unguarded store", "whole copy", "unguarded load"])
    assert not left, "\n".join(map(str, left))


def test_a_mutation_is_one_changed_line() -> None:
    text = "bar.sync 0;\nmov.u32 %r1, %tid.x;\n@%p1 st.global.b32 [%rd1], %r1;"
    found = {m.kind: m(text).split("\n") for m in mutations.of(text)}
    assert found["dropped barrier"][0] == "" and found["unguarded store"][2] == "st.global.b32 [%rd1], %r1;"
    assert found["inverted guard"][2].startswith("@!%p1") and set(found) == {
        "dropped barrier",
        "unguarded store",
        "inverted guard",
    }

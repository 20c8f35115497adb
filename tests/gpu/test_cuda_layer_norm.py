"""Layer norm's CUDA C++ kernels on the emulator: teams of every size, their accesses, what a row's bits depend on."""

import struct
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from budget import poisoned

pytest.importorskip("triton")

from fasttx import philox  # noqa: E402
from gpu import binary, mutations  # noqa: E402
from gpu.launchers import BINARY, by_dtype, full  # noqa: E402
from gpu.mutations import SYNCHRONISATION, Trial  # noqa: E402
from gpu.test_layer_norm import EPS, SEED, P, check_add_norm, check_norm  # noqa: E402

pytestmark = pytest.mark.skipif(binary.missing is not None, reason=str(binary.missing))
RAW = torch.ops.fasttx_cuda

# Threads of a row by accesses of 16 bytes each; "wide": rows that no block holds.
FORWARD = ("8x1", "32x1", "32x2", "32x3", "32x4", "128x2", "128x4", "256x4", "512x4", "wide")
BACKWARD = ("8x1", "32x1", "32x2", "32x3", "32x4", "128x2", "256x2", "512x2", "wide")


def widest(team: str, dtype: torch.dtype) -> int:
    """How many values of a row the team holds."""
    threads, accesses = map(int, team.split("x"))
    return threads * accesses * 16 // dtype.itemsize


def widths(team: str, teams: tuple, dtype: torch.dtype) -> tuple[int, int]:
    """Two widths of the team: of whole accesses, and not."""
    if team == "wide":
        least = widest(teams[-2], dtype)
        return least + 24, least + 27
    return widest(team, dtype), widest(team, dtype) - 3


def sample(teams: tuple, quick: tuple) -> list:
    return [team if team in quick else pytest.param(team, marks=full) for team in teams]


def names(machine) -> set[str]:
    return {launch.name.removeprefix("layer_norm_").rpartition("_")[0] for launch in machine.launches}


@by_dtype
@pytest.mark.parametrize("team", sample(FORWARD, ("8x1", "32x3", "128x2")))
def test_every_team_forward(team, dtype):
    for width in widths(team, FORWARD, dtype):
        machine = check_norm(BINARY, dtype, (9 if team[:3] in ("8x1", "32x") else 2, width))
        assert f"fwd_{team}" in names(machine)


@by_dtype
@pytest.mark.parametrize("team", sample(BACKWARD, ("8x1", "32x4", "128x2")))
def test_every_team_backward(team, dtype):
    for width in widths(team, BACKWARD, dtype):
        machine = check_add_norm(BINARY, dtype, (21 if team[:3] in ("8x1", "32x") else 3, width), P)
        assert {f"bwd_{team}"} <= names(machine) and (team != "wide" or "bwd_sums" in names(machine))


# What moves: every value once, in accesses of 16 bytes.


def launched(call) -> list:
    with binary.intercepted() as machine:
        call()
    return machine.launches


@by_dtype
@pytest.mark.parametrize("width", [768, pytest.param(2048, marks=full), pytest.param(8192, marks=full)])
def test_forward_reads_and_writes_every_value_once(dtype, width):
    rows = 16
    x, residual = torch.randn(2, rows, width).to(dtype).unbind()
    weight, bias = torch.randn(2, width).to(dtype).unbind()
    (plain,) = launched(lambda: RAW.layer_norm_fwd(x, width, weight, bias, EPS))
    (added,) = launched(lambda: RAW.add_layer_norm_fwd(x, residual.clone(), width, weight, bias, EPS, P, SEED, True))
    matrix, parameters = x.nbytes, 2 * weight.nbytes
    for counts, read, written in ((plain.counts, matrix, matrix), (added.counts, 2 * matrix, 2 * matrix)):
        assert counts.read == read + parameters and counts.written == written == counts.stored_bytes
        # Beyond the first time weight and bias come from the cache, here for every row: no team has a second one.
        assert counts.loaded_bytes <= read + rows * parameters
        assert set(counts.loads) == set(counts.stores) == {16}


@by_dtype
def test_a_team_keeps_its_weights(dtype):
    rows, width = 140_000, 16 // dtype.itemsize
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    (launch,) = launched(lambda: RAW.layer_norm_fwd(x, width, weight, None, EPS))
    assert launch.counts.loaded_bytes <= x.nbytes + rows // 2 * weight.nbytes


@by_dtype
@pytest.mark.parametrize("width", [768, pytest.param(2048, marks=full), pytest.param(4096, marks=full)])
def test_backward_reads_and_writes_every_value_once(dtype, width):
    rows = 96
    x, dy, dsum = (t.clone() for t in torch.randn(3, rows, width).to(dtype).unbind())
    weight = torch.randn(width).to(dtype)
    launch, _ = launched(
        lambda: RAW.add_layer_norm_bwd(dy, dsum, x, weight, width, EPS, P, SEED, True, True, True, True)
    )
    counts, lines = launch.counts, launch.grid[0]
    assert counts.read == 3 * x.nbytes + weight.nbytes
    assert counts.written == counts.stored_bytes == 2 * x.nbytes + lines * width * 2 * 4
    assert counts.loaded_bytes <= 3 * x.nbytes + rows * weight.nbytes
    assert set(counts.loads) == {16} and counts.stores[16] * 16 == 2 * x.nbytes


# What a row's bits depend on: itself.


@pytest.mark.parametrize("width", [40, 768, pytest.param(9000, marks=full), pytest.param(20000, marks=full)])
def test_neither_the_batch_nor_the_place_in_memory_matters(width):
    x, dy = torch.randn(2, 9, width).bfloat16().unbind()
    weight = torch.randn(width).bfloat16()

    def both(x, dy, weight):
        y = RAW.layer_norm_fwd(x, width, weight, weight, EPS)
        return y, RAW.layer_norm_bwd(dy, x, weight, width, EPS, True, False, False)[0]

    def moved(tensor):
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    with binary.intercepted():
        together = both(x, dy, weight)
        alone = [both(x[i : i + 1], dy[i : i + 1], weight) for i in (0, 4, 8)]
        elsewhere = both(moved(x), moved(dy), moved(weight))
    for expected, shifted in zip(together, elsewhere, strict=True):
        assert torch.equal(expected, shifted)
    for i, row in zip((0, 4, 8), alone, strict=True):
        assert all(torch.equal(expected[i : i + 1], found) for expected, found in zip(together, row, strict=True))


@by_dtype
@pytest.mark.parametrize("width", [33, pytest.param(128, marks=full), pytest.param(20000, marks=full)])
def test_the_mask_of_dropout(dtype, width):
    x, nothing = torch.ones(3, width, dtype=dtype), torch.zeros(3, width, dtype=dtype)
    with binary.intercepted():
        _, sum = RAW.add_layer_norm_fwd(x, nothing, width, None, None, EPS, P, SEED, True)
    expected = philox.matrix_keep_mask(SEED, 3, width, P) / (1 - P)
    assert torch.equal(sum, expected.to(dtype))


def test_a_seed_on_the_device():
    x, nothing, seed = torch.ones(3, 40), torch.zeros(3, 40), SEED.clone()
    at_dropout = 6 * 8  # in LayerNormFwd, behind its pointers
    with binary.intercepted() as machine:
        machine.allow(seed, "seed")
        run = machine.run

        def with_its_address(kernel, grid, threads, arguments, memory, shared):
            (parameter,) = map(bytearray, arguments)
            struct.pack_into("<QQ", parameter, at_dropout, seed.data_ptr(), 0)
            run(kernel, grid, threads, [bytes(parameter)], memory, shared)

        machine.run = with_its_address
        _, sum = RAW.add_layer_norm_fwd(x, nothing, 40, None, None, EPS, P, torch.tensor(1), True)
    assert torch.equal(sum, (philox.matrix_keep_mask(SEED, 3, 40, P) / (1 - P)).float())


@pytest.mark.parametrize("width", [24, pytest.param(2048, marks=full), pytest.param(9000, marks=full)])
def test_only_what_is_wanted(width):
    x, dy, dsum = (t.clone() for t in torch.randn(3, 5, width).unbind())
    weight = torch.randn(width)

    def call(*needs):
        return RAW.add_layer_norm_bwd(dy, dsum, x, weight, width, EPS, P, SEED, *needs)

    with binary.intercepted():
        whole = call(True, True, True, True)
        for needs in ((True, False, False, False), (False, True, False, True), (False, False, True, False)):
            found = call(*needs)
            in_order = (needs[1], needs[0], *needs[2:])  # the residual's gradient comes first
            for tensor, expected, wanted in zip(found, whole, in_order, strict=True):
                assert torch.equal(tensor, expected) if wanted else tensor.numel() == 0


def test_a_block_whose_rows_end_in_a_warp_adds_nothing():
    # Lanes without a row see no variance, and here nothing is added to it.
    x, dy = torch.randn(2, 3, 16).unbind()
    with binary.intercepted():
        dx, dweight, dbias = RAW.layer_norm_bwd(dy, x, None, 16, 0.0, True, True, True)
    assert all(bool(t.isfinite().all()) for t in (dx, dweight, dbias))
    torch.testing.assert_close(dbias, dy.sum(0))


def test_errors():
    x = torch.randn(2, 8)
    with binary.intercepted():
        for call, words in (
            (lambda: RAW.layer_norm_fwd(x, 3, None, None, EPS), "does not consist of rows of 3"),
            (lambda: RAW.layer_norm_fwd(x, 8, x[0, :7], None, EPS), "weight must hold 8 values"),
            (lambda: RAW.layer_norm_fwd(x, 8, x[0].half(), None, EPS), "weight differs in dtype"),
            (lambda: RAW.layer_norm_fwd(x.double(), 8, None, None, EPS), "must be float32, bfloat16 or float16"),
            (lambda: RAW.layer_norm_bwd(x[:1], x, None, 8, EPS, True, False, False), "grad has the wrong shape"),
            (lambda: RAW.add_layer_norm_fwd(x, x, 8, None, None, EPS, 0.5, None, True), "dropout needs a seed"),
        ):
            with pytest.raises(RuntimeError, match=words):
                call()
    with pytest.raises(RuntimeError, match="tensors on a CUDA device"):
        RAW.layer_norm_fwd(x, 8, None, None, EPS)


# Barriers left out.


def trial(rows: int, width: int) -> Trial:
    x, dy = (t.clone() for t in torch.randn(2, rows, width).unbind())
    leaf, weight = x.double().requires_grad_(), torch.ones(width).double().requires_grad_()
    y = F.layer_norm(leaf, (width,), weight, None, EPS)
    expected = y.detach(), *torch.autograd.grad(y, (leaf, weight), dy.double()), dy.double().sum(0)

    def call():
        with poisoned():
            y = RAW.layer_norm_fwd(x, width, None, None, EPS)
            return y, *RAW.layer_norm_bwd(dy, x, None, width, EPS, True, True, True)

    def agrees(results):
        pairs = zip(results, expected, strict=True)
        return all(bool(((a.double() - b).abs() <= 2**-18 * (1 + b.abs().max())).all()) for a, b in pairs)

    return Trial(call, agrees)


@pytest.mark.parametrize(
    ("kernel", "size"),
    [
        ("fwd_128x2", (3, 600)),
        ("bwd_128x2", (9, 600)),
        ("bwd_32x1", (70, 68)),
        pytest.param("fwd_wide", (2, 8200), marks=full),
        pytest.param("bwd_wide", (2, 8200), marks=full),
        pytest.param("bwd_sums", (9, 8200), marks=full),
    ],
)
def test_missing_synchronisation_is_caught(kernel, size):
    left, outcomes = mutations.survivors(BINARY, [trial(*size)], SYNCHRONISATION, kernel=f"layer_norm_{kernel}_")
    assert not left, "\n".join(map(str, left))
    caught = Counter(outcome.check for outcome in outcomes)
    assert caught and set(caught) <= {"shared race", "warp race", "uninitialised shared memory"}

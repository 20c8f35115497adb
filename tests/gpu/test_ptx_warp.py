"""Shuffles, votes, and the matrix instructions, against numpy with fragments laid out by the PTX ISA's tables."""

import itertools

import numpy as np
import pytest
import torch

from gpu.harness import elementwise, module, run_module
from gpu.ptx import CheckFailed

LANE = np.arange(32)
VALUES = np.random.default_rng(0).integers(0, 2**32, 32, np.uint64).astype(np.uint32)


def lanes(body: str) -> np.ndarray:
    return elementwise(body, [VALUES], np.uint32)


@pytest.mark.parametrize(
    ("mode", "amount", "clamp", "source"),
    [
        ("bfly", 5, 31, LANE ^ 5),
        ("down", 3, 31, np.where(LANE + 3 < 32, LANE + 3, LANE)),
        ("up", 3, 0, np.where(LANE >= 3, LANE - 3, LANE)),
        ("idx", 7, 31, np.full(32, 7)),
        ("idx", 9, 0x181F, LANE & 24 | 1),  # segments of 8
        ("down", 2, 0x181F, np.where((LANE & 7) + 2 < 8, LANE + 2, LANE)),
    ],
)
def test_shuffles(mode: str, amount: int, clamp: int, source: np.ndarray) -> None:
    got = lanes(f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {amount}, {clamp}, -1;")
    assert (got == VALUES[source]).all()


def test_shuffle_from_a_lane_in_a_register_and_its_flag() -> None:
    body = "and.b32 %r1, {a}, 63;\nshfl.sync.down.b32 %r2|%p1, {a}, %r1, 31, -1;\nselp.b32 {d}, %r2, 0, %p1;"
    target = LANE + (VALUES & 31)
    assert (lanes(body) == np.where(target < 32, VALUES[np.minimum(target, 31)], 0)).all()


def test_votes_and_matches() -> None:
    odd = VALUES % 2 == 1
    ballot = sum(1 << i for i in LANE[odd].tolist())
    body = "and.b32 %r1, {a}, 1;\nsetp.ne.u32 %p1, %r1, 0;\n"
    assert (lanes(body + "vote.sync.ballot.b32 {d}, %p1, -1;") == ballot).all()
    assert (lanes(body + "vote.sync.any.pred %p2, %p1, -1;\nselp.b32 {d}, 1, 0, %p2;") == odd.any()).all()
    assert (lanes(body + "vote.sync.all.pred %p2, !%p1, -1;\nselp.b32 {d}, 1, 0, %p2;") == (~odd).all()).all()
    groups = VALUES & 3
    expected = [sum(1 << i for i in LANE[groups == g].tolist()) for g in groups]
    assert (lanes("and.b32 %r1, {a}, 3;\nmatch.any.sync.b32 {d}, %r1, -1;") == expected).all()
    assert (lanes("activemask.b32 {d};") == 0xFFFFFFFF).all()
    assert (lanes("elect.sync {d}|%p1, -1;\n@%p1 mov.u32 {d}, 77;") == np.where(LANE == 0, 77, 0)).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("add.u32", np.add.reduce(VALUES, dtype=np.uint32)),
        ("max.s32", VALUES.view(np.int32).max().view(np.uint32)),
        ("min.u32", VALUES.min()),
        ("xor.b32", np.bitwise_xor.reduce(VALUES)),
    ],
)
def test_reductions_of_a_warp(name: str, expected: int) -> None:
    assert (lanes(f"redux.sync.{name} {{d}}, {{a}}, -1;") == expected).all()


def test_a_shuffle_of_part_of_a_warp_is_caught() -> None:
    body = "setp.lt.u32 %p1, %t, 16;\n@%p1 shfl.sync.bfly.b32 {d}, {a}, 1, 31, {members};"
    with pytest.raises(CheckFailed, match="warp divergence"):
        lanes(body.replace("{members}", "-1"))
    got = lanes(body.replace("{members}", "0xFFFF"))
    assert (got[:16] == VALUES[LANE[:16] ^ 1]).all()


def _bits(matrix: np.ndarray, kind: str) -> np.ndarray:
    """float32 rounded to a type, as 16-bit words (32-bit for TF32)."""
    if kind == "tf32":
        return matrix.view(np.uint32)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(matrix).to(dtype).view(torch.int16).numpy().view(np.uint16)


def _pack(halves: list[np.ndarray]) -> np.ndarray:
    return (halves[0].astype(np.uint32)) | (halves[1].astype(np.uint32) << 16)


@pytest.mark.parametrize(
    ("kind", "k", "result"),
    [
        *(("bf16", k, "f32") for k in (8, 16)),
        *(("f16", k, result) for k in (8, 16) for result in ("f16", "f32")),
        *(("tf32", k, "f32") for k in (4, 8)),
    ],
)
def test_mma(kind: str, k: int, result: str) -> None:
    rng = np.random.default_rng(1)
    # Small integers: exact in every type.
    a, b, c = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))
    group, member = LANE // 4, LANE % 4
    bits_a, bits_b = _bits(a, kind), _bits(b, kind)
    if kind == "tf32":
        registers_a = [bits_a[group + 8 * (i & 1), member + 4 * (i >> 1)] for i in range(k // 2)]
        registers_b = [bits_b[member + 4 * i, group] for i in range(k // 4)]
    else:
        registers_a = [
            _pack([bits_a[group + 8 * (i & 1), member * 2 + h + 8 * (i >> 1)] for h in (0, 1)]) for i in range(k // 4)
        ]
        registers_b = [_pack([bits_b[member * 2 + h + 8 * i, group] for h in (0, 1)]) for i in range(k // 8)]
    places = [(group + 8 * (i >> 1), member * 2 + (i & 1)) for i in range(4)]
    if result == "f32":
        registers_c = [c[place].view(np.uint32) for place in places]
    else:
        half = _bits(c, "f16")
        registers_c = [_pack([half[places[2 * i]], half[places[2 * i + 1]]]) for i in (0, 1)]
    out = np.zeros((len(registers_c), 32), np.uint32)
    inputs = np.stack([*registers_a, *registers_b, *registers_c])
    lines = ["mul.wide.u32 %rd10, %t, 4;", "add.s64 %rd11, %rd0, %rd10;", "add.s64 %rd12, %rd1, %rd10;"]
    lines += [f"ld.global.b32 %r{i}, [%rd11+{128 * i}];" for i in range(len(inputs))]
    names = iter(f"%r{i}" for i in range(len(inputs)))
    parts = [
        "{" + ", ".join(itertools.islice(names, len(part))) + "}" for part in (registers_a, registers_b, registers_c)
    ]
    target = "{" + ", ".join(f"%r{100 + i}" for i in range(len(registers_c))) + "}"
    opcode = f"mma.sync.aligned.m16n8k{k}.row.col.{result}.{kind}.{kind}.{result}"
    lines.append(f"{opcode} {target}, {', '.join(parts)};")
    lines += [f"st.global.b32 [%rd12+{128 * i}], %r{100 + i};" for i in range(len(registers_c))]
    counts = run_module(module("\n".join(lines), 2, 32), [inputs, out], 32)
    expected = a @ b + c
    if result == "f32":
        got = np.zeros((16, 8), np.float32)
        for i, place in enumerate(places):
            got[place] = out[i].view(np.float32)
    else:
        got = np.zeros((16, 8), np.float16)
        for i, place in enumerate(places):
            got[place] = (out[i // 2] >> (16 * (i % 2))).astype(np.uint16).view(np.float16)
    assert (got == expected).all()
    assert sum(counts.matrix_flops.values()) == 2 * 16 * 8 * k


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_to_and_from_shared_memory(count: int, transposed: bool) -> None:
    """ldmatrix of rows in reverse order, and stmatrix back into a second place, transposed twice or never."""
    source = np.arange(count * 64, dtype=np.uint16)
    fragments, back = np.zeros((count, 32), np.uint32), np.zeros(count * 64, np.uint16)
    registers = "{" + ", ".join(f"%r{50 + i}" for i in range(count)) + "}"
    trans = ".trans" if transposed else ""
    copy = "\n".join(
        f"ld.global.b32 %r1, [%rd10+{128 * i}];\nst.shared.b32 [%r2+{128 * i}], %r1;" for i in range(count)
    )
    keep = "\n".join(
        f"st.global.b32 [%rd11+{128 * i}], %r{50 + i};\nld.shared.b32 %r1, [%r2+{512 + 128 * i}];\n"
        f"st.global.b32 [%rd12+{128 * i}], %r1;"
        for i in range(count)
    )
    body = f"""
    mul.wide.u32 %rd9, %t, 4;
    add.s64 %rd10, %rd0, %rd9;
    add.s64 %rd11, %rd1, %rd9;
    add.s64 %rd12, %rd2, %rd9;
    mov.u32 %r3, smem;
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r2, %r3;
    {copy}
    bar.sync 0;
    xor.b32 %r4, %t, 7;
    shl.b32 %r4, %r4, 4;
    add.u32 %r4, %r4, %r3;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r4];
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r4+512], {registers};
    bar.sync 0;
    {keep}
    """
    run_module(module(body, 3, 32), [source, fragments, back], 32, shared=1024)
    matrices = source.reshape(count, 8, 8)[:, ::-1]
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    assert (fragments.view(np.uint16).reshape(count, 8, 8) == matrices).all()
    assert (back == source).all()


def _swizzled(matrix: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes in the 128-byte swizzle: 16-byte columns xor the row's number modulo 8."""
    rows = matrix.reshape(len(matrix), 8, 8)
    return np.stack([row[np.arange(8) ^ (i % 8)] for i, row in enumerate(rows)]).reshape(matrix.shape)


@pytest.mark.parametrize("n", [8, 64])
def test_wgmma(n: int) -> None:
    """D (64, n) = A (64, 64) B (64, n) in four steps of k = 16; both operands K-major with the 128-byte swizzle."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(-4, 5, (64, 64)).astype(np.float32), rng.integers(-4, 5, (n, 64)).astype(np.float32)
    source = np.concatenate([_swizzled(_bits(a, "bf16")), _swizzled(_bits(b, "bf16"))])
    out = np.zeros((n // 2, 128), np.float32)
    registers = "{" + ",".join(f"%r{64 + i}" for i in range(n // 2)) + "}"
    words = source.nbytes // 4
    loads = "\n".join(
        f"ld.global.b32 %r1, [%rd10+{512 * i}];\nst.shared.b32 [%r2+{512 * i}], %r1;" for i in range(words // 128)
    )
    # The descriptor: start, stride 1024 bytes between groups of 8 rows, swizzle 1 (128 bytes).
    fixed = (1024 >> 4) << 32 | 1 << 62
    steps = "\n".join(
        f"""mov.b64 %rd20, {fixed + (32 * step >> 4)};
        mov.b64 %rd21, {fixed + (8192 + 32 * step >> 4)};
        setp.ne.u32 %p1, {step}, 0;
        wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {registers}, %rd20, %rd21, %p1, 1, 1, 0, 0;"""
        for step in range(4)
    )
    keep = "\n".join(f"st.global.b32 [%rd11+{512 * i}], %r{64 + i};" for i in range(n // 2))
    body = f"""
    mul.wide.u32 %rd9, %t, 4;
    add.s64 %rd10, %rd0, %rd9;
    add.s64 %rd11, %rd1, %rd9;
    mov.u32 %r3, smem;
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r2, %r3;
    {loads}
    FENCE
    bar.sync 0;
    wgmma.fence.sync.aligned;
    LATE
    {steps}
    wgmma.commit_group.sync.aligned;
    WAIT
    {keep}
    """

    def go(fence: str, wait: str, late: str = "") -> None:
        text = body.replace("FENCE", fence).replace("WAIT", wait).replace("LATE", late)
        run_module(module(text, 2, 128), [source, out], 128, shared=source.nbytes)

    go("fence.proxy.async.shared::cta;", "wgmma.wait_group.sync.aligned 0;")
    lane, expected = np.arange(128), a @ b.T
    for i in range(n // 2):
        row = lane // 32 * 16 + lane % 32 // 4 + 8 * (i >> 1 & 1)
        assert (out[i] == expected[row, (i >> 2) * 8 + lane % 4 * 2 + (i & 1)]).all()
    with pytest.raises(CheckFailed, match="proxy fence"):
        go("", "wgmma.wait_group.sync.aligned 0;")
    with pytest.raises(CheckFailed, match="asynchronous product"):
        go("fence.proxy.async.shared::cta;", "")
    with pytest.raises(CheckFailed, match="asynchronous read"):
        go("fence.proxy.async.shared::cta;", "st.shared.b32 [%r2], 0;\nwgmma.wait_group.sync.aligned 0;")
    # A copy after the fence is as good as what it copies.
    complete = "fence.proxy.async.shared::cta;", "wgmma.wait_group.sync.aligned 0;"
    copy, write = "mov.b32 %r64, %r65;", "add.u32 %r65, %r65, 0;"
    go(*complete, copy)
    for late in ("mov.b32 %r65, 0;", f"{write}\n{copy}", f"{copy}\n{write}"):
        with pytest.raises(CheckFailed, match="wgmma fence"):
            go(*complete, late)


@pytest.mark.parametrize("checks", (True, False))
def test_a_warpgroup_fences_its_own_registers_alone(checks: bool) -> None:
    accumulators = ", ".join(f"%r{64 + i}" for i in range(4))
    body = f"""
    mul.wide.u32 %rd8, %t, 4;
    cvt.u64.u32 %rd20, 0;
    mov.u32 %r3, smem;
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r2, %r3;
    st.shared.b32 [%r2], 0;
    st.shared.b32 [%r2+1024], 0;
    st.shared.b32 [%r2+2048], 0;
    st.shared.b32 [%r2+3072], 0;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    setp.lt.u32 %p2, %t, 128;
    @%p2 bra FIRST;
    SECOND
    bra.uni JOINED;
FIRST:
    add.u32 %r64, %r64, 1;
    wgmma.fence.sync.aligned;
JOINED:
    setp.ne.b32 %p1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{accumulators}}}, %rd20, %rd20, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    """

    def go(second: str) -> None:
        out = np.zeros(256, np.uint32)
        run_module(module(body.replace("SECOND", second), 1, 256), [out], 256, shared=4096, checks=checks)

    go("")
    go("add.u32 %r64, %r64, 1;\nwgmma.fence.sync.aligned;")
    with pytest.raises(CheckFailed, match="wgmma fence"):
        go("add.u32 %r64, %r64, 1;")

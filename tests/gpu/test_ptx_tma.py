"""mbarriers and TMA, instruction by instruction, and what the emulator says of their misuse."""

import re

import numpy as np
import pytest

from gpu.harness import module, run_module
from gpu.ptx import CheckFailed, PTXError
from gpu.ptx.tensor_map import encode

INIT = """
mov.u32 %r100, smem;
shl.b32 %r101, %t, 2;
add.u32 %r102, %r100, %r101;
mul.wide.u32 %rd10, %t, 4;
add.s64 %rd11, %rd1, %rd10;
setp.eq.u32 %p10, %t, 0;
@%p10 mbarrier.init.shared::cta.b64 [smem+8192], 1;
@%p10 mbarrier.init.shared::cta.b64 [smem+8200], 1;
@%p10 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""


def wait(barrier: int, parity: int | str, label: str) -> str:
    return f"""{label}:
    mbarrier.try_wait.parity.shared::cta.b64 %p11, [smem+{barrier}], {parity};
    @!%p11 bra {label};
    """


def aligned(data: bytes, alignment: int = 64) -> np.ndarray:
    buffer = np.zeros(len(data) + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    buffer[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return buffer[start : start + len(data)]


def dense(tensor: np.ndarray, box: tuple, swizzle: int = 0) -> bytes:
    """The map of a dense tensor, whose box is given innermost first."""
    return encode(tensor.ctypes.data, tensor.itemsize, tensor.shape[::-1], tensor.strides[-2::-1], box, swizzle)


def storage(tensor: np.ndarray) -> np.ndarray:
    """A copy at an address that a map can hold."""
    return aligned(tensor.tobytes()).view(tensor.dtype).reshape(tensor.shape)


def run(body: str, source: np.ndarray, *more: np.ndarray, threads: int = 64, words: int = 64) -> np.ndarray:
    """Runs with p0 = source, p1 zeros, which are returned, and what more there is; smem ends behind two barriers."""
    out = np.zeros(words, np.uint32)
    arrays = [source, out, *more]
    run_module(module(INIT + body, len(arrays), threads), arrays, threads, shared=8192 + 16)
    return out


def fails(check: str, body: str, source: np.ndarray, *more: np.ndarray, **options) -> str:
    with pytest.raises(CheckFailed) as caught:
        run(body, source, *more, **options)
    assert caught.value.check == check, caught.value
    assert "PTX line" in str(caught.value)
    return str(caught.value)


COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
TENSOR = "cp.async.bulk.tensor.{}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
WORDS = storage(np.arange(1, 129, dtype=np.uint32))
FETCH = f"""
@%p10 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+8192], 256;
@%p10 {COPY} [smem], [%rd0], 256, [smem+8192];
"""
READ = "ld.shared.b32 %r1, [%r102];\nst.global.b32 [%rd11], %r1;\n"


def test_bytes_in_a_row() -> None:
    assert (run(FETCH + wait(8192, 0, "W") + READ, WORDS) == WORDS[:64]).all()
    fails("asynchronous copy", FETCH + READ, WORDS)
    fails("asynchronous copy", FETCH + "st.shared.b32 [%r102], 0;", WORDS)
    assert "2 warps wait" in fails("hang", FETCH.replace(", 256;", ", 272;", 1) + wait(8192, 0, "W"), WORDS)
    assert "0 arrivals and -16 bytes" in fails("hang", FETCH.replace(", 256;", ", 240;", 1) + wait(8192, 0, "W"), WORDS)
    fails("hang", FETCH + wait(8192, 0, "W") + wait(8192, 1, "V"), WORDS)
    fails("bulk copy", FETCH.replace("[%rd0], 256", "[%rd0], 248"), WORDS)
    fails("global bounds", FETCH.replace("[%rd0]", "[%rd0+272]"), WORDS)
    fails("global alignment", FETCH.replace("[%rd0]", "[%rd0+8]"), WORDS)
    fails("shared alignment", FETCH.replace("[smem], [%rd0]", "[smem+8], [%rd0]"), WORDS)
    fails("shared bounds", FETCH.replace("[smem], [%rd0]", "[smem+8064], [%rd0]"), WORDS)
    fails("mbarrier", FETCH.replace("[smem], [%rd0]", "[smem+7952], [%rd0]"), WORDS)


def test_a_warp_that_has_not_waited_knows_nothing_of_a_copy() -> None:
    first_waits = f"setp.ge.u32 %p1, %t, 32;\n@%p1 bra OUT;\n{wait(8192, 0, 'W')}OUT:\n"
    fails("asynchronous copy", FETCH + first_waits + "bar.warp.sync -1;\n" + READ, WORDS)
    assert (run(FETCH + first_waits + "bar.sync 0;\n" + READ, WORDS) == WORDS[:64]).all()


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "box", "start"),
    [
        ((12, 64), (0, 8), (0, 2)),
        ((5, 12, 64), (0, 8, 3), (0, 6, 2)),  # beyond the ends of two dimensions
        ((3, 2, 9, 72), (0, 4, 2, 2), (16, -1, 1, 2)),
    ],
)
def test_boxes_of_tensors(shape: tuple, box: tuple, start: tuple, swizzle: int) -> None:
    tensor = storage(np.arange(1, np.prod(shape) + 1, dtype=np.uint16).reshape(shape))
    width = (32, 16, 32, 64)[swizzle]
    box = (width, *box[1:])
    count = int(np.prod(box)) // 2  # words
    coordinates = ", ".join(map(str, start))
    steps = "\n".join(
        f"ld.shared.b32 %r1, [%r102+{256 * i}];\nst.global.b32 [%rd11+{256 * i}], %r1;" for i in range(count // 64)
    )
    body = f"""
    @%p10 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+8192], {4 * count};
    @%p10 {TENSOR.format(len(box))} [smem], [%rd0, {{{coordinates}}}], [smem+8192];
    {wait(8192, 0, "W")}
    {steps}
    """
    got = run(body, aligned(dense(tensor, box, swizzle)), tensor, words=count).view(np.uint16).reshape(-1, width)
    # Back from the swizzle: 16-byte columns of row i, counted in rows of 128 bytes, are xored.
    row = np.arange(len(got)) * 2 * width // 128
    for i, line in enumerate(got):
        columns = np.arange(width // 8) ^ (row[i] & (0, 1, 3, 7)[swizzle] & (width // 8 - 1) if swizzle else 0)
        got[i] = line.reshape(-1, 8)[columns].ravel()
    padded = np.zeros([3 * extent + size for extent, size in zip(box[::-1], shape, strict=True)], np.uint16)
    padded[tuple(slice(extent, extent + size) for extent, size in zip(box[::-1], shape, strict=True))] = tensor
    expected = padded[tuple(slice(b + s, 2 * b + s) for b, s in zip(box[::-1], start[::-1], strict=True))]
    assert (got.reshape(expected.shape) == expected).all()


BOX = f"""
@%p10 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+8192], 1024;
@%p10 {TENSOR.format(2)} [smem], [%rd0, {{0, 0}}], [smem+8192];
"""


def test_misused_tensor_maps() -> None:
    tensor = storage(np.ones((8, 64), np.uint16))
    good = dense(tensor, (64, 8), 3)
    run(BOX + wait(8192, 0, "W"), aligned(good), tensor)
    assert "not a multiple of 64" in fails("tensor map", BOX, aligned(bytes(16) + good, 128)[16:], tensor)
    fails("tensor map", BOX, aligned(bytes(128)), tensor)
    fails("tensor map", BOX.replace("2d", "3d").replace("{0, 0}", "{0, 0, 0}"), aligned(good), tensor)
    fails("shared alignment", BOX.replace("[smem],", "[smem+64],"), aligned(good), tensor)
    beyond = encode(tensor.ctypes.data, 2, (64, 9), (128,), (64, 9))
    fails("global bounds", BOX, aligned(beyond), tensor)
    rules = {
        "multiple of 16": dict(address=8),
        "strides": dict(strides=(100,)),
        "256 of the box": dict(box=(64, 257)),
        "rows of the box of": dict(box=(4, 8)),
        "within the swizzle": dict(box=(128, 8), swizzle=3),
        "dimensions": dict(sizes=(64,)),
    }
    for rule, change in rules.items():
        with pytest.raises(ValueError, match=rule):
            encode(**(dict(address=0, item=2, sizes=(64, 8), strides=(128,), box=(64, 8)) | change))


def test_phases_and_states() -> None:
    # Two threads arrive, in two phases; each phase is asked for by its parity and by its state.
    body = """
    @%p10 mbarrier.inval.shared::cta.b64 [smem+8192];
    @%p10 mbarrier.init.shared::cta.b64 [smem+8192], 2;
    bar.sync 0;
    and.b32 %r1, %t, 31;
    setp.ne.u32 %p1, %r1, 0;
    mov.b64 %rd20, 0;
    @!%p1 mbarrier.arrive.shared::cta.b64 %rd20, [smem+8192];
    bar.sync 0;
    mbarrier.test_wait.shared::cta.b64 %p2, [smem+8192], %rd20;
    mbarrier.test_wait.parity.shared::cta.b64 %p3, [smem+8192], 0;
    mbarrier.test_wait.parity.shared::cta.b64 %p4, [smem+8192], 1;
    @%p10 mbarrier.arrive.shared::cta.b64 _, [smem+8192], 2;
    bar.sync 0;
    mbarrier.test_wait.parity.shared::cta.b64 %p5, [smem+8192], 1;
    selp.b32 %r2, 1, 0, %p2;
    selp.b32 %r3, 2, 0, %p3;
    selp.b32 %r4, 4, 0, %p4;
    selp.b32 %r5, 8, 0, %p5;
    or.b32 %r2, %r2, %r3;
    or.b32 %r2, %r2, %r4;
    or.b32 %r2, %r2, %r5;
    st.global.b32 [%rd11], %r2;
    """
    assert (run(body, WORDS) == 1 + 2 + 8).all()
    stale = body.replace("mbarrier.test_wait.parity.shared::cta.b64 %p5, [smem+8192], 1", body.split("\n")[9])
    fails("mbarrier", stale.replace("%p5", "%p2") + body.split("\n")[9], WORDS)
    assert "3 arrivals" in fails("mbarrier", body.replace("_, [smem+8192], 2;", "_, [smem+8192], 3;"), WORDS)


def test_misused_barriers() -> None:
    arrive = "@%p10 mbarrier.arrive.shared::cta.b64 _, [smem+{}];\n"
    fails("mbarrier", arrive.format(8192) + "@%p10 mbarrier.arrive.shared::cta.b64 _, [smem+8192], 2;", WORDS)
    fails("mbarrier", arrive.format(4096), WORDS)
    fails("shared alignment", arrive.format(8196), WORDS)
    fails("shared bounds", arrive.format(8208), WORDS)
    fails("mbarrier", "@%p10 mbarrier.init.shared::cta.b64 [smem+8192], 1;", WORDS)
    fails("mbarrier", "@%p10 mbarrier.init.shared::cta.b64 [smem], 0;", WORDS)
    fails("mbarrier", "ld.shared.b32 %r1, [smem+8192];", WORDS)
    fails("mbarrier", "st.shared.b32 [smem+8196], 1;", WORDS)
    fails("mbarrier", "@%p10 mbarrier.inval.shared::cta.b64 [smem+8192];\n" + arrive.format(8192), WORDS)
    fails("mbarrier", wait(8192, 2, "W"), WORDS)
    run("@%p10 mbarrier.inval.shared::cta.b64 [smem+8192];\n@%p10 st.shared.b32 [smem+8192], 1;", WORDS)
    for target in ("mbarrier.arrive_drop.shared::cta.b64 _, [smem+8192];", "mbarrier.arrive.b64 _, [%rd0];"):
        with pytest.raises(PTXError, match="not implemented"):
            run(target, WORDS)


def test_initialisation_has_to_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fence, barrier = "@%p10 fence.mbarrier_init.release.cluster;\n", "bar.sync 0;\n"
    complete, init = FETCH + wait(8192, 0, "W"), INIT
    monkeypatch.setattr("gpu.test_ptx_tma.INIT", init.replace(fence, ""))
    fails("proxy fence", complete, WORDS)
    monkeypatch.setattr("gpu.test_ptx_tma.INIT", init.replace(fence, "fence.proxy.async.shared::cta;\n"))
    run(complete, WORDS)
    monkeypatch.setattr("gpu.test_ptx_tma.INIT", init.replace(barrier, "bar.warp.sync -1;\n"))
    fails("shared race", complete, WORDS)


PIPELINE = f"""
setp.ge.u32 %p1, %t, 32;
@%p1 bra CONSUMER;
mov.u32 %r10, 0;
PRODUCE:
and.b32 %r11, %r10, 1;
xor.b32 %r12, %r11, 1;
EMPTY:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+8200], %r12;
@!%p2 bra EMPTY;
mul.wide.u32 %rd20, %r10, 256;
add.s64 %rd21, %rd0, %rd20;
elect.sync _|%p3, -1;
@%p3 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+8192], 256;
@%p3 {COPY} [smem], [%rd21], 256, [smem+8192];
add.u32 %r10, %r10, 1;
setp.lt.u32 %p4, %r10, 4;
@%p4 bra PRODUCE;
bra.uni END;
CONSUMER:
mov.u32 %r10, 0;
mov.u32 %r20, 0;
CONSUME:
and.b32 %r11, %r10, 1;
FULL:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+8192], %r11;
@!%p2 bra FULL;
ld.shared.b32 %r1, [%r102];
ld.shared.b32 %r2, [%r102+-128];
add.u32 %r20, %r20, %r1;
add.u32 %r20, %r20, %r2;
bar.warp.sync -1;
elect.sync _|%p3, -1;
@%p3 mbarrier.arrive.shared::cta.b64 _, [smem+8200];
add.u32 %r10, %r10, 1;
setp.lt.u32 %p4, %r10, 4;
@%p4 bra CONSUME;
st.global.b32 [%rd11+-128], %r20;
END:
"""


def test_a_pipeline_of_a_producer_and_a_consumer() -> None:
    source = storage(np.arange(256, dtype=np.uint32))
    out = run(PIPELINE, source)
    assert (out[:32] == source.reshape(4, 2, 32).sum((0, 1))).all()
    fails("asynchronous copy", PIPELINE.replace("@!%p2 bra EMPTY;", ""), source)
    fails("asynchronous copy", PIPELINE.replace("@!%p2 bra FULL;", ""), source)
    fails("hang", PIPELINE.replace("xor.b32 %r12, %r11, 1", "mov.u32 %r12, %r11"), source)
    fails("hang", PIPELINE.replace("and.b32 %r11, %r10, 1;\nFULL", "mov.b32 %r11, 1;\nFULL"), source)
    fails("hang", PIPELINE.replace("@%p3 mbarrier.arrive.shared::cta.b64 _, [smem+8200];", ""), source)
    twice = re.sub(r"(@%p3 mbarrier.arrive.shared.*;)", r"\1\n\1", PIPELINE)
    fails("hang", twice, source)
    early = PIPELINE.replace("ld.shared.b32 %r2, [%r102+-128];", "").replace(
        "add.u32 %r10, %r10, 1;\nsetp.lt.u32 %p4, %r10, 4;\n@%p4 bra CONSUME",
        "ld.shared.b32 %r2, [%r102+-128];\nadd.u32 %r10, %r10, 1;\nsetp.lt.u32 %p4, %r10, 4;\n@%p4 bra CONSUME",
    )
    fails("shared race", early, source)


def test_a_copy_over_what_threads_wrote_needs_a_proxy_fence() -> None:
    written = "st.shared.b32 [%r102], 0;\n{}bar.sync 0;\n" + FETCH + wait(8192, 0, "W") + READ
    fails("proxy fence", written.format(""), WORDS)
    assert (run(written.format("fence.proxy.async.shared::cta;\n"), WORDS) == WORDS[:64]).all()


def test_a_copy_over_what_wgmma_reads() -> None:
    accumulators = ", ".join(f"%r{64 + i}" for i in range(4))
    product = f"""
    @%p10 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+8192], 4096;
    @%p10 {COPY} [smem], [%rd0], 4096, [smem+8192];
    {wait(8192, 0, "W")}
    mov.b64 %rd20, 0;
    wgmma.fence.sync.aligned;
    setp.ne.b32 %p1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{accumulators}}}, %rd20, %rd20, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    WAIT
    @%p10 {COPY} [smem], [%rd0], 16, [smem+8192];
    wgmma.wait_group.sync.aligned 0;
    """
    source = storage(np.zeros(1024, np.uint32))
    fails("asynchronous read", product.replace("WAIT", ""), source, threads=128, words=128)
    fails("shared race", product.replace("WAIT", "wgmma.wait_group.sync.aligned 0;"), source, threads=128, words=128)
    run(product.replace("WAIT", "wgmma.wait_group.sync.aligned 0;\nbar.sync 0;"), source, threads=128, words=128)


def test_registers_of_warpgroups_and_elections() -> None:
    run("setmaxnreg.inc.sync.aligned.u32 240;", WORDS, threads=128, words=128)
    for count in (100, 16, 264):
        with pytest.raises(PTXError, match="multiple of 8"):
            run(f"setmaxnreg.dec.sync.aligned.u32 {count};", WORDS, threads=128, words=128)
    part = "setp.ge.u32 %p1, %t, {};\n@%p1 bra OUT;\n{}\nOUT:"
    fails("warp divergence", part.format(32, "setmaxnreg.dec.sync.aligned.u32 24;"), WORDS, threads=128, words=128)
    fails("warp divergence", part.format(16, "elect.sync _|%p2, -1;"), WORDS)

"""Loads, stores, copies, barriers and what the emulator says of those that break a rule."""

import numpy as np
import pytest

from gpu.harness import module, run_module
from gpu.ptx import CheckFailed, PTXError

WORDS = np.arange(1, 129, dtype=np.uint32)
# The thread's place in p0 and p1, and in shared memory.
PLACES = """
mul.wide.u32 %rd10, %t, 4;
add.s64 %rd11, %rd0, %rd10;
add.s64 %rd12, %rd1, %rd10;
mov.u32 %r100, smem;
shl.b32 %r101, %t, 2;
add.u32 %r102, %r100, %r101;
xor.b32 %r103, %r101, 128;
add.u32 %r104, %r100, %r103;
"""


def run(body: str, threads: int = 64, grid: tuple = (1,), size: int = 64, shared: int = 256, **options) -> np.ndarray:
    """Runs with p0 = 1, 2, ... and p1, which is returned, zero."""
    source, out = WORDS[:size].copy(), np.zeros(size, np.uint32)
    run_module(module(PLACES + body, 2, threads), [source, out], threads, grid, shared, **options)
    return out


def fails(check: str, body: str, **options) -> str:
    with pytest.raises(CheckFailed) as caught:
        run(body, **options)
    assert caught.value.check == check, caught.value
    assert "PTX line" in str(caught.value)
    return str(caught.value)


def test_vectors_and_widths() -> None:
    out = run(
        """
        and.b32 %r1, %t, 3;
        setp.ne.u32 %p1, %r1, 0;
        @%p1 bra DONE;
        ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd11];
        st.global.v2.b32 [%rd12], {%r5, %r4};
        st.global.b16 [%rd12+8], %r3;
        ld.global.u8 %h1, [%rd11];
        cvt.u32.u16 %r6, %h1;
        st.global.b32 [%rd12+12], %r6;
        DONE:
        """
    )
    expected = WORDS[:64].reshape(-1, 4)
    assert (out.reshape(-1, 4) == np.stack([expected[:, 3], expected[:, 2], expected[:, 1], expected[:, 0]], 1)).all()


def test_signed_loads_extend() -> None:
    source, out = np.array([-1, -128, 127, 5] * 8, np.int8), np.zeros(32, np.int32)
    body = """
    cvt.u64.u32 %rd5, %t;
    add.s64 %rd5, %rd5, %rd0;
    mul.wide.u32 %rd6, %t, 4;
    add.s64 %rd6, %rd6, %rd1;
    ld.global.s8 %r1, [%rd5];
    st.global.b32 [%rd6], %r1;
    """
    run_module(module(body, 2, 32), [source, out], 32)
    assert (out == source).all()


def test_global_bounds() -> None:
    message = fails("global bounds", "st.global.b32 [%rd12+4], %t;")
    assert "store of 4 bytes by 1 threads, the first at byte 256 of p1 (256 bytes)" in message
    fails("global bounds", "ld.global.b32 %r1, [%rd11+-4];")
    fails("global bounds", "ld.global.b32 %r1, [%rd10];")
    assert run("setp.lt.u32 %p1, %t, 63;\n@%p1 st.global.b32 [%rd12+4], %t;")[-1] == 62


def test_global_alignment() -> None:
    fails("global alignment", "add.s64 %rd12, %rd1, 2;\nst.global.b32 [%rd12], %t;")
    fails("global alignment", "setp.eq.u32 %p1, %t, 1;\n@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd11];")


def test_global_races() -> None:
    assert "writes the same bytes as program" in fails("global race", "st.global.b32 [%rd12], %t;", grid=(2,))
    reads_others = "ld.global.b32 %r1, [%rd1];\nbar.sync 0;\nst.global.b32 [%rd12], %r1;"
    fails("global race", reads_others, grid=(2,))
    same = "and.b32 %r1, %t, 1;\nmul.wide.u32 %rd3, %r1, 4;\nadd.s64 %rd4, %rd1, %rd3;\nst.global.b32 [%rd4], "
    run(same + "%r1;")
    assert "threads write different values" in fails("global race", same + "%t;")
    run("red.global.add.u32 [%rd12], 1;", grid=(4,))
    assert (run("atom.global.add.u32 %r1, [%rd12], 3;", grid=(4,)) == 12).all()


TICKET = """
mov.u32 %r9, %ctaid.x;
setp.eq.u32 %p1, %r9, 0;
@%p1 st.global.b32 [%rd11], 7;
setp.ne.u32 %p2, %t, 0;
@%p2 bra WAIT;
atom.global.gpu.SEMANTICS.add.u32 %r1, [%rd1], 1;
st.shared.b32 [smem], %r1;
WAIT:
bar.sync 0;
ld.shared.b32 %r1, [smem];
setp.ne.u32 %p3, %r1, 1;
@%p3 bra END;
ld.global.b32 %r2, [%rd11];
END:
"""


def test_atomics_with_acquire_and_release_order_programs() -> None:
    # The second program to arrive may read what the first wrote only if the ticket synchronises them.
    run(TICKET.replace("SEMANTICS", "acq_rel"), grid=(2,))
    fails("global race", TICKET.replace("SEMANTICS", "relaxed"), grid=(2,))


EXCHANGE = """
ld.global.b32 %r1, [%rd11];
st.shared.b32 [%r102], %r1;
{first}
ld.shared.b32 %r2, [%r104];
{second}
st.shared.b32 [%r102], 0;
st.global.b32 [%rd12], %r2;
"""


def test_shared_races() -> None:
    # Warps 0 and 1 exchange their words: both barriers are needed.
    out = run(EXCHANGE.format(first="bar.sync 0;", second="bar.sync 0;"))
    assert (out == np.roll(WORDS[:64], 32)).all()
    assert "read by warp" in fails("shared race", EXCHANGE.format(first="", second=""))
    assert "overwriting" in fails("shared race", EXCHANGE.format(first="bar.sync 0;", second=""))
    written_first = "st.shared.b32 [%r104], 0;\nbar.sync 0;\nst.shared.b32 [%r102], 1;\nld.shared.b32 %r2, [%r104];"
    assert "read by warp" in fails("shared race", written_first)


def test_races_within_a_warp() -> None:
    body = """
        st.shared.b32 [%r102], %t;
        {}
        xor.b32 %r1, %r101, 4;
        add.u32 %r1, %r1, %r100;
        ld.shared.b32 %r2, [%r1];
        """
    fails("warp race", body.format(""))
    out = run(body.format("bar.warp.sync -1;") + "st.global.b32 [%rd12], %r2;")
    assert (out == np.arange(64) ^ 1).all()


def test_barriers_of_named_groups() -> None:
    body = """
    st.shared.b32 [%r102], %t;
    setp.ge.u32 %p1, %t, 64;
    @%p1 bra SECOND;
    bar.sync 1, 64;
    bra.uni JOIN;
    SECOND:
    bar.sync 2, 64;
    JOIN:
    ld.shared.b32 %r2, [%r104];
    st.global.b32 [%rd12], %r2;
    """
    assert (run(body, threads=128, size=128, shared=512) == np.arange(128) ^ 32).all()
    across = "xor.b32 %r105, %r101, 256;\nadd.u32 %r105, %r105, %r100;\n" + body.replace("%r104", "%r105")
    fails("shared race", across, threads=128, size=128, shared=512)


def test_barrier_reductions() -> None:
    out = run(
        """
        setp.eq.u32 %p1, %t, 5;
        bar.red.or.pred %p2, 0, %p1;
        selp.b32 %r1, 1, 0, %p2;
        st.global.b32 [%rd12], %r1;
        """
    )
    assert (out == 1).all()
    out = run("setp.lt.u32 %p1, %t, 5;\nbar.red.popc.u32 %r1, 0, %p1;\nst.global.b32 [%rd12], %r1;")
    assert (out == 5).all()


def test_divergent_barriers() -> None:
    fails("warp divergence", "setp.lt.u32 %p1, %t, 5;\n@%p1 bra OUT;\nbar.sync 0;\nOUT:")
    fails("divergent barrier", "setp.lt.u32 %p1, %t, 32;\n@%p1 bra OUT;\nbar.sync 0;\nOUT:")
    never = "setp.lt.u32 %p1, %t, 64;\n@%p1 bra OUT;\nbar.sync 1, 96;\nOUT:"
    message = fails("divergent barrier", never, threads=128, size=128)
    assert "64 of 128 threads wait at PTX line" in message


def test_shared_bounds_and_initialisation() -> None:
    fails("shared bounds", "st.shared.b32 [%r102+4], %t;")
    fails("shared alignment", "st.shared.b32 [%r102+2], %t;", shared=512)
    fails("uninitialised shared memory", "ld.shared.b32 %r1, [%r102];")


COPY = """
setp.ge.u32 %p1, %t, 16;
shl.b32 %r1, %t, 4;
add.u32 %r2, %r100, %r1;
cvt.u64.u32 %rd20, %r1;
add.s64 %rd21, %rd0, %rd20;
@%p1 bra ISSUED;
cp.async.cg.shared.global [%r2], [%rd21], 16{size};
cp.async.commit_group;
ISSUED:
{wait}
{barrier}
ld.shared.b32 %r3, [%r102];
st.global.b32 [%rd12], %r3;
"""


def test_asynchronous_copies() -> None:
    whole = COPY.format(size="", wait="cp.async.wait_group 0;", barrier="bar.sync 0;")
    assert (run(whole) == WORDS[:64]).all()
    short = COPY.format(size=", 8", wait="cp.async.wait_all;", barrier="bar.sync 0;")
    assert (run(short) == np.where(np.arange(64) % 4 < 2, WORDS[:64], 0)).all()
    fails("uninitialised shared memory", COPY.format(size="", wait="", barrier="bar.sync 0;"))
    fails("uninitialised shared memory", COPY.format(size="", wait="cp.async.wait_group 1;", barrier="bar.sync 0;"))
    fails("warp race", COPY.format(size="", wait="cp.async.wait_group 0;", barrier=""))
    fails("shared race", COPY.format(size="", wait="cp.async.wait_group 0;", barrier="bar.warp.sync -1;"))
    rewritten = "st.shared.b32 [%r102], 0;\nbar.sync 0;\n" + COPY.format(size="", wait="", barrier="bar.sync 0;")
    fails("asynchronous copy", rewritten)


def test_divergent_loops_reconverge() -> None:
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    LOOP:
    add.u32 %r2, %r2, %r1;
    add.u32 %r1, %r1, 1;
    setp.le.u32 %p1, %r1, %t;
    @%p1 bra LOOP;
    shfl.sync.idx.b32 %r3, %r2, 0, 31, -1;
    add.u32 %r2, %r2, %r3;
    st.global.b32 [%rd12], %r2;
    """
    lane = np.arange(64)
    base = np.where(lane < 32, 0, 32 * 33 // 2)
    assert (run(body) == lane * (lane + 1) // 2 + base).all()


def test_predicated_instructions_touch_their_lanes_only() -> None:
    out = run(
        """
        setp.lt.u32 %p1, %t, 10;
        mov.u32 %r1, 1;
        @%p1 mov.u32 %r1, 2;
        @!%p1 add.u32 %r1, %r1, 4;
        st.global.b32 [%rd12], %r1;
        """
    )
    assert (out == np.where(np.arange(64) < 10, 2, 5)).all()


def test_atomics_go_lane_by_lane() -> None:
    out = run(
        """
        atom.global.add.u32 %r1, [%rd1], 1;
        bar.sync 0;
        setp.ne.u32 %p1, %t, 0;
        @%p1 st.global.b32 [%rd12], %r1;
        """
    )
    assert out[0] == 64 and (out[1:] == np.arange(1, 64)).all()
    out = run(
        """
        atom.global.cas.b32 %r1, [%rd1], 0, 9;
        red.global.max.u32 [%rd1+4], %t;
        red.global.add.f32 [%rd1+8], 0f3F800000;
        """
    )
    assert out[0] == 9 and out[1] == 63 and out[2:3].view(np.float32)[0] == 64
    out = run("st.shared.b32 [smem], 0;\nbar.sync 0;\natom.shared.add.u32 %r1, [smem], 2;\nst.global.b32 [%rd12], %r1;")
    assert (np.sort(out) == np.arange(0, 128, 2)).all()


def test_partial_batches_of_programs() -> None:
    body = """
    mov.u32 %r1, %ctaid.x;
    setp.eq.u32 %p1, %t, 0;
    mul.wide.u32 %rd5, %r1, 4;
    add.s64 %rd5, %rd1, %rd5;
    bar.sync 0;
    add.u32 %r1, %r1, 1;
    @%p1 st.global.b32 [%rd5], %r1;
    """
    out = run(body, grid=(61,))
    assert (out[:61] == np.arange(1, 62)).all() and (out[61:] == 0).all()


def test_generic_addresses() -> None:
    body = """
        cvta.shared.u64 %rd5, %rd6;
        st.b32 [%rd5], 5;
        bar.sync 0;
        ld.shared.b32 %r1, [%r102];
        st.b32 [%rd12], %r1;
        """
    assert (run("cvt.u64.u32 %rd6, %r102;\n" + body) == 5).all()


def test_what_is_not_implemented_is_said() -> None:
    with pytest.raises(PTXError, match="tcgen05.alloc.* is not implemented"):
        run("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem], 32;")
    with pytest.raises(PTXError, match="unknown label"):
        run("bra NOWHERE;")


def test_a_loop_without_end_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.ptx.machine._BLOCK_LIMIT", 1000)
    fails("hang", "FOREVER:\nbra FOREVER;")

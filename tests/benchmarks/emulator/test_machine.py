"""Small programs on the emulated chip: how lanes part and meet, and what it does not let pass."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.emulator.machine import Code, launch
from benchmarks.emulator.memory import Fault, Global
from benchmarks.emulator.ptx import parse

FIRST = """
    ld.param.b64 %rd0, [k_param_0];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, THREADS, %r0;
    mul.wide.s32 %rd1, %r2, 4;
    add.s64 %rd2, %rd0, %rd1;
    shl.b32 %r3, %r0, 2;
"""


def run(
    body: str,
    *tensors: torch.Tensor,
    threads: int = 64,
    programs: int = 2,
    shared: int = 1024,
    anywhere: bool = False,
) -> Counter[str]:
    """Behind `FIRST`: %rd2 is the place of a thread's word of the first tensor, %r0 the thread, %r3 it times 4."""
    params = ", ".join(f".param .u64 k_param_{i}" for i in range(len(tensors)))
    registers = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<30>; .reg .b64 %rd<9>;"
    text = f".visible .entry k({params}) .reqntid {threads} {{ {registers} {FIRST} {body} ret; }}"
    moved: Counter[str] = Counter()
    memory = Global(tensors, moved, anywhere)
    launch(
        Code(parse(text.replace("THREADS", str(threads)))),
        (programs, 1, 1),
        [t.data_ptr() for t in tensors],
        shared,
        memory,
    )
    return moved


def words(count: int = 128) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


def test_lanes_part_and_meet():
    """Each thread counts to its own number, and all meet behind the loop."""
    y = words()
    run(
        """
        mov.b32 %r4, 0;
    $loop:
        setp.ge.s32 %p1, %r4, %r0;
        @%p1 bra $out;
        add.s32 %r4, %r4, 1;
        bra.uni $loop;
    $out:
        bar.sync 0;
        mad.lo.s32 %r4, %r1, 1000, %r4;
        st.global.b32 [%rd2], {%r4};
        """,
        y,
    )
    assert y.tolist() == [*range(64), *range(1000, 1064)]


def test_a_guard_leaves_the_others_alone():
    y = words()
    run("mov.b32 %r4, 7; setp.lt.s32 %p1, %r0, 3; @%p1 mov.b32 %r4, 9; st.global.b32 [%rd2], {%r4};", y)
    assert y[:64].tolist() == [9] * 3 + [7] * 61


def test_many_programs_go_in_turns():
    y = words(64 * 700)
    run("st.global.b32 [%rd2], {%r2};", y, programs=700)
    assert torch.equal(y, torch.arange(64 * 700, dtype=torch.int32))


def test_shuffles():
    y = words(64)
    run("shfl.sync.bfly.b32 %r4, %r0, 16, 31, -1; st.global.b32 [%rd2], {%r4};", y, programs=1)
    assert y.tolist() == [i ^ 16 for i in range(64)]
    run("shfl.sync.idx.b32 %r4, %r0, 5, 31, -1; st.global.b32 [%rd2], {%r4};", y, programs=1)
    assert y.tolist() == [5] * 32 + [37] * 32
    run("redux.sync.max.s32 %r4, %r0, -1; st.global.b32 [%rd2], {%r4};", y, programs=1)
    assert y.tolist() == [31] * 32 + [63] * 32


def test_shared_memory_behind_a_barrier():
    y = words(64)
    body = """
        st.shared.b32 [%r3], {%r0};
        BARRIER
        sub.s32 %r4, 252, %r3;
        ld.shared.b32 %r5, [%r4];
        st.global.b32 [%rd2], {%r5};
        """
    run(body.replace("BARRIER", "bar.sync 0;"), y, programs=1)
    assert y.tolist() == list(range(63, -1, -1))
    with pytest.raises(Fault, match=r"ld\.shared.*reads what another has written since the last barrier"):
        run(body.replace("BARRIER", ""), y, programs=1)
    alone = body.replace("BARRIER", "").replace("252", "124")
    run(alone, y[:32], programs=1, threads=32)  # a warp does not race with itself
    assert y[:32].tolist() == list(range(31, -1, -1))


def test_what_another_warp_still_reads_is_not_written():
    y = words(64)
    body = """
        st.shared.b32 [%r3], {%r0};
        bar.sync 0;
        sub.s32 %r4, 252, %r3;
        ld.shared.b32 %r5, [%r4];
        BARRIER
        st.shared.b32 [%r3], {%r5};
        """
    run(body.replace("BARRIER", "bar.sync 0;"), y, programs=1)
    with pytest.raises(Fault, match="writes what another has read since the last barrier"):
        run(body.replace("BARRIER", ""), y, programs=1)


def test_two_lanes_may_write_the_same_but_nothing_else():
    y = words(64)
    run("mov.b32 %r5, 3; st.shared.b32 [%r1], {%r5};", y, programs=1)
    with pytest.raises(Fault, match="two lanes write different things to the same place"):
        run("st.shared.b32 [%r1], {%r0};", y, programs=1)


def test_a_barrier_is_for_all_threads():
    with pytest.raises(Fault, match="a barrier that some threads of a program do not come to"):
        run("setp.lt.s32 %p1, %r0, 32; @%p1 bra $out; bar.sync 0; $out: mov.b32 %r4, 0;", words())


def test_threads_wait_at_a_barrier_for_those_that_come_another_way():
    """One warp writes, further down, what the other reads behind the barrier, which stands further up."""
    y = words()
    run(
        """
        setp.lt.s32 %p1, %r0, 32;
        @%p1 bra $writes;
    $meet:
        bar.sync 0;
        sub.s32 %r4, 252, %r3;
        setp.ge.s32 %p2, %r0, 32;
        mov.b32 %r5, 0;
        @%p2 ld.shared.b32 %r5, [%r4];
        st.global.b32 [%rd2], {%r5};
        bra.uni $end;
    $writes:
        st.shared.b32 [%r3], {%r0};
        bra.uni $meet;
    $end:
        mov.b32 %r4, 0;
        """,
        y,
    )
    assert y.tolist() == [*[0] * 32, *range(31, -1, -1)] * 2


def test_a_wait_ends_with_the_product_it_is_for():
    y = words()
    body = """
        mbarrier.init.shared::cta.b64 [%r1], 1;
        COMMIT
    waitLoop:
        mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], PARITY;
        @!%p1 bra waitLoop;
        st.global.b32 [%rd2], {%r0};
        """
    commit = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];"
    run(body.replace("COMMIT", "").replace("PARITY", "1"), y, threads=1, programs=1)  # the phase before the first
    run(body.replace("COMMIT", commit).replace("PARITY", "0"), y, threads=1, programs=1)
    for text, parity in (("", "0"), (commit, "1")):
        with pytest.raises(Fault, match="k, .*: a wait for what does not come"):
            run(body.replace("COMMIT", text).replace("PARITY", parity), y, threads=1, programs=1)


def test_a_shuffle_is_for_a_whole_warp():
    with pytest.raises(Fault, match="whole warps"):
        run("setp.lt.s32 %p1, %r0, 3; @%p1 shfl.sync.bfly.b32 %r4, %r0, 16, 31, -1;", words())


def test_copies_have_to_be_waited_for():
    """Until then the place is all ones, even behind a barrier."""
    x, y = torch.arange(128, dtype=torch.int32), words()
    body = """
        ld.param.b64 %rd3, [k_param_1];
        add.s64 %rd4, %rd3, %rd1;
        cp.async.ca.shared.global [ %r3 + 0 ], [ %rd4 + 0 ], 0x4, %r6;
        cp.async.commit_group;
        cp.async.ca.shared.global [ %r3 + 256 ], [ %rd4 + 0 ], 0x4;
        cp.async.commit_group;
        cp.async.wait_group WAIT;
        bar.sync 0;
        ld.shared.b32 %r4, [%r3];
        ld.shared.b32 %r5, [%r3+256];
        sub.s32 %r4, %r4, %r5;
        st.global.b32 [%rd2], {%r4};
        """
    run("mov.b32 %r6, 4;" + body.replace("WAIT", "0"), y, x)
    assert not y.any()
    run("mov.b32 %r6, 4;" + body.replace("WAIT", "1"), y, x)
    assert torch.equal(y, x + 1)  # of the second group nothing has come: -1
    run("mov.b32 %r6, 0;" + body.replace("WAIT", "0"), y, x)
    assert torch.equal(y, -x)  # nothing is read where the size is 0, and zeros are written


def test_accesses_outside_are_faults():
    y = words()
    run("st.global.b32 [%rd2], {%r0};", y)
    far = y.new_zeros(2**22)  # alone in its pages
    with pytest.raises(Fault, match="outside every tensor, by 1 lanes"):
        run("st.global.b32 [%rd2 + 4], {%r0};", far[-128:])
    with pytest.raises(Fault, match="outside every tensor, by 128 lanes"):
        run("ld.global.b32 {%r4}, [%rd0 + -4];", far)
    for high in ("0x8000000000000000", "0x4000000000000000"):
        with pytest.raises(Fault, match="outside every tensor"):
            run(f"mov.b64 %rd4, {high}; ld.global.b32 {{%r4}}, [%rd4];", y)
    with pytest.raises(Fault, match="not a multiple of 8"):
        run("ld.global.v2.b32 {%r4, %r5}, [%rd2];", y)
    with pytest.raises(Fault, match="beyond the 1024 bytes of shared memory"):
        run("ld.shared.b32 %r4, [%r3+1000];", y)
    with pytest.raises(Fault, match="not a multiple of 4"):
        run("ld.shared.b32 %r4, [%r3+2];", y)


def test_tensors_of_others_are_out_of_reach_unless_addresses_are_given():
    x, y = words(), words()
    body = f"mov.b64 %rd4, {x.data_ptr()}; st.global.b32 [%rd4], {{%r0}};"
    with pytest.raises(Fault, match="outside every tensor"):
        run(body, y, threads=1, programs=1)
    run(body, y, threads=1, programs=1, anywhere=True)


def test_a_copy_from_outside_is_a_fault_before_anyone_waits():
    with pytest.raises(Fault, match="outside every tensor"):
        run("mov.b64 %rd4, 64; cp.async.ca.shared.global [ %r3 + 0 ], [ %rd4 + 0 ], 0x4;", words())


def test_one_barrier_is_known_that_of_all_threads():
    for body in ("bar.sync 1;", "bar.sync 0, 32;", "@%p1 bar.sync 0;"):
        with pytest.raises(NotImplementedError, match="one barrier, of all threads"):
            run(body, words())
    with pytest.raises(Fault, match="whole warps"):
        run("setp.lt.s32 %p1, %r0, 3; @%p1 bra $out; bar.sync 0; $out: mov.b32 %r4, 0;", words())


def test_tensor_memory_is_what_was_asked_for_and_a_warps_own():
    ask = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;"
    load = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r4, %r5}, [%r6 + 30]; st.global.b32 [%rd2], {%r5};"
    y = words(32)
    run(f"{ask} mov.b32 %r6, 0; {load}", y, threads=32, programs=1)
    assert (y == -1).all()
    with pytest.raises(Fault, match="beyond the tensor memory that was asked for"):
        run(f"{ask} mov.b32 %r6, 1; {load}", y, threads=32, programs=1)
    with pytest.raises(Fault, match="another's"):
        run(f"{ask} mov.b32 %r6, 2097152; {load}", y, threads=32, programs=1)


def test_an_empty_register_is_all_ones():
    """So that what depends on it is NaN; some lanes may have written it."""
    y = words()
    run("setp.lt.s32 %p1, %r0, 3; @%p1 mov.b32 %r9, 7; add.s32 %r9, %r9, %r8; st.global.b32 [%rd2], {%r9};", y)
    assert y[:64].tolist() == [6] * 3 + [-2] * 61


def test_what_the_emulator_does_not_know_is_said():
    with pytest.raises(NotImplementedError, match=r"atom\.global\.add\.f32"):
        run("atom.global.add.f32 %r4, [%rd2], %r0;", words())


def test_sectors_and_bank_conflicts_are_counted():
    y = words(64 * 16)
    close = run("ld.global.b32 {%r4}, [%rd2]; st.shared.b32 [%r3], {%r0};", y, programs=1)
    assert close == {
        "load requests": 2,
        "load sectors": 8,
        "load bytes": 256,
        "shared store passes": 2,
        "shared store passes at best": 2,
    }
    apart = run(
        """
        mul.wide.s32 %rd3, %r0, 64;
        add.s64 %rd4, %rd0, %rd3;
        ld.global.b32 {%r4}, [%rd4];
        shl.b32 %r5, %r3, 2;
        st.shared.b32 [%r5], {%r0};
        """,
        y,
        programs=1,
    )
    assert apart["load sectors"] == 64
    assert apart["shared store passes"] == 8  # every fourth word: the lanes of a warp meet in eight banks

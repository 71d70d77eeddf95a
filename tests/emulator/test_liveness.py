"""Launches that do not end: deadlock, livelock, endless loops; and that those which merely wait do end."""

import time

import pytest
import torch

from tests.emulator import (
    DeadlockError,
    DivergenceError,
    EmulatorTimeoutError,
    LaunchOptions,
    LivelockError,
    TrapError,
    load_ptx,
)
from tests.emulator.conformance.case import module, pointers

_HEAD = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %nctaid.x;
    setp.eq.u32 %p0, %r0, 0;
    mul.wide.u32 %rd4, %r1, 4;
    add.s64 %rd5, %rd0, %rd4;
"""

# CTA i waits for the flag of CTA i + 1 (or i - 1); the last (or first) one waits for nobody.
_CHAIN = (
    pointers("flags")
    + _HEAD
    + """
    setp.eq.u32 %p1, %r1, {end};
    @%p1 bra $raise;
$spin:
    ld.acquire.gpu.global.u32 %r3, [%rd5+{step}];
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra $spin;
$raise:
    bar.sync 0;
    @%p0 st.release.gpu.global.u32 [%rd5], 1;
"""
)


def launch(body, params, grid=4, block=32, **options):
    tensors = {name: torch.zeros(64, dtype=torch.int32) for name in params}
    load_ptx(module(body, dict.fromkeys(params, "u64"))).launch(
        None, grid, block, tensors, options=LaunchOptions(timeout_s=20, **options)
    )
    return tensors


@pytest.mark.parametrize("resident", [0, 1, 2, 3])
def test_waiting_for_earlier_ctas_never_deadlocks(resident):
    flags = launch(_CHAIN.format(end=0, step=-4), ["flags"], resident=resident)["flags"]
    assert flags[:4].tolist() == [1, 1, 1, 1]


def test_waiting_for_later_ctas_needs_them_resident():
    body = _CHAIN.format(end=3, step=4)
    launch(body, ["flags"], resident=4)
    with pytest.raises(DeadlockError, match="not all CTAs were resident.*spinning on a flag at PTX line"):
        message = None
        try:
            launch(body, ["flags"], resident=2)
        except DeadlockError as error:
            message = str(error).replace("\n", " ")
            raise DeadlockError(message) from error


def test_a_flag_that_nobody_raises():
    with pytest.raises(DeadlockError, match="spinning on a flag"):
        launch(_CHAIN.format(end=9, step=4), ["flags"])


def test_polling_through_a_shared_variable_ends_or_is_a_livelock():
    """As Triton polls: one thread reads the flag, hands it to the others through shared memory, and all decide."""
    body = pointers("flags") + _HEAD
    body += """
    setp.eq.u32 %p1, %r1, {silent};
    @%p1 bra $raise;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra $raise;
    mov.u32 %r9, word;
$poll:
    @%p0 ld.acquire.gpu.global.u32 %r3, [%rd5+-4];
    bar.sync 0;
    @%p0 st.shared.b32 [%r9], %r3;
    bar.sync 0;
    ld.shared.b32 %r4, [%r9];
    setp.eq.u32 %p2, %r4, 0;
    @%p2 bra $poll;
$raise:
    bar.sync 0;
    setp.ne.u32 %p3, %r1, {silent};
    and.pred %p3, %p3, %p0;
    @%p3 st.release.gpu.global.u32 [%rd5], 1;
"""

    def run(silent):
        tensors = {"flags": torch.zeros(64, dtype=torch.int32)}
        text = module(body.format(silent=silent), {"flags": "u64"}, ".shared .align 4 .b8 word[4];")
        load_ptx(text).launch(None, 4, 64, tensors, options=LaunchOptions(timeout_s=20))

    run(silent=99)
    with pytest.raises(LivelockError, match="everybody polls"):
        run(silent=1)


def test_alternating_polls_are_a_livelock():
    body = (
        pointers("flags")
        + _HEAD
        + (
            "$spin:\n    ld.relaxed.gpu.global.u32 %r3, [%rd0];\n"
            "    ld.relaxed.gpu.global.u32 %r4, [%rd0+4];\n    or.b32 %r3, %r3, %r4;\n"
            "    setp.eq.u32 %p2, %r3, 0;\n    @%p2 bra $spin;"
        )
    )
    with pytest.raises(LivelockError):
        launch(body, ["flags"])


def test_an_endless_loop_meets_the_time_limit():
    body = pointers("flags") + "\n    mov.u32 %r0, 0;\n$loop:\n    add.s32 %r0, %r0, 1;\n    bra.uni $loop;"
    start = time.thread_time()
    with pytest.raises(EmulatorTimeoutError, match="more than 0.5 s"):
        tensors = {"flags": torch.zeros(4, dtype=torch.int32)}
        load_ptx(module(body, {"flags": "u64"})).launch(None, 1, 32, tensors, options=LaunchOptions(timeout_s=0.5))
    assert 0.5 <= time.thread_time() - start < 5


def test_a_spinning_lock_of_one_warp_ends():
    """A lane that spins must not starve the lane of its own warp that holds the lock."""
    body = pointers("lock", "total") + (
        "\n    mov.u32 %r9, 0;\n$try:\n    atom.acquire.gpu.global.cas.b32 %r3, [%rd0], 0, 1;\n"
        "    setp.ne.u32 %p1, %r3, 0;\n    @%p1 bra $try;\n"
    )
    body += (
        "    ld.global.u32 %r4, [%rd1];\n    add.s32 %r4, %r4, 1;\n    st.global.u32 [%rd1], %r4;\n"
        "    atom.release.gpu.global.exch.b32 %r3, [%rd0], 0;"
    )
    for seed in range(4):
        assert launch(body, ["lock", "total"], grid=2, seed=seed)["total"][0] == 64


def test_a_lock_that_each_lane_tries_in_turn_ends():
    """The holder polls too (its volatile read looks like it): those who poll must take turns."""
    body = pointers("lock", "total") + (
        "\n$try:\n    atom.global.cas.b32 %r3, [%rd0], 0, 1;\n    setp.ne.s32 %p1, %r3, 0;\n    @%p1 bra $next;\n"
        "    fence.acq_rel.gpu;\n    ld.volatile.global.u32 %r4, [%rd1];\n    add.s32 %r4, %r4, 1;\n"
        "    st.volatile.global.u32 [%rd1], %r4;\n    fence.acq_rel.gpu;\n    atom.global.exch.b32 %r5, [%rd0], 0;\n"
        "$next:\n    @%p1 bra $try;"
    )
    for seed in range(4):
        assert launch(body, ["lock", "total"], grid=2, seed=seed)["total"][0] == 64


def test_reading_a_flag_many_times_is_no_deadlock():
    body = (
        pointers("flags")
        + "\n    mov.u32 %r1, 0;\n    mov.u32 %r2, 0;\n$loop:\n    ld.volatile.global.u32 %r3, [%rd0];\n"
    )
    body += "    add.s32 %r2, %r2, %r3;\n    add.s32 %r2, %r2, 3;\n    add.s32 %r1, %r1, 1;\n"
    body += "    setp.lt.u32 %p1, %r1, 100;\n    @%p1 bra $loop;\n    st.global.u32 [%rd0+64], %r2;"
    assert launch(body, ["flags"], grid=1, block=1)["flags"][16] == 300


def test_lanes_at_different_barriers():
    body = (
        pointers("flags")
        + _HEAD
        + (
            "    setp.lt.u32 %p1, %r0, 16;\n    @%p1 bra $low;\n    bar.sync 0;\n    bra.uni $end;\n"
            "$low:\n    bar.sync 0;\n$end:"
        )
    )
    with pytest.raises(DivergenceError, match="wait for each other"):
        launch(body, ["flags"])


def test_trap():
    body = pointers("flags") + _HEAD + "    setp.eq.u32 %p1, %r0, 7;\n    @%p1 trap;"
    with pytest.raises(TrapError, match="executed trap\n  at PTX line"):
        launch(body, ["flags"])


def test_a_wait_that_counts_its_tries_comes_to_its_end():
    """An mbarrier at which nobody arrives: try_wait gives up after a time, as on hardware, and the kernel may trap."""
    body = (
        "    mov.u32 %r4, word;\n    mov.u32 %r0, %tid.x;\n    setp.eq.u32 %p0, %r0, 0;\n"
        "    @%p0 mbarrier.init.shared::cta.b64 [%r4], 1;\n    bar.sync 0;\n    mov.u32 %r1, 0;\n"
        "$again:\n    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r4], 0;\n    @%p1 bra $done;\n"
        "    add.u32 %r1, %r1, 1;\n    setp.lt.u32 %p2, %r1, {tries};\n    @%p2 bra $again;\n    trap;\n$done:"
    )

    def run(tries):
        text = module(body.format(tries=tries), {}, ".shared .align 8 .b8 word[8];", arch="sm_90")
        load_ptx(text).launch(None, 1, 128, [], options=LaunchOptions(timeout_s=20))

    with pytest.raises(TrapError):
        run(tries=300)
    with pytest.raises(DeadlockError, match="128 threads of .*mbarrier.try_wait"):
        run(tries=1 << 30)

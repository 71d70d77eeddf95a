"""Every detector on a correct kernel with one edit: the kernel passes, the edit is found and named.

Each row is: case, text to replace, replacement, error, and a fragment of its message.
"""

from dataclasses import replace

import pytest

from tests.emulator import (
    AlignmentError,
    AsyncCopyError,
    BarrierError,
    BoundsError,
    DeadlockError,
    DivergenceError,
    EmulatorError,
    LivelockError,
    ProxyError,
    RaceError,
    ReadOnlyError,
    UninitialisedError,
    WgmmaError,
    load_ptx,
)
from tests.emulator.conformance import EmulatorRunner, all_cases
from tests.emulator.conformance.case import module

CASES = {case.name: case for case in all_cases()}
RING, HANDOVER = "TMA ring", "hand-over through TMA"
MESSAGE, FENCES = "st.release and ld.acquire", "fences around relaxed accesses"
WGMMA, STORE, MULTICAST = "wgmma n64", "TMA store (70, 88) torch.bfloat16 at (3, 8), swizzle 128", "TMA multicast"
LOAD = "TMA load (16, 64) of (70, 88) at (3, 8), swizzle 128, to shared::cluster"
EVERY_FENCE = "fence.sc of every thread"
ARRIVING = "cp.async.mbarrier.arrive.noinc"
STORED = "st.async.v4.b32"
CLUSTER_BARRIER = "    barrier.cluster.arrive.release.aligned;\n    barrier.cluster.wait.acquire.aligned;\n"

BULK_STORE = (  # of what a CTA has received to its part of y, before that is written
    "    mad.lo.s32 %r9, %r21, 128, 0;\n    cvt.u64.u32 %rd9, %r9;\n    add.s64 %rd9, %rd1, %rd9;\n"
    "    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd9], [%r4], 16;\n"
    "    cp.async.bulk.commit_group;\n    cp.async.bulk.wait_group 0;\n    bar.warp.sync -1;\n"
)

FIRST_FLAG = "st.release.gpu.global.u32 [%rd2],", "st.relaxed.gpu.global.u32 [%rd2],"
LAST_FLAG = "st.release.gpu.global.u32 [%rd2+4],", "st.relaxed.gpu.global.u32 [%rd2+4],"

RACES = [
    ("bar.sync 0", "bar.sync 0;", "", UninitialisedError, "read of uninitialised shared memory"),
    ("bar.sync with a count", "bar.sync 3, 128;", "", UninitialisedError, "read of uninitialised shared memory"),
    ("named barriers of two warps", "add.s32 %r6, %r6, 1;", "shr.u32 %r6, %r0, 5;", DeadlockError, "bar.sync (named)"),
    ("bar.arrive", "@%p1 bar.arrive 2, 128;", "", DeadlockError, "bar.sync (named)"),
    ("bar.arrive", "bar.sync 2, 128;", "bar.sync 2, 64;", BarrierError, "is used with"),
    ("shared by 32-bit address", "bar.sync 0;", "", RaceError, "read of shared memory"),
    (MESSAGE, "st.release.gpu", "st.relaxed.gpu", RaceError, "read of data[0] is not ordered after the write"),
    (MESSAGE, "st.release.gpu", "st.release.cta", RaceError, "flag[0]"),
    (MESSAGE, "@%p0 st.release.gpu.global.u32", "@%p0 st.global.u32", RaceError, "flag[0]"),
    (MESSAGE, "ld.acquire.gpu", "ld.relaxed.gpu", RaceError, "data[0]"),
    (MESSAGE, "ld.acquire.gpu", "ld.acquire.cta", RaceError, "flag[0]"),
    (MESSAGE, "st.global.b32 [%rd0], %r8;\n    bar.sync 0;", "st.global.b32 [%rd0], %r8;", RaceError, "data[1]"),
    (MESSAGE, "@%p2 bra $spin;", "", RaceError, "data[0]"),
    (FENCES, "@%p0 fence.acq_rel.gpu;", "", RaceError, "data[0]"),
    (FENCES, "@%p0 fence.acq_rel.gpu;", "@%p0 fence.acq_rel.cta;", RaceError, "data[0]"),
    (FENCES, "    fence.acq_rel.gpu;\n$ready", "$ready", RaceError, "data[0]"),
    # The fence must come after the barrier, unless all threads have one and those are sequentially consistent.
    (FENCES, "bar.sync 0;\n    @%p0 fence.acq_rel.gpu;", "fence.acq_rel.gpu;\n    bar.sync 0;", RaceError, "data[1]"),
    (EVERY_FENCE, "fence.sc.gpu;\n    bar.sync 0;", "fence.acq_rel.gpu;\n    bar.sync 0;", RaceError, "data[1]"),
    (EVERY_FENCE, "fence.sc.gpu;\n    bar.sync 0;", "fence.sc.cta;\n    bar.sync 0;", RaceError, "data["),
    (EVERY_FENCE, "fence.sc.gpu;\n    bar.sync 0;", "bar.sync 0;", RaceError, "data[0]"),
    (EVERY_FENCE, "fence.sc.gpu;\n    bar.sync 0;", "fence.sc.gpu;", RaceError, "data[1]"),
    (EVERY_FENCE, "bar.sync 0;\n    fence.sc.gpu;\n    ld", "bar.sync 0;\n    ld", RaceError, "data[0]"),
    (EVERY_FENCE, "bar.sync 0;\n    fence.sc.gpu;\n    ld", "fence.sc.gpu;\n    bar.sync 0;\n    ld", None, ""),
    ("atom.release and atom.acquire", "atom.release.gpu", "atom.relaxed.gpu", RaceError, "data[0]"),
    ("atom.release and atom.acquire", "atom.acquire.gpu", "atom.relaxed.gpu", RaceError, "data[0]"),
    ("red.release and atom.cas", "red.release.gpu", "red.relaxed.gpu", RaceError, "data[0]"),
    ("atom.shared.add", "bar.sync 0;\n    atom", "atom", RaceError, "shared memory"),
    # A plain write to the flag, strong or not, hands nothing on.
    ("release sequence", "atom.relaxed.gpu.global.add.u32 %r2, [%rd2], 1;", "st.relaxed.gpu.global.u32 [%rd2], 2;",
     RaceError, "data[0]"),
    ("release sequence", "atom.relaxed.gpu.global.add.u32 %r2, [%rd2], 1;", "st.global.u32 [%rd2], 2;",
     RaceError, "flag[0]"),
    # The second access must not hide the first from the third.
    ("read, atomic, atomic", *LAST_FLAG, RaceError, "x[0]"),
    ("atomic, read, read", *LAST_FLAG, RaceError, "x[0]"),
    ("write, atomic, read", *LAST_FLAG, RaceError, "x[0]"),
    ("write, atomic, read", *FIRST_FLAG, RaceError, "x[0]"),
    ("tickets", "mul.wide.u32 %rd2, %r2, 4;", "mov.u64 %rd2, 0;", RaceError, "tickets[0]"),
]  # fmt: skip

COPIES = [
    ("cp.async 16 bytes", "cp.async.wait_group 0;", "", RaceError, "still in flight"),
    ("cp.async 16 bytes", "cp.async.commit_group;", "", RaceError, "still in flight"),
    ("cp.async 16 bytes", "bar.sync 0;", "", None, ""),  # each thread reads what it copied
    ("cp.async groups", "cp.async.wait_group 1;", "cp.async.wait_group 2;", RaceError, "still in flight"),
    ("cp.async groups", "cp.async.wait_all;", "", RaceError, "still in flight"),
    (
        "cp.async 16 bytes",
        "mad.lo.s32 %r6, %r0, 16, %r4;",
        "mad.lo.s32 %r6, %r0, 8, %r4;",
        AlignmentError,
        "not aligned to 16",
    ),
    (
        ARRIVING,
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64",
        "mbarrier.arrive.shared::cta.b64 _,",
        RaceError,
        "still in flight",
    ),
    (ARRIVING, "@!%p9 bra $ready;", "", RaceError, "is not ordered after the asynchronous write"),
    (ARRIVING, "[%r5], 32;", "[%r5], 33;", LivelockError, "everybody polls"),
    (
        "cp.async.mbarrier.arrive",
        "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r5];",
        "",
        LivelockError,
        "everybody polls",
    ),
    (LOAD, "@!%p9 bra $wait_full;", "", RaceError, "still in flight"),
    (LOAD, "[%r5], 2048;", "[%r5], 1024;", DeadlockError, "mbarrier.try_wait"),
    (LOAD, "[%r5], 2048;", "[%r5], 4096;", DeadlockError, "mbarrier.try_wait"),
    (LOAD, "@%p0 mbarrier.init.shared::cta.b64 [%r5], 1;", "", BarrierError, "no mbarrier"),
    (
        LOAD,
        ("fence.mbarrier_init.release.cluster;\n    bar.sync 0;"),
        "fence.mbarrier_init.release.cluster;",
        RaceError,
        "without being ordered after its initialisation",
    ),
    (LOAD, "fence.mbarrier_init.release.cluster;", "", None, ""),  # asked for only where another CTA's copy signals
    (LOAD, "], [%r5];\n", "], [%r5+8];\n", BarrierError, "no mbarrier"),
    (LOAD, "[%r4], [%rd0", "[%r4+16], [%rd0", AlignmentError, "not aligned to 1024"),
    (STORE, "fence.proxy.async.shared::cta;", "", ProxyError, "has no fence.proxy.async for shared memory"),
    (
        STORE,
        "fence.proxy.async.shared::cta;",
        "fence.proxy.async.global;",
        ProxyError,
        "has no fence.proxy.async for shared memory",
    ),
    (STORE, "bar.sync 0;", "", RaceError, "asynchronous read of shared memory"),
    (STORE, "cp.async.bulk.commit_group;", "", AsyncCopyError, "may still read shared memory"),
    (
        STORE,
        ("cp.async.bulk.wait_group.read 0;\n    cp.async.bulk.wait_group 0;"),
        "",
        AsyncCopyError,
        "may still read shared memory",
    ),
    (STORE, "cp.async.bulk.wait_group.read 0;", "@%p0 st.shared.b32 [%r4], %r0;", RaceError, "write of shared memory"),
    (RING, "@!%p2 bra $wait_full;", "", EmulatorError, "shared memory"),
    (RING, "@!%p2 bra $wait_empty;", "", EmulatorError, "shared memory"),
    (RING, "xor.b32 %r15, %r12, 1;", "mov.b32 %r15, %r12;", DeadlockError, "mbarrier.try_wait"),
    (RING, "[%r13], 4096;", "[%r13], 4080;", EmulatorError, ""),
    (
        RING,
        ("4096, %r4;\n    shl"),
        ("2048, %r4;\n    shl"),
        RaceError,
        "asynchronous write of shared memory",
    ),  # stages overlap
    (RING, "mbarrier.arrive.shared::cta.b64 _, [%r14];", "", DeadlockError, "mbarrier.try_wait"),
    (RING, "[%r6], 32;", "[%r6], 31;", RaceError, "asynchronous write of shared memory"),
    (
        RING,
        "ld.shared.b32 %r17, [%r16+-4096];",
        "ld.shared.b32 %r17, [%r16];",
        RaceError,
        "shared memory",
    ),  # the next stage
    (HANDOVER, "fence.proxy.async.global;  // by the reader", "", None, ""),  # the writer's is on the path too
    (HANDOVER, "ld.acquire.gpu.global.u32 %r9", "ld.relaxed.gpu.global.u32 %r9", RaceError, "s[0]"),
    (HANDOVER, "red.release.gpu", "red.relaxed.gpu", RaceError, "s[0]"),
    (HANDOVER, "bar.sync 0;\n    @%p0 red", "@%p0 red", RaceError, "s[1]"),
    (HANDOVER, "bar.sync 1;", "", EmulatorError, ""),
    ("hand-over by TMA store", "wait_group 0;", "wait_group.read 0;", RaceError, "s[0] is not ordered after"),
    ("hand-over by TMA store", "st.release.gpu", "st.relaxed.gpu", RaceError, "s[0] is not ordered after"),
    ("hand-over by TMA store", "fence.proxy.async.shared::cta;", "", ProxyError, "shared memory"),
]

TENSOR_CORES = [
    (WGMMA, "fence.proxy.async.shared::cta;", "", ProxyError, "asynchronous read of shared memory"),
    (WGMMA, "bar.sync 0;", "", RaceError, "asynchronous read of shared memory"),
    (WGMMA, "wgmma.wait_group.sync.aligned 0;", "", WgmmaError, "in flight is read"),
    (WGMMA, "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", WgmmaError, "in flight is read"),
    (WGMMA, "wgmma.commit_group.sync.aligned;", "", WgmmaError, "in flight is read"),
    (WGMMA, "wgmma.fence.sync.aligned;", "", WgmmaError, "without a wgmma.fence"),
    (WGMMA, "wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned;\n    mov.f32 %f3, 0f00000000;",
     WgmmaError, "since its last wgmma.fence"),
    (WGMMA, "wgmma.commit_group.sync.aligned;",
     "wgmma.commit_group.sync.aligned;\n    mov.f32 %f3, 0f00000000;", WgmmaError, "in flight is written"),
    (WGMMA, "wgmma.commit_group.sync.aligned;",
     "wgmma.commit_group.sync.aligned;\n    st.shared.b32 [%r5], %r0;", RaceError, "write of shared memory"),
    (WGMMA, "or.b64 %rd11, %rd11,", "setp.gt.u32 %p7, %r0, 15;\n    @%p7 or.b64 %rd11, %rd11,",
     DivergenceError, "descriptor differs"),
    (WGMMA, "or.b64 %rd11, %rd11,",
     "setp.gt.u32 %p7, %r0, 63;\n    @%p7 or.b64 %rd11, %rd11, 1;\n    or.b64 %rd11, %rd11,",
     DivergenceError, "different wgmma"),
    ("wgmma bf16 A in registers, swizzle 128", "wgmma.commit_group.sync.aligned;",
     "wgmma.commit_group.sync.aligned;\n    mov.b32 %r20, 0;", WgmmaError, "in flight is written"),
    ("ldmatrix.x4", "bar.sync 0;", "", RaceError, "shared memory"),
    ("ldmatrix.x4", "[%r1];\n    st", "[%r1+8];\n    st", AlignmentError, "not aligned to 16"),
    ("ldmatrix.x4", "ldmatrix.sync", "@%p1 ldmatrix.sync", None, ""),  # all 32 lanes move rows of four matrices
    ("ldmatrix.x2", "ldmatrix.sync", "@%p1 ldmatrix.sync", DivergenceError, "predicated off"),
]  # fmt: skip

CLUSTERS = [
    ("mapa and remote load", CLUSTER_BARRIER + "    xor", "    xor", EmulatorError, ""),
    ("mapa and remote load", "%r8, [%r7];\n" + CLUSTER_BARRIER, "%r8, [%r7];\n", BoundsError, "has exited"),
    ("remote store", "barrier.cluster.arrive.release",
     "barrier.cluster.arrive.relaxed", RaceError, "read of shared memory"),
    ("remote mbarrier arrival", "@%p0 fence.mbarrier_init.release.cluster;\n" + CLUSTER_BARRIER, "", EmulatorError, ""),
    ("remote mbarrier arrival", "try_wait.parity.acquire.cluster", "try_wait.parity", RaceError, "shared memory"),
    ("remote mbarrier arrival", "arrive.release.cluster", "arrive.release.cta", RaceError, "shared memory"),
    ("remote mbarrier arrival", "arrive.release.cluster", "arrive.relaxed.cluster", RaceError, "shared memory"),
    ("mbarrier.arrive", "mbarrier.arrive.shared", "mbarrier.arrive.relaxed.cta.shared", RaceError, "shared memory"),
    ("remote overwrite", "@!%p9 bra $wait_read;", "", RaceError, "write of shared memory"),
    ("remote overwrite", "mbarrier.arrive.shared", "mbarrier.arrive.relaxed.cluster.shared", None, ""),
    ("remote overwrite", "ld.shared.b32 %r8, [%r5];\n    mapa", "st.shared.b32 [%r5], %r9;\n    mapa",
     RaceError, "write of shared memory"),
    ("remote overwrite", "ld.shared.b32 %r8, [%r5];\n    mapa",
     "ld.shared.b32 %r8, [%r5];\n    st.shared.b32 [%r5], %r9;\n    fence.proxy.async.shared::cta;\n    mapa",
     None, ""),
    (MULTICAST, "@%p0 fence.mbarrier_init.release.cluster;", "", ProxyError,
     "neither fence.mbarrier_init nor fence.proxy.async"),
    (MULTICAST, "@%p0 fence.mbarrier_init.release.cluster;", "fence.proxy.async.global;", ProxyError, "neither"),
    (MULTICAST, "@%p0 fence.mbarrier_init.release.cluster;", "fence.proxy.async.shared::cta;", None, ""),
    (MULTICAST, "[%r22], 4096;", "[%r22], 2048;", EmulatorError, ""),
    (MULTICAST, "[%r22], 4096;\n" + CLUSTER_BARRIER, "[%r22], 4096;\n",
     None, ""),  # bytes may come before they are expected
    (MULTICAST, "mov.b16 %h1, 3;", "mov.b16 %h1, 1;", DeadlockError, "mbarrier.try_wait"),
    (STORED, "@!%p9 bra $wait_full;", "", EmulatorError, "of shared memory"),
    ("remote slot", "@!%p9 bra $wait_read;", "", EmulatorError, ""),
    ("remote slot", "@!%p9 bra $wait_second;", "", RaceError, "shared memory"),
    (STORED, "try_wait.parity.shared", "try_wait.parity.relaxed.cta.shared", RaceError, "read of shared memory"),
    (STORED, "[%r22], 512;", "[%r22], 528;", DeadlockError, "mbarrier.try_wait"),
    (STORED, "[%r22], 512;", "[%r22], 496;", EmulatorError, ""),
    (STORED, "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r22], 512;", "", DeadlockError, "mbarrier.try_wait"),
    (STORED, CLUSTER_BARRIER, "", EmulatorError, "mbarrier"),
    (STORED, "}, [%r7+4096];", "}, [%r22];", AsyncCopyError, "in different CTAs"),
    (STORED, "}, [%r7+4096];", "}, [%r7+4104];", BarrierError, "no mbarrier"),
    (STORED, "bytes.v4.b32 [%r9]", "bytes.v4.b32 [%r9+4]", AlignmentError, "not aligned to 16"),
    (STORED, "add.s32 %r9, %r7, %r9;", "mov.b32 %r9, %r7;", RaceError, "write of shared memory"),
    # Its thread's earlier stores come before it, later ones do not come after it.
    (STORED, "add.s32 %r9, %r7, %r9;\n", "add.s32 %r9, %r7, %r9;\n    st.shared::cluster.b32 [%r9], %r10;\n", None, ""),
    (STORED, "[%r7+4096];\n", "[%r7+4096];\n    st.shared::cluster.b32 [%r9], %r10;\n",
     RaceError, "write of shared memory"),
    (STORED, "mov.u32 %r8, 0;\n", "mov.u32 %r8, 0;\n" + BULK_STORE, ProxyError, "has no fence.proxy.async"),
    (STORED, "mov.u32 %r8, 0;\n", "mov.u32 %r8, 0;\n    fence.proxy.async;\n" + BULK_STORE, None, ""),
    ("remote atomic", "atom.shared::cluster.add.u32 %r9",
     "ld.shared::cluster.u32 %r10, [%r7];\n    st.shared::cluster.u32 [%r7], %r10;\n    mov.u32 %r9",
     EmulatorError, ""),
]  # fmt: skip

OTHERS = [
    ("bytes side by side", "add.s32 %r2, %r1, %r0;", "and.b32 %r2, %r0, 62;\n    add.s32 %r2, %r1, %r2;",
     RaceError, "write"),
    ("shared by 32-bit address", "st.shared.b32 [%r2+128], %r1;", "", EmulatorError, ""),
    ("shared by symbol", "ld.shared.b32 %r6, [%rd5+128];",
     "ld.shared.b32 %r6, [%rd5+512];", UninitialisedError, "uninitialised shared memory"),
    ("shared by symbol", "ld.shared.b32 %r6, [%rd5+128];",
     "ld.shared.b32 %r6, [%rd5+1024];", BoundsError, "shared memory +1148, which has 1024 bytes"),
    ("shared by symbol", "ld.shared.b32 %r6, [%rd5+128];",
     "ld.shared.b32 %r6, [%rd5+130];", AlignmentError, "not aligned to 4"),
    ("shared by symbol", "ld.shared.b32 %r6, [%rd5+128];", "ld.shared.b32 %r6, [%rd5+-500];", BoundsError, "below"),
    ("shared by 32-bit address", "[%r5+128]", "[%r5+-2048]", BoundsError, "in no CTA"),
    ("ld/st.global.b32", "ld.global.b32 %r10, [%rd0];",
     "ld.global.b32 %r10, [%rd0+4];", BoundsError, "read of 4 bytes at x"),
    ("ld/st.global.b32", "st.global.b32 [%rd1]", "st.global.b32 [%rd1+-4]",
     BoundsError, "write of 4 bytes at y -4 bytes"),
    ("ld/st.global.b32", "ld.global.b32 %r10, [%rd0];",
     "mov.u64 %rd9, 64;\n    ld.global.b32 %r10, [%rd9];", BoundsError, "in no buffer"),
    ("ld.global.nc.b32", "ld.global.nc", "st.global.b32 [%rd0], %r0;\n    ld.global.nc",
     ReadOnlyError, "x[0] is read as constant memory, but the launch writes it"),
    ("ld.global.nc.v4.b32", "[%rd0];\n", "[%rd0];\n    st.global.b32 [%rd0+12], %r10;\n",
     ReadOnlyError, "write of x[3], which the launch reads as constant memory"),
    ("ldu.global.b32", "[%rd0];\n", "[%rd0];\n    red.relaxed.gpu.global.add.u32 [%rd0], 1;\n",
     ReadOnlyError, "write of x[0], which the launch reads as constant memory"),
    (MESSAGE, "ld.global.b32 %r8", "ld.global.nc.b32 %r8", ReadOnlyError, "data[0]"),  # no order helps
    ("ld/st.global.v4.b32", "[%rd0];\n    st", "[%rd0+4];\n    st", AlignmentError, "not aligned to 16"),
    ("local memory", "[%rd5+16]", "[%rd5+64]", BoundsError, "local access"),
    ("divergent loop", "31, -1;", "31, 0xffff;", DivergenceError, "not in its member mask"),
    ("shfl.down width 32", "shfl.sync", "setp.gt.s32 %p5, %r20, 0;\n    @%p5 shfl.sync",
     DivergenceError, "predicated off"),
    ("vote.any", "vote.sync.any.pred %p2, %p1, -1;",
     "@%p1 bra $else;\n    vote.sync.any.pred %p2, %p1, -1;\n    bra.uni $end;\n"
     "$else:\n    vote.sync.any.pred %p2, %p1, -1;\n$end:",
     DivergenceError, "wait for each other"),
    ("vote.sync.ballot.b32 of halves", "0xffff, 0xffff0000,", "0x1ffff, 0xffff8000,",
     DivergenceError, "name each other"),
    ("elect.sync", "elect.sync", "setp.gt.s32 %p5, %r20, 0;\n    @%p5 elect.sync", DivergenceError, "predicated off"),
    ("elect.sync", "%r9|%p1, -1;", "%r9|%p1, 0xffff;", DivergenceError, "not in its member mask"),
    ("elect.sync of some lanes", "elect.sync {d}|%p1, %r8;".replace("{d}", "%r21"),
     "@%p3 bra $else;\n    elect.sync %r21|%p1, -1;\n    bra.uni $end;\n$else:\n    elect.sync %r21|%p1, -1;\n$end:",
     DivergenceError, "wait for each other"),
    ("bar.sync 0", "bar.sync 0;", "setp.gt.u32 %p7, %r0, 15;\n    @%p7 bar.sync 0;", DivergenceError, "predicated off"),
    ("bar.sync 0", "bar.sync 0;", "setp.gt.u32 %p7, %r0, 31;\n    @%p7 bar.sync 0;", EmulatorError, ""),
    ("bar.sync with a count", "bar.sync 3, 128;", "bar.sync 3, 100;", BarrierError, "for 100 threads"),
    ("bar.sync with a count", "bar.sync 3, 128;", "bar.sync 16, 128;", BarrierError, "barrier number 16"),
    ("mbarrier.arrive", "mbarrier.init.shared::cta.b64 [%r5], 32;",
     "mbarrier.init.shared::cta.b64 [%r5], 32;\n    @%p0 mbarrier.init.shared::cta.b64 [%r5], 32;",
     BarrierError, "initialised again"),
    ("mbarrier.arrive", "mbarrier.init.shared::cta.b64 [%r5], 32;",
     "mbarrier.init.shared::cta.b64 [%r5], 33;", DeadlockError, "mbarrier.try_wait"),
    ("mbarrier by state", "bar.sync 0;\n    @%p0 mbarrier.inval",
     "@%p0 mbarrier.inval", RaceError, "without being ordered after its use"),
    ("setmaxnreg", "setmaxnreg.dec.sync.aligned.u32 40;", "", DeadlockError, "no free registers"),
    ("setmaxnreg", "inc.sync.aligned.u32 232", "inc.sync.aligned.u32 240", DeadlockError, "no free registers"),
]  # fmt: skip

MUTANTS = RACES + COPIES + TENSOR_CORES + CLUSTERS + OTHERS
POLICIES = [{}, {"seed": 1, "async_policy": "random"}, {"seed": 2, "async_policy": "early"}]


def describe(row):
    return f"{row[0]}: {row[1][:40]} -> {row[2][:40]}".replace("\n", " ")


@pytest.mark.parametrize("row", MUTANTS, ids=describe)
def test_the_edit_is_found(row):
    """By one of the completion orders at least; every error must be the expected one."""
    name, old, new, error, fragment = row
    case = CASES[name].edited(old, new)
    found = []
    for options in POLICIES:
        runner = EmulatorRunner(timeout_s=20, **options)
        try:
            mismatch = case.mismatch(runner.run(case))
        except EmulatorError as raised:
            assert error is not None and isinstance(raised, error), raised
            assert fragment in str(raised)
            assert raised.sites, "the message names no instruction"
            found.append(raised)
        else:
            assert mismatch is None or found, f"only the result tells: {mismatch}"
    assert bool(found) == (error is not None)


@pytest.mark.parametrize("name", sorted({row[0] for row in MUTANTS}))
def test_the_unedited_kernel_passes(name):
    for options in POLICIES + [{"seed": seed} for seed in range(3, 9)]:
        assert CASES[name].mismatch(EmulatorRunner(**options).run(CASES[name])) is None


@pytest.mark.parametrize(
    "store",
    ["st.shared.b32 [buffer], %r1;", "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r1};"],
    ids=("st.shared", "stmatrix"),
)
@pytest.mark.parametrize("own", [False, True], ids=("one value", "one for each warp"))
def test_replicated_stores_race_only_where_they_differ(store, own):
    body = "\n    mov.u32 %r0, %tid.x;\n    shr.u32 %r1, %r0, 5;\n" + "    mov.b32 %r1, 7;\n" * (not own)
    body += "    and.b32 %r0, %r0, 7;\n    shl.b32 %r0, %r0, 4;\n    mov.u32 %r2, buffer;\n"
    body += f"    add.s32 %r2, %r2, %r0;\n    {store}"
    kernel = load_ptx(module(body, {}, ".shared .align 16 .b8 buffer[128];", arch="sm_90"))
    if not own:
        kernel.launch(None, 1, 64, [])
        return
    with pytest.raises(RaceError, match="write of shared memory"):
        kernel.launch(None, 1, 64, [])


def test_an_asynchronous_store_wants_a_cluster():
    case = CASES[STORED].edited("xor.b32 %r6, %r20, 1;", "mov.b32 %r6, %r20;")
    assert case.mismatch(EmulatorRunner().run(case)), "each CTA stores to itself"
    with pytest.raises(AsyncCopyError, match="wants a cluster of more than one CTA"):
        EmulatorRunner().run(replace(case, cluster=(1, 1, 1)))


def test_an_asynchronous_store_publishes_nothing_else():
    """What its thread stored before it in the ordinary way is not for whoever waits for its bytes."""
    store, load = "st.async.shared::cluster", "ld.shared.b32 %r9, [%r5+0];"
    case = CASES[STORED].edited(store, "st.shared::cluster.b32 [%r9+512], %r10;\n    " + store)
    EmulatorRunner().run(case)
    with pytest.raises(RaceError, match="read of shared memory"):
        EmulatorRunner().run(case.edited(load, load.replace("+0", "+512")))

"""Small whole protocols: a ring of stages filled by TMA, and a hand-over of data between CTAs that TMA reads."""

import torch

from ..tensor_map import TensorMap
from .asynchronous import MAP
from .case import Case, module

_SHARED = ".extern .shared .align 1024 .b8 memory[];"
_STAGES, _TILES = 3, 8

_RING = """
    ld.param.u64 %rd1, [y];
    mov.b64 %rd0, x;
    prefetch.tensormap [%rd0];
    mov.u32 %r0, %tid.x;
    mov.u32 %r4, memory;
    add.s32 %r5, %r4, 12288;
    add.s32 %r6, %r5, 64;
    setp.eq.u32 %p0, %r0, 0;
    @!%p0 bra $initialised;
    mbarrier.init.shared::cta.b64 [%r5], 1;
    mbarrier.init.shared::cta.b64 [%r5+8], 1;
    mbarrier.init.shared::cta.b64 [%r5+16], 1;
    mbarrier.init.shared::cta.b64 [%r6], 32;
    mbarrier.init.shared::cta.b64 [%r6+8], 32;
    mbarrier.init.shared::cta.b64 [%r6+16], 32;
    fence.mbarrier_init.release.cluster;
$initialised:
    bar.sync 0;
    mov.u32 %r10, 0;  // tile
    mov.u32 %r11, 0;  // stage
    mov.u32 %r12, 0;  // parity
    mov.u32 %r20, 0;
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra $consume;
    @!%p0 bra $out;
$produce:
    mad.lo.s32 %r13, %r11, 8, %r5;
    mad.lo.s32 %r14, %r11, 8, %r6;
    xor.b32 %r15, %r12, 1;
$wait_empty:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r14], %r15;
    @!%p2 bra $wait_empty;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r13], 4096;
    mad.lo.s32 %r16, %r11, 4096, %r4;
    shl.b32 %r17, %r10, 5;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r16], [%rd0, {0, %r17}], [%r13];
    add.s32 %r10, %r10, 1;
    add.s32 %r11, %r11, 1;
    setp.eq.u32 %p3, %r11, 3;
    selp.b32 %r11, 0, %r11, %p3;
    @%p3 xor.b32 %r12, %r12, 1;
    setp.lt.u32 %p4, %r10, 8;
    @%p4 bra $produce;
    bra.uni $out;
$consume:
    mad.lo.s32 %r13, %r11, 8, %r5;
    mad.lo.s32 %r14, %r11, 8, %r6;
$wait_full:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r13], %r12;
    @!%p2 bra $wait_full;
    mad.lo.s32 %r16, %r11, 4096, %r4;
    mad.lo.s32 %r16, %r0, 128, %r16;
    ld.shared.b32 %r17, [%r16+-4096];
    add.s32 %r20, %r20, %r17;
    mbarrier.arrive.shared::cta.b64 _, [%r14];
    add.s32 %r10, %r10, 1;
    add.s32 %r11, %r11, 1;
    setp.eq.u32 %p3, %r11, 3;
    selp.b32 %r11, 0, %r11, %p3;
    @%p3 xor.b32 %r12, %r12, 1;
    setp.lt.u32 %p4, %r10, 8;
    @%p4 bra $consume;
    mul.wide.u32 %rd6, %r0, 4;
    add.s64 %rd1, %rd1, %rd6;
    st.global.b32 [%rd1+-128], %r20;
$out:"""


def ring():
    """One thread loads eight tiles into three stages; a warp adds up the first column."""
    x = (torch.arange(_TILES * 32 * 32) * 31 % 1009).int().view(_TILES * 32, 32)
    args = {"x": TensorMap(x, (32, 32), 0), "y": torch.zeros(32, dtype=torch.int32)}
    expected = x.view(_TILES, 32, 32)[:, :, 0].sum(0).int()
    ptx = module(_RING, {"x": MAP, "y": "u64"}, _SHARED, arch="sm_90")
    return Case("TMA ring", ptx, args, {"y": expected}, block=64, shared_bytes=12288 + 128, arch="sm_90")


_HANDOVER = """
    ld.param.u64 %rd1, [y];
    ld.param.u64 %rd2, [s];
    ld.param.u64 %rd3, [flag];
    mov.b64 %rd0, map;
    mov.u32 %r0, %tid.x;
    mov.u32 %r21, %ctaid.x;
    mov.u32 %r4, memory;
    add.s32 %r5, %r4, 4096;
    setp.eq.u32 %p0, %r0, 0;
    mul.wide.u32 %rd6, %r0, 4;
    setp.ne.u32 %p1, %r21, 0;
    @%p1 bra $receive;
    add.s64 %rd2, %rd2, %rd6;
    add.s32 %r8, %r0, 500;
    st.global.b32 [%rd2], %r8;
    fence.proxy.async.global;  // by the writer
    bar.sync 0;
    @%p0 red.release.gpu.global.add.u32 [%rd3], 1;
    bra.uni $out;
$receive:
    @!%p0 bra $loaded;
    mbarrier.init.shared::cta.b64 [%r5], 1;
    fence.mbarrier_init.release.cluster;
$spin:
    ld.acquire.gpu.global.u32 %r9, [%rd3];
    setp.eq.u32 %p2, %r9, 0;
    @%p2 bra $spin;
    fence.proxy.async.global;  // by the reader
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 128;
    cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd0, {0}], [%r5];
$loaded:
    bar.sync 1;
$wait_full:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r5], 0;
    @!%p3 bra $wait_full;
    mad.lo.s32 %r6, %r0, 4, %r4;
    ld.shared.b32 %r8, [%r6];
    mad.lo.s32 %r7, %r21, 32, %r0;
    mul.wide.u32 %rd7, %r7, 4;
    add.s64 %rd1, %rd1, %rd7;
    st.global.b32 [%rd1], %r8;
$out:"""


def handover():
    """CTA 0 writes s with ordinary stores and raises a flag; the others read s with TMA."""
    s = torch.zeros(32, dtype=torch.int32)
    y = torch.full((4 * 32,), -1, dtype=torch.int32)
    expected = torch.cat([y[:32], (torch.arange(32, dtype=torch.int32) + 500).repeat(3)])
    params = {"map": MAP, "s": "u64", "y": "u64", "flag": "u64"}
    args = {"map": TensorMap(s, (32,), 0), "s": s, "y": y, "flag": torch.zeros(1, dtype=torch.int32)}
    ptx = module(_HANDOVER, params, _SHARED, arch="sm_90")
    return Case(
        "hand-over through TMA", ptx, args, {"y": expected}, grid=(4, 1, 1), shared_bytes=4096 + 64, arch="sm_90"
    )


_STORED = """
    ld.param.u64 %rd1, [y];
    ld.param.u64 %rd2, [s];
    ld.param.u64 %rd3, [flag];
    mov.b64 %rd0, map;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r4, memory;
    mad.lo.s32 %r5, %r0, 4, %r4;
    setp.eq.u32 %p0, %r0, 0;
    mul.wide.u32 %rd6, %r0, 4;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra $receive;
    add.s32 %r8, %r0, 900;
    st.shared.b32 [%r5], %r8;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p0 bra $out;
    cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%rd0, {0}], [%r4];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    st.release.gpu.global.u32 [%rd3], 1;
    bra.uni $out;
$receive:
    @!%p0 bra $ready;
$spin:
    ld.acquire.gpu.global.u32 %r9, [%rd3];
    setp.eq.u32 %p2, %r9, 0;
    @%p2 bra $spin;
$ready:
    bar.sync 0;
    add.s64 %rd2, %rd2, %rd6;
    ld.global.b32 %r8, [%rd2];
    add.s64 %rd1, %rd1, %rd6;
    st.global.b32 [%rd1], %r8;
$out:"""


def handover_by_store():
    """CTA 0 writes s with TMA and raises a flag; CTA 1 reads s with ordinary loads."""
    s, y = (torch.zeros(32, dtype=torch.int32) for _ in range(2))
    params = {"map": MAP, "s": "u64", "y": "u64", "flag": "u64"}
    args = {"map": TensorMap(s, (32,), 0), "s": s, "y": y, "flag": torch.zeros(1, dtype=torch.int32)}
    ptx = module(_STORED, params, _SHARED, arch="sm_90")
    expected = {"y": torch.arange(32, dtype=torch.int32) + 900}
    return Case("hand-over by TMA store", ptx, args, expected, grid=(2, 1, 1), shared_bytes=1024, arch="sm_90")


_RELAY = """
    ld.param.u64 %rd0, [x];
    ld.param.u64 %rd1, [y];
    ld.param.u64 %rd2, [flags];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r5, 0;
    setp.eq.u32 %p1, %r1, 1;
    setp.eq.u32 %p2, %r1, 2;
    @%p1 bra $second;
    @%p2 bra $third;
    {first}
    st.release.gpu.global.u32 [%rd2], 1;
    bra.uni $out;
$second:
    ld.acquire.gpu.global.u32 %r2, [%rd2];
    setp.eq.u32 %p3, %r2, 0;
    @%p3 bra $second;
    {second}
    st.release.gpu.global.u32 [%rd2+4], 1;
    bra.uni $out;
$third:
    ld.acquire.gpu.global.u32 %r2, [%rd2+4];
    setp.eq.u32 %p3, %r2, 0;
    @%p3 bra $third;
    {third}
$out:
    mul.wide.u32 %rd4, %r1, 4;
    add.s64 %rd1, %rd1, %rd4;
    st.global.b32 [%rd1], %r5;"""


def relay(name, first, second, third, expected):
    """Three CTAs of one thread take turns with x, each waiting for the one before."""
    body = _RELAY.format(first=first, second=second, third=third)
    args = {name: torch.zeros(3, dtype=torch.int32) for name in ("x", "y", "flags")}
    ptx = module(body, dict.fromkeys(args, "u64"))
    return Case(name, ptx, args, {"y": torch.tensor(expected, dtype=torch.int32)}, grid=(3, 1, 1), block=1)


_SEQUENCE = """
    ld.param.u64 %rd0, [data];
    ld.param.u64 %rd1, [y];
    ld.param.u64 %rd2, [flag];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r5, 0;
    setp.eq.u32 %p1, %r1, 1;
    setp.eq.u32 %p2, %r1, 2;
    @%p1 bra $second;
    @%p2 bra $third;
    st.global.u32 [%rd0], 7;
    st.release.gpu.global.u32 [%rd2], 1;
    bra.uni $out;
$second:
    ld.relaxed.gpu.global.u32 %r2, [%rd2];
    setp.ne.u32 %p3, %r2, 1;
    @%p3 bra $second;
    atom.relaxed.gpu.global.add.u32 %r2, [%rd2], 1;
    bra.uni $out;
$third:
    ld.acquire.gpu.global.u32 %r2, [%rd2];
    setp.ne.u32 %p3, %r2, 2;
    @%p3 bra $third;
    ld.global.u32 %r5, [%rd0];
$out:
    mul.wide.u32 %rd4, %r1, 4;
    add.s64 %rd1, %rd1, %rd4;
    st.global.b32 [%rd1], %r5;"""


def release_sequence():
    """CTA 2 acquires what CTA 0 released, through a relaxed atomic of CTA 1 on the flag."""
    args = {name: torch.zeros(3, dtype=torch.int32) for name in ("data", "y", "flag")}
    ptx = module(_SEQUENCE, dict.fromkeys(args, "u64"))
    expected = {"y": torch.tensor([0, 0, 7], dtype=torch.int32)}
    return Case("release sequence", ptx, args, expected, grid=(3, 1, 1), block=1)


_READ, _ADD = "ld.global.u32 %r5, [%rd0];", "atom.relaxed.gpu.global.add.u32 %r5, [%rd0], 5;"


def cases():
    yield ring()
    yield handover()
    yield handover_by_store()
    yield release_sequence()
    yield relay("read, atomic, atomic", _READ, _ADD, _ADD, [0, 0, 5])
    yield relay("atomic, read, read", _ADD, _READ, _READ, [0, 5, 5])
    yield relay("write, atomic, read", "st.global.u32 [%rd0], 3;", _ADD, _READ, [0, 3, 8])

"""Clusters: distributed shared memory, remote mbarriers, multicast; and CTAs that talk through global memory."""

import torch

from ..tensor_map import TensorMap
from . import layouts
from .asynchronous import MAP, wait
from .case import Case, module, pointers

_SHARED = ".extern .shared .align 1024 .b8 memory[];"
_HEAD = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r4, memory;
    mov.u32 %r20, %cluster_ctarank;
    mov.u32 %r21, %ctaid.x;
    setp.eq.u32 %p0, %r0, 0;
"""
_BARRIER = "    barrier.cluster.arrive.release.aligned;\n    barrier.cluster.wait.acquire.aligned;\n"
_STORE = (
    "    mad.lo.s32 %r9, %r21, 32, %r0;\n    mul.wide.u32 %rd8, %r9, 4;\n"
    "    add.s64 %rd1, %rd1, %rd8;\n    st.global.b32 [%rd1], %r8;\n"
)


def _case(name, body, args, expected, grid=(4, 1, 1), cluster=(2, 1, 1), block=32, arch="sm_90", params=None):
    params = params or {key: MAP if isinstance(value, TensorMap) else "u64" for key, value in args.items()}
    return Case(
        name,
        module(body, params, _SHARED, arch=arch),
        args,
        expected,
        grid=grid,
        block=block,
        shared_bytes=20480,
        cluster=cluster,
        arch=arch,
    )


def _y(n_cta=4):
    return torch.zeros(32 * n_cta, dtype=torch.int32)


def _special_registers():
    scales = {
        "%cluster_ctarank": 1,
        "%cluster_nctarank": 10,
        "%cluster_ctaid.x": 100,
        "%cluster_ctaid.y": 1000,
        "%clusterid.x": 10000,
        "%nclusterid.x": 100000,
        "%cluster_nctaid.y": 1000000,
    }
    body = "    ld.param.u64 %rd1, [y];\n" + _HEAD + "    mov.u32 %r8, 0;\n"
    body += "".join(
        (f"    mov.u32 %r7, {name};\n    mad.lo.s32 %r8, %r7, {scale}, %r8;\n") for name, scale in scales.items()
    )
    body += "    mov.u32 %r7, %ctaid.y;\n    mad.lo.s32 %r21, %r7, 4, %r21;\n" + _STORE
    values = []
    for y in range(2):
        for x in range(4):
            facts = (x % 2 + 2 * (y % 2), 4, x % 2, y % 2, x // 2, 2, 2)
            values += [sum(fact * scale for fact, scale in zip(facts, scales.values(), strict=True))] * 32
    yield _case(
        "cluster special registers",
        body,
        {"y": _y(8)},
        {"y": torch.tensor(values, dtype=torch.int32)},
        grid=(4, 2, 1),
        cluster=(2, 2, 1),
    )


def _distributed_shared_memory():
    own = torch.arange(128, dtype=torch.int32) + 5
    partner = own.view(4, 32)[[1, 0, 3, 2]].reshape(-1)
    write = (
        "    ld.param.u64 %rd1, [y];\n"
        + _HEAD
        + (
            "    mad.lo.s32 %r8, %r21, 32, %r0;\n    add.s32 %r8, %r8, 5;\n    shl.b32 %r5, %r0, 2;\n"
            "    add.s32 %r5, %r4, %r5;\n"
        )
    )
    remote = "    xor.b32 %r6, %r20, 1;\n    mapa.shared::cluster.u32 %r7, %r5, %r6;\n"
    read = (
        "    st.shared.b32 [%r5], %r8;\n"
        + _BARRIER
        + remote
        + "    ld.shared::cluster.b32 %r8, [%r7];\n"
        + _BARRIER
        + _STORE
    )
    yield _case("mapa and remote load", write + read, {"y": _y()}, {"y": partner})
    apart = read.replace(".aligned", "")
    yield _case("cluster barrier of single threads", write + apart, {"y": _y()}, {"y": partner})
    push = remote + "    st.shared::cluster.b32 [%r7], %r8;\n" + _BARRIER + "    ld.shared.b32 %r8, [%r5];\n" + _STORE
    yield _case("remote store", write + push, {"y": _y()}, {"y": partner})
    four = remote + (
        "    setp.eq.u32 %p1, %r0, 0;\n    add.s32 %r9, %r8, 1;\n    add.s32 %r10, %r8, 2;\n    add.s32 %r11, %r8, 3;\n"
        "    st.shared.u32 [%r5], %r0;\n"
    )
    four += _BARRIER + "    @%p1 st.shared::cluster.v4.u32 [%r7], {%r8, %r9, %r10, %r11};\n" + _BARRIER
    expected = torch.arange(32, dtype=torch.int32).repeat(4).view(4, 32)
    expected[:, :4] = partner.view(4, 32)[:, :4]
    load = "    ld.shared.u32 %r8, [%r5];\n"
    yield _case("remote store of four", write + four + load + _STORE, {"y": _y()}, {"y": expected.reshape(-1)})
    generic = (
        "    st.shared.b32 [%r5], %r8;\n"
        + _BARRIER
        + (
            "    cvt.u64.u32 %rd2, %r5;\n    cvta.shared.u64 %rd2, %rd2;\n    xor.b32 %r6, %r20, 1;\n"
            "    mapa.u64 %rd3, %rd2, %r6;\n    ld.b32 %r8, [%rd3];\n"
        )
    )
    yield _case("mapa of a generic address", write + generic + _BARRIER + _STORE, {"y": _y()}, {"y": partner})
    ranks = remote + "    getctarank.shared::cluster.u32 %r8, %r7;\n" + _STORE
    yield _case(
        "getctarank",
        write + ranks,
        {"y": _y()},
        {"y": torch.tensor([1, 0, 1, 0], dtype=torch.int32).repeat_interleave(32)},
    )
    add = (
        ("    setp.eq.u32 %p1, %r20, 0;\n    mov.u32 %r10, 0;\n    @%p1 st.shared.b32 [%r5], %r10;\n")
        + _BARRIER
        + ("    mapa.shared::cluster.u32 %r7, %r5, 0;\n    atom.shared::cluster.add.u32 %r9, [%r7], %r8;\n")
        + _BARRIER
    )
    both = own.view(2, 2, 32).sum(1)
    load = "    ld.shared.b32 %r10, [%r5];\n    mov.u32 %r8, 0;\n    @%p1 mov.u32 %r8, %r10;\n"
    expected = torch.stack([both, torch.zeros_like(both)], 1).reshape(-1).int()
    yield _case(
        "remote atomic",
        write
        + add.replace("mov.u32 %r10, 0;\n", ("mov.u32 %r10, 0;\n    @!%p1 st.shared.b32 [%r5], %r10;\n"), 1)
        + load
        + _STORE,
        {"y": _y()},
        {"y": expected},
    )


def _remote_mbarrier():
    """The odd CTA writes into the even one's shared memory and arrives at its mbarrier."""
    body = (
        "    ld.param.u64 %rd1, [y];\n"
        + _HEAD
        + (
            "    add.s32 %r22, %r4, 4096;\n    @%p0 mbarrier.init.shared::cta.b64 [%r22], 32;\n"
            "    @%p0 fence.mbarrier_init.release.cluster;\n"
        )
        + _BARRIER
    )
    body += (
        "    shl.b32 %r5, %r0, 2;\n    add.s32 %r5, %r4, %r5;\n    mov.u32 %r8, 0;\n"
        "    setp.eq.u32 %p1, %r20, 1;\n    @!%p1 bra $receive;\n"
    )
    body += (
        "    mapa.shared::cluster.u32 %r6, %r5, 0;\n    mapa.shared::cluster.u32 %r7, %r22, 0;\n"
        "    mad.lo.s32 %r9, %r21, 100, %r0;\n    st.shared::cluster.b32 [%r6], %r9;\n"
    )
    body += "    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];\n    bra.uni $out;\n$receive:\n"
    body += (
        wait("%r22", 0, "full").replace("try_wait.parity.", "try_wait.parity.acquire.cluster.")
        + ("    ld.shared.b32 %r8, [%r5];\n$out:\n")
        + _STORE
        + _BARRIER
    )
    lanes = torch.arange(32, dtype=torch.int32)
    zero = torch.zeros_like(lanes)
    yield _case("remote mbarrier arrival", body, {"y": _y()}, {"y": torch.cat([100 + lanes, zero, 300 + lanes, zero])})


def _async_stores():
    """Each lane stores a vector into the partner's shared memory, which waits for the bytes of all lanes."""
    head = (
        "    ld.param.u64 %rd1, [y];\n"
        + _HEAD
        + ("    add.s32 %r22, %r4, 4096;\n    @%p0 mbarrier.init.shared::cta.b64 [%r22], 1;\n{announced}")
        + _BARRIER
        + "    shl.b32 %r5, %r0, 4;\n    add.s32 %r5, %r4, %r5;\n    xor.b32 %r6, %r20, 1;\n"
    )
    here = "    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r22], {total};\n"
    there = (
        "    mapa.shared::cluster.u32 %r9, %r22, %r6;\n"
        "    @%p0 mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%r9], {total};\n"
    )
    narrow, wide = ("b32", "u32", "s32", "f32"), ("b64", "u64", "s64", "f64")
    forms = [(weak, n, kind) for weak in ("", ".weak") for n in (1, 2, 4) for kind in (*narrow, *wide * (n < 4))]
    for weak, n, kind in forms:
        words = n * (2 if kind in wide else 1)
        sent = "    mad.lo.s32 %r10, %r21, 1000, %r0;\n"  # word j of lane l of CTA c: 1000 c + l + 100 j
        sent += "".join(f"    add.s32 %r{10 + j}, %r10, {100 * j};\n" for j in range(1, words))
        sent += "".join(f"    mov.b64 %rd{20 + j}, {{%r{10 + 2 * j}, %r{11 + 2 * j}}};\n" for j in range(words // 2))
        values = [f"%rd{20 + i}" if kind in wide else f"%r{10 + i}" for i in range(n)]
        vector, operand = (f".v{n}", f"{{{', '.join(values)}}}") if n > 1 else ("", values[0])
        store = f"st.async{weak}.shared::cluster.mbarrier::complete_tx::bytes{vector}.{kind}"
        sent += "    mapa.shared::cluster.u32 %r7, %r4, %r6;\n    sub.s32 %r9, %r5, %r4;\n"
        sent += f"    add.s32 %r9, %r7, %r9;\n    {store} [%r9], {operand}, [%r7+4096];\n"
        received = wait("%r22", 0, "full") + "    mov.u32 %r8, 0;\n"
        for j in range(words):
            received += f"    ld.shared.b32 %r9, [%r5+{4 * j}];\n    mad.lo.s32 %r8, %r9, {j + 1}, %r8;\n"
        lanes, partners = torch.arange(32), torch.tensor([1, 0, 3, 2])
        word = 1000 * partners[:, None] + lanes
        expected = sum((word + 100 * j) * (j + 1) for j in range(words)).reshape(-1).int()
        announced = here.format(total=32 * 4 * words)
        body = head.format(announced=announced) + sent + received + _STORE
        yield _case(f"st.async{weak}{vector}.{kind}", body, {"y": _y()}, {"y": expected})
        if (weak, n, kind) == ("", 4, "u32"):  # announced by the CTA that stores
            body = head.format(announced="") + there.format(total=32 * 4 * words) + sent + received + _STORE
            yield _case("st.async, announced by its sender", body, {"y": _y()}, {"y": expected})


def _remote_overwrite():
    """The odd CTA reads its shared memory and says so at the even one's mbarrier, which then overwrites it: an arrival
    that publishes nothing is enough for reads that are over."""
    body = (
        "    ld.param.u64 %rd1, [y];\n"
        + _HEAD
        + (
            "    add.s32 %r22, %r4, 4096;\n    @%p0 mbarrier.init.shared::cta.b64 [%r22], 32;\n"
            "    @%p0 fence.mbarrier_init.release.cluster;\n"
            "    shl.b32 %r5, %r0, 2;\n    add.s32 %r5, %r4, %r5;\n    mad.lo.s32 %r9, %r21, 100, %r0;\n"
            "    st.shared.b32 [%r5], %r9;\n    setp.eq.u32 %p1, %r20, 1;\n"
        )
        + _BARRIER
    )
    body += (
        "    @!%p1 bra $overwrite;\n    ld.shared.b32 %r8, [%r5];\n    mapa.shared::cluster.u32 %r7, %r22, 0;\n"
        "    mbarrier.arrive.shared::cluster.b64 _, [%r7];\n    bra.uni $over;\n$overwrite:\n"
        + wait("%r22", 0, "read")
        + "    mapa.shared::cluster.u32 %r6, %r5, 1;\n    st.shared::cluster.b32 [%r6], %r0;\n"
        "    mov.u32 %r8, 0;\n$over:\n"
    )
    body += _BARRIER + "    @%p1 ld.shared.b32 %r7, [%r5];\n    @%p1 mad.lo.s32 %r8, %r7, 1000, %r8;\n" + _STORE
    lanes = torch.arange(32, dtype=torch.int32)
    zero = torch.zeros_like(lanes)
    expected = torch.cat([zero, 100 + 1001 * lanes, zero, 300 + 1001 * lanes])
    yield _case("remote overwrite", body, {"y": _y()}, {"y": expected})


def _remote_slot():
    """The even CTA stores into the odd one's shared memory, and again once that has read it and said so: what a barrier
    has counted is over, whatever scope the arrival has that says so."""
    body = (
        "    ld.param.u64 %rd1, [y];\n"
        + _HEAD
        + "    add.s32 %r22, %r4, 4096;\n    add.s32 %r23, %r4, 4104;\n"
        + "    @%p0 mbarrier.init.shared::cta.b64 [%r22], 1;\n    @%p0 mbarrier.init.shared::cta.b64 [%r23], 32;\n"
        + "    @%p0 fence.mbarrier_init.release.cluster;\n    shl.b32 %r5, %r0, 2;\n    add.s32 %r5, %r4, %r5;\n"
        + _BARRIER
        + "    mov.u32 %r8, 0;\n    setp.eq.u32 %p1, %r20, 1;\n    @%p1 bra $receive;\n"
        + "    mapa.shared::cluster.u32 %r6, %r5, 1;\n    mapa.shared::cluster.u32 %r7, %r22, 1;\n"
    )
    store = "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32"
    for i in range(2):
        body += (
            f"    mad.lo.s32 %r9, %r21, 100, %r0;\n    add.s32 %r9, %r9, {i};\n"
            "    @%p0 mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%r7], 128;\n"
            f"    {store} [%r6], %r9, [%r7];\n" + (wait("%r23", 0, "read") if i == 0 else "")
        )
    body += "    bra.uni $over;\n$receive:\n    mapa.shared::cluster.u32 %r7, %r23, 0;\n"
    body += wait("%r22", 0, "first") + "    ld.shared.b32 %r8, [%r5];\n"
    body += "    mbarrier.arrive.shared::cluster.b64 _, [%r7];\n" + wait("%r22", 1, "second")
    body += "    ld.shared.b32 %r9, [%r5];\n    mad.lo.s32 %r8, %r9, 1000, %r8;\n$over:\n" + _BARRIER + _STORE
    lanes = torch.arange(32, dtype=torch.int32)
    zero = torch.zeros_like(lanes)
    received = [first + lanes + 1000 * (first + 1 + lanes) for first in (0, 200)]
    yield _case("remote slot", body, {"y": _y()}, {"y": torch.cat([zero, received[0], zero, received[1]])})


def _multicast():
    """Each CTA of a pair loads half a tile into both."""
    x = (torch.arange(64 * 64) % 251).view(64, 64).to(torch.bfloat16)
    image = layouts.tile_image(x[:32], (0, 0), (32, 64), 128)
    body = (
        ("    ld.param.u64 %rd1, [y];\n    mov.b64 %rd0, x;\n")
        + _HEAD
        + (
            "    add.s32 %r22, %r4, 8192;\n    @%p0 mbarrier.init.shared::cta.b64 [%r22], 1;\n"
            "    @%p0 fence.mbarrier_init.release.cluster;\n"
        )
        + _BARRIER
    )
    body += (
        "    shl.b32 %r5, %r20, 11;\n    add.s32 %r5, %r4, %r5;\n    mul.lo.s32 %r6, %r20, 16;\n"
        "    mov.b16 %h1, 3;\n    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r22], 4096;\n"
    ) + _BARRIER
    load = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
    body += f"    @%p0 {load} [%r5], [%rd0, {{0, %r6}}], [%r22], %h1;\n"
    body += wait("%r22", 0, "full") + (
        "    mad.lo.s32 %r2, %r21, 4096, 0;\n    cvt.u64.u32 %rd6, %r2;\n"
        "    add.s64 %rd1, %rd1, %rd6;\n    mov.u32 %r1, %r0;\n"
    )
    body += (
        "$dump:\n    mad.lo.s32 %r3, %r1, 16, %r4;\n"
        "    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3];\n    mul.wide.u32 %rd7, %r1, 16;\n"
        "    add.s64 %rd7, %rd1, %rd7;\n    st.global.v4.b32 [%rd7], {%r10, %r11, %r12, %r13};\n"
    )
    body += "    add.s32 %r1, %r1, 32;\n    setp.lt.u32 %p1, %r1, 256;\n    @%p1 bra $dump;\n" + _BARRIER
    args = {"x": TensorMap(x, (16, 64), 128), "y": torch.zeros(4 * 4096, dtype=torch.uint8)}
    yield _case("TMA multicast", body, args, {"y": image.repeat(4)}, arch="sm_90a")


def _message_passing():
    """CTA 0 writes data and raises a flag; the others spin on it and read."""
    head = pointers("data", "y", "flag") + (
        "\n    mov.u32 %r0, %tid.x;\n    mov.u32 %r21, %ctaid.x;\n    mul.wide.u32 %rd4, %r0, 4;\n"
        "    add.s64 %rd0, %rd0, %rd4;\n    setp.eq.u32 %p0, %r0, 0;\n    setp.ne.u32 %p1, %r21, 0;\n"
    )
    head += (
        "    @%p1 bra $receive;\n    add.s32 %r8, %r0, 77;\n    st.global.b32 [%rd0], %r8;\n"
        "    bar.sync 0;\n    {release}\n    bra.uni $store;\n$receive:\n    @!%p0 bra $ready;\n"
        "$spin:\n    {acquire}\n    setp.eq.u32 %p2, %r5, 0;\n    @%p2 bra $spin;\n    {after}\n"
    )
    tail = "$ready:\n    bar.sync 0;\n    ld.global.b32 %r8, [%rd0];\n$store:\n" + _STORE
    fences = "@%p0 fence.acq_rel.gpu;\n    @%p0 st.relaxed.gpu.global.u32 [%rd2], 1;"
    variants = {
        "st.release and ld.acquire": (
            "@%p0 st.release.gpu.global.u32 [%rd2], 1;",
            "ld.acquire.gpu.global.u32 %r5, [%rd2];",
            "",
        ),
        "fences around relaxed accesses": (fences, "ld.relaxed.gpu.global.u32 %r5, [%rd2];", "fence.acq_rel.gpu;"),
        "membar around volatile accesses": (
            ("@%p0 membar.gl;\n    @%p0 st.volatile.global.u32 [%rd2], 1;"),
            "ld.volatile.global.u32 %r5, [%rd2];",
            "membar.gl;",
        ),
        "atom.release and atom.acquire": (
            "@%p0 atom.release.gpu.global.add.u32 %r6, [%rd2], 1;",
            "atom.acquire.gpu.global.add.u32 %r5, [%rd2], 0;",
            "",
        ),
        "red.release and atom.cas": (
            "@%p0 red.release.gpu.global.add.u32 [%rd2], 1;",
            "atom.acq_rel.gpu.global.cas.b32 %r5, [%rd2], 5, 6;",
            "",
        ),
        "fence.sc of every thread": (
            "fence.sc.gpu;\n    bar.sync 0;\n    @%p0 red.relaxed.gpu.global.add.u32 [%rd2], 1;",
            "ld.relaxed.gpu.global.u32 %r5, [%rd2];",
            "",
        ),
        "fence.sc": (fences.replace("acq_rel", "sc"), "ld.relaxed.gpu.global.u32 %r5, [%rd2];", "fence.sc.gpu;"),
    }
    for name, (release, acquire, after) in variants.items():
        body = (head + tail).format(release=release, acquire=acquire, after=after)
        if name.endswith("every thread"):  # the barriers lie between the fences and the flag
            body = body.replace("bar.sync 0;\n    fence.sc.gpu;", "fence.sc.gpu;")
            body = body.replace("bar.sync 0;\n    ld.global", "bar.sync 0;\n    fence.sc.gpu;\n    ld.global")
        args = {"data": torch.zeros(32, dtype=torch.int32), "y": _y(), "flag": torch.zeros(1, dtype=torch.int32)}
        ptx = module(body, dict.fromkeys(args, "u64"))
        yield Case(name, ptx, args, {"y": (torch.arange(32, dtype=torch.int32) + 77).repeat(4)}, grid=(4, 1, 1))


def _registers():
    body = (
        "    ld.param.u64 %rd1, [y];\n    mov.u32 %r0, %tid.x;\n    mov.u32 %r21, 0;\n"
        "    setp.lt.u32 %p1, %r0, 128;\n    @%p1 bra $loader;\n"
        "    setmaxnreg.inc.sync.aligned.u32 232;\n    bra.uni $store;\n$loader:\n"
        "    setmaxnreg.dec.sync.aligned.u32 40;\n$store:\n    mov.u32 %r8, %r0;\n"
    )
    y = torch.zeros(384, dtype=torch.int32)
    ptx = module(body + _STORE, {"y": "u64"}, arch="sm_90a", directives=".maxntid 384, 1, 1\n.minnctapersm 1")
    yield Case("setmaxnreg", ptx, {"y": y}, {"y": torch.arange(384, dtype=torch.int32)}, block=384, arch="sm_90a")


def cases():
    yield from _special_registers()
    yield from _distributed_shared_memory()
    yield from _remote_mbarrier()
    yield from _async_stores()
    yield from _remote_overwrite()
    yield from _remote_slot()
    yield from _multicast()
    yield from _message_passing()
    yield from _registers()

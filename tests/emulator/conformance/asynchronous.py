"""cp.async, mbarriers, bulk copies and clusters."""

import torch

from ..tensor_map import TensorMap
from . import layouts
from .case import Case, module, pointers

MAP = (128, 64)  # a by-value tensor map


def wait(mbarrier, parity, label):
    """PTX that waits for a phase."""
    return (
        f"$wait_{label}:\n    mbarrier.try_wait.parity.shared::cta.b64 %p9, [{mbarrier}], {parity};\n"
        f"    @!%p9 bra $wait_{label};\n"
    )


def _dump(n_bytes, source="%r4"):
    """PTX with which 32 threads copy shared memory to y, a chunk of 16 bytes at a time."""
    return f"""
    mov.u32 %r1, %tid.x;
$dump:
    setp.ge.u32 %p1, %r1, {n_bytes // 16};
    @%p1 bra $dumped;
    shl.b32 %r2, %r1, 4;
    add.s32 %r3, %r2, {source};
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r3];
    cvt.u64.u32 %rd6, %r2;
    add.s64 %rd7, %rd1, %rd6;
    st.global.v4.b32 [%rd7], {{%r10, %r11, %r12, %r13}};
    add.s32 %r1, %r1, 32;
    bra.uni $dump;
$dumped:"""


_SHARED = ".extern .shared .align 1024 .b8 memory[];"
_ADDRESSES = (
    "\n    mov.u32 %r0, %tid.x;\n    mov.u32 %r4, memory;\n    add.s32 %r5, %r4, 16384;\n    setp.eq.u32 %p0, %r0, 0;\n"
)
_INIT = "    @%p0 mbarrier.init.shared::cta.b64 [%r5], 1;\n    fence.mbarrier_init.release.cluster;\n    bar.sync 0;\n"
_SHARED_BYTES = 16384 + 64


def _cp_async():
    for size in (4, 8, 16):
        x = torch.arange(32 * size // 4, dtype=torch.int32) * 7 + 1
        body = pointers("x", "y") + _ADDRESSES
        body += (
            f"    mul.wide.u32 %rd4, %r0, {size};\n    add.s64 %rd0, %rd0, %rd4;\n"
            f"    mad.lo.s32 %r6, %r0, {size}, %r4;\n"
        )
        for name, extra, keep in (("", "", lambda lane: True), (" partly", ", %r7", None), (" ignored", ", %p2", None)):
            text = body + "    setp.gt.u32 %p2, %r0, 20;\n    selp.b32 %r7, 0, " + str(size) + ", %p2;\n"
            text += (
                f"    cp.async.c{'g' if size == 16 else 'a'}.shared.global [%r6], [%rd0], {size}{extra};\n"
                "    cp.async.commit_group;\n    cp.async.wait_group 0;\n    bar.sync 0;"
            )
            expected = x.clone()
            if keep is None:
                expected.view(32, -1)[21:] = 0
            ptx = module(text + _dump(32 * size), {"x": "u64", "y": "u64"}, _SHARED)
            yield Case(
                f"cp.async {size} bytes{name}",
                ptx,
                {"x": x, "y": torch.zeros_like(x)},
                {"y": expected},
                shared_bytes=_SHARED_BYTES,
            )
    x = torch.arange(256, dtype=torch.int32)
    body = (
        pointers("x", "y")
        + _ADDRESSES
        + ("    mul.wide.u32 %rd4, %r0, 16;\n    add.s64 %rd0, %rd0, %rd4;\n    mad.lo.s32 %r6, %r0, 16, %r4;\n")
    )
    body += (
        "    cp.async.ca.shared.global.L2::128B [%r6], [%rd0], 16;\n    cp.async.commit_group;\n"
        "    cp.async.cg.shared.global [%r6+512], [%rd0+512], 16;\n    cp.async.commit_group;\n"
    )
    body += (
        "    cp.async.wait_group 1;\n    ld.shared.b32 %r8, [%r6];\n    cp.async.wait_all;\n"
        "    add.s32 %r8, %r8, 1;\n    st.shared.b32 [%r6], %r8;\n    bar.sync 0;"
    )
    expected = x.clone()
    expected[:128:4] += 1
    yield Case(
        "cp.async groups",
        module(body + _dump(1024), {"x": "u64", "y": "u64"}, _SHARED),
        {"x": x, "y": torch.zeros_like(x)},
        {"y": expected},
        shared_bytes=_SHARED_BYTES,
    )


def _copies_that_arrive():
    """An mbarrier instead of cp.async.wait_group: lanes read what others have copied."""
    x = torch.arange(128, dtype=torch.int32) * 3 + 1
    for noinc, arrivals in (
        (".noinc", 32),
        ("", 1),
    ):  # without .noinc the copies' arrivals are not among those expected
        body = pointers("x", "y") + _ADDRESSES
        body += (
            f"    @%p0 mbarrier.init.shared::cta.b64 [%r5], {arrivals};\n    bar.sync 0;\n"
            "    mul.wide.u32 %rd4, %r0, 16;\n    add.s64 %rd0, %rd0, %rd4;\n    mad.lo.s32 %r6, %r0, 16, %r4;\n"
            "    cp.async.cg.shared.global [%r6], [%rd0], 16;\n"
            f"    cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [%r5];\n"
        )
        if not noinc:
            body += "    bar.sync 0;\n    @%p0 mbarrier.arrive.shared::cta.b64 _, [%r5];\n"
        body += "$ready:\n    mbarrier.test_wait.parity.shared::cta.b64 %p9, [%r5], 0;\n    @!%p9 bra $ready;\n"
        ptx = module(
            body + _dump(512).replace("add.s32 %r3, %r2, %r4;", "xor.b32 %r3, %r2, 16;\n    add.s32 %r3, %r3, %r4;"),
            {"x": "u64", "y": "u64"},
            _SHARED,
            arch="sm_90",
        )
        yield Case(
            f"cp.async.mbarrier.arrive{noinc}",
            ptx,
            {"x": x, "y": torch.zeros_like(x)},
            {"y": x.view(-1, 4)[torch.arange(32) ^ 1].reshape(-1)},
            shared_bytes=_SHARED_BYTES,
            arch="sm_90",
        )


def _mbarriers():
    """64 threads: the first warp writes and arrives, the second waits; two phases."""
    head = pointers("x", "y") + _ADDRESSES
    head += (
        "    @%p0 mbarrier.init.shared::cta.b64 [%r5], {count};\n"
        "    @%p0 mbarrier.init.shared::cta.b64 [%r5+8], 32;\n    bar.sync 0;\n"
    )
    head += (
        "    and.b32 %r6, %r0, 31;\n    mul.wide.u32 %rd4, %r6, 4;\n    add.s64 %rd0, %rd0, %rd4;\n"
        "    add.s64 %rd1, %rd1, %rd4;\n    shl.b32 %r7, %r6, 2;\n    add.s32 %r7, %r7, %r4;\n"
    )
    head += (
        "    setp.ge.u32 %p2, %r0, 32;\n    @%p2 bra $consumer;\n    ld.global.b32 %r8, [%rd0];\n"
        "    st.shared.b32 [%r7], %r8;\n    {arrive}\n"
    )
    second = wait("%r5+8", 0, "empty") + (
        "    add.s32 %r8, %r8, 1000;\n    st.shared.b32 [%r7], %r8;\n    {arrive}\n"
        "    bra.uni $done;\n$consumer:\n    xor.b32 %r7, %r7, 4;\n"
    )
    consume = (
        "    {wait0}    ld.shared.b32 %r9, [%r7];\n    mbarrier.arrive.shared::cta.b64 _, [%r5+8];\n"
        "    {wait1}    ld.shared.b32 %r10, [%r7];\n    add.s32 %r9, %r9, %r10;\n"
        "    st.global.b32 [%rd1], %r9;\n$done:"
    )
    polling = (
        "$poll_{0}:\n    mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 %p9, [%r5], {0};\n"
        "    @!%p9 bra $poll_{0};\n"
    )
    elected = (
        "bar.warp.sync -1;\n    setp.eq.u32 %p3, %r6, 0;\n"
        "    @%p3 mbarrier.arrive.release.cta.shared::cta.b64 _, [%r5];"
    )
    variants = {
        "mbarrier.arrive": (
            32,
            "mbarrier.arrive.shared::cta.b64 _, [%r5];",
            wait("%r5", 0, "p0"),
            wait("%r5", 1, "p1"),
        ),
        "mbarrier.arrive with state": (
            32,
            "mbarrier.arrive.shared::cta.b64 %rd20, [%r5];",
            wait("%r5", 0, "p0"),
            wait("%r5", 1, "p1"),
        ),
        "mbarrier.arrive with count": (
            96,
            "mbarrier.arrive.shared::cta.b64 %rd20, [%r5], 3;",
            wait("%r5", 0, "p0"),
            wait("%r5", 1, "p1"),
        ),
        "mbarrier.arrive of one thread": (1, elected, wait("%r5", 0, "p0"), wait("%r5", 1, "p1")),
        "mbarrier.test_wait": (32, "mbarrier.arrive.shared::cta.b64 _, [%r5];", polling.format(0), polling.format(1)),
    }
    x = torch.arange(32, dtype=torch.int32) * 11
    expected = 2 * x[torch.arange(32) ^ 1] + 1000
    for name, (count, arrive, wait0, wait1) in variants.items():
        body = (head + second + consume).format(count=count, arrive=arrive, wait0=wait0, wait1=wait1)
        yield Case(
            name,
            module(body, {"x": "u64", "y": "u64"}, _SHARED, arch="sm_90"),
            {"x": x, "y": torch.zeros_like(x)},
            {"y": expected},
            block=64,
            shared_bytes=_SHARED_BYTES,
            arch="sm_90",
        )
    state = (
        pointers("y")
        + _ADDRESSES
        + (
            "    @%p0 mbarrier.init.shared::cta.b64 [%r5], 32;\n    bar.sync 0;\n"
            "    mbarrier.arrive.shared::cta.b64 %rd20, [%r5];\n"
        )
    )
    state += (
        "$again:\n    mbarrier.try_wait.shared::cta.b64 %p9, [%r5], %rd20;\n    @!%p9 bra $again;\n"
        "    bar.sync 0;\n    @%p0 mbarrier.inval.shared::cta.b64 [%r5];\n"
    )
    state += "    mul.wide.u32 %rd4, %r0, 4;\n    add.s64 %rd0, %rd0, %rd4;\n    st.global.b32 [%rd0], %r0;"
    yield Case(
        "mbarrier by state",
        module(state, {"y": "u64"}, _SHARED, arch="sm_90"),
        {"y": torch.zeros(32, dtype=torch.int32)},
        {"y": torch.arange(32, dtype=torch.int32)},
        shared_bytes=_SHARED_BYTES,
        arch="sm_90",
    )


def _tensor(*shape, dtype=torch.bfloat16):
    return (torch.arange(torch.Size(shape).numel()) % 251 + 1).view(shape).to(dtype)


def _tma_loads():
    boxes = [
        ((70, 88), (16, 64), 128),
        ((70, 88), (16, 32), 64),
        ((70, 88), (16, 16), 32),
        ((70, 88), (32, 64), 0),
        ((70, 88), (8, 128), 0),
    ]
    corners = [(0, 0), (3, 8), (64, 40), (-5, -8), (69, 80), (100, 0), (7, 1)]
    for shape, box, span in boxes:
        for corner in corners:
            yield _tma_load(_tensor(*shape), box, corner, span)
    for corner in ((0, 0, 0), (2, -3, 40), (5, 9, 72)):
        yield _tma_load(_tensor(6, 10, 88), (2, 8, 64), corner, 128)
        yield _tma_load(_tensor(6, 10, 88, dtype=torch.float32), (3, 4, 16), corner, 64)
    yield _tma_load(_tensor(70, 88), (16, 64), (3, 8), 128, destination="shared::cta")
    yield _tma_load(_tensor(200), (64,), (150,), 0)
    yield _tma_load(_tensor(3, 4, 5, 64), (2, 2, 2, 32), (1, 3, -1, 8), 64)


def _coordinates(corner):
    return "{" + ", ".join(str(each) for each in reversed(corner)) + "}"


def _tma_load(tensor, box, corner, span, destination="shared::cluster"):
    image = layouts.tile_image(tensor, corner, box, span)
    body = "    ld.param.u64 %rd1, [y];\n    mov.b64 %rd0, x;\n" + _ADDRESSES + _INIT
    body += f"    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], {image.numel()};\n"
    load = f"cp.async.bulk.tensor.{len(box)}d.{destination}.global.mbarrier::complete_tx::bytes"
    body += f"    @%p0 {load} [%r4], [%rd0, {_coordinates(corner)}], [%r5];\n"
    body += wait("%r5", 0, "full") + _dump(image.numel())
    ptx = module(body, {"x": MAP, "y": "u64"}, _SHARED, arch="sm_90")
    args = {"x": TensorMap(tensor, box, span), "y": torch.zeros_like(image)}
    return Case(
        f"TMA load {box} of {tuple(tensor.shape)} at {corner}, swizzle {span}, to {destination}",
        ptx,
        args,
        {"y": image},
        shared_bytes=_SHARED_BYTES,
        arch="sm_90",
    )


_FILL_SHARED = """
    mov.u32 %r1, %r0;
$fill:
    setp.ge.u32 %p1, %r1, {chunks};
    @%p1 bra $filled;
    mul.wide.u32 %rd6, %r1, 16;
    add.s64 %rd7, %rd2, %rd6;
    ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd7];
    mad.lo.s32 %r2, %r1, 16, %r4;
    st.shared.v4.b32 [%r2], {{%r10, %r11, %r12, %r13}};
    add.s32 %r1, %r1, 32;
    bra.uni $fill;
$filled:
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""


def _tma_stores():
    for corner in ((0, 0), (3, 8), (60, 40), (-5, -8)):
        yield _tma_store(torch.zeros(70, 88, dtype=torch.bfloat16), (16, 64), corner, 128)
        yield _tma_store(torch.zeros(70, 88, dtype=torch.bfloat16), (16, 64), corner, 0)
    yield _tma_store(torch.zeros(6, 10, 88), (2, 4, 16), (4, 8, 80), 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        yield _tma_store(_tensor(70, 88, dtype=dtype), (16, 16), (60, 80), 0, reduce=True)


def _tma_store(tensor, box, corner, span, reduce=False):
    tile = (torch.arange(torch.Size(box).numel()) % 7 + 1).view(box).to(tensor.dtype)
    image = layouts.tile_image(tile, (0,) * len(box), box, span)
    window = [slice(max(start, 0), max(start + extent, 0)) for start, extent in zip(corner, box, strict=True)]
    expected = tensor.clone()
    part = tuple(
        slice(each.start - start, each.start - start + len(range(*each.indices(size))))
        for each, start, size in zip(window, corner, tensor.shape, strict=True)
    )
    expected[tuple(window)] = tile[part] + (tensor[tuple(window)] if reduce else 0)
    body = (
        ("    ld.param.u64 %rd2, [x];\n    mov.b64 %rd0, y;\n")
        + _ADDRESSES
        + _FILL_SHARED.format(chunks=image.numel() // 16)
    )
    root, add = ("cp.reduce", ".add") if reduce else ("cp", "")
    operation = f"{root}.async.bulk.tensor.{len(box)}d.global.shared::cta{add}.bulk_group"
    body += (
        f"    @%p0 {operation} [%rd0, {_coordinates(corner)}], [%r4];\n"
        "    cp.async.bulk.commit_group;\n    cp.async.bulk.wait_group.read 0;\n"
        "    cp.async.bulk.wait_group 0;"
    )
    ptx = module(body, {"x": "u64", "y": MAP}, _SHARED, arch="sm_90")
    name = f"TMA {'reduction' if reduce else 'store'} {tuple(tensor.shape)} {tensor.dtype} at {corner}, swizzle {span}"
    return Case(
        name,
        ptx,
        {"x": image, "y": TensorMap(tensor, box, span)},
        {"y": expected},
        shared_bytes=_SHARED_BYTES,
        arch="sm_90",
    )


def _linear_copies():
    x = torch.arange(1024, dtype=torch.int32)
    body = pointers("x", "y") + _ADDRESSES + _INIT
    body += (
        "    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 4096;\n"
        "    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd0], 4096, [%r5];\n"
    )
    body += wait("%r5", 0, "full") + (
        "    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r4], 4096;\n"
        "    cp.async.bulk.commit_group;\n    cp.async.bulk.wait_group 0;"
    )
    yield Case(
        "linear bulk copies",
        module(body, {"x": "u64", "y": "u64"}, _SHARED, arch="sm_90"),
        {"x": x, "y": torch.zeros_like(x)},
        {"y": x},
        shared_bytes=_SHARED_BYTES,
        arch="sm_90",
    )
    f = torch.arange(256.0)
    body = "    ld.param.u64 %rd2, [x];\n    ld.param.u64 %rd1, [y];\n" + _ADDRESSES + _FILL_SHARED.format(chunks=64)
    body += (
        "    @%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r4], 1024;\n"
        "    cp.async.bulk.commit_group;\n    cp.async.bulk.wait_group 0;"
    )
    yield Case(
        "linear bulk reduction",
        module(body, {"x": "u64", "y": "u64"}, _SHARED, arch="sm_90"),
        {"x": f, "y": torch.ones(256)},
        {"y": f + 1},
        shared_bytes=_SHARED_BYTES,
        arch="sm_90",
    )


def cases():
    yield from _cp_async()
    yield from _copies_that_arrive()
    yield from _mbarriers()
    yield from _tma_loads()
    yield from _tma_stores()
    yield from _linear_copies()

"""ldmatrix, stmatrix, mma.sync and wgmma. Products are of small integers: exact in any order of summation."""

import torch

from . import layouts
from .case import Case, module, pointers


def _integers(shape, seed, dtype):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


_LANE_COPY = """
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd4, %r0, {from_bytes};
    add.s64 %rd0, %rd0, %rd4;
    mul.wide.u32 %rd5, %r0, {to_bytes};
    add.s64 %rd1, %rd1, %rd5;
"""


def _matrix_moves():
    shared = ".shared .align 128 .b8 buffer[1024];"
    for n in (1, 2, 4):
        for trans in (False, True):
            matrices = torch.arange(n * 64, dtype=torch.int16).view(n, 8, 8) * 3 + 1
            seen = matrices.transpose(1, 2) if trans else matrices
            # Lane l holds elements (l / 4, l % 4 * 2) and the next of every matrix.
            fragments = layouts.pack(
                torch.stack([seen[:, layouts.LANE // 4, layouts.LANE % 4 * 2 + e] for e in (0, 1)], -1)
            ).T.contiguous()
            registers = ", ".join(f"%r{10 + i}" for i in range(n))
            suffix = f"x{n}{'.trans' if trans else ''}"
            rows = 8 * n
            # Thread r < 8 n moves row r; addresses come from thread r of ldmatrix too.
            address = (
                "    mov.u32 %r1, buffer;\n    shl.b32 %r2, %r0, 4;\n    add.s32 %r1, %r1, %r2;\n"
                f"    setp.lt.u32 %p1, %r0, {rows};\n"
            )
            row_load = (
                "    @%p1 ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd0];\n"
                "    @%p1 st.shared.v4.b32 [%r1], {%r20, %r21, %r22, %r23};\n    bar.sync 0;\n"
            )
            stores = "\n".join(f"    st.global.b32 [%rd1+{4 * i}], %r{10 + i};" for i in range(n))
            body = pointers("x", "y") + _LANE_COPY.format(from_bytes=16, to_bytes=4 * n) + address + row_load
            body += f"    ldmatrix.sync.aligned.m8n8.{suffix}.shared.b16 {{{registers}}}, [%r1];\n{stores}"
            args = {"x": matrices.reshape(rows, 8), "y": torch.zeros_like(fragments)}
            yield Case(f"ldmatrix.{suffix}", module(body, {"x": "u64", "y": "u64"}, shared), args, {"y": fragments})
            loads = "\n".join(f"    ld.global.b32 %r{10 + i}, [%rd0+{4 * i}];" for i in range(n))
            row_store = (
                "    bar.sync 0;\n    @%p1 ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r1];\n"
                "    @%p1 st.global.v4.b32 [%rd1], {%r20, %r21, %r22, %r23};"
            )
            body = pointers("x", "y") + _LANE_COPY.format(from_bytes=4 * n, to_bytes=16) + address + loads
            body += f"\n    stmatrix.sync.aligned.m8n8.{suffix}.shared.b16 [%r1], {{{registers}}};\n{row_store}"
            args = {"x": fragments, "y": torch.zeros(rows, 8, dtype=torch.int16)}
            ptx = module(body, {"x": "u64", "y": "u64"}, shared, arch="sm_90")
            yield Case(f"stmatrix.{suffix}", ptx, args, {"y": matrices.reshape(rows, 8)}, arch="sm_90")


_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def _mma():
    for kind, k in (("bf16", 16), ("bf16", 8), ("f16", 16), ("f16", 8), ("tf32", 8), ("tf32", 4)):
        per = 1 if kind == "tf32" else 2
        a, b, c = (
            _integers((16, k), 1, _DTYPES[kind]),
            _integers((k, 8), 2, _DTYPES[kind]),
            _integers((16, 8), 3, torch.float32),
        )
        ra, ca = layouts.fragment_a(k, per)
        kb, nb = layouts.fragment_b(k, per)
        rc, cc = layouts.fragment_c()
        registers = torch.cat(
            [layouts.pack(a[ra, ca]), layouts.pack(b[kb, nb]), layouts.pack(c[rc, cc].unsqueeze(-1))], 1
        )
        n_a, n_b, total = ra.shape[1], kb.shape[1], registers.shape[1]
        names = [f"%r{10 + i}" for i in range(total)]
        groups = [names[:n_a], names[n_a : n_a + n_b], names[n_a + n_b :]]
        body = pointers("x", "y") + _LANE_COPY.format(from_bytes=4 * total, to_bytes=16)
        body += "".join(f"    ld.global.b32 {name}, [%rd0+{4 * i}];\n" for i, name in enumerate(names))
        body += "".join(f"    mov.b32 %f{i}, {name};\n" for i, name in enumerate(groups[2]))
        a_text, b_text = ("{" + ", ".join(group) + "}" for group in groups[:2])
        operands = f"{{%f4, %f5, %f6, %f7}}, {a_text}, {b_text}, {{%f0, %f1, %f2, %f3}}"
        body += f"    mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {operands};\n"
        body += "    st.global.v4.f32 [%rd1], {%f4, %f5, %f6, %f7};"
        product = (a.double() @ b.double() + c.double()).float()
        yield Case(
            f"mma.m16n8k{k}.{kind}",
            module(body, {"x": "u64", "y": "u64"}),
            {"x": registers, "y": torch.zeros(32, 4)},
            {"y": product[rc, cc]},
        )


_DESCRIPTOR_MODE = {0: 0, 128: 1, 64: 2, 32: 3}
_FILL = """
$fill{label}:
    setp.ge.u32 %p1, %r1, {chunks};
    @%p1 bra $filled{label};
    mul.wide.u32 %rd6, %r1, 16;
    add.s64 %rd7, {source}, %rd6;
    ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd7];
    shl.b32 %r2, %r1, 4;
    add.s32 %r2, %r2, {target};
    st.shared.v4.b32 [%r2], {{%r10, %r11, %r12, %r13}};
    add.s32 %r1, %r1, 128;
    bra.uni $fill{label};
$filled{label}:
    mov.u32 %r1, %r0;"""


def _descriptor(register, address, leading, stride, span):
    """PTX for a matrix descriptor of the shared address in a 32-bit register."""
    high = leading >> 4 << 16 | stride >> 4 << 32 | _DESCRIPTOR_MODE[span] << 62
    return (
        f"    shr.u32 %r3, {address}, 4;\n    and.b32 %r3, %r3, 0x3fff;\n"
        f"    cvt.u64.u32 {register}, %r3;\n    or.b64 {register}, {register}, {high:#x};\n"
    )


def wgmma_case(
    name,
    kind,
    n,
    a_span,
    b_span,
    a_major="k",
    b_major="k",
    a_in_registers=False,
    accumulate=True,
    negate=(False, False),
):
    """One wgmma of a warpgroup: D = A B (+ C)."""
    dtype = _DTYPES[kind]
    k = 8 if kind == "tf32" else 16
    a, b = _integers((64, k), 5, dtype), _integers((n, k), 6, dtype)
    c = _integers((64, n), 7, torch.float32)
    a_image, a_leading, a_stride = layouts.place_matrix(a, a_major == "mn", a_span, 8192)
    b_image, b_leading, b_stride = layouts.place_matrix(b, b_major == "mn", b_span, 32768)
    rows, columns = layouts.fragment_c(n)
    warp_rows = torch.arange(4)[:, None, None] * 16 + rows
    n_d = n // 2
    d = [f"%f{i}" for i in range(n_d)]
    body = pointers("a", "b", "c", "d")
    body += "\n    mov.u32 %r0, %tid.x;\n    mov.u32 %r1, %r0;\n    mov.u32 %r4, memory;\n    add.s32 %r5, %r4, 8192;"
    body += _FILL.format(label="a", chunks=512, source="%rd0", target="%r4") + _FILL.format(
        label="b", chunks=2048, source="%rd1", target="%r5"
    )
    body += (
        "\n    fence.proxy.async.shared::cta;\n    bar.sync 0;\n"
        f"    mul.wide.u32 %rd8, %r0, {4 * n_d};\n    add.s64 %rd2, %rd2, %rd8;\n"
        "    add.s64 %rd3, %rd3, %rd8;\n"
    )
    body += "".join(f"    ld.global.f32 {name}, [%rd2+{4 * i}];\n" for i, name in enumerate(d))
    args = {"a": a_image, "b": b_image, "c": c[warp_rows, columns].reshape(128, n_d), "d": torch.zeros(128, n_d)}
    params = dict.fromkeys("abcd", "u64")
    if a_in_registers:
        per = 1 if kind == "tf32" else 2
        ra, ca = layouts.fragment_a(k, per)
        args["fragments"] = layouts.pack(a[torch.arange(4)[:, None, None, None] * 16 + ra, ca]).reshape(128, 4)
        params["fragments"] = "u64"
        body += (
            "    ld.param.u64 %rd9, [fragments];\n    mul.wide.u32 %rd8, %r0, 16;\n"
            "    add.s64 %rd9, %rd9, %rd8;\n    ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd9];\n"
        )
        a_text, majors = "{%r20, %r21, %r22, %r23}", f", {int(b_major == 'mn')}"
    else:
        body += _descriptor("%rd10", "%r4", a_leading, a_stride, a_span)
        a_text, majors = "%rd10", f", {int(a_major == 'mn')}, {int(b_major == 'mn')}"
    body += _descriptor("%rd11", "%r5", b_leading, b_stride, b_span)
    signs = ", ".join("-1" if negated else "1" for negated in negate)
    if kind == "tf32":
        majors = ""
    body += f"    setp.eq.s32 %p3, 0, {0 if accumulate else 1};\n    wgmma.fence.sync.aligned;\n"
    operands = f"{{{', '.join(d)}}}, {a_text}, %rd11, %p3, {signs}{majors}"
    body += f"    wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {operands};\n"
    body += "    wgmma.commit_group.sync.aligned;\n    wgmma.wait_group.sync.aligned 0;\n"
    body += "".join(f"    st.global.f32 [%rd3+{4 * i}], {name};\n" for i, name in enumerate(d))
    sign = -1 if negate[0] != negate[1] else 1
    product = sign * (a.double() @ b.double().T) + (c.double() if accumulate else 0)
    expected = product.float()[warp_rows, columns].reshape(128, n_d)
    ptx = module(body, params, ".extern .shared .align 1024 .b8 memory[];", arch="sm_90a")
    return Case(name, ptx, args, {"d": expected}, block=128, shared_bytes=40960, arch="sm_90a")


def _wgmma():
    for n in range(8, 257, 8):
        yield wgmma_case(f"wgmma n{n}", "bf16", n, 128, 128)
    for n in (8, 16, 128, 256):
        yield wgmma_case(f"wgmma f16 n{n}", "f16", n, 128, 128)
    for kind in ("bf16", "f16"):
        for b_major in ("k", "mn"):
            for a_major in ("k", "mn"):
                name = f"wgmma {kind} A {a_major}-major, B {b_major}-major"
                yield wgmma_case(name, kind, 64, 128, 128, a_major, b_major)
            name = f"wgmma {kind} A in registers, B {b_major}-major"
            yield wgmma_case(name, kind, 64, 128, 128, b_major=b_major, a_in_registers=True)
    for kind in ("bf16", "f16", "tf32"):
        for span in (0, 32, 64, 128):
            yield wgmma_case(f"wgmma {kind} swizzle {span}", kind, 64, span, span)
            yield wgmma_case(f"wgmma {kind} A in registers, swizzle {span}", kind, 32, span, span, a_in_registers=True)
    for span in (0, 32, 64, 128):
        yield wgmma_case(f"wgmma B MN-major, swizzle {span}", "bf16", 128, 128, span, b_major="mn")
        yield wgmma_case(f"wgmma A MN-major, swizzle {span}", "f16", 128, span, 128, a_major="mn")
        yield wgmma_case(
            f"wgmma A in registers, B MN-major, swizzle {span}",
            "bf16",
            256,
            128,
            span,
            b_major="mn",
            a_in_registers=True,
        )
    yield wgmma_case("wgmma without accumulation", "bf16", 64, 128, 128, accumulate=False)
    yield wgmma_case("wgmma negated A", "bf16", 64, 128, 128, negate=(True, False))
    yield wgmma_case("wgmma negated B", "bf16", 64, 128, 128, negate=(False, True))


def cases():
    yield from _matrix_moves()
    yield from _mma()
    yield from _wgmma()

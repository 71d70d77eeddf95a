"""Loads, stores, state spaces, atomics and address conversions."""

import struct

import torch

from .case import Case, elementwise, module, pointers

_THREAD = "    mov.u32 %r0, %tid.x;\n"


def _iota(n, dtype=torch.int32):
    return (torch.arange(n) * 2654435761 % 1000003).to(dtype)


def _copy(name, width, instruction_pairs, elements=32, arch="sm_80", shared=""):
    """Every thread moves `width` bytes from x to y."""
    body = (
        pointers("x", "y")
        + "\n"
        + _THREAD
        + (f"    mul.wide.u32 %rd4, %r0, {width};\n    add.s64 %rd0, %rd0, %rd4;\n    add.s64 %rd1, %rd1, %rd4;\n")
    )
    body += "\n".join(f"    {line}" for line in instruction_pairs)
    x = _iota(elements * width // 4)
    return Case(
        name,
        module(body, {"x": "u64", "y": "u64"}, shared, arch=arch),
        {"x": x, "y": torch.zeros_like(x)},
        {"y": x},
        arch=arch,
    )


def _widths():
    registers = {"b16": "%h", "b32": "%r", "b64": "%rd"}
    for kind, family in registers.items():
        size = int(kind[1:]) // 8
        for count in (1, 2, 4):
            if size * count > 16 or size * count < 4:
                continue
            names = [f"{family}{10 + i}" for i in range(count)]
            suffix, operand = (f".v{count}", "{" + ", ".join(names) + "}") if count > 1 else ("", names[0])
            pair = [f"ld.global{suffix}.{kind} {operand}, [%rd0];", f"st.global{suffix}.{kind} [%rd1], {operand};"]
            yield _copy(f"ld/st.global{suffix}.{kind}", size * count, pair)
    yield _copy(
        "ld.global.nc.L1::evict_last",
        4,
        ["ld.global.nc.L1::evict_last.b32 %r10, [%rd0];", "st.global.b32 [%rd1], %r10;"],
    )
    loads = (
        ("ld.global.nc.b32", "%r10", 4),
        ("ld.global.nc.u32", "%r10", 4),
        ("ld.global.nc.f32", "%f10", 4),
        ("ld.global.nc.v2.u32", "{%r10, %r11}", 8),
        ("ld.global.nc.v4.b32", "{%r10, %r11, %r12, %r13}", 16),
    )
    for load, operand, width in loads:
        store = load.replace("ld.global.nc", "st.global")
        yield _copy(load, width, [f"{load} {operand}, [%rd0];", f"{store} [%rd1], {operand};"])
    yield _copy("ldu.global.b32", 4, ["ldu.global.b32 %r10, [%rd0];", "st.global.b32 [%rd1], %r10;"])
    hinted = [
        "createpolicy.fractional.L2::evict_first.b64 %rd10, 1.0;",
        "ld.global.L2::cache_hint.b32 %r10, [%rd0], %rd10;",
        "st.global.L2::cache_hint.b32 [%rd1], %r10, %rd10;",
    ]
    yield _copy("ld/st.L2::cache_hint", 4, hinted)
    yield _copy("ld.volatile", 4, ["ld.volatile.global.b32 %r10, [%rd0];", "st.volatile.global.b32 [%rd1], %r10;"])
    for scope in ("cta", "gpu", "sys"):
        for width in (32, 64):
            register = "%r10" if width == 32 else "%rd10"
            pair = [
                f"ld.acquire.{scope}.global.b{width} {register}, [%rd0];",
                f"st.release.{scope}.global.b{width} [%rd1], {register};",
            ]
            yield _copy(f"acquire/release.{scope}.b{width}", width // 8, pair)
            pair = [
                f"ld.relaxed.{scope}.global.u{width} {register}, [%rd0];",
                f"st.relaxed.{scope}.global.u{width} [%rd1], {register};",
            ]
            yield _copy(f"relaxed.{scope}.u{width}", width // 8, pair)
    for kind, family in (("u16", "%h"), ("s32", "%r"), ("u32", "%r"), ("u64", "%rd"), ("f32", "%f")):
        for count in (2, 4) if kind in ("u16", "u32", "f32") else (1, 2):
            names = [f"{family}{10 + i}" for i in range(count)]
            suffix, operand = (f".v{count}", "{" + ", ".join(names) + "}") if count > 1 else ("", names[0])
            pair = [f"ld.global{suffix}.{kind} {operand}, [%rd0];", f"st.global{suffix}.{kind} [%rd1], {operand};"]
            yield _copy(f"ld/st.global{suffix}.{kind}", int(kind[1:]) // 8 * count, pair)
    halves = [
        "ld.global.u16 %h10, [%rd0];",
        "ld.global.u16 %h11, [%rd0+2];",
        "st.global.u16 [%rd1], %h10;",
        "st.global.u16 [%rd1+2], %h11;",
    ]
    yield _copy("ld/st.global.u16", 4, halves)
    yield _copy("ld.global.nc.u16", 4, [line.replace("ld.global", "ld.global.nc") for line in halves])
    flagged = ["ld.acquire.gpu.global.s32 %r10, [%rd0];", "st.release.gpu.global.s32 [%rd1], %r10;"]
    yield _copy("acquire/release.gpu.s32", 4, flagged)
    converted = [
        "cvta.to.global.u64 %rd0, %rd0;",
        "ld.global.b32 %r10, [%rd0];",
        "cvta.to.global.u64 %rd1, %rd1;",
        "st.global.b32 [%rd1], %r10;",
    ]
    yield _copy("cvta.to.global", 4, converted)
    yield _copy("generic addresses", 4, ["ld.b32 %r10, [%rd0];", "st.b32 [%rd1], %r10;"])
    yield _copy(
        "prefetch", 4, ["prefetch.global.L2 [%rd0];", "ld.global.b32 %r10, [%rd0];", "st.global.b32 [%rd1], %r10;"]
    )
    narrow = torch.randint(0, 255, (128,), dtype=torch.int32)
    for kind in ("s8", "u8", "b8"):
        extended = narrow.to(torch.int8 if kind == "s8" else torch.uint8).int()
        for space in ("global", "global.nc"):
            text = f"ld.{space}.{kind} {{d}}, [%rd0];"
            yield elementwise(f"ld.{space}.{kind} extends", text, [narrow], [extended])


def _bytes_side_by_side():
    """Every thread stores one byte and reads its word: neighbouring bytes are nobody's conflict."""
    body = pointers("y") + "\n" + _THREAD
    body += """    mov.u32 %r1, buffer;
    add.s32 %r2, %r1, %r0;
    cvt.u16.u32 %h1, %r0;
    st.shared.b8 [%r2], %h1;
    bar.sync 0;
    and.b32 %r3, %r0, 60;
    add.s32 %r3, %r3, %r1;
    ld.shared.b32 %r4, [%r3];
    mul.wide.u32 %rd4, %r0, 4;
    add.s64 %rd0, %rd0, %rd4;
    st.global.b32 [%rd0], %r4;"""
    words = torch.arange(64, dtype=torch.uint8).view(torch.int32)
    ptx = module(body, {"y": "u64"}, ".shared .align 16 .b8 buffer[64];")
    args = {"y": torch.zeros(64, dtype=torch.int32)}
    yield Case("bytes side by side", ptx, args, {"y": words.repeat_interleave(4)}, block=64)


def _signed_bytes():
    """A byte of shared memory is extended to the register that it is loaded into."""
    for family, convert in (("%r", ""), ("%h", "cvt.s32.s16 %r10, %h10;")):
        body = pointers("y") + "\n" + _THREAD
        body += f"""    mov.u32 %r1, buffer;
    add.s32 %r2, %r1, %r0;
    add.s32 %r3, %r0, 96;
    cvt.u16.u32 %h1, %r3;
    st.shared.b8 [%r2], %h1;
    ld.shared.s8 {family}10, [%r2];
    {convert}
    mul.wide.u32 %rd4, %r0, 4;
    add.s64 %rd0, %rd0, %rd4;
    st.global.b32 [%rd0], %r10;"""
        ptx = module(body, {"y": "u64"}, ".shared .align 16 .b8 buffer[64];")
        extended = torch.arange(96, 160).to(torch.int8).int()
        yield Case(f"ld.shared.s8 {family}", ptx, {"y": torch.zeros(64, dtype=torch.int32)}, {"y": extended}, block=64)


def _shared_and_local():
    shared = ".shared .align 16 .b8 buffer[1024];"
    body = pointers("x", "y") + "\n" + _THREAD
    body += """    mul.wide.u32 %rd4, %r0, 4;
    add.s64 %rd0, %rd0, %rd4;
    add.s64 %rd1, %rd1, %rd4;
    ld.global.b32 %r1, [%rd0];
    mov.u32 %r2, buffer;
    shl.b32 %r3, %r0, 2;
    add.s32 %r2, %r2, %r3;
    st.shared.b32 [%r2+128], %r1;
    bar.sync 0;
    xor.b32 %r4, %r3, 124;
"""
    variants = {
        "shared by 32-bit address": (
            "mov.u32 %r5, buffer;\n    add.s32 %r5, %r5, %r4;\n    ld.shared.b32 %r6, [%r5+128];"
        ),
        "shared by symbol": (
            "cvt.u64.u32 %rd5, %r4;\n    mov.u64 %rd6, buffer;\n    add.s64 %rd5, %rd5, %rd6;\n"
            "    ld.shared.b32 %r6, [%rd5+128];"
        ),
        "shared by generic address": (
            "cvt.u64.u32 %rd5, %r4;\n    mov.u64 %rd6, buffer;\n    cvta.shared.u64 %rd6, %rd6;\n"
            "    add.s64 %rd5, %rd5, %rd6;\n    ld.b32 %r6, [%rd5+128];"
        ),
        "shared there and back": (
            "cvt.u64.u32 %rd5, %r4;\n    mov.u64 %rd6, buffer;\n    cvta.shared.u64 %rd6, %rd6;\n"
            "    cvta.to.shared.u64 %rd6, %rd6;\n    add.s64 %rd5, %rd5, %rd6;\n"
            "    ld.shared.b32 %r6, [%rd5+128];"
        ),
    }
    x = _iota(32)
    for name, load in variants.items():
        ptx = module(body + f"    {load}\n    st.global.b32 [%rd1], %r6;", {"x": "u64", "y": "u64"}, shared)
        yield Case(name, ptx, {"x": x, "y": torch.zeros_like(x)}, {"y": x.flip(0)})
    local = "    .local .align 8 .b8 depot[64];\n" + body.split("    mov.u32 %r2, buffer")[0]
    local += """    mov.u64 %rd5, depot;
    cvta.local.u64 %rd6, %rd5;
    st.local.b32 [%rd5+16], %r1;
    ld.b32 %r6, [%rd6+16];
    st.global.b32 [%rd1], %r6;"""
    yield Case("local memory", module(local, {"x": "u64", "y": "u64"}), {"x": x, "y": torch.zeros_like(x)}, {"y": x})


def _through_shared():
    """Every width and type by which kernels move data through shared memory: each thread's own 16 bytes."""
    registers = {"b8": "%h", "b16": "%h", "u16": "%h", "b32": "%r", "u32": "%r", "f32": "%f", "b64": "%rd"}
    for kind, family in registers.items():
        size = int(kind[1:]) // 8
        for count in (1, 2, 4):
            if size * count > 16:
                continue
            suffix = f".v{count}" if count > 1 else ""
            moves = []
            for start in range(0, 16, size * count):
                names = [f"{family}{20 + start // size + i}" for i in range(count)]
                operand = "{" + ", ".join(names) + "}" if count > 1 else names[0]
                moves.append((start, operand))
            lines = ["ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd0];", "mov.u32 %r2, buffer;"]
            lines += [
                "shl.b32 %r3, %r0, 4;",
                "add.s32 %r2, %r2, %r3;",
                "st.shared.v4.b32 [%r2], {%r10, %r11, %r12, %r13};",
            ]
            lines += [f"ld.shared{suffix}.{kind} {operand}, [%r2+{start}];" for start, operand in moves]
            lines += [f"st.shared{suffix}.{kind} [%r2+{512 + start}], {operand};" for start, operand in moves]
            lines += ["ld.shared.v4.b32 {%r14, %r15, %r16, %r17}, [%r2+512];"]
            lines += ["st.global.v4.b32 [%rd1], {%r14, %r15, %r16, %r17};"]
            shared = ".shared .align 16 .b8 buffer[1024];"
            yield _copy(f"ld/st.shared{suffix}.{kind}", 16, lines, shared=shared)


def _parameters():
    """A structure by value, read in every way, by its symbol and by a generic address."""
    words = [7, -3, 11, 13, 17, 19, 23, 29]
    body = pointers("y") + "\n" + _THREAD
    body += """    ld.param.b32 %r1, [s];
    ld.param.s32 %rd1, [s+4];
    ld.param.v2.u32 {%r2, %r3}, [s+8];
    ld.param.v4.u32 {%r4, %r5, %r6, %r7}, [s+16];
    ld.param.b64 %rd2, [s+24];
    ld.param.f32 %f1, [s+28];
    ld.param.v2.f32 {%f2, %f3}, [s+8];
    mov.b32 %r8, %f1;
    mov.b32 %r10, %f2;
    mov.b32 %r11, %f3;
    mov.u64 %rd3, s;
    cvta.param.u64 %rd4, %rd3;
    ld.b32 %r9, [%rd4+12];
    setp.eq.u32 %p1, %r0, 0;
    @!%p1 bra $out;
"""
    stores = [("b32", "%r1"), ("b64", "%rd1"), ("v2.b32", "{%r2, %r3}"), ("v4.b32", "{%r4, %r5, %r6, %r7}")]
    stores += [("b64", "%rd2"), ("b32", "%r8"), ("b32", "%r9"), ("v2.b32", "{%r10, %r11}")]
    at = [0, 8, 16, 32, 48, 56, 60, 64]
    body += "".join(
        f"    st.global.{kind} [%rd0+{start}], {register};\n"
        for (kind, register), start in zip(stores, at, strict=True)
    )
    expected = [7, 0, -3, -1, 11, 13, 0, 0, 17, 19, 23, 29, 23, 29, 29, 13, 11, 13]
    yield Case(
        "parameters by value",
        module(body + "$out:", {"y": "u64", "s": (32, 64)}),
        {"y": torch.zeros(18, dtype=torch.int32), "s": struct.pack("<8i", *words)},
        {"y": torch.tensor(expected, dtype=torch.int32)},
    )


def _variables_and_parameters():
    table = ".const .align 4 .b32 table[4] = {10, 20, 30, 40};\n.global .align 4 .b32 counters[4] = {1, 2, 3, 4};"
    body = pointers("y") + "\n" + _THREAD
    body += """    and.b32 %r1, %r0, 3;
    mul.wide.u32 %rd1, %r1, 4;
    mov.u64 %rd2, table;
    add.s64 %rd2, %rd2, %rd1;
    ld.const.b32 %r2, [%rd2];
    mov.u64 %rd3, counters;
    add.s64 %rd3, %rd3, %rd1;
    ld.global.b32 %r3, [%rd3];
    ld.param.u32 %r4, [n];
    add.s32 %r2, %r2, %r3;
    add.s32 %r2, %r2, %r4;
    mul.wide.u32 %rd4, %r0, 4;
    add.s64 %rd0, %rd0, %rd4;
    st.global.b32 [%rd0], %r2;"""
    lanes = torch.arange(32, dtype=torch.int32) % 4
    expected = (lanes + 1) * 10 + lanes + 1 + 1000
    yield Case(
        "module variables and scalar parameters",
        module(body, {"y": "u64", "n": "u32"}, table),
        {"y": torch.zeros(32, dtype=torch.int32), "n": 1000},
        {"y": expected},
    )


_ATOMICS = {
    "add": (("u32", "s32", "u64"), lambda old, b: old + b),
    "min": (("u32", "s32"), torch.minimum),
    "max": (("u32", "s32"), torch.maximum),
    "and": (("b32",), lambda old, b: old & b),
    "or": (("b32",), lambda old, b: old | b),
    "xor": (("b32",), lambda old, b: old ^ b),
    "exch": (("b32", "b64"), lambda old, b: b),
}


def _atomics():
    """Every thread on a location of its own: the old value and the new one."""
    for operation, (kinds, model) in _ATOMICS.items():
        for kind in kinds:
            for order in (
                "",
                ".relaxed.gpu",
                ".acquire.gpu",
                ".release.gpu",
                ".acq_rel.gpu",
                ".acq_rel.sys",
                ".relaxed.cta",
            ):
                dtype = torch.int64 if kind[1:] == "64" else torch.int32
                x, b = _iota(128, dtype), _iota(128, dtype).flip(0)
                yield _atomic_case(
                    f"atom{order}.{operation}.{kind}",
                    f"atom{order}.global.{operation}.{kind} {{d}}, [%rd5], {{a}};",
                    x,
                    b,
                    model(x, b),
                    x,
                )
    x, b = _iota(128), _iota(128).flip(0)
    b[::2] = x[::2]
    swapped = torch.where(x == b, torch.full_like(x, 99), x)
    yield _atomic_case("atom.cas.b32", "atom.acq_rel.gpu.global.cas.b32 {d}, [%rd5], {a}, 99;", x, b, swapped, x)
    h = [each.short() for each in (x, b, swapped)]
    yield _atomic_case("atom.cas.b16", "atom.global.cas.b16 {d}, [%rd5], {a}, 99;", *h, h[0])
    f = torch.randn(128, generator=torch.Generator().manual_seed(0))
    yield _atomic_case("atom.add.f32", "atom.global.add.f32 {d}, [%rd5], {a};", f, f.flip(0), f + f.flip(0), f)
    pairs = torch.arange(128) // 2 * 2  # even threads add to their own element and to the next
    yield _atomic_case(
        "atom.add.v2.f32",
        "mov.f32 {d}, {a};\n    and.b32 %r9, %r0, 1;\n    setp.eq.s32 %p2, %r9, 0;\n    "
        "@%p2 atom.relaxed.gpu.global.add.v2.f32 {{{d}, %f9}}, [%rd5], {{{a}, {a}}};",
        f,
        f.flip(0),
        f + f.flip(0)[pairs],
        torch.where(pairs == torch.arange(128), f, f.flip(0)),
        arch="sm_90",
    )
    yield _atomic_case(
        "red.add.f32",
        ("red.global.add.f32 [%rd5], {a};\n    mov.f32 {d}, {a};"),
        f,
        f.flip(0),
        f + f.flip(0),
        f.flip(0),
    )
    for kind in ("u32", "s32"):
        text = f"red.release.gpu.global.add.{kind} [%rd5], {{a}};\n    mov.b32 {{d}}, {{a}};"
        yield _atomic_case(f"red.release.add.{kind}", text, x, b, x + b, b)
    counted = torch.where(x >= b, torch.zeros_like(x), x + 1)
    yield _atomic_case("atom.inc.u32", "atom.global.inc.u32 {d}, [%rd5], {a};", x, b, counted, x)
    down = torch.where((x == 0) | (x > b), b, x - 1)
    yield _atomic_case("atom.dec.u32", "atom.global.dec.u32 {d}, [%rd5], {a};", x, b, down, x)


def _atomic_case(name, text, x, b, new, old, arch="sm_80"):
    size = x.element_size()
    address = f"ld.param.u64 %rd5, [target];\n    mul.wide.u32 %rd6, %r0, {size};\n    add.s64 %rd5, %rd5, %rd6;\n    "
    case = elementwise(name, address + text, [b], [old], arch=arch)
    return Case(
        name,
        case.ptx.replace(".param .u64 p0", (".param .u64 target,\n    .param .u64 p0")),
        {"target": x, **case.args},
        {"target": new, **case.expected},
        block=128,
        arch=arch,
    )


def _contended():
    """All threads of all CTAs on one counter: every ticket once, and the sum."""
    body = pointers("counter", "tickets")
    body += """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r0, %r1, 64, %r0;
    atom.relaxed.gpu.global.add.u32 %r2, [%rd0], 1;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd1, %rd1, %rd2;
    st.global.b32 [%rd1], 1;"""
    ptx = module(body, {"counter": "u64", "tickets": "u64"})
    args = {"counter": torch.zeros(1, dtype=torch.int32), "tickets": torch.zeros(256, dtype=torch.int32)}
    expected = {"counter": torch.tensor([256], dtype=torch.int32), "tickets": torch.ones(256, dtype=torch.int32)}
    yield Case("tickets", ptx, args, expected, grid=(4, 1, 1), block=64)
    shared = module(
        pointers("y")
        + """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, total;
    setp.eq.s32 %p1, %r0, 0;
    @%p1 st.shared.b32 [%r1], 5;
    bar.sync 0;
    atom.shared.add.u32 %r2, [%r1], %r0;
    bar.sync 0;
    ld.shared.b32 %r3, [%r1];
    mul.wide.u32 %rd2, %r0, 4;
    add.s64 %rd0, %rd0, %rd2;
    st.global.b32 [%rd0], %r3;""",
        {"y": "u64"},
        ".shared .align 4 .b8 total[4];",
    )
    yield Case(
        "atom.shared.add",
        shared,
        {"y": torch.zeros(64, dtype=torch.int32)},
        {"y": torch.full((64,), 5 + 63 * 32, dtype=torch.int32)},
        block=64,
    )


def cases():
    yield from _widths()
    yield from _bytes_side_by_side()
    yield from _signed_bytes()
    yield from _shared_and_local()
    yield from _through_shared()
    yield from _parameters()
    yield from _variables_and_parameters()
    yield from _atomics()
    yield from _contended()

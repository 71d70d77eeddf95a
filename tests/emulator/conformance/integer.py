"""Integer arithmetic, logic, bit fields, selection and comparisons against Python's integers."""

import itertools
import random

import torch

from .case import elementwise

_DTYPES = {16: torch.int16, 32: torch.int32, 64: torch.int64}
_COUNT = 128


def signed(value, bits):
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def interpret(value, kind):
    bits = int(kind[1:])
    return signed(value, bits) if kind[0] == "s" else value & ((1 << bits) - 1)


def values(bits, seed, small=False):
    """Random numbers of every magnitude, and the edges."""
    generator = random.Random(seed)
    edges = [0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    if small:
        return [generator.choice([0, 1, 5, bits - 1, bits, bits + 3, 200]) for _ in range(_COUNT)]
    return [
        generator.choice(edges) if generator.random() < 0.3 else generator.getrandbits(generator.randint(1, bits))
        for _ in range(_COUNT)
    ]


def tensor(numbers, bits):
    return torch.tensor([signed(number, bits) for number in numbers], dtype=_DTYPES[bits])


def _case(name, instruction, kinds, result_bits, model, arch="sm_80"):
    """kinds: type of each source, with a trailing "~" for shift amounts and field positions."""
    columns = [values(int(kind.strip("~")[1:]), seed, small=kind.endswith("~")) for seed, kind in enumerate(kinds)]
    results = [
        model(*(interpret(value, kind.strip("~")) for value, kind in zip(row, kinds, strict=True)))
        for row in zip(*columns, strict=True)
    ]
    inputs = [tensor(column, int(kind.strip("~")[1:])) for column, kind in zip(columns, kinds, strict=True)]
    return elementwise(name, instruction, inputs, [tensor(results, result_bits)], arch=arch)


def _truncated_division(a, b, bits):
    return ~0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a, b, bits):
    return a if b == 0 else a - b * _truncated_division(a, b, bits)


def _arithmetic():
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        bits = int(kind[1:])
        binary = {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul.lo": lambda a, b: a * b,
            "mul.hi": lambda a, b, bits=bits: (a * b) >> bits,
            "min": min,
            "max": max,
            "div": lambda a, b, bits=bits: _truncated_division(a, b, bits),
            "rem": lambda a, b, bits=bits: _remainder(a, b, bits),
        }
        for operation, model in binary.items():
            yield _case(f"{operation}.{kind}", f"{operation}.{kind} {{d}}, {{a}}, {{b}};", [kind] * 2, bits, model)
        yield _case(
            f"mad.lo.{kind}", f"mad.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [kind] * 3, bits, lambda a, b, c: a * b + c
        )
        high = lambda a, b, c, bits=bits: ((a * b) >> bits) + c  # noqa: E731
        yield _case(f"mad.hi.{kind}", f"mad.hi.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [kind] * 3, bits, high)
        if bits < 64:
            wide = f"{kind[0]}{bits * 2}"
            yield _case(
                f"mul.wide.{kind}", f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", [kind] * 2, bits * 2, lambda a, b: a * b
            )
            yield _case(
                f"mad.wide.{kind}",
                f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}};",
                [kind, kind, wide],
                bits * 2,
                lambda a, b, c: a * b + c,
            )
        yield _case(
            f"sad.{kind}", f"sad.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [kind] * 3, bits, lambda a, b, c: c + abs(a - b)
        )
        if kind[0] == "s":
            yield _case(f"neg.{kind}", f"neg.{kind} {{d}}, {{a}};", [kind], bits, lambda a: -a)
            yield _case(f"abs.{kind}", f"abs.{kind} {{d}}, {{a}};", [kind], bits, abs)
        shift = lambda a, n, bits=bits: a >> min(n, bits)  # noqa: E731
        yield _case(f"shr.{kind}", f"shr.{kind} {{d}}, {{a}}, {{b}};", [kind, "u32~"], bits, shift)


def _carries():
    """Carry chains: CC.CF is what an operation with .cc leaves, as 0 or 1; for a subtraction, what it borrows."""
    for bits in (32, 64):
        kind, register = f"u{bits}", "%r" if bits == 32 else "%rd"
        for root, sign in (("add", 1), ("sub", -1)):
            chain = (
                f"{root}.cc.{kind} {register}40, {{a}}, {{b}};\n    {root}c.cc.{kind} {register}41, {{a}}, {{c}};\n"
                f"    {root}c.{kind} {{d}}, {{b}}, {{c}};\n    xor.b{bits} {{d}}, {{d}}, {register}40;\n"
                f"    xor.b{bits} {{d}}, {{d}}, {register}41;"
            )

            def model(a, b, c, bits=bits, sign=sign):
                first = a + sign * b
                second = a + sign * (c + (first >> bits & 1))
                third = b + sign * (c + (second >> bits & 1))
                return first ^ second ^ third

            yield _case(f"{root}.cc.{kind}", chain, [kind] * 3, bits, model)
        for sign in "us":
            kind = f"{sign}{bits}"
            chain = (
                f"mad.lo.cc.{kind} {register}40, {{a}}, {{b}}, {{c}};\n"
                f"    madc.hi.cc.{kind} {register}41, {{a}}, {{b}}, {{c}};\n"
                f"    madc.lo.{kind} {{d}}, {{b}}, {{c}}, {register}40;\n    xor.b{bits} {{d}}, {{d}}, {register}41;"
            )

            def multiplied(a, b, c, bits=bits):
                ones = (1 << bits) - 1
                low = (a * b & ones) + (c & ones)
                high = (a * b >> bits & ones) + (c & ones) + (low >> bits)
                return (b * c + (low & ones) + (high >> bits)) ^ high

            yield _case(f"mad.cc.{kind}", chain, [kind] * 3, bits, multiplied)
    wide = "mul.lo.u32 %r40, {a}, {b};\n    mad.hi.cc.u32 %r41, {a}, {b}, {c};\n    addc.u32 {d}, %r40, %r41;"
    ones = 0xFFFFFFFF
    yield _case(
        "mad.hi.cc.u32", wide, ["u32"] * 3, 32, lambda a, b, c: a * b + (a * b >> 32) + c + ((a * b >> 32) + c > ones)
    )


def _packed():
    for kind in ("u16x2", "s16x2"):
        for name, model in {"add": lambda a, b: a + b, "min": min, "max": max}.items():

            def both(a, b, model=model, kind=kind[:3]):
                low, high = (model(interpret(a >> at, kind), interpret(b >> at, kind)) & 0xFFFF for at in (0, 16))
                return low | high << 16

            text = f"{name}.{kind} {{d}}, {{a}}, {{b}};"
            yield _case(f"{name}.{kind}", text, ["u32"] * 2, 32, both, arch="sm_90")


def _reversed(a, bits):
    return int(f"{a:0{bits}b}"[::-1], 2)


def _extract(a, position, length, kind):
    """bfe: past the top, a signed field repeats the sign and an unsigned one is zero."""
    bits = int(kind[1:])
    position, length = position & 255, length & 255
    sign = 0 if kind[0] == "u" or length == 0 else interpret(a, f"u{bits}") >> min(position + length - 1, bits - 1) & 1
    field = [
        (interpret(a, f"u{bits}") >> (position + i) & 1) if i < length and position + i < bits else sign
        for i in range(bits)
    ]
    return sum(bit << i for i, bit in enumerate(field))


def _insert(a, b, position, length, bits):
    position, length = position & 255, length & 255
    for i in range(min(length, bits)):
        if position + i < bits:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def _permute(a, b, selector):
    data = [(a | b << 32) >> 8 * i & 255 for i in range(8)]
    result = 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = data[pick & 7]
        result |= ((255 if byte & 128 else 0) if pick & 8 else byte) << 8 * i
    return result


def _lookup(a, b, c, table):
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


def _bits():
    for bits in (16, 32, 64):
        kind = f"u{bits}"
        logic = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}
        for operation, model in logic.items():
            yield _case(f"{operation}.b{bits}", f"{operation}.b{bits} {{d}}, {{a}}, {{b}};", [kind] * 2, bits, model)
        yield _case(f"not.b{bits}", f"not.b{bits} {{d}}, {{a}};", [kind], bits, lambda a: ~a)
        yield _case(f"cnot.b{bits}", f"cnot.b{bits} {{d}}, {{a}};", [kind], bits, lambda a: int(a == 0))
        yield _case(f"shl.b{bits}", f"shl.b{bits} {{d}}, {{a}}, {{b}};", [kind, "u32~"], bits, lambda a, n: a << n)
        if bits == 16:
            continue
        yield _case(f"popc.b{bits}", f"popc.b{bits} {{d}}, {{a}};", [kind], 32, lambda a: bin(a).count("1"))
        yield _case(
            f"clz.b{bits}", f"clz.b{bits} {{d}}, {{a}};", [kind], 32, lambda a, bits=bits: bits - a.bit_length()
        )
        yield _case(
            f"brev.b{bits}", f"brev.b{bits} {{d}}, {{a}};", [kind], bits, lambda a, bits=bits: _reversed(a, bits)
        )
        insert = lambda a, b, c, length, bits=bits: _insert(a, b, c, length, bits)  # noqa: E731
        yield _case(
            f"bfi.b{bits}",
            f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{c}}, {{x}};",
            [kind, kind, "u32~", "u32~"],
            bits,
            insert,
        )
        for sign in "us":
            field = f"{sign}{bits}"
            extract = lambda a, b, c, field=field: _extract(a, b, c, field)  # noqa: E731
            yield _case(
                f"bfe.{field}", f"bfe.{field} {{d}}, {{a}}, {{b}}, {{c}};", [field, "u32~", "u32~"], bits, extract
            )
            find = lambda a: (~a if a < 0 else a).bit_length() - 1  # noqa: E731
            yield _case(f"bfind.{field}", f"bfind.{field} {{d}}, {{a}};", [field], 32, find)
            shift = lambda a, find=find, top=bits - 1: top - find(a) if find(a) >= 0 else -1  # noqa: E731
            yield _case(f"bfind.shiftamt.{field}", f"bfind.shiftamt.{field} {{d}}, {{a}};", [field], 32, shift)
    yield _case("prmt", "prmt.b32 {d}, {a}, {b}, {c};", ["u32"] * 3, 32, _permute)
    for table in (0x96, 0xE8, 0x1B, 0xC0):
        yield _case(
            f"lop3 {table:#x}",
            f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};",
            ["u32"] * 3,
            32,
            lambda a, b, c, table=table: _lookup(a, b, c, table),
        )
    for mode in ("wrap", "clamp"):
        amount = (lambda n: n & 31) if mode == "wrap" else (lambda n: min(n, 32))
        left = lambda a, b, n, amount=amount: (b << 32 | a) << amount(n) >> 32  # noqa: E731
        right = lambda a, b, n, amount=amount: (b << 32 | a) >> amount(n)  # noqa: E731
        yield _case(f"shf.l.{mode}", f"shf.l.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", ["u32", "u32", "u32~"], 32, left)
        yield _case(f"shf.r.{mode}", f"shf.r.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", ["u32", "u32", "u32~"], 32, right)
    for kind in ("u32", "s32"):
        byte = f"{kind[0]}8"

        def dot(a, b, c, byte=byte):
            return c + sum(interpret(a >> i, byte) * interpret(b >> i, byte) for i in range(0, 32, 8))

        yield _case(f"dp4a.{kind}", f"dp4a.{kind}.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [kind] * 3, 32, dot)


_RELATIONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _comparisons():
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        names = dict.fromkeys(_RELATIONS) | (unsigned if kind[0] == "u" else {})
        for name, alias in names.items():
            relation = _RELATIONS[alias or name]
            # Sources of nearby values, so that equality happens.
            text = f"setp.{name}.{kind} %p1, {{a}}, {{b}};\n    selp.b32 {{d}}, 1, 0, %p1;"
            yield _case(
                f"setp.{name}.{kind}", text, [kind] * 2, 32, lambda a, b, relation=relation: int(relation(a, b))
            )
    for name, bits in itertools.product(("eq", "ne"), (16, 32, 64)):
        text = f"setp.{name}.b{bits} %p1, {{a}}, {{b}};\n    selp.u32 {{d}}, 1, 0, %p1;"
        yield _case(
            f"setp.{name}.b{bits}",
            text,
            [f"u{bits}"] * 2,
            32,
            lambda a, b, relation=_RELATIONS[name]: int(relation(a, b)),
        )
    combined = {"and": lambda p, c: p and c, "or": lambda p, c: p or c, "xor": lambda p, c: p != c}
    for name, combine in combined.items():
        text = (
            f"setp.gt.s32 %p2, {{c}}, 0;\n    setp.lt.{name}.s32 %p0|%p1, {{a}}, {{b}}, !%p2;\n"
            f"    selp.b32 {{d}}, 1, 0, %p0;\n    selp.b32 %r9, 2, 0, %p1;\n    or.b32 {{d}}, {{d}}, %r9;"
        )

        def model(a, b, c, combine=combine):
            return int(combine(a < b, c <= 0)) + 2 * int(combine(a >= b, c <= 0))

        yield _case(f"setp.lt.{name}", text, ["s32"] * 3, 32, model)
    logic = (
        "setp.lt.s32 %p0, {a}, 0;\n    setp.lt.s32 %p1, {b}, 0;\n    setp.lt.s32 %p2, {c}, 0;\n"
        "    and.pred %p3, %p0, %p1;\n    or.pred %p4, %p3, %p2;\n    xor.pred %p5, %p4, %p0;\n"
    )
    logic += "    not.pred %p6, %p5;\n    mov.pred %p7, %p6;\n    selp.b32 {d}, {a}, {b}, %p7;"
    yield _case(
        "predicate logic",
        logic,
        ["s32"] * 3,
        32,
        lambda a, b, c: a if ((a < 0 and b < 0) or c < 0) == (a < 0) else b,
    )
    for kind in ("b16", "b64", "u16", "u32"):
        bits = int(kind[1:])
        text = f"setp.lt.s32 %p1, {{a}}, 0;\n    selp.{kind} {{d}}, {{b}}, {{c}}, %p1;"
        yield _case(f"selp.{kind}", text, ["s32", f"u{bits}", f"u{bits}"], bits, lambda a, b, c: b if a < 0 else c)


def _moves():
    yield _case("mov pack 2x32", "mov.b64 {d}, {{{a}, {b}}};", ["u32", "u32"], 64, lambda a, b: a | b << 32)
    yield _case("mov pack 2x16", "mov.b32 {d}, {{{a}, {b}}};", ["u16", "u16"], 32, lambda a, b: a | b << 16)
    yield _case(
        "mov unpack 2x16",
        ("mov.b32 {{%h1, %h2}}, {a};\n    mov.b32 {d}, {{%h2, %h1}};"),
        ["u32"],
        32,
        lambda a: a >> 16 | (a & 0xFFFF) << 16,
    )
    yield _case(
        "mov unpack 4x16",
        ("mov.b64 {{%h1, %h2, %h3, %h4}}, {a};\n    mov.b64 {d}, {{%h4, %h3, %h2, %h1}};"),
        ["u64"],
        64,
        lambda a: sum((a >> 16 * i & 0xFFFF) << 16 * (3 - i) for i in range(4)),
    )
    yield _case("mov unpack sink", "mov.b64 {{_, {d}}}, {a};", ["u64"], 32, lambda a: a >> 32)
    yield _case("mov.u16", "mov.u16 {d}, {a};", ["u16"], 16, lambda a: a)
    yield _case("mov.u64", "mov.u64 {d}, {a};", ["u64"], 64, lambda a: a)
    yield _case(
        "guards",
        ("setp.gt.s32 %p1, {a}, 0;\n    mov.u32 {d}, 7;\n    @%p1 mov.u32 {d}, 1;\n    @!%p1 add.u32 {d}, {d}, {a};"),
        ["s32"],
        32,
        lambda a: 1 if a > 0 else 7 + a,
    )


def _philox_round(c, key):
    """One round on the four counter words, as two 32-bit products."""
    product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
    return [
        product1 >> 32 ^ c[1] ^ key[0],
        product1 & 0xFFFFFFFF,
        product0 >> 32 ^ c[3] ^ key[1],
        product0 & 0xFFFFFFFF,
    ]


def _philox():
    """Seven rounds: the integer arithmetic of the dropout mask."""
    lines = [
        "mov.u32 %r30, {a};",
        "mov.u32 %r31, {b};",
        "mov.u32 %r32, 0;",
        "mov.u32 %r33, 0;",
        "mov.u32 %r34, {c};",
        "mov.u32 %r35, 12345;",
    ]
    for _ in range(7):
        lines += [
            "mul.hi.u32 %r36, %r30, -766435501;",
            "mul.lo.u32 %r37, %r30, -766435501;",
            "mul.wide.u32 %rd30, %r32, -845247145;",
            "mov.b64 {{%r38, %r39}}, %rd30;",
            "xor.b32 %r30, %r39, %r31;",
            "xor.b32 %r30, %r30, %r34;",
            "lop3.b32 %r32, %r36, %r33, %r35, 0x96;",
            "mov.u32 %r31, %r38;",
            "mov.u32 %r33, %r37;",
            "add.s32 %r34, %r34, -1640531527;",
            "add.s32 %r35, %r35, -1150833019;",
        ]
    lines += ["xor.b32 {d}, %r30, %r31;", "xor.b32 %r32, %r32, %r33;", "add.u32 {d}, {d}, %r32;"]

    def model(a, b, key):
        counter, keys = [a, b, 0, 0], [key, 12345]
        for _ in range(7):
            counter = _philox_round(counter, keys)
            keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return (counter[0] ^ counter[1]) + (counter[2] ^ counter[3])

    yield _case("philox", "\n    ".join(lines), ["u32"] * 3, 32, model)


def cases():
    yield from _arithmetic()
    yield from _carries()
    yield from _packed()
    yield from _bits()
    yield from _comparisons()
    yield from _moves()
    yield from _philox()

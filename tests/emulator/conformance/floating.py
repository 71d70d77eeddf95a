"""Floating-point arithmetic, comparisons and conversions against torch."""

import itertools
from fractions import Fraction

import numpy as np
import torch

from .case import bits, elementwise

_COUNT = 256
_LETTERS = "abc"


def floats(dtype, seed, scale=4.0):
    """Numbers of moderate size with short mantissas, so that sums and products round once; and special values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(_COUNT, generator=generator).mul(scale).to(torch.bfloat16).to(dtype)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 65504.0, 1e-3])
    values[torch.randperm(_COUNT, generator=generator)[:36]] = special.repeat(4).to(dtype)
    return values


def _canonical(tensor):
    """The hardware's NaN has all mantissa bits set."""
    pattern = {
        torch.bfloat16: 0x7FFF,
        torch.float16: 0x7FFF,
        torch.float32: 0x7FFFFFFF,
        torch.float64: 0x7FF8000000000000,
    }[tensor.dtype]
    whole = bits(tensor).clone()
    whole[tensor.isnan()] = pattern
    return whole.view(tensor.dtype)


def _kind(dtype):
    return {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]


def _case(operation, n, dtype, model, scale=4.0, tolerance=0.0):
    inputs = [floats(dtype, seed, scale) for seed in range(n)]
    result = model(*(value.double() for value in inputs)).to(dtype)
    # NaN bits differ between machines: results are compared as numbers where one is a NaN.
    text = f"{operation} {{d}}, {', '.join(f'{{{letter}}}' for letter in _LETTERS[:n])};"
    return elementwise(operation, text, inputs, [result], tolerance=tolerance or 1e-30)


def _square_root(a):
    """Correctly rounded, which torch's vectorised one is not always."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.sqrt(a.numpy()))


def _arithmetic():
    for dtype in (torch.float32, torch.float64):
        kind = _kind(dtype)
        rounding = ".rn"
        yield _case(f"add{rounding}.{kind}", 2, dtype, lambda a, b: a + b)
        yield _case(f"sub{rounding}.{kind}", 2, dtype, lambda a, b: a - b)
        yield _case(f"mul{rounding}.{kind}", 2, dtype, lambda a, b: a * b)
        yield _case(f"div.rn.{kind}", 2, dtype, lambda a, b, dtype=dtype: (a.to(dtype) / b.to(dtype)).double())
        yield _case(f"fma.rn.{kind}", 3, dtype, lambda a, b, c: a * b + c)
        yield _case(f"min.{kind}", 2, dtype, torch.fmin)
        yield _case(f"max.{kind}", 2, dtype, torch.fmax)
        yield _case(f"neg.{kind}", 1, dtype, lambda a: -a)
        yield _case(f"abs.{kind}", 1, dtype, torch.abs)
        yield _case(f"sqrt.rn.{kind}", 1, dtype, _square_root)
        yield _case(f"rcp.rn.{kind}", 1, dtype, lambda a, dtype=dtype: (1 / a.to(dtype)).double())
        yield _case(f"copysign.{kind}", 2, dtype, lambda sign, magnitude: torch.copysign(magnitude, sign))
    yield _case("mul.f32", 2, torch.float32, lambda a, b: a * b)
    text = "setp.lt.f32 %p1, {a}, {b};\n    selp.f32 {d}, {a}, {b}, %p1;"
    a, b = torch.randn(128, generator=torch.Generator().manual_seed(0)), torch.zeros(128)
    yield elementwise("selp.f32", text, [a, b], [torch.minimum(a, b)])
    yield _case("min.NaN.f32", 2, torch.float32, torch.minimum)
    yield _case("max.NaN.f32", 2, torch.float32, torch.maximum)
    yield _case("add.sat.f32", 2, torch.float32, lambda a, b: torch.nan_to_num((a + b).clamp(0, 1), nan=0.0))
    approximate = {
        "ex2": torch.exp2,
        "lg2": torch.log2,
        "rcp": torch.reciprocal,
        "sqrt": torch.sqrt,
        "rsqrt": torch.rsqrt,
    }
    for name, model in approximate.items():
        yield _case(f"{name}.approx.f32", 1, torch.float32, model, tolerance=4e-6)
        yield _case(f"{name}.approx.ftz.f32", 1, torch.float32, model, tolerance=4e-6)
    yield _case("div.full.f32", 2, torch.float32, lambda a, b: a / b, tolerance=4e-7)
    yield _case("div.approx.f32", 2, torch.float32, lambda a, b: a / b, tolerance=4e-7)
    yield _case("rsqrt.approx.f64", 1, torch.float64, torch.rsqrt, tolerance=1e-5)
    yield _case("tanh.approx.f32", 1, torch.float32, torch.tanh, tolerance=2e-3)
    for name, model in {"sin": torch.sin, "cos": torch.cos}.items():
        small = (torch.arange(_COUNT) - 128) / 64.0
        yield elementwise(
            f"{name}.approx.f32",
            f"{name}.approx.f32 {{d}}, {{a}};",
            [small],
            [model(small.double()).float()],
            tolerance=2e-4,
        )


def _rounded(exact, mode, dtype):
    """The number of this type next to an exact one, on the side that the rounding mode says."""
    number = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    value = number(float(exact))
    up = mode == "rp" or (mode == "rz" and exact < 0)
    while (Fraction(float(value)) < exact) if up else (Fraction(float(value)) > exact):
        value = np.nextafter(value, number(np.inf if up else -np.inf))
    while True:
        closer = np.nextafter(value, number(-np.inf if up else np.inf))
        if (Fraction(float(closer)) < exact) if up else (Fraction(float(closer)) > exact):
            return float(value)
        value = closer


def _directed():
    models = {
        "add": (2, lambda a, b: a + b),
        "sub": (2, lambda a, b: a - b),
        "mul": (2, lambda a, b: a * b),
        "div": (2, lambda a, b: a / b),
        "rcp": (1, lambda a: 1 / a),
        "fma": (3, lambda a, b, c: a * b + c),
    }
    for (name, (n, model)), mode, dtype in itertools.product(
        models.items(), ("rz", "rm", "rp"), (torch.float32, torch.float64)
    ):
        sources = [_finite(dtype, seed, 4.0)[:128] for seed in range(20, 20 + n)]
        exact = [model(*map(Fraction, row)) for row in zip(*(source.tolist() for source in sources), strict=True)]
        expected = torch.tensor([_rounded(each, mode, dtype) for each in exact], dtype=dtype)
        operation = f"{name}.{mode}.{_kind(dtype)}"
        text = f"{operation} {{d}}, {', '.join(f'{{{letter}}}' for letter in _LETTERS[:n])};"
        yield elementwise(operation, text, sources, [expected])


def _flush():
    tiny = torch.tensor([1e-39, -1e-39, 1.5, 2e-38]).repeat(_COUNT // 4)
    flushed = torch.tensor([0.0, -0.0, 3.0, 4e-38]).repeat(_COUNT // 4)
    yield elementwise("add.ftz.f32", "add.ftz.f32 {d}, {a}, {a};", [tiny], [flushed])
    yield elementwise("add.f32 subnormal", "add.f32 {d}, {a}, {a};", [tiny], [tiny + tiny])
    doubled = tiny + tiny
    yield elementwise("sub.f32 subnormal", "sub.f32 {d}, {a}, {b};", [doubled, tiny], [doubled - tiny])


def _halves():
    """16-bit arithmetic, single and in pairs: rounded once from the exact result."""
    for dtype, arch in ((torch.float16, "sm_80"), (torch.bfloat16, "sm_90")):
        kind = _kind(dtype)
        models = {
            "add.rn": (2, lambda a, b: a + b),
            "sub.rn": (2, lambda a, b: a - b),
            "mul.rn": (2, lambda a, b: a * b),
            "fma.rn": (3, lambda a, b, c: a * b + c),
        }
        models |= {"min": (2, torch.fmin), "max": (2, torch.fmax), "neg": (1, lambda a: -a), "abs": (1, torch.abs)}
        for name, (n, model) in models.items():
            sources = [floats(dtype, seed, 1.0) for seed in range(n)]
            result = model(*(value.double() for value in sources)).to(dtype)
            text = f"{name}.{kind} {{d}}, {', '.join(f'{{{letter}}}' for letter in _LETTERS[:n])};"
            yield elementwise(f"{name}.{kind}", text, sources, [result], arch=arch, tolerance=1e-30)
            pairs = [bits(value).view(torch.int32) for value in sources]
            plain = [torch.where(value.isnan(), torch.ones_like(value), value) for value in sources]
            packed = [bits(value).view(torch.int32).repeat(2) for value in plain]
            expected = (
                bits(_canonical(model(*(value.double() for value in plain)).to(dtype))).view(torch.int32).repeat(2)
            )
            assert len(pairs[0]) * 2 == _COUNT
            yield elementwise(f"{name}.{kind}x2", text.replace(f".{kind}", f".{kind}x2"), packed, [expected], arch=arch)


_FLOAT_RELATIONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & ~(a.isnan() | b.isnan()),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "num": lambda a, b: ~(a.isnan() | b.isnan()),
    "nan": lambda a, b: a.isnan() | b.isnan(),
}


def _relations():
    """By name: whether a comparison holds, for operands of double precision. With u: also where one is a NaN."""
    relations = dict(_FLOAT_RELATIONS)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        relations[name + "u"] = lambda a, b, ordered=_FLOAT_RELATIONS[name]: ordered(a, b) | a.isnan() | b.isnan()
    return relations


def _comparisons():
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        kind = _kind(dtype)
        a, b = floats(dtype, 5, 0.5), floats(dtype, 6, 0.5)
        for name, relation in _relations().items():
            text = f"setp.{name}.{kind} %p1, {{a}}, {{b}};\n    selp.b32 {{d}}, 1, 0, %p1;"
            arch = "sm_90" if kind == "bf16" else "sm_80"
            yield elementwise(f"setp.{name}.{kind}", text, [a, b], [relation(a.double(), b.double()).int()], arch=arch)


def _comparisons_as_numbers():
    """set, and comparisons of pairs."""
    for kind, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        a, b = floats(dtype, 5, 0.5), floats(dtype, 6, 0.5)
        arch = "sm_90" if kind == "bf16" else "sm_80"
        for name, relation in _relations().items():
            holds = relation(a.double(), b.double())
            for to, expected in (("u32", -holds.int()), (kind, holds.to(dtype))):
                operation = f"set.{name}.{to}.{kind}"
                yield elementwise(operation, f"{operation} {{d}}, {{a}}, {{b}};", [a, b], [expected], arch=arch)
            if kind == "f32":
                continue
            packed = [bits(value).view(torch.int32).repeat(2) for value in (a, b)]
            for to, half in ((f"{kind}x2", bits(holds.to(dtype))), ("u32", -holds.short()), ("s32", -holds.short())):
                operation = f"set.{name}.{to}.{kind}x2"
                expected = half.view(torch.int32).repeat(2)
                yield elementwise(operation, f"{operation} {{d}}, {{a}}, {{b}};", packed, [expected], arch=arch)
            text = f"setp.{name}.{kind}x2 %p1|%p2, {{a}}, {{b}};\n    selp.b32 {{d}}, 1, 0, %p1;\n"
            text += "    selp.b32 {e}, 1, 0, %p2;"
            halves = holds.int().view(-1, 2).repeat(2, 1)
            yield elementwise(f"setp.{name}.{kind}x2", text, packed, list(halves.T.contiguous()), arch=arch)


def _finite(dtype, seed, scale):
    return torch.randn(_COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)


def _conversions():
    x = _finite(torch.float32, 1, 300.0)
    for name, model in {"rni": torch.round, "rzi": torch.trunc, "rmi": torch.floor, "rpi": torch.ceil}.items():
        yield elementwise(f"cvt.{name}.s32.f32", f"cvt.{name}.s32.f32 {{d}}, {{a}};", [x], [model(x).int()])
        yield elementwise(f"cvt.{name}.f32.f32", f"cvt.{name}.f32.f32 {{d}}, {{a}};", [x], [model(x)])
    big = torch.tensor([3e9, -3e9, 1e20, float("inf"), float("-inf"), float("nan"), -0.5, 7.9]).repeat(_COUNT // 8)
    clamped = torch.tensor([2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1, -(2**31), 0, 0, 7], dtype=torch.int32).repeat(
        _COUNT // 8
    )
    yield elementwise("cvt.rzi.s32.f32 saturates", "cvt.rzi.s32.f32 {d}, {a};", [big], [clamped])
    unsigned = torch.tensor([-1294967296, 0, -1, -1, 0, 0, 0, 7], dtype=torch.int32).repeat(_COUNT // 8)
    yield elementwise("cvt.rzi.u32.f32 saturates", "cvt.rzi.u32.f32 {d}, {a};", [big], [unsigned])
    yield elementwise("cvt.rn.f16.f32", "cvt.rn.f16.f32 {d}, {a};", [x], [x.half()])
    yield elementwise("cvt.rn.bf16.f32", "cvt.rn.bf16.f32 {d}, {a};", [x], [x.bfloat16()])
    zeroed = (bits(x) & -65536).view(torch.float32).bfloat16()
    yield elementwise("cvt.rz.bf16.f32", "cvt.rz.bf16.f32 {d}, {a};", [x], [zeroed])
    tf32 = ((bits(x) + 0x1000) & -0x2000).int()
    yield elementwise("cvt.rna.tf32.f32", "cvt.rna.tf32.f32 {d}, {a};", [x], [tf32])
    tiny = _finite(torch.float32, 2, 3e-6)
    yield elementwise("cvt.rn.f16.f32 subnormal", "cvt.rn.f16.f32 {d}, {a};", [tiny], [tiny.half()])
    huge = _finite(torch.float32, 3, 60000.0)
    yield elementwise("cvt.rn.f16.f32 overflow", "cvt.rn.f16.f32 {d}, {a};", [huge], [huge.half()])
    for dtype in (torch.float16, torch.bfloat16):
        kind = _kind(dtype)
        h = floats(dtype, 7)
        h = torch.where(h.isnan(), torch.ones_like(h), h)
        yield elementwise(f"cvt.f32.{kind}", f"cvt.f32.{kind} {{d}}, {{a}};", [h], [h.float()])
        y = _finite(torch.float32, 8, 40.0)
        pair = (bits(x.to(dtype)).int() << 16) | (bits(y.to(dtype)).int() & 0xFFFF)
        yield elementwise(f"cvt.rn.{kind}x2.f32", f"cvt.rn.{kind}x2.f32 {{d}}, {{a}}, {{b}};", [x, y], [pair])
        relu = (bits(x.clamp(min=0).to(dtype)).int() << 16) | (bits(y.clamp(min=0).to(dtype)).int() & 0xFFFF)
        yield elementwise(f"cvt.rn.relu.{kind}x2.f32", f"cvt.rn.relu.{kind}x2.f32 {{d}}, {{a}}, {{b}};", [x, y], [relu])
    d = _finite(torch.float64, 9, 1e3)
    yield elementwise("cvt.rn.f32.f64", "cvt.rn.f32.f64 {d}, {a};", [d], [d.float()])
    yield elementwise("cvt.f64.f32", "cvt.f64.f32 {d}, {a};", [x], [x.double()])
    yield elementwise("cvt.rzi.s64.f64", "cvt.rzi.s64.f64 {d}, {a};", [d], [d.long()])
    yield elementwise("cvt.sat.f32.f32", "cvt.sat.f32.f32 {d}, {a};", [x], [x.clamp(0, 1)])


def _integers_to_floats():
    generator = torch.Generator().manual_seed(4)
    for bits_, dtype in ((16, torch.int16), (32, torch.int32), (64, torch.int64)):
        n = torch.randint(-(2 ** (bits_ - 1)), 2 ** (bits_ - 1) - 1, (_COUNT,), generator=generator).to(dtype)
        yield elementwise(f"cvt.rn.f64.s{bits_}", f"cvt.rn.f64.s{bits_} {{d}}, {{a}};", [n], [n.double()])
    for mode, sign, dtype in itertools.product(("rz", "rm", "rp"), "us", (torch.float32, torch.float64)):
        exact = [Fraction(number % 2**64 if sign == "u" else number) for number in n.tolist()]
        expected = torch.tensor([_rounded(number, mode, dtype) for number in exact], dtype=dtype)
        name = f"cvt.{mode}.{_kind(dtype)}.{sign}64"
        yield elementwise(name, f"{name} {{d}}, {{a}};", [n], [expected])
    kinds = [f"{sign}{width}" for sign in "us" for width in (8, 16, 32, 64)]
    for source, destination in itertools.product(kinds, kinds):
        # 8-bit values live in 16-bit registers: a source is their low byte, a result is extended.
        dtypes = {8: torch.int16, 16: torch.int16, 32: torch.int32, 64: torch.int64}
        n = torch.randint(-(2**62), 2**62, (_COUNT,), generator=generator)
        value = n.numpy().astype(f"{'u' * (source[0] == 'u')}int{source[1:]}")
        result = value.astype(f"{'u' * (destination[0] == 'u')}int{destination[1:]}")
        expected = torch.tensor(result.astype("int64")).to(dtypes[int(destination[1:])])
        name = f"cvt.{destination}.{source}"
        yield elementwise(name, f"{name} {{d}}, {{a}};", [n.to(dtypes[int(source[1:])])], [expected])
        if destination == "u8":
            expected = torch.tensor(value.astype("float32"))
            yield elementwise(
                f"cvt.rn.f32.{source}",
                f"cvt.rn.f32.{source} {{d}}, {{a}};",
                [n.to(dtypes[int(source[1:])])],
                [expected],
            )
    n = torch.randint(-(2**31), 2**31, (_COUNT,), generator=generator).int()
    yield elementwise("cvt.sat.s16.s32", "cvt.sat.s16.s32 {d}, {a};", [n], [n.clamp(-32768, 32767).short()])


def cases():
    yield from _arithmetic()
    yield from _directed()
    yield from _flush()
    yield from _halves()
    yield from _comparisons()
    yield from _comparisons_as_numbers()
    yield from _conversions()
    yield from _integers_to_floats()

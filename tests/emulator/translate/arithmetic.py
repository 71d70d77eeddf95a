"""Arithmetic, logic, comparisons, moves and conversions."""

from ..errors import PtxError
from ..program import CLOCKS, FILE_32, FILE_PRED, file_of
from ..ptx import SIZES
from .registry import translates, vector

FLUSH, SATURATE, PROPAGATE_NAN = 1, 2, 4  # FloatFlags of engine/ops_float.cpp
_DIRECTED = {"rz": 8, "rm": 16, "rp": 24}
_INTEGERS = {f"{sign}{bits}" for sign in "us" for bits in (16, 32, 64)}
_FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2"}


def _compute(instruction, builder, name, n_sources):
    instruction.takes(1 + n_sources)
    kind = instruction.type
    sources = [builder.source(text, kind) for text in instruction.operands[1 : 1 + n_sources]]
    immediates = []
    if kind in _FLOATS:
        directed = _DIRECTED if kind in ("f32", "f64") else {}
        instruction.only("rn", "ftz", "sat", "NaN", "approx", "full", "noftz", *directed, kind)
        immediates = [
            FLUSH * instruction.has("ftz") | SATURATE * instruction.has("sat") | PROPAGATE_NAN * instruction.has("NaN")
        ]
        immediates[0] |= sum(bits for name, bits in directed.items() if instruction.has(name))
    builder.emit(f"{name}.{kind}", [builder.destination(instruction.operands[0], kind)], sources, immediates)


@translates("add", "sub", "min", "max", "div", "rem", "copysign")
def _binary(instruction, builder):
    if instruction.type not in _FLOATS:
        instruction.only(instruction.type)
    _compute(instruction, builder, instruction.modifiers[0], 2)


@translates("add.cc", "addc", "sub.cc", "subc", "mad.lo.cc", "mad.hi.cc", "madc")
def _carry_chain(instruction, builder):
    """The carry is one predicate of the whole program; a mad adds its product."""
    root, kind = instruction.modifiers[0], instruction.type
    multiplies = root.startswith("mad")
    instruction.only("cc", kind, *(("lo", "hi") if multiplies else ()))
    instruction.takes(3 + multiplies)
    sources = [builder.source(text, kind) for text in instruction.operands[1:]]
    if multiplies:
        product = builder.new_register(file_of(kind))
        builder.emit(f"mul.{instruction.modifiers[1]}.{kind}", [product], sources[:2])
        sources[:2] = [product]
    carry_in = builder.carry() if root.endswith("c") else builder.constant(0, FILE_PRED)
    carry_out = builder.carry() if instruction.has("cc") else builder.new_register(FILE_PRED)
    builder.emit(
        f"carry.b{SIZES[kind] * 8}",
        [builder.destination(instruction.operands[0], kind), carry_out],
        [*sources, carry_in],
        [root.startswith("sub")],
    )


@translates("sad")
def _sum_of_differences(instruction, builder):
    instruction.only(instruction.type)
    _compute(instruction, builder, "sad", 3)


@translates("neg", "abs", "ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh")
def _unary(instruction, builder):
    _compute(instruction, builder, instruction.modifiers[0], 1)


@translates("fma")
def _fma(instruction, builder):
    _compute(instruction, builder, "fma", 3)


@translates("mul", "mad")
def _multiply(instruction, builder):
    root, kind, operands = instruction.modifiers[0], instruction.type, instruction.operands
    n_sources = 2 if root == "mul" else 3
    if kind in _FLOATS:
        return _compute(instruction, builder, "mul" if root == "mul" else "fma", n_sources)
    part = instruction.modifiers[1]
    instruction.only("lo", "hi", "wide", kind)
    instruction.takes(1 + n_sources)
    result = f"{kind[0]}{int(kind[1:]) * 2}" if part == "wide" else kind
    sources = [builder.source(text, kind) for text in operands[1:3]]
    if root == "mad":
        sources.append(builder.source(operands[3], result))
    builder.emit(f"{root}.{part}.{kind}", [builder.destination(operands[0], result)], sources)


@translates("and", "or", "xor", "not", "cnot")
def _logic(instruction, builder):
    kind = instruction.type
    instruction.only(kind)
    instruction.takes(2 if instruction.modifiers[0] in ("not", "cnot") else 3)
    sources = [builder.source(text, kind) for text in instruction.operands[1:]]
    builder.emit(f"{instruction.modifiers[0]}.{kind}", [builder.destination(instruction.operands[0], kind)], sources)


@translates("shl", "shr")
def _shift(instruction, builder):
    kind, (dst, value, amount) = instruction.type, instruction.operands
    instruction.only(kind)
    name = f"shr.{kind.replace('b', 'u')}" if instruction.modifiers[0] == "shr" else f"shl.{kind}"
    builder.emit(name, [builder.destination(dst, kind)], [builder.source(value, kind), builder.source(amount, "u32")])


@translates("shf")
def _funnel_shift(instruction, builder):
    direction, mode, kind = instruction.modifiers[1:]
    instruction.takes(4)
    sources = [builder.source(text, kind) for text in instruction.operands[1:]]
    builder.emit(
        "shf", [builder.destination(instruction.operands[0], kind)], sources, [direction == "l", mode == "wrap"]
    )


@translates("popc", "clz", "brev", "bfind")
def _bit_count(instruction, builder):
    root, kind = instruction.modifiers[0], instruction.type
    instruction.only(kind, *(("shiftamt",) if root == "bfind" else ()))
    result = kind if root == "brev" else "u32"
    builder.emit(
        instruction.opcode,
        [builder.destination(instruction.operands[0], result)],
        [builder.source(instruction.operands[1], kind)],
    )


@translates("bfe", "bfi")
def _bit_field(instruction, builder):
    root, kind, operands = instruction.modifiers[0], instruction.type, instruction.operands
    n_values = 1 if root == "bfe" else 2
    instruction.takes(3 + n_values)
    sources = [builder.source(text, kind) for text in operands[1 : 1 + n_values]]
    sources += [builder.source(text, "u32") for text in operands[1 + n_values :]]
    builder.emit(f"{root}.{kind}", [builder.destination(operands[0], kind)], sources)


@translates("prmt", "lop3", "dp4a")
def _bytes(instruction, builder):
    root, operands = instruction.modifiers[0], instruction.operands
    instruction.only("b32", "u32", "s32")
    instruction.takes(4 + (root == "lop3"))
    immediates = [builder.number(operands[4])] if root == "lop3" else []
    if root == "dp4a" and len(set(instruction.modifiers[1:])) != 1:
        raise PtxError("dp4a of mixed signedness is not modelled")
    name = f"dp4a.{instruction.type}" if root == "dp4a" else root
    builder.emit(
        name,
        [builder.destination(operands[0], "b32")],
        [builder.source(text, "b32") for text in operands[1:4]],
        immediates,
    )


@translates("selp")
def _select(instruction, builder):
    kind, (dst, a, b, chosen) = instruction.type, instruction.operands
    name = f"selp.b{SIZES[kind] * 8}"
    builder.emit(
        name,
        [builder.destination(dst, kind)],
        [builder.source(a, kind), builder.source(b, kind), builder.source(chosen, "pred")],
    )


# Compare of engine/ops_float.cpp; 8 marks a comparison that is true of a NaN.
_COMPARISONS = {
    "eq": 0,
    "ne": 1,
    "lt": 2,
    "le": 3,
    "gt": 4,
    "ge": 5,
    "lo": 2,
    "ls": 3,
    "hi": 4,
    "hs": 5,
    "num": 6,
    "nan": 7,
}
_COMPARISONS |= {f"{name}u": 8 | _COMPARISONS[name] for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_COMBINATIONS = {"and": 1, "or": 2, "xor": 3}


def _comparison(kind):
    kind = kind.removesuffix("x2")
    return f"setp.{kind.replace('b', 'u') if kind[0] == 'b' and kind != 'bf16' else kind}"


@translates("setp")
def _set_predicate(instruction, builder):
    kind, operands = instruction.type, instruction.operands
    comparison, *rest = instruction.modifiers[1:-1]
    combination = next((_COMBINATIONS[name] for name in rest if name in _COMBINATIONS), 0)
    if set(rest) - set(_COMBINATIONS) - {"ftz"}:
        raise PtxError(f"{instruction.opcode} is not modelled")
    instruction.takes(3 + bool(combination))
    destinations = [builder.destination(text.strip(), "pred") for text in operands[0].split("|")]
    sources = [builder.source(text, kind) for text in operands[1:3]]
    if kind.endswith("x2") and not combination and len(destinations) == 2:
        for destination, half in zip(destinations, _parts(sources, kind, builder), strict=True):
            builder.emit(_comparison(kind), [destination], half, [_COMPARISONS[comparison], 0, 1])
        return
    if kind.endswith("x2"):
        raise PtxError(f"{instruction.opcode} is not modelled")
    if combination:
        sources.append(builder.source(operands[3], "pred"))
    builder.emit(_comparison(kind), destinations, sources, [_COMPARISONS[comparison], combination, len(destinations)])


@translates("set")
def _set_value(instruction, builder):
    """A comparison as a number: all ones as an integer, 1 as a float."""
    _, comparison, *flush, to, kind = instruction.modifiers
    instruction.takes(3)
    bits = SIZES[to] * 8 // (2 if kind.endswith("x2") else 1)
    true = {"u": (1 << bits) - 1, "s": (1 << bits) - 1, "f": {32: 0x3F800000, 16: 0x3C00}.get(bits), "b": 0x3F80}[to[0]]
    if set(flush) - {"ftz"} or true is None or SIZES[to] == 8:
        raise PtxError(f"{instruction.opcode} is not modelled")
    results = []
    for sources in _parts([builder.source(text, kind) for text in instruction.operands[1:]], kind, builder):
        holds, result = builder.new_register(FILE_PRED), builder.new_register(FILE_32)
        builder.emit(_comparison(kind), [holds], sources, [_COMPARISONS[comparison], 0, 1])
        builder.emit("selp.b32", [result], [builder.constant(true, FILE_32), builder.constant(0, FILE_32), holds])
        results.append(result)
    builder.emit("pack", [builder.destination(instruction.operands[0], to)], results, [bits])


def _parts(sources, kind, builder):
    """The operands of each half of a packed type; of any other, the operands."""
    if not kind.endswith("x2"):
        return [sources]
    halves = [[builder.new_register(FILE_32) for _ in range(2)] for _ in sources]
    for source, parts in zip(sources, halves, strict=True):
        builder.emit("unpack", parts, [source], [16])
    return list(zip(*halves, strict=True))


@translates("mov")
def _move(instruction, builder):
    kind, (dst, src) = instruction.type, instruction.operands
    instruction.only(kind)
    if dst.startswith("{"):
        parts = vector(dst)
        part_kind = f"b{SIZES[kind] * 8 // len(parts)}"
        builder.emit(
            "unpack",
            [builder.destination(part, part_kind) for part in parts],
            [builder.source(src, kind)],
            [part_kind[1:]],
        )
    elif src.startswith("{"):
        parts = vector(src)
        part_kind = f"b{SIZES[kind] * 8 // len(parts)}"
        builder.emit(
            "pack",
            [builder.destination(dst, kind)],
            [builder.source(part, part_kind) for part in parts],
            [part_kind[1:]],
        )
    elif src in CLOCKS:
        builder.emit("clock", [builder.destination(dst, kind)])
    elif kind == "pred":
        builder.emit("mov.pred", [builder.destination(dst, kind)], [builder.source(src, kind)])
    else:
        builder.emit(
            f"mov.b{SIZES[kind] * 8 if SIZES[kind] > 1 else 16}",
            [builder.destination(dst, kind)],
            [builder.source(src, kind)],
        )


_CVT_TYPES = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "tf32", "f32", "f64")
_ROUNDINGS = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 4, "rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}


def _register_type(kind):
    return "b32" if kind == "tf32" else kind


@translates("cvt")
def _convert(instruction, builder):
    to, source_type = instruction.modifiers[-2:]
    operands = instruction.operands
    if to in ("bf16x2", "f16x2") and source_type == "f32":
        instruction.only("rn", "relu", to, "f32")
        sources = [builder.source(text, "f32") for text in operands[1:]]
        return builder.emit(
            f"cvt.{to}.f32", [builder.destination(operands[0], "b32")], sources, [instruction.has("relu")]
        )
    instruction.only(*_ROUNDINGS, "ftz", "sat", "relu", to, source_type)
    if to not in _CVT_TYPES or source_type not in _CVT_TYPES:
        raise PtxError(f"{instruction.opcode} is not modelled")
    destination = builder.any_destination(operands[0], _register_type(to))
    source = builder.any_register(operands[1], _register_type(source_type))
    natural = destination & 3 == file_of(_register_type(to)) and source & 3 == file_of(_register_type(source_type))
    rounding = next((name for name in instruction.modifiers if name in _ROUNDINGS), None)
    exact_name = f"cvt.{to}.{source_type}"
    plain = not instruction.has("sat", "ftz", "relu") and rounding in (None, "rn")
    integers = to[0] in "us" and source_type[0] in "us"
    frequent = integers or (to == "f32" and (source_type[0] in "us" or source_type in ("bf16", "f16")))
    if natural and plain and frequent:
        return builder.emit(exact_name, [destination], [source])
    flags = [
        instruction.has("sat"),
        instruction.has("ftz"),
        instruction.has("relu"),
        rounding is not None and rounding.endswith("i"),
    ]
    kinds = [_CVT_TYPES.index(to), _CVT_TYPES.index(source_type), _ROUNDINGS.get(rounding, 0)]
    return builder.emit("cvt", [destination], [source], kinds + flags)

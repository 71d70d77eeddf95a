"""Loads, stores, atomics, fences and address conversions."""

from ..errors import PtxError
from ..program import FILE_64, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from ..ptx import SIZES
from .registry import translates, vector

GENERIC, GLOBAL, SHARED = (
    0,
    1,
    2,
)  # Space of engine/memory.h; local and parameter addresses carry their window, like generic ones
_SPACES = {
    "global": GLOBAL,
    "const": GLOBAL,
    "shared": SHARED,
    "shared::cta": SHARED,
    "shared::cluster": SHARED,
    "local": GENERIC,
    "param": GENERIC,
    "param::entry": GENERIC,
}
_SCOPES = {"cta": 1, "cluster": 2, "gpu": 3, "sys": 3}
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak")
_CACHE += tuple(
    f"L1::{what}" for what in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")
)
_CACHE += tuple(
    f"L2::{what}" for what in ("evict_normal", "evict_first", "evict_last", "cache_hint", "64B", "128B", "256B")
)
_VECTORS = ("v2", "v4", "v8")
_SEMANTICS = ("relaxed", "acquire", "release", "acq_rel", "volatile")


def _space(instruction):
    return next((_SPACES[name] for name in instruction.modifiers if name in _SPACES), GENERIC)


def _scope(instruction, default):
    return next((_SCOPES[name] for name in instruction.modifiers if name in _SCOPES), default)


def _order(instruction, offset, default_scope):
    """The immediates that every strong operation starts with."""
    acquire = instruction.has("acquire", "acq_rel")
    release = instruction.has("release", "acq_rel")
    return [_space(instruction), offset, _scope(instruction, default_scope), acquire, release]


def _elements(instruction, operand):
    """The registers of a load or store, as many as it says."""
    names = vector(instruction.operands[operand])
    expected = next((int(name[1:]) for name in _VECTORS if instruction.has(name)), 1)
    if len(names) != expected or SIZES[instruction.type] > 8:
        raise PtxError(f"{instruction.opcode} of {len(names)} registers is not modelled")
    return names


@translates("ld", "ldu")
def _load(instruction, builder):
    kind = instruction.type
    instruction.only(*_SPACES, *_SCOPES, *_CACHE, *_VECTORS, *_SEMANTICS, kind)
    address, offset = builder.address(instruction.operands[1])
    destinations = [builder.any_destination(name, kind) for name in _elements(instruction, 0)]
    if instruction.has(*_SEMANTICS):
        builder.emit("ld.strong", destinations, [address], [*_order(instruction, offset, 3), SIZES[kind]])
    else:
        constant = instruction.has("nc") or instruction.modifiers[0] == "ldu"
        if constant and not instruction.has("global"):
            raise PtxError(f"{instruction.opcode} wants .global")
        layout = [_space(instruction), SIZES[kind], offset]
        builder.emit("ld", destinations, [address], [*layout, kind[0] == "s", constant])


@translates("st")
def _store(instruction, builder):
    kind = instruction.type
    instruction.only(*_SPACES, *_SCOPES, *_CACHE, *_VECTORS, *_SEMANTICS, kind)
    address, offset = builder.address(instruction.operands[0])
    values = [builder.any_register(name, kind) for name in _elements(instruction, 1)]
    if instruction.has(*_SEMANTICS):
        builder.emit("st.strong", [], [address, *values], [*_order(instruction, offset, 3), SIZES[kind]])
    else:
        builder.emit("st", [], [address, *values], [_space(instruction), SIZES[kind], offset])


_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
_ATOMIC_TYPES = ("b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64", "f16x2", "bf16x2", "f16", "bf16", "b16")


@translates("atom", "red")
def _atomic(instruction, builder):
    kind, operands = instruction.type, list(instruction.operands)
    instruction.only(*_SPACES, *_SCOPES, *_SEMANTICS, *_ATOMICS, *_VECTORS, "noftz", "L2::cache_hint", kind)
    operation = next(name for name in instruction.modifiers[1:] if name in _ATOMICS)
    if instruction.has("L2::cache_hint"):
        operands.pop()
    old = vector(operands.pop(0)) if instruction.modifiers[0] == "atom" else []
    address, offset = builder.address(operands.pop(0))
    values = [vector(text) for text in operands]
    elements = list(zip(*values, strict=True))
    if kind not in _ATOMIC_TYPES or len(values) != 1 + (operation == "cas") or (old and len(old) != len(elements)):
        raise PtxError(f"{instruction.opcode} is not modelled")
    for i, sources in enumerate(elements):  # a vector is atomic element by element
        builder.emit(
            "atom",
            [builder.destination(old[i], kind)] if old else [],
            [address, *(builder.source(text, kind) for text in sources)],
            [
                *_order(instruction, offset + i * SIZES[kind], 3),
                _ATOMICS.index(operation),
                _ATOMIC_TYPES.index(kind),
            ],
        )


@translates("fence")
def _fence(instruction, builder):
    instruction.only("acq_rel", "sc", *_SCOPES)
    builder.emit("fence", immediates=[_scope(instruction, 3), instruction.has("sc")])


@translates("membar")
def _membar(instruction, builder):
    instruction.only("cta", "gl", "sys")
    builder.emit("fence", immediates=[1 if instruction.has("cta") else 3, True])  # membar is another name of fence.sc


@translates("fence.proxy.async")
def _fence_proxy_async(instruction, builder):
    instruction.only("proxy", "async", "global", "shared::cta", "shared::cluster", "shared::{cta,cluster}")
    everything = len(instruction.modifiers) == 3
    builder.emit(
        "fence.proxy.async",
        immediates=[everything or not instruction.has("global"), everything or instruction.has("global")],
    )


@translates("cvta")
def _convert_address(instruction, builder):
    """Generic addresses carry a window bit for every space but global."""
    window = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(
        instruction.modifiers[-2], 0
    )
    instruction.only("to", "u64", "shared", "shared::cta", "local", "param", "global", "const")
    to_space = instruction.has("to")
    destination, source = (
        builder.destination(instruction.operands[0], "u64"),
        builder.source(instruction.operands[1], "u64"),
    )
    if window == SHARED_WINDOW:
        constant = builder.constant(~window if to_space else window, 1)
        builder.emit("and.b64" if to_space else "or.b64", [destination], [source, constant])
    elif window and not to_space:
        builder.emit("or.b64", [destination], [source, builder.constant(window, 1)])
    else:
        builder.emit("mov.b64", [destination], [source])


@translates("isspacep")
def _is_in_space(instruction, builder):
    instruction.only("shared", "shared::cta", "shared::cluster", "local", "param", "global")
    space = instruction.type.partition("::")[0]
    windows = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
    window, found = windows.get(space, sum(windows.values())), builder.new_register(FILE_64)
    address, none = builder.source(instruction.operands[1], "u64"), builder.constant(0, FILE_64)
    builder.emit("and.b64", [found], [address, builder.constant(window, FILE_64)])
    equals = int(space != "global")  # Compare of engine/ops_float.cpp: eq or ne
    builder.emit("setp.u64", [builder.destination(instruction.operands[0], "pred")], [found, none], [equals, 0, 1])


@translates("mapa")
def _map_shared_address(instruction, builder):
    kind = instruction.type
    destination, rank = (
        builder.destination(instruction.operands[0], kind),
        builder.source(instruction.operands[2], "u32"),
    )
    text = instruction.operands[1]
    source = builder.source(text, kind)
    builder.emit("mapa", [destination], [source, rank])


@translates("getctarank")
def _rank_of_address(instruction, builder):
    builder.emit(
        "getctarank",
        [builder.destination(instruction.operands[0], "u32")],
        [builder.source(instruction.operands[1], instruction.type)],
    )


@translates("createpolicy")
def _cache_policy(instruction, builder):
    builder.emit("mov.b64", [builder.destination(instruction.operands[0], "b64")], [builder.constant(0, 1)])


@translates(
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "cp.async.bulk.prefetch",
    "griddepcontrol",
    "pmevent",
)
def _no_effect(instruction, builder):
    """Hints."""
    builder.emit("nop")

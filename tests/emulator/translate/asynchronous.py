"""cp.async, mbarriers, bulk copies and asynchronous stores."""

import re

from ..errors import PtxError
from ..ptx import SIZES
from .registry import translates, vector

_SHARED = ("shared", "shared::cta", "shared::cluster")
_HINTS = ("L2::cache_hint", "L2::64B", "L2::128B", "L2::256B")


@translates("cp.async")
def _cp_async(instruction, builder):
    instruction.only("async", "ca", "cg", *_SHARED, "global", *_HINTS)
    operands = list(instruction.operands)
    if instruction.has("L2::cache_hint"):
        operands.pop()
    destination, destination_offset = builder.address(operands[0])
    source, source_offset = builder.address(operands[1])
    size, third, sources = builder.number(operands[2]), 0, []
    if size not in ((16,) if instruction.has("cg") else (4, 8, 16)):
        raise PtxError(f"cp.async of {size} bytes")
    if len(operands) > 3:
        register = builder.scope.find("registers", operands[3])
        third = 2 if register is not None and register & 3 == 2 else 1
        sources = [builder.source(operands[3], "pred" if third == 2 else "u32")]
    builder.emit("cp.async", [], [destination, source, *sources], [destination_offset, source_offset, size, third])


@translates("cp.async.commit_group")
def _commit(instruction, builder):
    builder.emit("cp.async.commit_group")


@translates("cp.async.wait_group")
def _wait(instruction, builder):
    builder.emit("cp.async.wait_group", immediates=[builder.number(instruction.operands[0])])


@translates("cp.async.wait_all")
def _wait_all(instruction, builder):
    builder.emit("cp.async.wait_all")


@translates("cp.async.mbarrier.arrive")
def _copies_arrive(instruction, builder):
    instruction.only("async", "mbarrier", "arrive", "noinc", "shared", "shared::cta", "b64")
    address, offset = builder.address(instruction.operands[0])
    builder.emit("cp.async.mbarrier.arrive", [], [address], [offset, instruction.has("noinc")])


_SCOPES = {"cta": 1, "cluster": 2}  # Scope of engine/common.h
_MBARRIER = ("b64", *_SHARED, "release", "acquire", "relaxed", *_SCOPES)


def _order(instruction):
    """Whether the instruction releases or acquires, and at which scope."""
    scope = next((_SCOPES[name] for name in instruction.modifiers if name in _SCOPES), _SCOPES["cta"])
    return [not instruction.has("relaxed"), scope]


@translates("mbarrier.init", "mbarrier.inval")
def _mbarrier_life(instruction, builder):
    root = ".".join(instruction.modifiers[:2])
    instruction.only("init", "inval", *_MBARRIER)
    address, offset = builder.address(instruction.operands[0])
    builder.emit(root, [], [address, *(builder.source(text, "u32") for text in instruction.operands[1:])], [offset])


@translates("mbarrier.arrive", "mbarrier.expect_tx")
def _mbarrier_arrive(instruction, builder):
    instruction.only("arrive", "expect_tx", *_MBARRIER)
    arrives = instruction.modifiers[1] == "arrive"
    has_tx = instruction.has("expect_tx")
    operands = list(instruction.operands)
    destinations = []
    if not operands[0].startswith("["):
        state = operands.pop(0)
        destinations = [] if state == "_" else [builder.destination(state, "b64")]
    address, offset = builder.address(operands[0])
    numbers = [builder.source(text, "u32") for text in operands[1:]]
    has_count = len(numbers) > has_tx
    builder.emit(
        "mbarrier.arrive", destinations, [address, *numbers], [offset, has_tx, has_count, arrives, *_order(instruction)]
    )


@translates("mbarrier.test_wait", "mbarrier.try_wait")
def _mbarrier_wait(instruction, builder):
    instruction.only("test_wait", "try_wait", "parity", *_MBARRIER)
    address, offset = builder.address(instruction.operands[1])
    by_parity = instruction.has("parity")
    phase = builder.source(instruction.operands[2], "u32" if by_parity else "b64")
    builder.emit(
        "mbarrier.wait",
        [builder.destination(instruction.operands[0], "pred")],
        [address, phase],
        [offset, instruction.has("try_wait"), by_parity, *_order(instruction)],
    )


@translates("fence.mbarrier_init")
def _fence_initialisation(instruction, builder):
    instruction.only("mbarrier_init", "release", "cluster")
    builder.emit("fence.mbarrier_init")


_STORED = ("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")


@translates("st.async")
def _store(instruction, builder):
    """Of 8.1, into shared memory; the release store to global memory is of sm_100."""
    kind = instruction.type
    instruction.only("async", "weak", "shared::cluster", "mbarrier::complete_tx::bytes", "v2", "v4", *_STORED)
    names = vector(instruction.operands[1])
    expected = next((int(name[1:]) for name in ("v2", "v4") if instruction.has(name)), 1)
    if (
        kind not in _STORED
        or not instruction.has("mbarrier::complete_tx::bytes")
        or len(names) != expected
        or expected * SIZES[kind] > 16
    ):
        raise PtxError(f"{instruction.opcode} of {len(names)} registers is not modelled")
    address, offset = builder.address(instruction.operands[0])
    mbarrier = builder.address_register(instruction.operands[2])
    values = [builder.source(name, kind) for name in names]
    builder.emit("st.async", [], [address, mbarrier, *values], [SIZES[kind], offset])


_BULK = (
    "async",
    "bulk",
    "tensor",
    "1d",
    "2d",
    "3d",
    "4d",
    "5d",
    "global",
    *_SHARED,
    "tile",
    "bulk_group",
    "L2::cache_hint",
)
_LOAD = ("mbarrier::complete_tx::bytes", "multicast::cluster")


def _tensor_operand(text, builder):
    """[map, {x, y}] -> registers."""
    match = re.fullmatch(r"\[\s*(.+?)\s*,\s*(\{.*\})\s*\]", text)
    if not match:
        raise PtxError(f"cannot read the tensor coordinates {text!r}")
    return [builder.source(match.group(1), "b64"), *(builder.source(name, "b32") for name in vector(match.group(2)))]


@translates("cp.async.bulk")
def _bulk_copy(instruction, builder):
    instruction.only(*_BULK, *_LOAD)
    operands = list(instruction.operands)
    if instruction.has("L2::cache_hint"):
        operands.pop()
    if not instruction.has("tensor"):
        return _linear_copy(instruction, operands, builder)
    if instruction.has("bulk_group"):
        tensor, shared = _tensor_operand(operands[0], builder), builder.address_register(operands[1])
        return builder.emit("tma.store", [], [shared, *tensor], [len(tensor) - 1, 0])
    shared, tensor, mbarrier = (
        builder.address_register(operands[0]),
        _tensor_operand(operands[1], builder),
        builder.address_register(operands[2]),
    )
    multicast = instruction.has("multicast::cluster")
    mask = [builder.source(operands[3], "u16")] if multicast else []
    return builder.emit("tma.load", [], [shared, *tensor, mbarrier, *mask], [len(tensor) - 1, multicast])


def _linear_copy(instruction, operands, builder):
    spaces = [name for name in instruction.modifiers if name in (*_SHARED, "global")]
    first, second = builder.address_register(operands[0]), builder.address_register(operands[1])
    size = builder.source(operands[2], "u32")
    if spaces == ["global", "shared::cta"]:
        return builder.emit("bulk.store", [], [first, second, size], [0])
    if spaces[1] != "global":
        raise PtxError("a bulk copy between shared memories is not modelled")
    multicast = instruction.has("multicast::cluster")
    mask = [builder.source(operands[4], "u16")] if multicast else []
    return builder.emit(
        "bulk.load", [], [first, second, size, builder.address_register(operands[3]), *mask], [multicast]
    )


_REDUCTION_TYPES = {
    "f32": 1,
    "f16": 2,
    "bf16": 3,
    "u32": 4,
    "s32": 5,
    "f64": 6,
    "u64": 7,
}  # ReductionType of engine/ops_tma.cpp


@translates("cp.reduce.async")
def _bulk_reduction(instruction, builder):
    instruction.only("reduce", *_BULK, "add", "noftz", *_REDUCTION_TYPES)
    operands = instruction.operands
    if instruction.has("tensor"):
        tensor = _tensor_operand(operands[0], builder)
        return builder.emit("tma.store", [], [builder.address_register(operands[1]), *tensor], [len(tensor) - 1, 1])
    registers = [
        builder.address_register(operands[0]),
        builder.address_register(operands[1]),
        builder.source(operands[2], "u32"),
    ]
    return builder.emit("bulk.store", [], registers, [_REDUCTION_TYPES[instruction.type]])


# The longest prefix of an opcode that is registered wins; these have four parts.
@translates("cp.async.bulk.commit_group")
def _bulk_commit(instruction, builder):
    builder.emit("bulk.commit_group")


@translates("cp.async.bulk.wait_group")
def _bulk_wait(instruction, builder):
    instruction.only("async", "bulk", "wait_group", "read")
    builder.emit("bulk.wait_group", immediates=[builder.number(instruction.operands[0]), instruction.has("read")])

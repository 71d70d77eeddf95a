"""Branches, barriers and exchanges between lanes."""

from ..errors import PtxError
from .registry import translates


@translates("bra")
def _branch(instruction, builder):
    instruction.only("uni")
    builder.emit_branch(instruction.operands[0])


RETURN = "(return)"  # a label that no PTX can have, at the end of a function that is being copied to its call


@translates("ret", "exit")
def _exit(instruction, builder):
    instruction.only("uni")
    if instruction.modifiers[0] == "ret" and builder.scope.find("labels", RETURN):
        builder.emit_branch(RETURN)
    else:
        builder.emit("exit")


@translates("trap", "brkpt")
def _trap(instruction, builder):
    builder.emit("trap")


@translates("nanosleep")
def _sleep(instruction, builder):
    builder.emit("nanosleep")


@translates("activemask")
def _activemask(instruction, builder):
    builder.emit("activemask", [builder.destination(instruction.operands[0], "b32")])


@translates("setmaxnreg")
def _set_registers(instruction, builder):
    instruction.only("inc", "dec", "sync", "aligned", "u32")
    count = builder.number(instruction.operands[0])
    if count % 8 or not 24 <= count <= 256:
        raise PtxError("setmaxnreg wants a multiple of 8 between 24 and 256")
    builder.emit("setmaxnreg", immediates=[count, instruction.has("inc")])


_SYNC, _ARRIVE, _POPC, _AND, _OR = range(5)  # Mode of engine/ops_barrier.cpp


@translates("bar", "barrier")
def _barrier(instruction, builder):
    instruction.only("cta", "sync", "arrive", "red", "aligned", "popc", "and", "or", "u32", "pred")
    aligned = instruction.modifiers[0] == "bar" or instruction.has("aligned")
    operands, destinations, voted = list(instruction.operands), [], []
    mode = _ARRIVE if instruction.has("arrive") else _SYNC
    if instruction.has("red"):
        mode = _POPC if instruction.has("popc") else _AND if instruction.has("and") else _OR
        destinations = [builder.destination(operands.pop(0), "u32" if mode == _POPC else "pred")]
        voted = [builder.source(operands.pop(), "pred")]
    counts = [builder.source(text, "u32") for text in operands]
    if not 1 <= len(counts) <= 2:
        raise PtxError(f"{instruction.opcode} with {len(instruction.operands)} operands is not modelled")
    builder.emit("bar", destinations, counts + voted, [mode, aligned, len(counts) > 1])


@translates("bar.warp", "barrier.warp")
def _warp_barrier(instruction, builder):
    instruction.only("warp", "sync")
    builder.emit("bar.warp.sync", [], [builder.source(instruction.operands[0], "b32")])


@translates("barrier.cluster.arrive")
def _cluster_arrive(instruction, builder):
    instruction.only("cluster", "arrive", "release", "relaxed", "aligned")
    builder.emit("cluster.arrive", immediates=[instruction.has("aligned"), not instruction.has("relaxed")])


@translates("barrier.cluster.wait")
def _cluster_wait(instruction, builder):
    instruction.only("cluster", "wait", "acquire", "aligned")
    builder.emit("cluster.wait", immediates=[instruction.has("aligned")])


def _with_predicate(text, builder):
    """d|p -> both destinations; p may be missing."""
    register, _, predicate = text.partition("|")
    return [builder.destination(register.strip(), "b32"), builder.destination(predicate.strip() or "_", "pred")]


@translates("shfl.sync")
def _shuffle(instruction, builder):
    instruction.only("sync", "up", "down", "bfly", "idx", "b32")
    mode = ("up", "down", "bfly", "idx").index(instruction.modifiers[2])
    sources = [builder.source(text, "b32") for text in instruction.operands[1:]]
    builder.emit("shfl", _with_predicate(instruction.operands[0], builder), sources, [mode])


@translates("vote.sync")
def _vote(instruction, builder):
    instruction.only("sync", "all", "any", "uni", "ballot", "pred", "b32")
    dst, predicate, members = instruction.operands
    mode = ("all", "any", "uni", "ballot").index(instruction.modifiers[2])
    builder.emit(
        "vote",
        [builder.destination(dst, instruction.type)],
        [builder.source(predicate, "pred"), builder.source(members, "b32")],
        [mode],
    )


@translates("match")
def _match(instruction, builder):
    instruction.only("any", "all", "sync", "b32", "b64")
    dst, value, members = instruction.operands
    sources = [builder.source(value, instruction.type), builder.source(members, "b32")]
    builder.emit("match", _with_predicate(dst, builder), sources, [instruction.has("all")])


@translates("redux.sync")
def _reduce(instruction, builder):
    instruction.only("sync", "add", "min", "max", "and", "or", "xor", "u32", "s32", "b32")
    operation = ("add", "min", "max", "and", "or", "xor").index(instruction.modifiers[2])
    dst, value, members = instruction.operands
    sources = [builder.source(value, "b32"), builder.source(members, "b32")]
    builder.emit("redux", [builder.destination(dst, "b32")], sources, [operation, instruction.type == "s32"])


@translates("elect.sync")
def _elect(instruction, builder):
    instruction.only("sync")
    if "|" not in instruction.operands[0]:
        raise PtxError("elect.sync without a predicate")
    builder.emit(
        "elect", _with_predicate(instruction.operands[0], builder), [builder.source(instruction.operands[1], "b32")]
    )

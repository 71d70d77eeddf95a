"""Counts of a kernel's machine code: by loop and by what runs once a tile, as the sources name them."""

import re
from collections.abc import Collection, Sequence

from benchmarks.cuda_resources.loops import Loop, costliest_way, find_loops, is_wait, is_waterfall
from benchmarks.cuda_resources.naming import LOADS, Names
from benchmarks.cuda_resources.sass import Instruction

_COPIES = ("UTMALDG",)
# Counted wherever they stand on the way through a step.
_EVENTS = {
    "products": ("HGMMA",),
    "waits": ("WARPGROUP.DEPBAR", "DEPBAR"),  # for products, and for copies out of shared memory
    "stores": ("UTMASTG",),
    "barriers": ("BAR", "UCGABAR_ARV", "UCGABAR_WAIT"),
    "mbarriers": ("SYNCS",),
    "fences": ("FENCE.VIEW",),  # of the copy engine's view of memory, each with a MEMBAR of the CTA
    "membars": ("MEMBAR.ALL.GPU", "MEMBAR.SC.GPU", "MEMBAR.ALL.SYS", "MEMBAR.SC.SYS"),
    "invalidates": ("CCTL.IVALL",),  # of the first cache, behind an acquire
}
# Of a loop: "code" counts what lies in memory, "step" what lies on the costliest way through a step, "stalls" are that
# way's, and so are the events; "copies" counts what lies in memory, "issued" what one CTA issues in a step. Of straight
# code everything is the sum of what lies in memory.
COLUMNS = ("code", "step", "stalls", "waterfalls", "copies", "issued", "spills", *_EVENTS)


def _counts(code: Sequence[Instruction], way: Sequence[Instruction], issued: int, waterfalls: int) -> dict[str, int]:
    return {
        "code": len(code),
        "step": len(way),
        "stalls": sum(each.stall for each in way),
        "waterfalls": waterfalls,
        "copies": sum(each.is_a(*_COPIES) for each in code),
        "issued": issued,
        "spills": sum(each.is_a("LDL", "STL") for each in code),
    } | {what: sum(each.is_a(*names) for each in way) for what, names in _EVENTS.items()}


def _loop_row(
    loop: Loop,
    part: str,
    names: Names,
    cluster: int,
    waterfalls: int,
    also: Collection[str] = (),
    decoded: str | None = None,
) -> dict[str, int]:
    """``also``: functions whose conditional copies belong to the step that is counted. ``decoded``: the one format of a
    packed weight that the step decodes."""
    # The expand loop is in a function of its own; the condition of its call holds for the loop, not for a step of it.
    functions = ("load_expand",) if part == "expand" else tuple(LOADS)

    def rare(each: Instruction) -> bool:
        wanted = any(name in also for name, _ in names.calls(each.places))
        return each.is_a(*_COPIES, "ATOMG") and names.is_conditional(each, functions) and not wanted

    def shared(each: Instruction) -> bool:
        return cluster > 1 and each.is_a(*_COPIES) and names.is_shared(each) and not rare(each)

    def avoided(each: Instruction) -> bool:
        another = decoded is not None and names.format_of(each) not in (None, decoded)
        return another or (rare(each) and each.predicate is None)

    way = costliest_way(loop.code, avoided, shared, cluster)
    if way is None:
        way = list(loop.code)
    copies = [each for each in way if each.is_a(*_COPIES) and not rare(each)]
    turns = sum(shared(each) and each.predicate is not None for each in copies)  # the other CTAs' are predicated off
    return _counts(loop.code, way, len(copies) - turns + -(-turns // cluster), waterfalls)


def count_kernel(code: Sequence[Instruction], names: Names, cluster: int) -> dict[str, dict[str, int]]:
    """The rows of a kernel, by name; "all" is the whole of it."""
    loops = find_loops(code)
    waterfalls = [loop for loop in loops if is_waterfall(loop)]
    rows: dict[str, dict[str, int]] = {}

    def add(name: str, row: dict[str, int]) -> None:
        same = sum(re.fullmatch(rf"{re.escape(name)}( \d+)?", each) is not None for each in rows)
        rows[f"{name} {same + 1}" if same else name] = row

    add("all", _counts(code, code, sum(each.is_a(*_COPIES) for each in code), len(waterfalls)))
    apart = {id(each) for loop in loops if is_wait(loop) for each in loop.code}  # from straight code
    steps = [loop for loop in loops if not is_wait(loop) and not is_waterfall(loop) and _works(loop)]
    for loop in sorted(loops, key=lambda each: each.first):
        if is_wait(loop) or is_waterfall(loop) or any(inner in loop for inner in steps):
            continue  # the last: the loop over tiles
        owner, _, part = names.name_of_loop(loop).partition(": ")
        works = loop in steps
        if not works and part != "mask":
            continue
        apart |= {id(each) for each in loop.code}
        # Where most of a step is the mask, it is still the loop.
        name = f"{owner}: loop" if part == "rest" or (works and part == "mask") else f"{owner}: {part} loop"
        inside = sum(each in loop for each in waterfalls)
        add(name, _loop_row(loop, part, names, cluster, inside))
        for decoded in sorted({found for each in loop.code if (found := names.format_of(each))}):
            add(f"{name}, {decoded}", _loop_row(loop, part, names, cluster, inside, decoded=decoded))
        if name == "producer base: loop" and any(_loads_down(each, names) for each in loop.code):
            add("producer fused: loop", _loop_row(loop, part, names, cluster, inside, also=("load_down",)))

    straight: dict[str, list[Instruction]] = {}
    for each in code:
        if id(each) not in apart:
            name = names.name(each.places).replace(": mask", ": rest")  # what jumps over the mask
            straight.setdefault(name, []).append(each)
    elections = {id(loop.code[0]) for loop in waterfalls}
    for name, part in sorted(straight.items()):
        inside = sum(id(each) in elections for each in part)
        add(name, _counts(part, part, sum(each.is_a(*_COPIES) for each in part), inside))
    return rows


def _works(loop: Loop) -> bool:
    return any(each.is_a("HGMMA", *_COPIES) for each in loop.code)


def _loads_down(each: Instruction, names: Names) -> bool:
    of_down = any(name == "load_down" for name, _ in names.calls(each.places))
    return each.is_a(*_COPIES) and of_down and names.is_conditional(each)

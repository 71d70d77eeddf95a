"""Bugs planted in what the CUDA kernels have of their own for rows in segments, each of which a check finds: the map of
segments, in the sources; waits and fences, in the compiled PTX."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.cuda_bugs import RELAXED_ACQUIRE, RELAXED_RELEASE, remove
from tests.support.cuda_emulation import ptx_of
from tests.support.cuda_segment_checks import (
    SHORT,
    SIZES,
    check_bad_ends,
    check_layout,
    check_missing,
    check_neighbours,
    check_schedules,
    kernels_of,
)

FORWARD, BACKWARD = "forward", "backward"
_RAGGED = functools.partial(check_layout, "ragged", SHORT)
_MANY = functools.partial(check_layout, "hundreds", SHORT)


@dataclass(frozen=True)
class Planted:
    """A change of a source file, and what finds it; a stand-in for generated.Generated."""

    path: str
    old: str
    new: str
    check: Callable = _RAGGED

    def apply(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(f"{self.old!r} is {text.count(self.old)} times in {self.path}")
        return text.replace(self.old, self.new)


def _in(name: str) -> Callable[..., Planted]:
    return functools.partial(Planted, f"csrc/sm90/{name}.cuh")


_MAP, _GRADIENT, _EPILOGUE = _in("row_map"), _in("gradient"), _in("epilogue")

PLANTED = {
    "a segment starts a row early": _MAP(
        "tile.first_row = before.end_row + (block", "tile.first_row = before.end_row - (segment == 1) + (block"
    ),
    "a segment ends a row late": _MAP(
        "    tile.end_row = own.end_row;\n    tile.segment = segment;\n    tile.adapter = own.adapter;\n    if",
        "    tile.end_row = own.end_row + 1;\n    tile.segment = segment;\n    tile.adapter = own.adapter;\n    if",
    ),
    "the row block behind a segment is still its own": _MAP("each.end_block > block", "each.end_block >= block"),
    "the adapter of the segment in front": _MAP(
        "tile.adapter = own.adapter;\n    if (tile.kind == kShrinkTile)",
        "tile.adapter = segment ? before.adapter : own.adapter;\n    if (tile.kind == kShrinkTile)",
    ),
    "the weight of the first segment for all": _MAP("return expert(params, tile.segment); }", "return 0; }"),
    "ends that decrease are believed": _MAP(
        "scan(max(before.end_row, min(given, params.m)), [](int a, int b) { return max(a, b); })",
        "min(given, params.m)",
        functools.partial(check_bad_ends, SHORT),
    ),
    "64-bit numbers are read as 32-bit ones": _MAP(
        "wide ? static_cast<const int64_t*>(list)[g] : static_cast<const int32_t*>(list)[g]",
        "static_cast<const int32_t*>(list)[wide ? 2 * g : g]",
        functools.partial(check_missing, SHORT),
    ),
    "what does not exist is taken for the first": _MAP(
        "found == kNone ? kNone : kMissing;", "found == kNone ? kNone : 0;", functools.partial(check_missing, SHORT)
    ),
    "every other 32 segments are not in the table": _MAP(
        "first += 32) {\n      const int g = first", "first += 64) {\n      const int g = first", _MANY
    ),
    "tail rows are stored into the next segment": _EPILOGUE(
        "if (c.first_row(tile) + kBox > tile.end_row) {",
        "if (c.first_row(tile) + kBox > c.params.m) {",
    ),
    "tail rows are summed": _GRADIENT("if (rows < kBox) zero_rows_from(c, stage, rows);", ""),
    "tail rows of one operand are summed": _GRADIENT(
        "  zero(stage + Traits::kGradRightOffset, kRankSpan);\n", "",
        functools.partial(check_neighbours, SHORT, False),
    ),
    "zeroed rows are not waited for": _GRADIENT("  c.sync_consumers();\n", ""),
    "zeroed rows are not fenced": _GRADIENT("  fence_async_shared();\n  c.sync_consumers();", "  c.sync_consumers();"),
    "gradients of adapters without rows are left as they were": _GRADIENT(
        ".last >= 0) continue;", ".last >= -1) continue;"
    ),
    "gradients of adapters with rows are zeroed": _GRADIENT(".last >= 0) continue;", ".last >= 99) continue;"),
    "segments of one adapter do not wait for each other": _MAP(
        "return {all.index + (tile.row", "return {0 * all.index + (tile.row"
    ),
    "all adapters' gradients are one": _GRADIENT("const int owner = RowMap::owner(tile);", "const int owner = 0;"),
}  # fmt: skip

# In the PTX of the kernel of a direction.
COMPILED = {
    "S of a segment is read without acquiring its flag": (FORWARD, RELAXED_ACQUIRE),
    "S of a segment is not released": (FORWARD, RELAXED_RELEASE),
    "no proxy fence between a segment's S and the copies that read it": (
        FORWARD,
        remove(r"fence\.proxy\.async\.global"),
    ),
    "dA waits for no rows of a segment's dS": (BACKWARD, RELAXED_ACQUIRE),
    "a ragged tile's rows are read before all are staged": (FORWARD, remove(r"bar\.sync")),
    "zeroed rows are not waited for, in the PTX": (BACKWARD, remove(r"bar\.sync")),
}


def check_compiled(name: str) -> None:
    direction, edit = COMPILED[name]

    def ptx(kernel: str) -> str:
        return edit(ptx_of(kernel)) if f"_{direction}_" in kernel else ptx_of(kernel)

    check_schedules(SHORT, schedules=(), ptx=ptx)


def check_changed(planted: Planted) -> None:
    """By kernels that are compiled of the changed sources."""
    from tests.support.generated_cuda import Compiled

    Compiled(planted).run(planted.check, kernels_of(SHORT, SIZES[2]))  # type: ignore[arg-type]

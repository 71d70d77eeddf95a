"""Which rows a row block and a gradient tile hold, and whose matrices they meet: all rows as one segment, or each
segment with row blocks of its own, as in csrc/sm90/row_map.cuh.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.schedule.queue_order import Schedule, cdiv

GRADIENT_STEP = 64  # rows that a gradient tile sums at once (kBox of csrc/sm90)
ADAPTERS_OF_ZERO_TILE = 16  # kAdaptersOfZeroTile of csrc/host/params.h


class RowBlock(NamedTuple):
    """rows: of the output that a tile stores; loaded: that its product brings into its SM, the next segment's among
    them; summed: that a gradient tile multiplies; expert: whose weight and adapter they meet."""

    rows: int
    loaded: int
    summed: int
    expert: int


class Chunk(NamedTuple):
    """What a gradient tile sums over: row blocks, for the adapter ``expert``, as number ``place`` of its ordered sum.
    Without blocks it stores zeros, for ``zeroed`` adapters."""

    blocks: range
    expert: int
    place: int
    zeroed: int = 0


@dataclass(frozen=True)
class RowMap:
    """blocks: by the number of their row block; chunks: by that of their part of M."""

    blocks: tuple[RowBlock, ...]
    chunks: tuple[Chunk, ...]


def one_segment(m: int, schedule: Schedule) -> RowMap:
    """All ``m`` rows meet one weight and one adapter; a chunk is a row group. Rows past the end are not loaded."""
    height, group = schedule.block_m, schedule.group_m
    ragged = [min(height, m - first) for first in range(0, m, height)]
    blocks = tuple(RowBlock(rows, rows, height, 0) for rows in ragged)
    starts = range(0, len(blocks), group)
    chunks = (Chunk(range(start, min(start + group, len(blocks))), 0, place) for place, start in enumerate(starts))
    return RowMap(blocks, tuple(chunks))


def segments(lengths: Sequence[int], schedule: Schedule) -> RowMap:
    """Segment g has ``lengths[g]`` rows, the weight and the adapter of its number, and no row follows the last.

    Raises:
        ValueError: a length is negative.
    """
    if min(lengths) < 0:
        raise ValueError(f"a segment cannot have {min(lengths)} rows")
    height, group = schedule.block_m, schedule.group_m
    blocks: list[RowBlock] = []
    chunks: list[Chunk] = []
    m = sum(lengths)
    first = 0
    for expert, length in enumerate(lengths):
        own = len(blocks)
        for start in range(0, length, height):
            rows = min(height, length - start)
            loaded = min(height, m - first - start)
            blocks.append(RowBlock(rows, loaded, cdiv(rows, GRADIENT_STEP) * GRADIENT_STEP, expert))
        for place, start in enumerate(range(own, len(blocks), group)):
            chunks.append(Chunk(range(start, min(start + group, len(blocks))), expert, place))
        first += length
    for start in range(0, len(lengths), ADAPTERS_OF_ZERO_TILE):
        empty = sum(length == 0 for length in lengths[start : start + ADAPTERS_OF_ZERO_TILE])
        chunks.append(Chunk(range(0), start, 0, empty))
    return RowMap(tuple(blocks), tuple(chunks))

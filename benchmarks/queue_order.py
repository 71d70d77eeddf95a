"""The order in which a one-launch kernel's tiles are claimed.

A queue is a list of :class:`Tile`; a CTA claims the next one as soon as it is free. A tile may wait only on tiles in
front of it.
"""

from dataclasses import dataclass
from typing import NamedTuple

ORDERS = ("wave", "head", "all")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


class Tile(NamedTuple):
    """One entry of the queue.

    kind: "shrink" (makes columns of S, and its tile of C where shrink tiles are fused), "plain" (a tile of C), "dA" or
        "dB" (a gradient tile).
    block: row block of C; for a gradient tile its part of M.
    column: column block of C; for a gradient tile the block of K (dA) or N (dB).
    """

    kind: str
    block: int
    column: int


@dataclass(frozen=True)
class Schedule:
    """Tile sizes and queue order of one kernel.

    Args:
        block_m, block_n, block_k: the tile of C and the K step, in elements.
        group_m: row blocks per group; a group's tiles are claimed column by column.
        order: where a group's shrink tiles go: "wave" (one wave ahead of the end of the group before), "head" (at the
            head of their own group) or "all" (every group's first of all).
        grad_blocks: row blocks that one gradient tile sums over; 0 for a whole row group.
        grad_columns: columns of X or dY that one gradient tile covers.
        fused: whether a shrink tile is a tile of C with a second accumulator for all of S's columns, or makes S alone.
        shrink_width: columns of S that a tile which makes S alone makes; a larger rank takes several of them. (Several
            fused ones per row block would wait for each other, the first for a later one.)
        early_db: whether a group's dB tiles follow its shrink tiles (they need no dS, so they fill the wait for it), or
            go to the end of the group with the dA tiles.
        chain: True adds the parts of M one after another into one fp32 buffer, each waiting for the part before; False
            leaves one fp32 plane per part for the last arriver to add.
        overlap: whether the loads of the next tile start during the last steps of this one and its store is
            asynchronous (a producer warp and TMA stores), or every tile fills and drains the pipeline itself.
        cluster: CTAs along M that share each load of V (multicast).
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    group_m: int = 16
    order: str = "wave"
    fused: bool = True
    shrink_width: int = 64
    grad_blocks: int = 0
    grad_columns: int = 256
    early_db: bool = False
    chain: bool = True
    overlap: bool = True
    cluster: int = 2

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}; choose one of {', '.join(ORDERS)}")
        for name in ("block_m", "block_n", "block_k", "group_m", "shrink_width", "grad_columns", "cluster"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.grad_blocks < 0:
            raise ValueError(f"grad_blocks must be at least 0, got {self.grad_blocks}")


def build_queue(rows: int, columns: int, shrink: int, grad_columns: tuple[int, int], schedule: Schedule, wave: int):
    """The queue of one launch.

    Args:
        rows, columns: row and column blocks of C.
        shrink: columns of shrink tiles; 0 without a side branch.
        grad_columns: (blocks of N for dB, blocks of K for dA); (0, 0) in a forward pass.
        schedule: group size and order.
        wave: number of CTAs.

    Returns:
        A list of Tile: with order "wave" S_0, then for each group g its other tiles, with S_{g+1} put in ``wave`` tiles
        before their end, then the gradient tiles of the parts of M whose last row block is in the group.
    """
    starts = range(0, rows, schedule.group_m)
    groups = [range(start, min(start + schedule.group_m, rows)) for start in starts]
    columns_b, columns_a = grad_columns
    ahead, plains, behind = [], [], []
    for group in groups:
        parts = _parts_ending_in(group, rows, schedule)
        db_tiles = [Tile("dB", part, column) for part in parts for column in range(columns_b)]
        da_tiles = [Tile("dA", part, column) for part in parts for column in range(columns_a)]
        shrinks = [Tile("shrink", m, n) for n in range(shrink) for m in group]
        plains.append([Tile("plain", m, n) for n in range(shrink if schedule.fused else 0, columns) for m in group])
        ahead.append(shrinks + (db_tiles if schedule.early_db else []))
        behind.append(([] if schedule.early_db else db_tiles) + da_tiles)
    queue: list[Tile] = []
    if schedule.order == "all":
        for tiles in ahead:
            queue += tiles
    elif schedule.order == "wave":
        queue += ahead[0]
    for index in range(len(groups)):
        if schedule.order == "wave":
            following = ahead[index + 1] if index + 1 < len(groups) else []
            cut = max(0, len(plains[index]) - wave)
            queue += plains[index][:cut] + following + plains[index][cut:]
        else:
            queue += (ahead[index] if schedule.order == "head" else []) + plains[index]
        queue += behind[index]
    return queue


def part_blocks(schedule: Schedule) -> int:
    """Row blocks that one gradient tile sums over."""
    return schedule.grad_blocks or schedule.group_m


def _parts_ending_in(group: range, rows: int, schedule: Schedule) -> list[int]:
    """The parts of M whose last row block is in this group."""
    size = part_blocks(schedule)
    return [part for part in range(cdiv(rows, size)) if min((part + 1) * size, rows) - 1 in group]

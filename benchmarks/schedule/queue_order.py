"""The order in which a one-launch kernel's tiles are claimed.

A queue is a list of :class:`Tile`; a CTA claims the next one as soon as it is free. A tile may wait only on tiles in
front of it.
"""

from dataclasses import dataclass
from typing import NamedTuple


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


class Tile(NamedTuple):
    """One entry of the queue.

    kind: "shrink" (makes columns of S, and its tile of the output where they are fused), "base" (a tile of the
        output), "dA" or "dB" (a gradient tile).
    block: row block of the output; for a gradient tile its part of M, a row group.
    column: column block of the output; for a gradient tile the block of K (dA) or N (dB).
    """

    kind: str
    block: int
    column: int


@dataclass(frozen=True)
class Schedule:
    """Tile sizes and row groups of one kernel. The order is the kernels' own: see :func:`build_queue`.

    Args:
        block_m, block_n, block_k: the tile of the output and the step of the contraction, in elements.
        group_m: row blocks per group; a group's tiles are claimed column by column.
        grad_columns: columns of X or dY that one gradient tile covers.
        fused: whether a shrink tile is a tile of the output with a second accumulator for all of S's columns, or makes
            only S.
        shrink_width: columns of S that a separate tile makes; a larger rank takes several of them. (Several
            fused ones per row block would wait for each other, the first for a later one.)
        overlap: whether the loads of the next tile start during the last steps of this one and its store is
            asynchronous (a producer warp and TMA stores), or every tile fills and drains the pipeline itself.
        cluster: CTAs along M that share each load of the weight (multicast).
        gradients_last: whether gradient tiles follow all products, or each group's its own.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    group_m: int = 16
    fused: bool = True
    shrink_width: int = 64
    grad_columns: int = 256
    overlap: bool = True
    cluster: int = 2
    gradients_last: bool = False

    def __post_init__(self):
        for name in ("block_m", "block_n", "block_k", "group_m", "shrink_width", "grad_columns", "cluster"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def build_queue(
    rows: int,
    columns: int,
    shrink: int,
    grad_columns: tuple[int, int],
    schedule: Schedule,
    wave: int,
    parts: int | None = None,
) -> list[Tile]:
    """The queue of one launch.

    Args:
        rows, columns: row and column blocks of the output.
        shrink: columns of shrink tiles; 0 without a side branch.
        grad_columns: (blocks of N for dB, blocks of K for dA); (0, 0) in a forward pass.
        schedule: group size, and who makes S.
        wave: number of CTAs.
        parts: parts of M that gradient tiles sum over, where these are not the row groups.

    Returns:
        A list of Tile: S_0, then for each row group g its other tiles, with S_{g+1} put in ``wave`` tiles before their
        end, then the gradient tiles of the part of M that the group is, dB's first; these at the very end where
        schedule.gradients_last.

    Raises:
        ValueError: gradient tiles would follow groups that are not their parts.
    """
    starts = range(0, rows, schedule.group_m)
    groups = [range(start, min(start + schedule.group_m, rows)) for start in starts]
    if parts is None:
        parts = len(groups)
    elif parts != len(groups) and not schedule.gradients_last:
        raise ValueError(f"{parts} parts of M can follow {len(groups)} row groups only with gradients_last=True")
    shrinks = [[Tile("shrink", m, n) for n in range(shrink) for m in group] for group in groups]
    first = shrink if schedule.fused else 0
    kinds = tuple(zip(("dB", "dA"), grad_columns, strict=True))
    gradients = [[Tile(kind, part, n) for kind, width in kinds for n in range(width)] for part in range(parts)]
    queue = list(shrinks[0])
    for part, group in enumerate(groups):
        base = [Tile("base", m, n) for n in range(first, columns) for m in group]
        following = shrinks[part + 1] if part + 1 < len(groups) else []
        cut = max(0, len(base) - wave)
        queue += base[:cut] + following + base[cut:]
        if not schedule.gradients_last:
            queue += gradients[part]
    return queue + [tile for part in gradients if schedule.gradients_last for tile in part]

"""Tile configurations, as data, and the pure function that chooses one."""

from dataclasses import dataclass

MAX_RANK = 256
FUSED_RANK = 64  # up to here column 0 makes S beside its own tile; beyond, two accumulators do not fit


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is cut into tiles.

    block_m, block_n, block_k: the product's tile [block_m, block_n] and its step along the contracted dimension.
    group_m: row blocks that share a stretch of the queue, so that their rows stay in L2.
    gradient_m, gradient_n: rows per step and columns of a gradient tile.
    slice_n: columns of the low-rank branch that dX's dropout masks at a time.
    programs_per_sm: programs launched per multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    gradient_m: int = 64
    gradient_n: int = 128
    slice_n: int = 64
    programs_per_sm: int = 1


def padded_rank(rank: int) -> int:
    """The rank as tiles hold it: a power of two, at least 16 (the narrowest matrix instruction)."""
    return max(16, 1 << (rank - 1).bit_length())


def choose_config(direction, arch, m, n, k, r, dtype, dropout):
    return TileConfig(64, 64, 32, 4, 4, 3)

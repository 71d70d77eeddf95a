"""Tile configurations, as data, and the pure function that chooses one."""

from dataclasses import dataclass, replace
from functools import lru_cache

from fastlora.problem import Direction

MAX_RANK = 256
FUSED_RANK = 64  # the largest for the fused shrink: beyond, two accumulators do not fit
FEW_ROWS = 64  # the most of a forward without dropout, as of a decode step, for which there are tables of their own
LONGEST_WAIT = 0.015  # of a launch, for S: about the resolution of the schedule model
_LEAST_COLUMNS = 32  # a narrower product takes as long: its left operand has to be read all the same
# As long as a product with so many columns takes drawing dropout's mask for its rows: instructions counted in the
# machine code (benchmarks/schedule/machine.py).
MASK_COLUMNS = 124


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is cut into tiles.

    block_m, block_n, block_k: the product's tile [block_m, block_n] and its step along the contracted dimension.
    group_m: row blocks that share a section of the queue, so that their rows stay in L2.
    gradient_m, gradient_n: rows per step and columns of a gradient tile.
    slice_n: columns of a tile that are finished (low-rank branch, bias, store) at a time. Of 16 rows, eight warps find
        work of their own in 64.
    fused: whether the tiles of column 0 make S with their own product (fused shrink, up to FUSED_RANK) or S has tiles
        of its own (separate shrink); choose_config sets it by fuses_shrink.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    gradient_m: int = 64
    gradient_n: int = 64
    slice_n: int = 64
    fused: bool = True


# Each table runs from the largest tile to the smallest. Those for a large rank serve ranks above FUSED_RANK, where
# gradient tiles need more registers; "unaligned" ones tensors whose rows do not start on 16 bytes, where addresses do,
# or sizes that are no multiples of 16, which Triton compiles as if rows did not; those for few rows, FEW_ROWS at most.
# A run of training meets any number of rows, and a tile is three kernels to compile (forward with dropout and without,
# backward), the largest six: so there are three tiles. By the schedule model Llama-8B's layers take, on average over 40
# to 2048 rows, no longer than with three smaller ones besides, but up to twice as long where at most 128 rows meet 1024
# columns.
# GROUP_M = 8 comes from benchmarks/results/schedule.md. The other figures compile without a spill; what was tuned on a
# device goes into tuned/, and nothing is there yet.
TILE_TABLES: dict[str, tuple[TileConfig, ...]] = {
    "hopper": (
        TileConfig(128, 256, 64, 8, 8, 3, gradient_n=128),
        TileConfig(128, 128, 64, 8, 8, 4, gradient_n=128),
        TileConfig(64, 128, 64, 8, 4, 4),
    ),
    "hopper few rows": (
        TileConfig(64, 64, 64, 8, 4, 4),
        TileConfig(32, 64, 128, 8, 4, 4),
        TileConfig(16, 64, 128, 8, 4, 4, gradient_m=32, slice_n=32),
        TileConfig(16, 32, 128, 8, 4, 4),
    ),
    "hopper large-rank": (
        TileConfig(128, 256, 64, 8, 8, 3),
        TileConfig(128, 128, 64, 8, 8, 3),
        TileConfig(64, 64, 64, 8, 8, 3, gradient_m=32, gradient_n=32, slice_n=32),
        TileConfig(16, 64, 64, 8, 8, 3, gradient_m=32, gradient_n=32),
    ),
    "ampere": (
        TileConfig(128, 128, 32, 8, 8, 4),
        TileConfig(64, 64, 32, 8, 4, 4, gradient_m=32, slice_n=32),
        TileConfig(32, 64, 64, 8, 4, 4, gradient_m=32),  # with 64, ptxas spills on sm_120 over packed weights
    ),
    "ampere few rows": (
        TileConfig(64, 64, 32, 8, 4, 4, gradient_m=32, slice_n=32),
        TileConfig(32, 64, 64, 8, 4, 4, gradient_m=32),
        TileConfig(16, 64, 32, 8, 4, 4),
        TileConfig(16, 32, 32, 8, 4, 4),  # in steps of 128, ptxas spills on sm_86, of 64 on sm_120
    ),
    "ampere large-rank": (
        # With gradient_m=32, ptxas spills on sm_120, the smaller over packed weights.
        TileConfig(64, 128, 32, 8, 8, 3, gradient_m=16, gradient_n=32, slice_n=32),
        TileConfig(16, 64, 32, 8, 8, 3, gradient_m=16, gradient_n=32),
    ),
    "unaligned": (
        TileConfig(64, 64, 32, 8, 8, 3, gradient_m=32, slice_n=32),
        TileConfig(16, 64, 32, 8, 4, 3, gradient_m=32, slice_n=32),
    ),
    "unaligned large-rank": (
        TileConfig(64, 64, 32, 8, 8, 3, gradient_m=32, gradient_n=32, slice_n=32),
        TileConfig(16, 64, 32, 8, 8, 3, gradient_m=32),  # with gradient_n=32, ptxas spills on sm_90
    ),
    # No height of 64: tcgen05 would take such a product in TF32, whatever precision is asked for (Triton 3.6).
    "float32": (
        TileConfig(32, 64, 16, 8, 8, 3, gradient_m=16, gradient_n=32, slice_n=32),
        TileConfig(16, 64, 16, 8, 8, 2, gradient_m=16, gradient_n=32, slice_n=32),
    ),
    "float32 large-rank": (TileConfig(16, 64, 16, 8, 8, 2, gradient_m=16, gradient_n=32, slice_n=32),),
}


# With Triton 3.9's ptxas the backward of two tiles spills on sm_100 unless they are finished in narrower slices.
TILE_TABLES["blackwell"] = tuple(
    replace(config, slice_n=32) if (config.block_m, config.block_n) in ((128, 128), (64, 128)) else config
    for config in TILE_TABLES["hopper"]
)
TILE_TABLES["blackwell few rows"] = TILE_TABLES["hopper few rows"]
TILE_TABLES["blackwell large-rank"] = TILE_TABLES["hopper large-rank"]


def padded_rank(rank: int) -> int:
    """The rank as tiles hold it: a power of two, at least 16 (the narrowest matrix instruction)."""
    return max(16, 1 << (rank - 1).bit_length())


def fuses_shrink(rank: int, block_n: int, n_tiles: int, n_programs: int, *, draws: bool = False) -> bool:
    """Whether the tiles of column 0 should make S with their own product, or S have short tiles of its own.

    Fused, S costs no pass over the rows, which column 0 multiplies anyway. But these tiles take longer, by S's share of
    their columns, and in the first wave all others wait for them. Separate tiles finish S before its first reader, at
    the cost of a pass over the rows out of L2. So the shrink is fused where the wait, once a launch, is at most
    LONGEST_WAIT of it. How far this is from the best: benchmarks/results/schedule.md, "Defaults".

    Args:
        rank: of the adapter; block_n: columns of a tile.
        n_tiles: of the product; n_programs: that run at once.
        draws: whether the tiles that make S draw dropout's mask, in front of their products.
    """
    waves = -(-n_tiles // n_programs)
    columns = max(padded_rank(rank), _LEAST_COLUMNS) + (MASK_COLUMNS if draws else 0)
    return rank <= FUSED_RANK and columns <= LONGEST_WAIT * waves * block_n


def gradients_last(m: int, columns: int, contracted: int, block_m: int, block_n: int) -> bool:
    """Whether a backward's gradient tiles should follow all of dX's, or each row group its own.

    Between the products they find their rows in L2, and its bandwidth free; but the last wave becomes ragged, by half
    of one of dX's tiles on average: N·block_m·block_n/2 multiply-adds of a multiprocessor. At the end they read dY and
    X from DRAM, all at once. By the bandwidths of DRAM and of all multiprocessors' ports an element costs 3.3e-13 s
    more there, on an H200 as much as a multiply-add. What the schedule model makes of it:
    benchmarks/results/schedule.md.

    Args:
        m, columns, contracted: dX's sizes M, K, and N that it contracts.
        block_m, block_n: its tile.
    """
    return 2 * m * (columns + contracted) < contracted * block_m * block_n


def has_few_rows(direction: Direction, m: int, dropout: bool) -> bool:
    """Whether a call is a forward without dropout of FEW_ROWS rows at most, as of a decode step."""
    return m <= FEW_ROWS and direction == "forward" and not dropout


def table_for(arch: int, rank: int, element_size: int, aligned: bool, few_rows: bool = False) -> str:
    """The name of the table of tiles for a GPU of compute capability ``arch`` (90 for 9.0).

    Args:
        rank: of the adapter.
        element_size: bytes of one element of x.
        aligned: whether every operand's rows start on 16 bytes, and are multiples of 16 elements.
        few_rows: whether a forward without dropout has FEW_ROWS rows at most.
    """
    if element_size == 4:
        family = "float32"
    elif not aligned:
        family = "unaligned"
    else:
        family = {90: "hopper", 100: "blackwell", 103: "blackwell"}.get(arch, "ampere")
    if padded_rank(rank) > FUSED_RANK:
        return f"{family} large-rank"
    return f"{family} few rows" if few_rows and f"{family} few rows" in TILE_TABLES else family


def over_packed(config: TileConfig, element_size: int) -> TileConfig:
    """The tile over a packed weight: tiles that make S alone need no weight, and fill the wave that the last parts of
    it leave. (In float32 they spill.)"""
    return replace(config, fused=config.fused and element_size == 4)


@lru_cache(maxsize=4096)
def choose_config(
    direction: Direction,
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    arch: int,
    n_sms: int,
    element_size: int,
    aligned: bool,
    dropout: bool = False,
    n_segments: int = 1,
    one_row_block: bool = False,
) -> TileConfig:
    """The largest tile that is not much taller than the problem and still gives every multiprocessor work; where none
    does, the one that gives the most of them work. Fused or separate shrink as fuses_shrink says.

    Args:
        direction: the forward puts out [m, n], the backward [m, k].
        m, n, k, r: tokens, out_features, in_features, rank.
        arch, n_sms: compute capability (90 for 9.0) and multiprocessors of the GPU.
        element_size: bytes of one element of x.
        aligned: whether every operand's rows start on 16 bytes, and are multiples of 16 elements.
        dropout: whether the call drops elements of x.
        n_segments: that the rows lie in, about as many in each: no tile has rows of two.
        one_row_block: whether to take one of the lowest tiles that are as tall as all rows, where there are any: for
            products that decode their columns of the weight, which every further row block would do again.
    """
    columns = n if direction == "forward" else k
    m = -(-m // n_segments)
    few_rows = has_few_rows(direction, m, dropout)
    table = TILE_TABLES[table_for(arch, r, element_size, aligned, few_rows)]

    def n_tiles(config: TileConfig) -> int:
        return n_segments * -(-m // config.block_m) * -(-columns // config.block_n)

    fitting = [c for c in table if c.block_m <= max(16, 1 << (m - 1).bit_length())] or [table[-1]]
    covering = [c for c in table if c.block_m >= m] if one_row_block else []
    if covering:
        fitting = [c for c in covering if c.block_m == min(each.block_m for each in covering)]
    chosen = next((c for c in fitting if n_tiles(c) >= n_sms), max(fitting, key=n_tiles))
    # In float32 the separate tiles of S spill at rank 64.
    draws = dropout and direction == "forward"
    fused = element_size == 4 or fuses_shrink(r, chosen.block_n, n_tiles(chosen), n_sms, draws=draws)
    return replace(chosen, fused=fused)

"""Which tile a launch of the CUDA kernels takes. What is compiled comes from fastlora._C.variants()."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fastlora.backends.configs import fuses_shrink, gradients_last
from fastlora.backends.cuda.extension import variants


@dataclass(frozen=True)
class CudaTile:
    """How one launch is cut into tiles.

    block_m, block_n: the tile of Y or dX.
    group_m: row blocks of a group, which share a stretch of the queue, so that their rows stay in L2.
    splits: of the contraction of each tile; their sums are added in order.
    fused: whether S is made fused with the first column's tiles, from what they read anyway, or in short separate
        tiles; see fuses_drawn and fastlora.backends.configs.fuses_shrink.
    gradients_last: whether the gradient tiles follow all others; see fastlora.backends.configs.gradients_last.
    """

    block_m: int
    block_n: int
    group_m: int
    splits: int = 1
    fused: bool = False
    gradients_last: bool = False


SPLITS = (1, 2, 4, 8)
_TALL_SEGMENT = 128  # rows on average
GROUP_ROWS = 16 * 128  # of a group of sixteen row blocks

# What choose_tile computes with, in clocks of one multiprocessor: figures of the H200's data sheet, not measurements.
_FMA_PER_CLOCK = 2048
_SM_BYTES_PER_CLOCK = 40
_DRAM_BYTES_PER_CLOCK = 2800  # of the whole chip
_TILE_CLOCKS = 3000  # filling the pipeline, storing the last tile
_REDUCTION_BYTES_PER_CLOCK = 40
_LANES = 128  # of a multiprocessor: instructions of a thread that it issues in a clock
# Of an element of nf4 with nested statistics, in the loop of a product that decodes it, of everything in that loop
# (benchmarks/results/cuda_resources.md).
IN_LOOP_INSTRUCTIONS = 281 / 32
_PACKED_BYTES = 1 / 2 + 1 / 64  # of such an element


def group_size(cluster: int, m: int, *, draws_over: int | None = None) -> int:
    """Row blocks of a group, for tiles that clusters of ``cluster`` CTAs take.

    A wave of 132 of the largest tiles, those of clusters, reads the fewest rows of both operands when it is about as
    high as wide. Few rows make two groups all the same: by the schedule model that is as fast where gradient tiles come
    last, and faster where they follow their group. A gradient tile that draws dropout's mask takes about as long for a
    row as a tile of dX does for an element that it contracts: it should not take longer than that tile, nor as long as
    half of all rows (benchmarks/results/schedule.md).

    Args:
        cluster: CTAs that take tiles together; m: rows.
        draws_over: the elements that dX contracts, of a backward with dropout; None of other launches.
    """
    if draws_over is not None and (m <= 2 * GROUP_ROWS or draws_over < GROUP_ROWS):
        return 8
    return 16 if cluster > 1 and m > GROUP_ROWS else 8


@lru_cache(maxsize=4096)
def choose_tile(
    m: int,
    n: int,
    k: int,
    r: int,
    n_sms: int,
    *,
    transposed: bool = False,
    decodes: bool = False,
    in_loop: bool = False,
    dropout: bool = False,
    backward: bool = False,
    projections: int = 0,
) -> CudaTile:
    """The tile for an output [m, n] contracted over k with rank r that a rough model of waves and memory finds fastest.
    ``transposed``: over a base weight that lies as [in_features, out_features]; ``projections``: how many
    share an input, if the launch is of several; n, or k of a backward, is then the sum of theirs.

    S is fused where that is faster and the kernel of this direction, with or without dropout, can do it. Where the
    launch ``decodes`` a packed weight first, S has tiles of its own: they need no weight, and fill the wave that the
    last parts of it leave. So it has where products decode the weight ``in_loop``.

    Raises:
        RuntimeError: the extension is not built.
        ValueError: no kernel is compiled for the rank.
    """
    candidates = []
    weight = {"transposed": transposed, "decodes": decodes, "in_loop": in_loop}
    shared = projections > 0
    for kernel in kernels(r, dropout=dropout, backward=backward, shared=shared, **weight):  # type: ignore[arg-type]
        splits = [s for s in SPLITS if s * kernel["block_k"] <= k] if kernel["splits"] else []
        group_m = group_size(kernel["cluster"], m, draws_over=k if dropout and backward else None)
        candidates += [(CudaTile(kernel["block_m"], kernel["block_n"], group_m, s), kernel) for s in splits or (1,)]
    if not candidates:
        over = " over a transposed base weight" if transposed else ""
        raise ValueError(f"no CUDA kernel{over} is compiled for rank {r}")
    # Of equals (memory decides), the smallest: its rows past the end cost least.
    tile, kernel = min(
        candidates,
        key=lambda each: (_estimated_clocks(each[0], each[1], m, n, k, n_sms), each[0].block_m * each[0].block_n),
    )
    shrink_tiles = -(-m // tile.block_m) * tile.splits
    n_tiles = shrink_tiles * -(-n // tile.block_n)
    if dropout and not backward:
        fused = fuses_drawn(shrink_tiles * max(projections, 1), n_tiles, n_sms)
    else:
        fused = fuses_shrink(r, tile.block_n, n_tiles, n_sms)
    return replace(
        tile,
        fused=kernel["fuses"] and fused and not decodes,
        # Between dX's tiles, these hide most of what the generator costs a gradient tile; behind them, nothing does.
        gradients_last=backward and not dropout and gradients_last(m, n, k, tile.block_m, tile.block_n),
    )


def fuses_drawn(shrink_tiles: int, n_tiles: int, n_sms: int) -> bool:
    """Whether column 0 should make S with its own product where that draws dropout's mask: these kernels do it while
    products are in flight. Separate tiles of S take half as long as a tile of the product to draw it; they cost nothing
    only where the last wave has a multiprocessor idle for each of them.

    Args:
        shrink_tiles: separate tiles of S; n_tiles: of the product.
        n_sms: multiprocessors.
    """
    return shrink_tiles > -n_tiles % n_sms


def choose_segment_tile(m: int, n_segments: int) -> CudaTile:
    """The tile for m rows in so many segments: a tall one loads fewer bytes for a product, but the last row block of a
    segment is half empty on average. By the schedule model, not by a measurement: from 128 rows on average the tall
    tile is faster under every load, at 64 under skewed ones (python -m benchmarks.schedule --experts)."""
    return CudaTile(128 if m >= _TALL_SEGMENT * n_segments else 64, 128, group_m=8)


def kernels(
    r: int,
    *,
    dropout: bool,
    backward: bool,
    transposed: bool = False,
    decodes: bool = False,
    in_loop: bool = False,
    segments: bool = False,
    shared: bool = False,
    dtype: str = "bfloat16",
) -> list[dict[str, Any]]:
    """For each tile that is compiled for rank r, its kernel: that of the least rank that is enough."""
    weight = {"transposed": transposed, "decodes": decodes, "in_loop": in_loop}
    weight |= {"segments": segments, "shared": shared}
    wanted = {**weight, "dropout": dropout, "backward": backward, "dtype": dtype}
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for variant in variants():
        if variant.items() >= wanted.items() and variant["rank"] >= r:
            tile = variant["block_m"], variant["block_n"]
            best[tile] = min(best.get(tile, variant), variant, key=lambda each: each["rank"])
    return list(best.values())


def _estimated_clocks(tile: CudaTile, kernel: dict[str, Any], m: int, n: int, k: int, n_sms: int) -> float:
    rows, columns = -(-m // tile.block_m), -(-n // tile.block_n)
    rows += -rows % kernel["cluster"]  # a cluster takes a row block for each CTA, whether there are as many or not
    waves = -(-rows * columns * tile.splits // n_sms)
    block_k = kernel["block_k"]
    steps = -(-k // (block_k * tile.splits))
    weight_bytes = _PACKED_BYTES if kernel["in_loop"] else 2
    # Rows past the end are multiplied but not read.
    step_bytes = (min(m, tile.block_m) * 2 + tile.block_n * weight_bytes) * block_k
    step = max(
        tile.block_m * tile.block_n * block_k / _FMA_PER_CLOCK,
        step_bytes / _SM_BYTES_PER_CLOCK,
        tile.block_n * block_k * IN_LOOP_INSTRUCTIONS / _LANES if kernel["in_loop"] else 0,
    )
    reduction = (tile.splits - 1) * min(m, tile.block_m) * tile.block_n * 4 / _REDUCTION_BYTES_PER_CLOCK
    traffic = (2 * m * (k + n) + k * n * weight_bytes) / _DRAM_BYTES_PER_CLOCK
    # Of short tiles the ends count.
    ends = (waves if kernel["in_loop"] else 1) * _TILE_CLOCKS
    return max(waves * steps * step, traffic) + ends + reduction

"""Where it pays to decode a packed weight in the loop of its product, by a rough model of waves. Decoded once, ahead,
the weight is work for all multiprocessors, written to L2 and read again; in the loop, a tile decodes its columns
itself, as often as there are row blocks. Nothing in the Triton kernels' loop overlaps its products, so there both add
up on as many multiprocessors as there are tiles. The CUDA kernel decodes a step into the pipeline's stage while
products of the step before are in flight, and splits the contraction.
"""

from itertools import chain
from typing import NamedTuple

from benchmarks.schedule.machine import CLOCK, Machine
from fastlora.backends.configs import FEW_ROWS, TILE_TABLES, TileConfig
from fastlora.backends.cuda.quantised_launch import ROWS_IN_LOOP
from fastlora.backends.cuda.tiles import IN_LOOP_INSTRUCTIONS, SPLITS

# Of nf4 with nested statistics, an element: in the loop of decode.cuh, eight groups of eight at once
# (benchmarks/results/cuda_resources.json). The Triton kernels' are taken for as many.
DECODE_INSTRUCTIONS = 576 / 64
PACKED_BYTES = 1 / 2 + 1 / 64
_LANES = 128  # of a multiprocessor: instructions of a thread that it issues in a clock
_SHARED_BYTES = 128  # that go through its shared memory in a clock
STAGE_TILE = (64, 128)  # of the CUDA kernel that decodes in the loop
LAYERS = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
ROWS = (1, 16, 32, 64, 96, 128, 200, 256)


class Decoded(NamedTuple):
    """Microseconds of a forward of m rows, by the tiles that are fastest: decoded once, and in the loop of the Triton
    and of the CUDA kernels."""

    once: float
    in_loop: float
    in_stage: float


def _tiles() -> list[TileConfig]:
    return [*chain(TILE_TABLES["hopper"], TILE_TABLES["hopper few rows"])]


def _product(tile: TileConfig, k: int, weight_bytes: float, machine: Machine) -> float:
    """Of one tile: its products or its loads, and its last products and its store. ``weight_bytes``: of an element."""
    products = 2 * tile.block_m * tile.block_n * k * machine.sm_count / machine.flops
    loads = k * (2 * tile.block_m + weight_bytes * tile.block_n) / machine.sm_bandwidth
    return max(products, loads) + machine.tile_overhead


def _in_stage(m: int, n: int, k: int, splits: int, machine: Machine) -> float:
    """Seconds of the CUDA kernel. S is one more column of tiles. A tile's steps are bound by the instructions of its
    loop, or by what goes through shared memory: codes and elements in and out, and the activations, which both
    warpgroups read. The last split adds what the others have stored."""
    block_m, block_n = STAGE_TILE
    waves = -(-splits * -(-m // block_m) * (-(-n // block_n) + 1) // machine.sm_count)
    instructions = block_n * IN_LOOP_INSTRUCTIONS / _LANES
    shared = (2 * (PACKED_BYTES + 2) * block_n + 3 * 2 * block_m) / _SHARED_BYTES
    tile = k / splits * max(instructions, shared) / CLOCK + machine.tile_overhead
    reduction = (splits - 1) * min(m, block_m) * block_n * 4 / machine.sm_bandwidth
    return max(waves * tile, n * k * PACKED_BYTES / machine.dram_bandwidth) + reduction + machine.flag_latency


def model(m: int, n: int, k: int, machine: Machine | None = None) -> Decoded:
    """Of a forward over an nf4 weight [n, k]."""
    machine = machine or Machine()
    element = DECODE_INSTRUCTIONS / _LANES / CLOCK  # seconds of one multiprocessor
    ahead = machine.flag_latency + max(
        n * k * element / machine.sm_count,
        2 * n * k / machine.l2_bandwidth,
        n * k * PACKED_BYTES / machine.dram_bandwidth,
    )
    once, in_loop = [], []
    for tile in _tiles():
        tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
        waves = -(-tiles // machine.sm_count)
        once.append(ahead + waves * _product(tile, k, 2, machine))
        in_loop.append(waves * (_product(tile, k, PACKED_BYTES, machine) + tile.block_n * k * element))
    in_stage = min(_in_stage(m, n, k, splits, machine) for splits in SPLITS)
    return Decoded(1e6 * min(once), 1e6 * min(in_loop), 1e6 * in_stage)


def _table(title: str, ratio) -> list[str]:
    lines = [title, "N x K".ljust(14) + "".join(f"M={m}".rjust(8) for m in ROWS)]
    for n, k in LAYERS:
        lines.append(f"{n} x {k}".ljust(14) + "".join(f"{ratio(model(m, n, k)):8.2f}" for m in ROWS))
    return lines


def as_text() -> str:
    """Ratios by layer and rows; below 1 the first named is faster."""
    return "\n".join(
        [
            "nf4, a forward without dropout; model, not a measurement",
            *_table("Triton's loop / once", lambda each: each.in_loop / each.once),
            *_table("CUDA's loop / once", lambda each: each.in_stage / each.once),
            *_table("CUDA's loop / Triton's loop", lambda each: each.in_stage / each.in_loop),
            f"The Triton kernels decode in the loop up to {FEW_ROWS} rows, the CUDA kernels up to {ROWS_IN_LOOP}.",
        ]
    )

"""Where it pays to decode a packed weight in the loop of its product, by a rough model of waves: what is not overlapped
adds up. Decoded once, ahead, the weight is work for all multiprocessors, written to L2 and read again; in the loop, a
tile decodes its columns itself, as often as there are row blocks, on as many multiprocessors as there are tiles.
"""

from itertools import chain
from typing import NamedTuple

from benchmarks.schedule.machine import CLOCK, Machine
from fastlora.backends.configs import FEW_ROWS, TILE_TABLES, TileConfig

# Of nf4 with nested statistics, an element: in the loop of decode.cuh, eight groups of eight at once
# (benchmarks/results/cuda_resources.json). The Triton kernels' are taken for as many.
DECODE_INSTRUCTIONS = 576 / 64
PACKED_BYTES = 1 / 2 + 1 / 64
_LANES = 128  # of a multiprocessor: instructions of a thread that it issues in a clock
LAYERS = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
ROWS = (1, 16, 32, 64, 96, 128, 200, 256)


class Decoded(NamedTuple):
    """Microseconds of a forward of m rows, by the tiles that are fastest."""

    once: float
    in_loop: float


def _tiles() -> list[TileConfig]:
    return [*chain(TILE_TABLES["hopper"], TILE_TABLES["hopper few rows"])]


def _product(tile: TileConfig, k: int, weight_bytes: float, machine: Machine) -> float:
    """Of one tile: its products or its loads, and its last products and its store. ``weight_bytes``: of an element."""
    products = 2 * tile.block_m * tile.block_n * k * machine.sm_count / machine.flops
    loads = k * (2 * tile.block_m + weight_bytes * tile.block_n) / machine.sm_bandwidth
    return max(products, loads) + machine.tile_overhead


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
    return Decoded(1e6 * min(once), 1e6 * min(in_loop))


def as_text() -> str:
    """In the loop over once, by layer and rows; below 1 the loop is faster."""
    lines = ["in the loop / once, nf4, a forward without dropout; model, not a measurement", "N x K".ljust(14)]
    lines[-1] += "".join(f"M={m}".rjust(8) for m in ROWS)
    for n, k in LAYERS:
        found = [model(m, n, k) for m in ROWS]
        lines.append(f"{n} x {k}".ljust(14) + "".join(f"{each.in_loop / each.once:8.2f}" for each in found))
    return "\n".join([*lines, f"The kernels decode in the loop up to {FEW_ROWS} rows."])

"""What the schedule model takes for granted: figures of the GPU, and costs counted in the kernels' machine code."""

from dataclasses import dataclass

CLOCK = 1.7e9  # Hz, under load
_LANES = 128  # of a multiprocessor: four schedulers, each issues an instruction of a warp a clock
_CONSUMER_WARPS_PER_SCHEDULER = 2

# Counted in the machine code of the largest tile in bf16 at rank 16 (benchmarks/results/cuda_resources.md).
# A call of the generator and what is done with its bits, for eight elements of one lane: the loop of a forward's
# separate tile of S with dropout less the one without, over the eight calls of its two steps.
PHILOX_INSTRUCTIONS = (632 - 73) / 8
EPILOGUE_INSTRUCTIONS = 410  # of a forward's base tile
# Estimates: the last products behind the last wait, and the wait for the next tile and its first stage.
DRAIN_CLOCKS, SWITCH_CLOCKS = 100, 240


def tile_overhead(epilogue_instructions: int) -> float:
    """Seconds a tile exposes between its last product and the next tile's first: two consumer warps a scheduler."""
    return (_CONSUMER_WARPS_PER_SCHEDULER * epilogue_instructions + DRAIN_CLOCKS + SWITCH_CLOCKS) / CLOCK


@dataclass(frozen=True)
class Machine:
    """Figures of a GPU. Defaults: H200 SXM, from the sources named field by field.

    sm_count: vendor's datasheet.
    flops: FLOP/s of all SMs inside a main loop. cuBLAS reaches 788e12 on random bf16 data over a whole 8192³ product;
        the rest is waves that do not fill and the tile's own overhead below.
    dram_bandwidth: bytes/s; a large device-to-device copy moved 4.3e12, read and written bytes counted.
    l2_bandwidth: bytes/s of all SMs together: 5120 B per clock (vendor) at 1.7 GHz under load. It bounds gradient
        tiles: 33 KB a step of 64 rows, where a product step brings 32 KB to four times the time.
    sm_bandwidth: bytes/s into one SM: 64 B per clock at 1.7 GHz.
    l2_bytes: vendor's 50 MB (the runtime reports 60 MB, of which a part is not usable by one side).
    load_latency, flag_latency: seconds from a miss to shared memory; from a release to the acquire that sees it.
    tile_overhead: seconds, by the function of that name, of the largest tile.
    shrink_floor: the shrink product reads its 64×16 fragment of act from shared memory in as many clocks as 32 columns
        compute, so fewer columns save nothing.
    philox: seconds per element of act that dropout costs one SM's schedulers: PHILOX_INSTRUCTIONS for eight elements.
    """

    sm_count: int = 132
    flops: float = 815e12
    dram_bandwidth: float = 4.3e12
    l2_bandwidth: float = 8.7e12
    sm_bandwidth: float = 109e9
    l2_bytes: float = 50e6
    load_latency: float = 0.7e-6
    flag_latency: float = 1.0e-6
    tile_overhead: float = tile_overhead(EPILOGUE_INSTRUCTIONS)
    shrink_floor: int = 32
    philox: float = PHILOX_INSTRUCTIONS / (8 * _LANES) / CLOCK

"""Rows in segments as the CUDA kernels queue them: what experts' loads cost, and which of the two tiles suits them.

By the same model as one segment. A tile is compared with the least time that the frozen products could take: theirs at
the rate of the main loop, or that of the memory which brings every used operand once.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.schedule.machine import Machine, tile_overhead
from benchmarks.schedule.model import LABEL, Outcome, Problem, simulate
from benchmarks.schedule.queue_order import Schedule
from benchmarks.schedule.row_map import segments
from fastlora.backends.cuda.tiles import choose_segment_tile

# (N, K) of a projection of each expert.
LAYERS = {"Mixtral": (14336, 4096), "Qwen3-MoE": (768, 2048), "gpt-oss": (2880, 2880)}
EXPERTS = (8, 32, 64, 128)
ROWS = (4096, 16384)  # after top-k
RANK = 16
# block_m of the tiles that are compiled -> what a consumer warp executes after its last product
# (benchmarks/results/cuda_resources.md, the forward's base tile at rank 16 in bf16)
EPILOGUES = {64: 147, 128: 270}


def _apportion(m: int, shares: list[float]) -> list[int]:
    """Whole rows as close to ``shares`` as their sum allows; the largest remainders are rounded up."""
    wanted = [m * share / sum(shares) for share in shares]
    lengths = [int(each) for each in wanted]
    by_remainder = sorted(range(len(shares)), key=lambda g: lengths[g] - wanted[g])
    for g in by_remainder[: m - sum(lengths)]:
        lengths[g] += 1
    return lengths


def balanced(m: int, experts: int) -> list[int]:
    """As many rows each."""
    return _apportion(m, [1.0] * experts)


def drawn(m: int, experts: int) -> list[int]:
    """Each row's expert is drawn, all as likely: what a balanced router comes to."""
    counts = Counter(random.Random(0).choices(range(experts), k=m))
    return [counts[g] for g in range(experts)]


def zipf(m: int, experts: int) -> list[int]:
    """The i-th most popular has 1/i of the first one's rows; which one that is, is drawn."""
    places = random.Random(0).sample(range(1, experts + 1), experts)
    return _apportion(m, [1 / place for place in places])


def half_empty(m: int, experts: int) -> list[int]:
    """Every second expert has no row, the others as many each."""
    return _apportion(m, [float(g % 2) for g in range(experts)])


def all_in_one(m: int, experts: int) -> list[int]:
    """One expert has every row."""
    return [m if g == experts // 2 else 0 for g in range(experts)]


LOADS: dict[str, Callable[[int, int], list[int]]] = {
    "balanced": balanced,
    "drawn": drawn,
    "Zipf": zipf,
    "half empty": half_empty,
    "all in one": all_in_one,
}


def schedule_of(block_m: int) -> Schedule:
    """How the kernels of this tile queue rows in segments: S in tiles of its own, gradients last, no clusters."""
    group_m = choose_segment_tile(1, 1).group_m
    return Schedule(
        block_m, block_n=128, group_m=group_m, grad_columns=128, fused=False, cluster=1, gradients_last=True
    )


def simulate_segments(
    lengths: list[int], n: int, k: int, r: int, block_m: int, backward: bool = False, machine: Machine | None = None
) -> Outcome:
    """One launch of experts with ``lengths`` rows and weights [n, k]."""
    machine = machine or replace(Machine(), tile_overhead=tile_overhead(EPILOGUES[block_m]))
    schedule = schedule_of(block_m)
    return simulate(Problem(sum(lengths), n, k, r, backward), schedule, machine, segments(lengths, schedule))


def tail_share(lengths: list[int], block_m: int) -> float:
    """Of the rows that are multiplied, those that are another segment's or nobody's."""
    multiplied = sum(-(-length // block_m) * block_m for length in lengths)
    return 1 - sum(lengths) / multiplied


def least_time(lengths: list[int], n: int, k: int, machine: Machine) -> float:
    """Microseconds of the frozen products; see the module."""
    m, used = sum(lengths), sum(length > 0 for length in lengths)
    return 1e6 * max(2 * m * n * k / machine.flops, 2 * (m * k + m * n + used * n * k) / machine.dram_bandwidth)


class Row(NamedTuple):
    """One launch by each tile. load: a key of LOADS; least: µs; outcomes: by block_m; taken: the block_m of
    choose_segment_tile."""

    layer: str
    backward: bool
    m: int
    experts: int
    load: str
    least: float
    outcomes: dict[int, Outcome]
    taken: int

    @property
    def faster(self) -> int:
        return min(self.outcomes, key=lambda block_m: self.outcomes[block_m].makespan)

    @property
    def lost(self) -> float:
        """By the tile that is taken, over the faster one's time."""
        return self.outcomes[self.taken].makespan / self.outcomes[self.faster].makespan - 1


def _point(point: tuple[str, bool, int, int, str]) -> Row:
    layer, backward, m, experts, load = point
    (n, k), lengths = LAYERS[layer], LOADS[load](m, experts)
    outcomes = {block_m: simulate_segments(lengths, n, k, RANK, block_m, backward) for block_m in EPILOGUES}
    least, taken = least_time(lengths, n, k, Machine()), choose_segment_tile(m, experts).block_m
    return Row(*point, least, outcomes, taken)


def sweep(
    layers: Iterable[str] = LAYERS, rows: Iterable[int] = ROWS, experts: Iterable[int] = EXPERTS, progress: bool = True
) -> list[Row]:
    """Every layer, direction, number of rows and experts, and load."""
    points = list(product(layers, (False, True), rows, experts, LOADS))
    with ProcessPoolExecutor() as pool:
        return list(tqdm(pool.map(_point, points), total=len(points), disable=not progress, unit="point"))


def as_text(rows: list[Row]) -> str:
    """A line for each launch; then, by rows of an expert on average, which tile is faster and what is taken."""
    cells = "tail".rjust(7) + "µs".rjust(9) + "x least".rjust(9) + "stall".rjust(7)
    lines = [
        f"experts, bf16, rank {RANK}; {LABEL}",
        " " * 47 + "".join(f"{block_m}x128".center(len(cells)) for block_m in EPILOGUES),
        "layer      way       rows  experts  load       " + cells * len(EPILOGUES) + "  faster  taken",
    ]
    for row in rows:
        lengths = LOADS[row.load](row.m, row.experts)
        way = "backward" if row.backward else "forward"
        line = f"{row.layer:<10} {way:<8} {row.m:>5}  {row.experts:>7}  {row.load:<11}"
        for block_m, found in row.outcomes.items():
            line += f"{tail_share(lengths, block_m):7.1%}{found.makespan:9.1f}"
            line += f"{found.makespan / row.least:9.2f}{found.stall / found.makespan:7.1%}"
        line += f"{row.faster:8}{row.taken:7}" + f"  {row.lost:.1%} lost" * (row.faster != row.taken)
        lines.append(line)
    lines += ["", "rows/expert  64x128 / 128x128  128x128 faster  taken"]
    for mean in sorted({row.m // row.experts for row in rows}):
        found = [row for row in rows if row.m // row.experts == mean]
        ratios = [row.outcomes[64].makespan / row.outcomes[128].makespan for row in found]
        ratio = math.exp(sum(map(math.log, ratios)) / len(ratios))
        taken = sorted({row.taken for row in found})
        lines.append(
            f"{mean:>11}  {ratio:16.2f}  {sum(row.faster == 128 for row in found):>6} of {len(found):>3}"
            f"  {', '.join(map(str, taken)):>8}"
        )
    wrong = [row.lost for row in rows if row.faster != row.taken]
    lines.append(
        f"The slower tile is taken by {len(wrong)} of {len(rows)}, which lose {max(wrong, default=0):.1%} at most."
    )
    return "\n".join(lines)

"""How many stages the largest tile's pipeline should have: what a slow copy costs against what a longer epilogue does.

Four stages of 48 KiB leave 32 KiB for staging buffers, which an epilogue then fills twice; three leave 64 KiB, which
hold a whole tile. The counts are of the machine code at rank 16 (python -m benchmarks.cuda_resources); four stages were
counted in kernels compiled for it and given up.
"""

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.schedule.machine import DRAIN_CLOCKS, SWITCH_CLOCKS

MMA_CLOCKS = 1024  # a step of the tensor cores: 128 x 256 x 64 by both warpgroups
RELEASE_CLOCKS, WAIT_CLOCKS = 60, 30  # estimates: until the producer sees a free stage, a consumer a full one
BARRIER_CLOCKS = 30  # estimate: a warpgroup's barrier beyond its issue stall


class Epilogue(NamedTuple):
    """Issue stalls of a warp, in clocks, and barriers."""

    stalls: int
    barriers: int

    @property
    def clocks(self) -> int:
        return self.stalls + BARRIER_CLOCKS * self.barriers


@dataclass(frozen=True)
class Pipeline:
    """One kernel: its stages, what the producer's step costs in clocks, and the epilogue that the stages leave room
    for."""

    stages: int
    producer_step: int
    epilogue: Epilogue


PIPELINES = {
    "forward": (Pipeline(3, 111, Epilogue(536, 2)), Pipeline(4, 111, Epilogue(653, 8))),
    "backward": (Pipeline(3, 126, Epilogue(256, 2)), Pipeline(4, 126, Epilogue(422, 8))),
}


def tile_clocks(pipeline: Pipeline, contracted: int, copy_clocks: int) -> float:
    """Clocks of a tile of 128 x 256 in the middle of a launch, contracted over ``contracted`` elements, if each copy
    arrives ``copy_clocks`` after it was issued."""
    ends: list[float] = []
    issued = 0.0
    n_steps = -(-contracted // 64)
    warm_up = 4 * pipeline.stages
    for step in range(warm_up + n_steps):
        free = ends[step - pipeline.stages] + RELEASE_CLOCKS if step >= pipeline.stages else 0.0
        issued = max(issued, free) + pipeline.producer_step
        ends.append(max(issued + copy_clocks + WAIT_CLOCKS, ends[-1] if ends else 0.0) + MMA_CLOCKS)
    return ends[-1] - ends[warm_up - 1] + pipeline.epilogue.clocks + DRAIN_CLOCKS + SWITCH_CLOCKS


def break_even(direction: str, contracted: int) -> int:
    """The least time of a copy, in clocks, from which four stages are faster than three."""
    three, four = PIPELINES[direction]
    return next(
        clocks
        for clocks in range(0, 10000, 10)
        if tile_clocks(four, contracted, clocks) < tile_clocks(three, contracted, clocks)
    )


def as_text() -> str:
    """The table, for copies of several lengths."""
    lengths = (700, 1100, 1500, 1700, 1900, 2100, 2500)
    lines = [
        "A 128 x 256 tile with four stages and an epilogue in two phases, over one with three stages and one phase,",
        "by the clocks from a copy's issue to its arrival. A model with counted stalls, not a measurement.",
        f"{'':24s}" + "".join(f"{length:8d}" for length in lengths) + "   equal at",
    ]
    for direction, (three, four) in PIPELINES.items():
        for contracted in (1024, 2048, 4096):
            ratios = [tile_clocks(four, contracted, each) / tile_clocks(three, contracted, each) for each in lengths]
            name = f"{direction}, {contracted} contracted"
            lines.append(
                f"{name:24s}"
                + "".join(f"{ratio:8.3f}" for ratio in ratios)
                + f"{break_even(direction, contracted):11d}"
            )
    return "\n".join(lines)
